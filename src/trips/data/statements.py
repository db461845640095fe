"""Statements about several images and their readers: the forms of NLVR2, of NLVR v1 and of one's own lists.

Feeds the visual reasoning experiments (section 5.1.2, Table 2). No image is opened here. Read are

- NLVR2's JSON lines: ``dev-850-0-1`` is the second sentence about ``dev-850-0-img0.png`` and ``-img1.png``;
- NLVR v1's JSON lines: ``1572-0`` is about the pictures ``dev-1572-0-0.png`` to ``-5.png``, which hold the same three
  boxes in six orders; the boxes are the images;
- tars of such pictures, each with a KEY.json of ``statement_id``, ``permutation``, ``sentence`` and ``label``;
- lists (JSON, JSON lines, CSV, TSV) and datasets of Hugging Face with ``sentence``, ``label`` and ``images``, or
  ``image1``, ``image2``, ...; one of them is ALBEF's file for NLVR2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips.data.annotation_rows import ImageFolders
from trips.data.hf import picture
from trips.data.listings import text_problem
from trips.data.records import BadSamples
from trips.data.statement_rows import NLVR2_ID, images_of, read_rows
from trips.errors import DataError
from trips.images import FileSlice

Box = tuple[int, int, int, int]

NLVR_BOXES: tuple[Box, ...] = ((0, 0, 100, 100), (150, 0, 250, 100), (300, 0, 400, 100))
"""The three boxes in a picture of NLVR v1, 400 x 100 pixels: left, top, right, bottom."""

_PERMUTATIONS = 6
_NLVR1_ID = re.compile(r"\d+-\d+")  # sentence, picture
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|dev|test|hidden)(?![a-z])")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class ReasoningRecord:
    """A statement about several images.

    Attributes:
        identifier: unique over the data set.
        images: encoded bytes, or where they are, in their order; with `boxes` the one picture that they cut.
        sentence: as written.
        label: whether it is true of the images; None where nobody says.
        group: what is consistent if the model is right in all of it: a sentence with all its images, as NLVR's
            scripts count.
        source: where it came from, "dev.json line 3"; messages call it by this name.
        statement: a sentence with one set of images, whatever their order: the permutations of NLVR v1 share it.
        boxes: parts of the picture that are the images; None takes `images` whole.
    """

    identifier: str
    images: tuple[bytes | Path | FileSlice, ...] = field(repr=False)
    sentence: str
    label: bool | None
    group: str
    source: str
    statement: str
    boxes: tuple[Box, ...] | None = None

    @property
    def num_images(self) -> int:
        """Images that the statement is about."""
        return len(self.images if self.boxes is None else self.boxes)


def read_statements(
    entry: str | Path,
    images: Sequence[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    bad_samples: BadSamples | None = None,
) -> list[ReasoningRecord]:
    """Read one entry of a recipe's data.

    What cannot be used (a blank sentence, a label that is no truth value, an image that is not there, an identifier
    seen before) is counted in `bad_samples` and left out.

    Args:
        entry: path or pattern of tars; a file in one of the forms above, or a folder with one called statements.* or
            metadata.*; or ``hf:NAME``. ``#SPLIT+SPLIT`` behind it chooses by the field "split", by the first part of
            NLVR2's identifiers, or the splits of a dataset.
        images: folders that images are looked up in, tried in turn; none takes that of the list, and "images" in it.
        columns: other names of the fields of a list or dataset, {"sentence": "caption", "image1": "left"}.
        bad_samples: where to count bad statements; None raises at the first.
    Returns:
        The statements in the order of the file, the permutations of a picture one after the other. Images embedded in
        a dataset are held in memory.
    Raises:
        DataError: the file is missing, damaged as a whole or of another task, holds several splits and none is
            chosen, or nothing in it can be used; a bad statement, or too many.
        ConfigError: a split that is not there; a name in `columns` that is no field; no folder of images.
        MissingDependencyError: see `trips.data.hf.DatasetRows`.
    """
    given = read_rows(str(entry), columns or {})
    reader = _Reader(given.path, images)
    records: list[ReasoningRecord] = []
    seen: set[str] = set()
    for source, row in given.rows:
        with nullcontext() if bad_samples is None else bad_samples.guard(source):
            try:
                if isinstance(row, DataError):
                    raise row
                parsed = list(reader.parse(row, source))
                if repeated := seen & {record.identifier for record in parsed}:
                    raise DataError("identifier occurs twice", found=min(repeated))
            except DataError as error:
                named = DataError(
                    error.message, item=source, found=error.found, expected=error.expected, hint=error.hint
                )
                raise named from error
            seen.update(record.identifier for record in parsed)
            records += parsed
    if not records:
        reasons = list(bad_samples.errors.values()) if bad_samples is not None else []
        raise DataError("no statement can be used", item=str(entry), found=reasons[-1] if reasons else "no rows")
    return records


def parse_label(value: object) -> bool | None:
    """Truth value of a label in any clear spelling: true, "True", 1, "1", "yes"; None for null and an empty cell.

    Raises:
        DataError: anything else.
    """
    if value is None or value == "":
        return None
    known = isinstance(value, (str, bool, int)) and str(value).strip().lower() in _TRUTH
    if not known:
        raise DataError("label is no truth value", found=value, expected="true or false, yes or no, 1 or 0")
    return _TRUTH[str(value).strip().lower()]


class _Reader:
    """The statements that the rows of an entry hold."""

    def __init__(self, path: Path, images: Sequence[str | Path]) -> None:
        self.name, self.folder = path.name, path if path.is_dir() else path.parent
        self.folders = ImageFolders(images, self.folder)

    def parse(self, row: Any, source: str) -> Iterator[ReasoningRecord]:
        """Statements of a row: several where its picture has permutations."""
        if not isinstance(row, dict):
            raise DataError("is no object", found=type(row).__name__, expected='{"sentence", "label", ...}')
        sentence = row.get("sentence")
        if (problem := text_problem(sentence)) is not None:
            raise DataError(f"sentence {problem}", found=sentence)
        # With its folder: two lists may have one name.
        identifier = _name(row, "identifier", str(self.folder / source))
        common = {"sentence": sentence.strip(), "label": parse_label(row.get("label")), "source": source}
        if (given := images_of(row)) is not None:
            files = tuple(map(self._find, given))
            if permutation := _name(row, "permutation", ""):
                yield _permutation(_name(row, "statement_id", identifier), permutation, files, common)
                return
            identifier = _name(row, "statement_id", identifier)
            group = _name(row, "group", common["sentence"])
            yield ReasoningRecord(identifier, files, group=group, statement=identifier, **common)
        elif match := NLVR2_ID.fullmatch(identifier):
            yield self._pair(row, match, common)
        elif _NLVR1_ID.fullmatch(identifier):
            yield from self._permutations(row, identifier, common)
        else:
            raise DataError(
                "names no images",
                found=sorted(map(str, row)),
                expected="images, image1 and image2, or an identifier of NLVR",
            )

    def _find(self, image: Any) -> bytes | Path | FileSlice:
        if isinstance(image, FileSlice):
            return image
        if isinstance(image, (dict, bytes)):  # of a dataset
            image = picture(image)
        if isinstance(image, bytes) or (isinstance(image, Path) and image.is_file()):
            return image
        if isinstance(image, Path):
            image = str(image)
        if (problem := text_problem(image)) is not None:
            raise DataError(f"path of an image {problem}", found=image)
        return self.folders.need(image)

    def _pair(self, row: dict[str, Any], match: re.Match[str], common: dict[str, Any]) -> ReasoningRecord:
        """NLVR2: a sentence stands with up to four pairs of a set, whose number the group leaves out."""
        split, number, pair, sentence = match.groups()
        folders = _folders(split, row.get("directory"))
        files = tuple(self.folders.need(f"{split}-{number}-{pair}-img{i}.png", folders) for i in (0, 1))
        group = f"{split}-{number}-{sentence}"
        return ReasoningRecord(match[0], files, group=group, statement=match[0], **common)

    def _permutations(self, row: dict[str, Any], identifier: str, common: dict[str, Any]) -> Iterator[ReasoningRecord]:
        """NLVR v1: those of the six pictures that are there."""
        splits = [str(row["split"])] if row.get("split") else _SPLIT_IN_NAME.findall(self.name.lower())
        if len(splits) != 1:
            raise DataError("name of the file does not tell the split", found=self.name, expected="dev.json")
        statement, folders = f"{splits[0]}-{identifier}", _folders(splits[0], row.get("directory"))
        files = {i: self.folders.find(f"{statement}-{i}.png", folders) for i in range(_PERMUTATIONS)}
        if not any(files.values()):
            self.folders.need(f"{statement}-0.png", folders)
        for i, file in files.items():
            if file is not None:
                yield _permutation(statement, str(i), (file,), common)


def _permutation(
    statement: str, permutation: str, files: tuple[bytes | Path | FileSlice, ...], common: dict[str, Any]
) -> ReasoningRecord:
    """One order of the boxes in a picture of NLVR v1; the group joins the pictures of its sentence."""
    if len(files) != 1:
        raise DataError("permutations are of one picture", found=f"{len(files)} images")
    group = statement.rpartition("-")[0] or statement
    name = f"{statement}-{permutation}"
    return ReasoningRecord(name, files, group=group, statement=statement, boxes=NLVR_BOXES, **common)


def _folders(split: str, directory: object) -> list[str]:
    """Where pictures of NLVR stand: images/train/35 and dev as NLVR2 is handed out, dev/images/2 in NLVR v1."""
    places = ("images", f"images/{split}", split, f"{split}/images", "")
    if directory is None:
        return list(places)
    return [f"{place}/{directory}".lstrip("/") for place in places] + list(places)


def _name(row: dict[str, Any], key: str, default: str) -> str:
    """Text or number that names something; the default where it is not there."""
    value = row.get(key)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)) or text_problem(str(value)):
        raise DataError(f"{key} is no text or number", found=value)
    return str(value)
