"""Lists of images and captions as people keep them on disk: what `trips.data.pack` reads.

JSON in ALBEF's layout (a list of ``{"image", "caption"}``, where a caption may be a list), in Karpathy's (``{"images":
[{"filename", "sentences": [{"raw"}]}]}``) and in COCO's own (``images`` beside ``annotations``); JSON lines; CSV and
TSV with a header; Flickr's ``image#0<tab>caption``; a folder of ``KEY.jpg`` beside ``KEY.txt``. Rows of one image are
joined. A row that cannot be used is named with its reason, and the others are read.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trips.data.records import IMAGE_SUFFIXES
from trips.errors import ConfigError, DataError

_LISTS = ("metadata.jsonl", "metadata.csv", "captions.txt", "captions.csv", "captions.tsv", "captions.json")
_IMAGE_KEYS = ("image", "file_name", "filename", "image_path", "path")
_CAPTION_KEYS = ("captions", "caption", "text", "sentences", "sentence", "title")
_ID_KEYS = ("image_id", "cocoid", "imgid")
_SUFFIXES = (*IMAGE_SUFFIXES, "tif", "tiff")
_FLICKR_LINE = re.compile(r"([^\t]+)#\d+\t(.*)", re.DOTALL)


@dataclass
class ListedImage:
    """One image of a list with all its captions.

    Attributes:
        image: path relative to the folder of the images, with forward slashes; it does not lead out of it.
        image_id: as the list gives it, else the path without its suffix.
        captions: at least one, stripped of white space around them.
        source: where the image comes first, "captions.csv line 3".
    """

    image: str
    image_id: str
    source: str
    captions: list[str] = field(default_factory=list)


def text_problem(text: object) -> str | None:
    """Why something cannot serve as a caption or question, or None if it can."""
    if not isinstance(text, str):
        return f"is no text but {type(text).__name__}"
    if "\0" in text:
        return "holds a NUL character"
    if not any(char.isprintable() and not char.isspace() for char in text):
        return "is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, as JSON can write it
        return "is not valid Unicode"
    return None


def read_listing(
    source: str | Path, images: str | Path | None = None, splits: Sequence[str] = ()
) -> tuple[list[ListedImage], dict[str, str]]:
    """Read a list of images with captions; no image is opened. The whole list is held in memory.

    Args:
        source: .json, .jsonl, .csv, .tsv or .txt file, or a folder: of one such list (metadata.jsonl, captions.txt,
            ...) beside the images, or of KEY.txt beside KEY.jpg, one caption per line.
        images: folder that the paths of the list are relative to; None takes that of the list.
        splits: parts of the list to take, by its field "split".
    Returns:
        The images in the order of the list, and the rows that cannot be used: where they stand, and why.
    Raises:
        DataError: the list is missing or damaged as a whole, or holds several splits and none is chosen.
        ConfigError: the kind of list is unknown, or a split is not in it.
    """
    path = Path(source)
    if not path.exists():
        raise DataError("does not exist", item=str(path))
    if path.is_dir():
        lists = [path / name for name in _LISTS if (path / name).is_file()]
        if len(lists) > 1:
            found = [item.name for item in lists]
            raise DataError("folder holds several lists", item=str(path), found=found, hint="name one of them")
        path = lists[0] if lists else path
    root = os.path.abspath(path if path.is_dir() else path.parent) if images is None else os.path.abspath(images)
    if not os.path.isdir(root):
        raise DataError("is not a folder of images", item=str(images))
    rejected: dict[str, str] = {}
    listed: dict[str, ListedImage] = {}
    owners: dict[str, str] = {}  # image of each image id
    seen_splits: Counter[str] = Counter()
    for place, row in _rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            split = row.get("split") if isinstance(row, dict) else None
            if split is not None:
                seen_splits[str(split)] += 1
                if splits and str(split) not in splits:
                    continue
            name, image_id, captions = _parse_row(row, root)
            if owners.setdefault(image_id, name) != name:
                raise DataError(f"image id {image_id!r} belongs to {owners[image_id]!r} already", item=name)
        except DataError as error:
            rejected[place] = str(error)
            continue
        entry = listed.setdefault(name, ListedImage(name, image_id, place))
        for i, caption in enumerate(captions):
            problem = text_problem(caption)
            if problem is None:
                entry.captions.append(caption.strip())
            else:
                label = place if len(captions) == 1 else f"{place} captions[{i}]"
                rejected[label] = f"{name}: caption {problem}"
        if not captions:
            rejected[place] = f"{name}: has no caption"
    _check_splits(path, splits, seen_splits)
    return [entry for entry in listed.values() if entry.captions], rejected


def _check_splits(path: Path, splits: Sequence[str], seen: Counter[str]) -> None:
    found = ", ".join(f"{name} ({count})" for name, count in sorted(seen.items()))
    missing = [split for split in splits if split not in seen]
    if missing:
        raise ConfigError("is not in the list", item=f"split {missing[0]!r}", found=found or "no field split")
    if not splits and len(seen) > 1:
        # Packed together, test images would end in the training data, and nobody would notice.
        raise DataError("holds several splits", item=str(path), found=found, hint='choose: splits=["train"]')


def _parse_row(row: object, root: str) -> tuple[str, str, list[Any]]:
    """Path relative to `root`, image id and captions of one row."""
    if not isinstance(row, dict):
        raise DataError("row is no object", found=type(row).__name__)
    if None in row:
        raise DataError("more cells than the header has", found=row[None], hint='quote a text with commas: "a, b"')
    keys = [key for key in _IMAGE_KEYS if row.get(key)]
    if not keys or not isinstance(row[keys[0]], str):
        raise DataError("names no image", found=sorted(map(str, row)), expected=f"one of {', '.join(_IMAGE_KEYS)}")
    name = row[keys[0]]
    if keys[0] == "filename" and isinstance(row.get("filepath"), str):
        name = os.path.join(row["filepath"], name)
    if "\0" in name:
        raise DataError("path holds a NUL character", item=repr(name))
    relative = os.path.relpath(os.path.join(root, name), root)
    if relative.split(os.sep)[0] == os.pardir or os.path.isabs(relative):
        raise DataError("path leads out of the folder of the images", item=name)
    relative = relative.replace(os.sep, "/")
    image_id = next((row[key] for key in _ID_KEYS if row.get(key) is not None), os.path.splitext(relative)[0])
    if isinstance(image_id, bool) or not isinstance(image_id, (str, int)):
        raise DataError("image id is no text or number", item=name, found=image_id)
    if (problem := text_problem(relative) or text_problem(str(image_id))) is not None:
        raise DataError(f"path or image id {problem}", item=repr(name))
    given = next((row[key] for key in _CAPTION_KEYS if row.get(key) is not None), [])
    captions = given if isinstance(given, list) else [given]
    captions = [caption.get("raw") if isinstance(caption, dict) else caption for caption in captions]
    return relative, str(image_id), captions


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a list with the place that messages call it by; a DataError stands for a row that has no form."""
    if path.is_dir():
        yield from _folder(path)
        return
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table, ".txt": _text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError("unknown kind of list", item=str(path), expected=f"a folder, or one of {', '.join(readers)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for place, row in reader(file, path):
                yield f"{path.name}{place}", row
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", item=str(path)) from error


def _json(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    content = json.load(file)
    images = content.get("images") if isinstance(content, dict) else content
    if not isinstance(images, list):
        raise DataError("is no list of images", item=str(path), expected='[{"image", "caption"}] or {"images": [...]}')
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):  # COCO: joined by the image's id
        names = {image.get("id"): image.get("file_name") for image in images if isinstance(image, dict)}
        for i, note in enumerate(content["annotations"]):
            known = isinstance(note, dict) and isinstance(note.get("image_id"), (str, int))
            yield f" annotations[{i}]", {"image": names.get(note["image_id"]), **note} if known else note
        return
    for i, row in enumerate(images):
        yield f" [{i}]", row


def _json_lines(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = DataError(f"broken JSON: {error}")  # the lines around it are sound
        yield f" line {number}", row


def _table(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    # strict: a stray quotation mark would otherwise swallow the rows up to the next one.
    reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header = reader.fieldnames or []
    if not set(header) & set(_IMAGE_KEYS) or not set(header) & set(_CAPTION_KEYS):
        raise DataError(
            "header names no image or no caption",
            item=str(path),
            found=list(header),
            expected=f"one of {', '.join(_IMAGE_KEYS)} and one of {', '.join(_CAPTION_KEYS)}",
        )
    for row in reader:
        yield f" line {reader.line_num}", row


def _text(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Flickr's lines, or a table in a file called .txt, as Flickr8k is also handed on."""
    flickr = _FLICKR_LINE.fullmatch(file.readline()) is not None
    file.seek(0)
    if not flickr:
        yield from _table(file, path)
        return
    for number, line in enumerate(file, 1):
        match = _FLICKR_LINE.fullmatch(line)
        if match is None and not line.strip():
            continue
        row = {"image": match[1], "caption": match[2]} if match else DataError("is not image#number<tab>caption")
        yield f" line {number}", row


def _folder(folder: Path) -> Iterator[tuple[str, Any]]:
    files = {
        os.path.relpath(os.path.join(base, name), folder).replace(os.sep, "/")
        for base, _, names in os.walk(folder)
        for name in names
    }
    stems: dict[str, str] = {}
    for name in sorted(files):
        stem, suffix = os.path.splitext(name)
        if suffix[1:].lower() in _SUFFIXES:
            stems.setdefault(stem, name)
    for name in sorted(files):
        stem, suffix = os.path.splitext(name)
        if suffix[1:].lower() in _SUFFIXES:
            if stems[stem] != name:
                yield name, DataError(f"is a second image beside {stems[stem]}")
            elif f"{stem}.txt" not in files:
                yield name, DataError("has no text beside it")
            else:
                try:
                    lines = (folder / f"{stem}.txt").read_text(encoding="utf-8-sig").split("\n")
                    yield name, {"image": name, "captions": [line for line in lines if line.strip()]}
                except (OSError, UnicodeDecodeError) as error:
                    yield name, DataError(f"text cannot be read: {error}")
        elif suffix == ".txt" and stem not in stems:
            yield name, DataError("has no image beside it")
