"""Rows of a list of images with captions, whatever its layout, and what their fields are called.

The reading behind `trips.data.listings`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from trips.data.annotation_kinds import describe, wrong_kind
from trips.data.records import IMAGE_SUFFIXES
from trips.errors import ConfigError, DataError

_IMAGE_KEYS = ("image", "file_name", "filename", "image_path", "path")
_CAPTION_KEYS = ("captions", "caption", "text", "sentences", "sentence", "title")
_ID_KEYS = ("image_id", "cocoid", "imgid")
FIELDS = {"image": _IMAGE_KEYS, "caption": _CAPTION_KEYS, "image_id": _ID_KEYS, "split": ("split",)}
_SUFFIXES = (*IMAGE_SUFFIXES, "tif", "tiff")
_FLICKR_LINE = re.compile(r"([^\t]+)#\d+\t(.*)", re.DOTALL)


def list_rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Each row of a list with the place that messages call it by; a DataError stands for a row that has no form."""
    if path.is_dir():
        yield from _folder(path)
        return
    table = partial(_table, columns=columns)
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": table, ".tsv": table, ".txt": partial(_text, table=table)}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError("unknown kind of list", item=str(path), expected=f"a folder, or one of {', '.join(readers)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if not any(map(str.strip, iter(partial(file.read, 4096), ""))):
                raise DataError("is empty", item=str(path))
            file.seek(0)
            for place, row in reader(file, path):
                yield f"{path.name}{place}", row
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else None
        hint = "is the file whole?" if isinstance(error, json.JSONDecodeError) else hint
        raise DataError(f"cannot be read: {error}", item=str(path), hint=hint) from error


def _json(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.load(file)
    except json.JSONDecodeError:
        file.seek(0)
        if not isinstance(_line(file.readline()), dict):
            raise
        file.seek(0)
        yield from _json_lines(file, path)  # as NLVR's are, whatever they are called
        return
    images = content.get("images") if isinstance(content, dict) else content
    if not isinstance(images, list):
        expected = '[{"image", "caption"}] or {"images": [...]}'
        raise not_captions("is no list of images", str(path), content, expected=expected)
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
        if line.strip():
            yield f" line {number}", _line(line)


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON: {error}")  # the lines around it are sound


def _table(file: IO[str], path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",\t;", key=file.readline().count)
    file.seek(0)
    # strict: a stray quotation mark would otherwise swallow the rows up to the next one.
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        yield from _table_rows(reader, delimiter, path, columns)
    except csv.Error as error:
        raise DataError(f"cannot be read behind line {reader.line_num}: {error}", item=str(path)) from error


def _table_rows(
    reader: csv.DictReader, delimiter: str, path: Path, columns: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    header = list(reader.fieldnames or [])
    known = set(rename(dict.fromkeys(header), columns))
    if not known & set(_IMAGE_KEYS) or not known & set(_CAPTION_KEYS):
        line = delimiter.join(header)
        raise not_captions(
            "header names no image or no caption",
            str(path),
            [dict.fromkeys(header)] if describe(line) is None else line,  # DAQUAR's text has no header
            found=header,
            expected=f"one of {', '.join(_IMAGE_KEYS)} and one of {', '.join(_CAPTION_KEYS)}",
            hint="other names: data.columns",
        )
    for row in reader:
        yield f" line {reader.line_num}", row


def _text(
    file: IO[str], path: Path, table: Callable[[IO[str], Path], Iterator[tuple[str, Any]]]
) -> Iterator[tuple[str, Any]]:
    """Flickr's lines, or a table in a file called .txt, as Flickr8k is also handed on."""
    flickr = _FLICKR_LINE.fullmatch(file.readline()) is not None
    file.seek(0)
    if not flickr:
        yield from table(file, path)
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


def rename(row: Any, columns: Mapping[str, str]) -> Any:
    """A row with the user's fields under the names known here, in place of any other that would say the same."""
    if not isinstance(row, dict):
        return row
    for ours, theirs in columns.items():
        if theirs in row:
            row = {**{key: value for key, value in row.items() if key not in FIELDS[ours]}, ours: row[theirs]}
    return row


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names that are no field of an image with captions."""
    if unknown := sorted(set(columns) - set(FIELDS)):
        raise ConfigError(
            "is no field of an image with captions", item="columns", found=unknown, expected=", ".join(FIELDS)
        )


def captions_of(row: Mapping[str, Any]) -> list[Any]:
    """What a row gives as its captions, of any type."""
    given = next((row[key] for key in _CAPTION_KEYS if row.get(key) is not None), [])
    captions = given if isinstance(given, list) else [given]
    return [caption.get("raw") if isinstance(caption, dict) else caption for caption in captions]


def not_captions(problem: str, item: str, content: object, **fields: Any) -> DataError:
    """The error for what holds no images with captions; says whose it is where it looks like another task's."""
    kind = describe(content)
    if kind is None or "captions" in kind:
        return DataError(problem, item=item, **fields)
    return wrong_kind(item, content, "images with captions", **fields)


def peek(path: Path) -> object:
    """The beginning of a list that was read before, for `not_captions`."""
    if path.suffix.lower() == ".json":
        with contextlib.suppress(ValueError):  # lines of JSON
            return json.loads(path.read_text(encoding="utf-8-sig"))
    return [row for _, row in islice(list_rows(path, {}), 10)]
