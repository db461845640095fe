"""Rows of statements about images, from lists, tars and datasets, in one form.

Feeds `trips.data.statements`. A row is a dictionary with the names of `FIELDS`; the pictures of a tar stand in its
``images``. The first row shows whether a file holds statements at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trips.data.annotation_kinds import describe, wrong_kind
from trips.data.annotation_rows import Row, choose_splits, find_list, list_rows, read_text, split_entry
from trips.data.hf import DatasetRows, is_dataset
from trips.data.remote import expand_patterns, is_remote
from trips.data.shards import load_index
from trips.errors import ConfigError, DataError
from trips.images import FileSlice

FIELDS = ("sentence", "label", "images", "image", "identifier", "group", "split", "statement_id", "permutation")

NLVR2_ID = re.compile(r"([a-z]+\d*)-(\d+)-(\d+)-(\d+)")
"""Identifier of NLVR2: split, set of images, pair, sentence."""

_LISTS = tuple(f"{name}.{suffix}" for name in ("metadata", "statements") for suffix in ("jsonl", "json", "csv", "tsv"))
_WANTED = "statements about images"
_IMAGE_COLUMN = re.compile(r"image_?(\d+)")


@dataclass(frozen=True)
class StatementRows:
    """Rows of one entry of a recipe.

    Attributes:
        rows: each with the name that messages call it by; a DataError stands for one that has no form.
        path: the list that they come from, or the folder that paths in them start at.
    """

    rows: Sequence[Row]
    path: Path


def read_rows(entry: str, columns: Mapping[str, str]) -> StatementRows:
    """Rows of tars, of a list or of a dataset, those of the chosen splits alone.

    The split is the field "split", or the first part of an identifier of NLVR2.

    Args:
        entry: see `trips.data.statements.read_statements`.
        columns: other names of fields.
    Raises:
        DataError, ConfigError, MissingDependencyError: see `trips.data.statements.read_statements`.
    """
    for name in columns:
        if name not in FIELDS and not _IMAGE_COLUMN.fullmatch(name):
            raise ConfigError("is no field of a statement", item=f"data.columns.{name}", expected=", ".join(FIELDS))
    if is_dataset(entry):
        place = Path(split_entry(entry.removeprefix("hf:"))[0])
        rows = [(source, _rename(row, columns)) for source, row in DatasetRows(entry)]
        _check_task(rows, entry)
        return StatementRows(rows, place if place.is_dir() else Path())
    name, splits = split_entry(entry)
    tars = name.endswith(".tar")
    path = Path(name) if tars else find_list(Path(name), _LISTS)
    rows = [(source, _rename(row, columns)) for source, row in (_tar_rows(name) if tars else _list_rows(path))]
    _check_task(rows, name if tars else str(path))
    return StatementRows(choose_splits(rows, splits, "split", path), Path() if tars else path)


def images_of(row: Mapping[str, Any]) -> list[Any] | None:
    """What stands in ``images``, in ``image1``, ``image2``, ..., or in ``image``; None if none of them is there.

    Raises:
        DataError: ``images`` is no list, or an empty one.
    """
    if (images := row.get("images")) is not None:
        if not isinstance(images, list) or not images:
            raise DataError("images are no list", found=images, hint="a table has columns image1, image2, ...")
        return images
    numbered = sorted((int(match[1]), key) for key in row if (match := _IMAGE_COLUMN.fullmatch(str(key))))
    if numbered:
        return [row[key] for _, key in numbered]
    return None if row.get("image") is None else [row["image"]]


def _list_rows(path: Path) -> Iterator[Row]:
    """Rows of a list; the texts of other tasks, which have no header, are refused at their first line."""
    first = read_text(path).lstrip().partition("\n")[0]
    if first[:1] not in ("{", "[") and describe(first) is not None:
        raise wrong_kind(str(path), first, _WANTED)
    return list_rows(path)


def _tar_rows(pattern: str) -> Iterator[Row]:
    """KEY.json of each sample with its picture; every tar is looked through before the first row."""
    paths = expand_patterns(pattern, "data")
    if remote := [path for path in paths if is_remote(path)]:
        raise ConfigError("statements are read from local files", item=remote[0], hint="download it first")
    indexes = [load_index(path) for path in paths]
    for path, index in zip(paths, indexes, strict=True):
        if index.damage is not None:
            raise DataError(f"tar file is not whole: {index.damage}", item=path, hint="copy it again")
    for path, index in zip(map(Path, paths), indexes, strict=True):
        for sample, (image, annotation, _) in enumerate(index.members.tolist()):
            row: Any = DataError("needs exactly one image and KEY.json beside it")
            if image[0] >= 0 and annotation[0] >= 0:
                try:
                    row = json.loads(FileSlice(path, *annotation).read_bytes())
                except (ValueError, RecursionError) as error:  # broken JSON or not UTF-8
                    row = DataError(f"broken JSON: {error}")
            if isinstance(row, dict):
                row = {"identifier": f"{path}:{index.key(sample)}", **row, "images": [FileSlice(path, *image)]}
            yield f"{path.name}:{index.key(sample)}", row


def _rename(row: Any, columns: Mapping[str, str]) -> Any:
    """A row with our names beside the user's, and with its split."""
    if not isinstance(row, dict):
        return row
    row = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
    if not row.get("split") and (match := NLVR2_ID.fullmatch(str(row.get("identifier")))):
        row["split"] = match[1]
    return row


def _check_task(rows: Sequence[Row], item: str) -> None:
    """Refuse a file of another task at its first row that has a form."""
    row = next((row for _, row in rows if not isinstance(row, DataError)), {"sentence": None})
    if isinstance(row, dict) and "sentence" in row:
        return
    raise wrong_kind(
        item,
        row,
        _WANTED,
        found=sorted(map(str, row))[:8] if isinstance(row, dict) else type(row).__name__,
        expected="sentence and label, with images or an identifier of NLVR",
        hint="fields of other names: data.columns",
    )
