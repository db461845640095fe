"""Lists of images and captions as people keep them on disk: what training reads as it is, and `trips.data.pack` packs.

JSON in ALBEF's layout (a list of ``{"image", "caption"}``, where a caption may be a list), in Karpathy's (``{"images":
[{"filename", "sentences": [{"raw"}]}]}``) and in COCO's own (``images`` beside ``annotations``); JSON lines; CSV and
TSV with a header; Flickr's ``image#0<tab>caption``; a folder of ``KEY.jpg`` beside ``KEY.txt``. Rows of one image are
joined. A row that cannot be used is named with its reason, and the others are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips.data.listing_rows import FIELDS, captions_of, check_columns, list_rows, rename
from trips.errors import ConfigError, DataError

LISTS = ("metadata.jsonl", "metadata.csv", "captions.txt", "captions.csv", "captions.tsv", "captions.json")


@dataclass
class ListedImage:
    """One image of a list with all its captions.

    Attributes:
        image: path relative to the folder of the images, with forward slashes; it does not lead out of it. Where
            there are several folders, a path that the list gives in full stays so.
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
    source: str | Path,
    images: str | Path | Sequence[str | Path] | None = None,
    splits: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> tuple[list[ListedImage], dict[str, str]]:
    """Read a list of images with captions; no image is opened. The whole list is held in memory.

    Args:
        source: .json, .jsonl, .csv, .tsv or .txt file, or a folder: of one such list (metadata.jsonl, captions.txt,
            ...) beside the images, or of KEY.txt beside KEY.jpg, one caption per line.
        images: folder that the paths of the list are relative to, or several; None takes that of the list.
        splits: parts of the list to take, by its field "split".
        columns: what the list calls a field, {"caption": "sentence_en"}; of image, caption, image_id, split.
    Returns:
        The images in the order of the list, and the rows that cannot be used: where they stand, and why.
    Raises:
        DataError: the list is missing or damaged as a whole, or holds several splits and none is chosen.
        ConfigError: the kind of list is unknown, a split is not in it, or `columns` names no field.
    """
    path, columns = find_list(source), columns or {}
    check_columns(columns)
    roots = image_folders(path, images)
    rejected: dict[str, str] = {}
    listed: dict[str, ListedImage] = {}
    owners: dict[str, str] = {}  # image of each image id
    seen_splits: Counter[str] = Counter()
    for place, row in list_rows(path, columns):
        try:
            if isinstance(row, DataError):
                raise row
            row = rename(row, columns)
            split = row.get("split") if isinstance(row, dict) else None
            if split is not None:
                seen_splits[str(split)] += 1
                if splits and str(split) not in splits:
                    continue
            name, image_id, captions = _parse_row(row, roots)
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


def find_list(source: str | Path) -> Path:
    """The list itself: a file, or in a folder its only list; a folder without one is a list of KEY.txt by KEY.jpg.

    Raises:
        DataError: missing, or a folder with several lists.
    """
    path = Path(source)
    if not path.exists():
        raise DataError("does not exist", item=str(path))
    if path.is_dir():
        lists = [path / name for name in LISTS if (path / name).is_file()]
        if len(lists) > 1:
            found = [item.name for item in lists]
            raise DataError("folder holds several lists", item=str(path), found=found, hint="name one of them")
        path = lists[0] if lists else path
    return path


def image_folders(path: Path, images: str | Path | Sequence[str | Path] | None = None) -> list[str]:
    """Absolute folders that image paths start at: those given, else the folder of the list at `path`.

    Raises:
        DataError: one of them is no folder.
    """
    if images is None or (not isinstance(images, (str, Path)) and not images):
        images = path if path.is_dir() else path.parent
    folders = [images] if isinstance(images, (str, Path)) else images
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError("is not a folder of images", item=str(folder))
    return [os.path.abspath(folder) for folder in folders]


def _check_splits(path: Path, splits: Sequence[str], seen: Counter[str]) -> None:
    found = ", ".join(f"{name} ({count})" for name, count in sorted(seen.items()))
    missing = [split for split in splits if split not in seen]
    if missing:
        raise ConfigError("is not in the list", item=f"{path}#{missing[0]}", found=found or "no field split")
    if not splits and len(seen) > 1:
        # Packed together, test images would end in the training data, and nobody would notice.
        hint = f"choose: {path}#{min(seen)}, or --splits={min(seen)} of trips data pack"
        raise DataError("holds several splits", item=str(path), found=found, hint=hint)


def _parse_row(row: object, roots: Sequence[str]) -> tuple[str, str, list[Any]]:
    """Path relative to the folder of the images, image id and captions of one row."""
    if not isinstance(row, dict):
        raise DataError("row is no object", found=type(row).__name__)
    if None in row:
        raise DataError("more cells than the header has", found=row[None], hint='quote a text with commas: "a, b"')
    keys = [key for key in FIELDS["image"] if row.get(key)]
    if not keys or not isinstance(row[keys[0]], str):
        expected = ", ".join(FIELDS["image"])
        raise DataError("names no image", found=sorted(map(str, row)), expected=f"one of {expected}")
    name = row[keys[0]]
    if keys[0] == "filename" and isinstance(row.get("filepath"), str):
        name = os.path.join(row["filepath"], name)
    if "\0" in name:
        raise DataError("path holds a NUL character", item=repr(name))
    relative = _inside(name, roots)
    image_id = next((row[key] for key in FIELDS["image_id"] if row.get(key) is not None), os.path.splitext(relative)[0])
    if isinstance(image_id, bool) or not isinstance(image_id, (str, int)):
        raise DataError("image id is no text or number", item=name, found=image_id)
    if (problem := text_problem(relative) or text_problem(str(image_id))) is not None:
        raise DataError(f"path or image id {problem}", item=repr(name))
    return relative, str(image_id), captions_of(row)


def _inside(name: str, roots: Sequence[str]) -> str:
    """Path of an image relative to its folder; DataError if it is outside of them all."""
    for root in roots:
        relative = os.path.relpath(os.path.join(root, name), root)
        if relative.split(os.sep)[0] != os.pardir and not os.path.isabs(relative):
            # In two folders one relative path may name two pictures: a full one says which.
            whole = os.path.isabs(name) and len(roots) > 1
            return (os.path.normpath(name) if whole else relative).replace(os.sep, "/")
    raise DataError("path leads out of the folder of the images", item=name, hint="name the folder it lies in")
