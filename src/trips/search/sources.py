"""The pictures that an index is about: image files of a folder and of its folders, and WebDataset tars among them.

Not part of the paper. A picture is known by its key, "sub/cat.jpg" or "sub/photos.tar:KEY", so that a collection may
move as a whole, and by a stamp, which tells whether it has changed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from trips.data.records import IMAGE_SUFFIXES, BadSamples
from trips.data.shards import load_index
from trips.errors import DataError
from trips.images import FileSlice

_SEVERAL = -2  # in place of an offset, as in `ShardIndex`
Row = tuple[str, str, int]  # key, stamp, place in its tar or -1
_CHUNK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Photo:
    """One picture of a collection, not yet decoded.

    Attributes:
        key: relative to the collection, with forward slashes.
        stamp: size and time of the last change, or size and hash of the content.
        image: where it is.
    """

    key: str
    stamp: str
    image: Path | FileSlice

    @property
    def row(self) -> Row:
        """What an index remembers."""
        return self.key, self.stamp, self.image.offset if isinstance(self.image, FileSlice) else -1


def list_photos(source: str | Path, bad: BadSamples, *, hashed: bool = False) -> list[Photo]:
    """All pictures of a collection, sorted by key; nothing is decoded.

    Names that begin with a dot are left out, and so are folders behind symbolic links.

    Args:
        source: a folder, or one tar.
        bad: counts what cannot be read: a folder, a tar, a damaged tar behind its damage.
        hashed: read every file and tell changes by its content, not by size and time.
    Raises:
        DataError: no such folder or tar.
    """
    root = Path(source)
    check_source(root)
    if root.is_file():
        return sorted(_of_file(root, root.name, bad, hashed), key=lambda photo: photo.key)
    photos = []
    for folder, folders, names in os.walk(root, onerror=lambda error: bad.record(str(error.filename), str(error))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                photos += _of_file(path, path.relative_to(root).as_posix(), bad, hashed)
    return sorted(photos, key=lambda photo: photo.key)


def check_source(source: Path) -> None:
    """Refuse what is neither a folder nor a tar.

    Raises:
        DataError: as said.
    """
    if source.is_file() and source.suffix.lower() != ".tar":
        raise DataError("is a file", item=str(source), expected="a folder of images or a tar")
    if not source.exists():
        raise DataError("does not exist", item=str(source), expected="a folder of images or a tar")


def locate(source: str | Path, row: Row) -> tuple[str, Path | FileSlice]:
    """What messages and hits call a picture of an index, its path or "path.tar:KEY", and where it is."""
    key, stamp, offset = row
    folder = Path(source)
    if folder.suffix.lower() == ".tar" and not folder.is_dir():
        folder = folder.parent
    if offset < 0:
        return str(folder / key), folder / key
    tar = key[: key.lower().index(".tar:") + len(".tar")]
    return str(folder / key), FileSlice((folder / tar).absolute(), offset, int(stamp.split(":")[0]))


def _of_file(path: Path, key: str, bad: BadSamples, hashed: bool) -> list[Photo]:
    """The pictures in a file: one, those of a tar, or none."""
    suffix = path.suffix.lower()
    if suffix != ".tar" and suffix[1:] not in IMAGE_SUFFIXES:
        return []
    try:
        status = path.stat()
        if suffix == ".tar":
            return _of_tar(path, key, status.st_mtime_ns, bad, hashed)
        mark = _hash(path, 0, status.st_size) if hashed else f"{status.st_mtime_ns}"
        return [Photo(key, f"{status.st_size}:{mark}", path)]
    except (OSError, DataError) as error:
        bad.record(key, f"cannot be read: {error}" if isinstance(error, OSError) else error)
        return []


def _of_tar(path: Path, key: str, changed: int, bad: BadSamples, hashed: bool) -> list[Photo]:
    index = load_index(path)
    if index.damage is not None:
        bad.record(key, DataError(index.damage, item=str(path)))
    photos, seen = [], set()
    for sample in range(len(index)):
        offset, size = index.members[sample, 0].tolist()
        name = f"{key}:{index.key(sample)}"
        if offset == _SEVERAL or name in seen:
            bad.record(name, DataError("holds several images under one key", item=name))
        elif offset >= 0:
            seen.add(name)
            mark = _hash(path, offset, size) if hashed else f"{changed}"
            photos.append(Photo(name, f"{size}:{mark}:{offset}", FileSlice(path.absolute(), offset, size)))
    return photos


def _hash(path: Path, offset: int, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (block := file.read(min(size, _CHUNK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
