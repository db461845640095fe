"""Annotation files as people keep them: what an entry of a recipe names, the rows of a list, the images they name.

Feeds the readers of questions, statements and captions. A file is told by its content, not its name: NLVR's own are
called ``dev.json`` and hold JSON lines. A row that has no form stands as a DataError among the others, which are sound.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trips.errors import ConfigError, DataError

Row = tuple[str, Any]
"""The name that messages call a row by, such as "train.csv line 3", and the row; or a DataError in its place."""

_PACKED = {b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def split_entry(entry: str) -> tuple[str, tuple[str, ...]]:
    """Path and splits of ``PATH#SPLIT+SPLIT``; a path that exists as it is has none.

    Raises:
        ConfigError: a "#" with nothing before or behind it.
    """
    path, mark, splits = entry.rpartition("#")
    if not mark or os.path.exists(entry):
        return entry, ()
    if not path or not all(splits.split("+")):
        raise ConfigError("does not say which splits", item=entry, expected="PATH#SPLIT or PATH#SPLIT+SPLIT")
    return path, tuple(splits.split("+"))


def find_list(path: Path, names: Sequence[str]) -> Path:
    """The file itself, or the one list in a folder.

    Args:
        path: file or folder.
        names: of lists that a folder may hold.
    Raises:
        DataError: missing; a folder without a list, or with several.
    """
    if not path.exists():
        raise DataError("does not exist", item=str(path), hint="paths start at the working directory")
    if not path.is_dir():
        return path
    lists = [path / name for name in names if (path / name).is_file()]
    if len(lists) != 1:
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        raise DataError(
            "folder needs one list beside its images",
            item=str(path),
            found=[file.name for file in lists] or "none",
            expected=" or ".join(names),
            hint=f"a saved dataset is called hf:{path}" if saved else "or name the file",
        )
    return lists[0]


def read_text(path: Path) -> str:
    """Text of a file without its byte order mark; ends of lines stay as they are.

    Raises:
        DataError: missing, a folder, unreadable, compressed, not UTF-8, or nothing but white space.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", item=str(path)) from error
    packed = next((name for magic, name in _PACKED.items() if data.startswith(magic)), None)
    if packed is not None:
        raise DataError(f"is compressed ({packed})", item=str(path), hint="unpack it first")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text: {error}", item=str(path), hint="save it as UTF-8") from error
    if not text.strip():
        raise DataError("is empty", item=str(path))
    return text


def list_rows(path: Path) -> Iterator[Row]:
    """Each row of a list: JSON, JSON lines, or a table with a header.

    Raises:
        DataError: see `read_text` and `parse`; an object that fills the file is given as its one row.
    """
    content = parse(read_text(path), path)
    yield from content if isinstance(content, list) else [(path.name, content)]


def parse(text: str, path: Path) -> dict[str, Any] | list[Row]:
    """The JSON object that fills a text, or else the rows of its JSON list, JSON lines or table.

    Args:
        text: begins with "{", "[" or the header of a table, whose cells are parted by commas, tabs or semicolons.
        path: where it came from, for messages.
    Raises:
        DataError: broken JSON; a table whose header names a column twice, or with an open quotation mark.
    """
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        return _table(text, path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Only objects of a line each are JSON lines: the first lines of a list or object that was cut do not parse.
        if start == "{" and (
            path.suffix.lower() == ".jsonl" or isinstance(_line(text.lstrip().split("\n", 1)[0]), dict)
        ):
            return _lines(text, path)
        raise DataError(f"broken JSON: {error}", item=str(path), hint="is the file whole?") from error
    return content if isinstance(content, dict) else [(f"{path.name} [{i}]", row) for i, row in enumerate(content)]


def choose_splits(rows: Sequence[Row], splits: Sequence[str], field: str, path: Path) -> Sequence[Row]:
    """Rows of the chosen splits; those that do not tell theirs are kept.

    Args:
        rows: of a list.
        splits: the chosen ones; none takes the only one there is.
        field: of the rows that holds the split.
        path: of the list.
    Raises:
        DataError: several splits, and none chosen.
        ConfigError: a chosen split that is not there.
    """
    told = [row.get(field) if isinstance(row, dict) else None for _, row in rows]
    names = [None if split in (None, "") else str(split) for split in told]
    seen = Counter(name for name in names if name is not None)
    found = ", ".join(f"{name} ({count})" for name, count in sorted(seen.items()))
    for split in splits:
        if split not in seen:
            raise ConfigError("is not in the list", item=f"{path}#{split}", found=found or f"no field {field}")
    if not splits and len(seen) > 1:
        # Together, test questions would end in the training data, and nobody would notice.
        raise DataError("holds several splits", item=str(path), found=found, hint=f"choose: {path}#{min(seen)}")
    return [row for row, name in zip(rows, names) if not splits or name is None or name in splits]


class ImageFolders:
    """Folders that the paths of a list start at, tried in turn.

    Args:
        folders: as given by the user.
        default: the folder of the list, where none are given; its folder "images" is looked in too.
    Raises:
        ConfigError: one is not a folder.
    """

    def __init__(self, folders: Sequence[str | Path], default: Path) -> None:
        own = [default, *(folder for folder in [default / "images"] if folder.is_dir())]
        self.folders = [os.path.abspath(folder) for folder in folders or own]
        for folder in self.folders:
            if not os.path.isdir(folder):
                raise ConfigError("is not a folder of images", item=folder)

    def find(self, name: str, inside: Sequence[str] = ("",)) -> Path | None:
        """The first file of a name in one of the sub-folders of one of the folders; no file is opened.

        Raises:
            DataError: the path leads out of the folder.
        """
        for folder in self.folders:
            for part in inside:
                path = os.path.normpath(os.path.join(folder, part, name))
                if "\0" in name or os.path.commonpath((folder, path)) != folder:
                    raise DataError("path leads out of the folder of the images", found=name)
                if os.path.isfile(path):
                    return Path(path)
        return None

    def need(self, names: str | Sequence[str], inside: Sequence[str] = ("",)) -> Path:
        """As `find`, for the first of several names that is there; no file is an error that says where it should be."""
        names = (names,) if isinstance(names, str) else names
        for name in names:
            if (path := self.find(name, inside)) is not None:
                return path
        places = " or ".join(self.folders if len(self.folders) < 4 else [*self.folders[:3], "..."])
        raise DataError(
            "image file does not exist", found=names[0], expected=f"in {places}", hint="folders: data.images"
        )

    def relative(self, path: Path) -> str:
        """Path of a file from the innermost of the folders, with forward slashes; a file in none keeps its name."""
        inside = [path.relative_to(folder) for folder in self.folders if path.is_relative_to(folder)]
        return min((place.as_posix() for place in inside), key=len, default=path.name)


def _line(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON: {error}")


def _lines(text: str, path: Path) -> list[Row]:
    # Not splitlines: a line of JSON may hold any of Unicode's other ends of lines.
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path.name} line {number}", _line(line)) for number, line in lines if line.strip()]


def _table(text: str, path: Path) -> list[Row]:
    table = text.lstrip("\r\n")
    above, header = text.count("\n") - table.count("\n"), table.partition("\n")[0]
    # strict: a stray quotation mark would otherwise swallow the rows up to the next one.
    reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=max(",\t;", key=header.count), strict=True)
    rows: list[Row] = []
    try:
        names = reader.fieldnames or []
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError("header names a column twice", item=str(path), found=repeated[0])
        for row in reader:
            cells: Any = row
            if None in row:
                cells = DataError("more cells than the header has", found=row[None], hint='quote a text: "a, b"')
            rows.append((f"{path.name} line {above + reader.line_num}", cells))
    except csv.Error as error:
        raise DataError(f"cannot be read behind line {above + reader.line_num}: {error}", item=str(path)) from error
    return rows
