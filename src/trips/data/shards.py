"""Shards of image-text data: WebDataset tars, indexed once, so that any process can read any sample alone.

Feeds pre-training (4.1: four corpora, 5.1 M pairs). An index holds where in the tar the members of each sample lie;
it comes from the headers alone (a local tar is walked by seeking, about 25 microseconds a member) or from a sidecar
``NAME.tar.index.json`` beside the tar, which is believed as long as it tells the size that the tar has. A key is a
member's name up to the first dot behind the last slash, as in WebDataset; neighbours with one key are one sample.

A tar that is cut or damaged gives the samples before the damage; `ShardIndex.damage` says what is wrong with it.

Legend: S samples of a shard; its members are an image, KEY.json and KEY.txt, in this order, each may be absent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trips.data.records import IMAGE_SUFFIXES
from trips.errors import DataError
from trips.images import FileSlice

logger = logging.getLogger("trips")

INDEX_SUFFIX = ".index.json"
_FORMAT, _VERSION = "trips-tar-index", 1
_BLOCK = 512  # bytes; a tar ends with two blocks of zeros
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_COLUMN = {**dict.fromkeys(IMAGE_SUFFIXES, 0), "json": 1, "txt": 2}
_ABSENT, _SEVERAL = -1, -2  # in place of an offset


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one tar lie; about 75 bytes a sample.

    Attributes:
        size: bytes of the tar that this describes.
        keys: (S,) fixed-width bytes, one key a sample.
        members: (S, 3, 2) int64, offset and size in bytes of image, json and txt; a negative offset means that there
            is none, or, for images, more than one.
        damage: None, or what is wrong behind the last sample.
    """

    size: int
    keys: np.ndarray = field(repr=False)
    members: np.ndarray = field(repr=False)
    damage: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """Key of a sample, as it stands in the tar."""
        return bytes(self.keys[sample]).decode("utf-8", "surrogateescape")

    def to_json(self) -> str:
        """The text of a sidecar; `from_json` reads it back."""
        content = {"format": _FORMAT, "version": _VERSION, "size": self.size, "damage": self.damage}
        content["keys"] = [self.key(i) for i in range(len(self))]
        content["members"] = self.members.reshape(len(self), 6).tolist()
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, name: str) -> ShardIndex:
        """Read the text of a sidecar.

        Args:
            text: content of the file.
            name: how messages call it.
        Raises:
            DataError: not what `to_json` writes, or places outside the tar.
        """
        try:
            content = json.loads(text)
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
            keys = _key_array(content["keys"])
            members = np.array(content["members"], dtype=np.int64).reshape(len(keys), 3, 2)
            size, damage = int(content["size"]), content["damage"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(
                f"not an index of a tar: {error!r}", item=name, hint="delete it; it is made anew"
            ) from error
        offsets, sizes = members[..., 0], members[..., 1]
        if (offsets < _SEVERAL).any() or (sizes < 0).any() or (offsets + sizes > size).any():
            raise DataError("index names places outside the tar", item=name, hint="delete it; it is made anew")
        return cls(size, keys, members, damage if damage is None else str(damage))


@dataclass(frozen=True)
class Members:
    """What one sample holds.

    Attributes:
        image: the encoded picture, or where it is, or None.
        json, txt: the annotation files, or None.
        num_images: 0, 1, or 2 for more than one.
        problem: why there is no image, where the shard knows.
    """

    image: bytes | Path | FileSlice | None = field(repr=False)
    json: bytes | None = field(repr=False)
    txt: bytes | None = field(repr=False)
    num_images: int
    problem: str | None = None


@dataclass(frozen=True)
class Shard:
    """One tar of a corpus.

    Attributes:
        location: path or URL.
        index: where its samples lie.
    """

    location: str
    index: ShardIndex

    def __len__(self) -> int:
        return len(self.index)

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]

    def source(self, sample: int) -> str:
        """How messages call a sample: "file.tar:KEY"."""
        return f"{self.name}:{self.index.key(sample)}"

    def read(self, sample: int, stream: BinaryIO, whole: bool = True) -> Members:
        """Read one sample.

        Args:
            sample: 0 to S - 1.
            stream: the opened tar.
            whole: read its image too; else the image is left in the tar, which has to be a local file.
        Raises:
            DataError: the tar has become shorter, or cannot be read.
        """
        parts: list[bytes | FileSlice | None] = []
        for column, (offset, size) in enumerate(self.index.members[sample].tolist()):
            if offset < 0:
                parts.append(None)
                continue
            if column == 0 and not whole:
                parts.append(FileSlice(Path(self.location), offset, size))
                continue
            try:
                stream.seek(offset)
                content = stream.read(size)
            except OSError as error:
                raise DataError(f"tar file cannot be read: {error}", item=self.location) from error
            if len(content) != size:
                raise DataError(
                    "tar file is shorter than when it was indexed", item=self.location, found=self.source(sample)
                )
            parts.append(content)
        image, annotation, text = parts
        several = int(self.index.members[sample, 0, 0]) == _SEVERAL
        return Members(image, annotation, text, 2 if several else int(image is not None))


def load_index(path: str | Path, write: bool = False) -> ShardIndex:
    """Index of a local tar: its sidecar's if that is fresh, else made from the headers.

    Args:
        path: the tar.
        write: leave a sidecar where there was none, or a stale one; a folder that cannot be written is no error.
    Raises:
        DataError: see `index_tar`.
    """
    path = Path(path)
    index = read_index(path)
    if index is None:
        index = index_tar(path)
        if write:
            try:
                write_index(path, index)
            except OSError as error:
                logger.info("%s: no index is kept: %s", path, error)
    return index


def read_index(path: str | Path) -> ShardIndex | None:
    """Index from the sidecar of a local tar; None where there is none, or one of another size or broken (logged)."""
    sidecar = Path(f"{path}{INDEX_SUFFIX}")
    try:
        index = ShardIndex.from_json(sidecar.read_text(encoding="utf-8"), str(sidecar))
        size = Path(path).stat().st_size
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, DataError) as error:
        logger.warning("%s is not used: %s", sidecar, error)
        return None
    if index.size != size:
        logger.warning("%s is stale: made for %d bytes, the tar has %d", sidecar, index.size, size)
        return None
    return index


def write_index(path: str | Path, index: ShardIndex) -> Path:
    """Write the sidecar of a tar, in one step, so that no reader meets half of it.

    Args:
        path: the tar; it need not be there.
        index: its index.
    Returns:
        ``PATH.index.json``
    Raises:
        OSError: the folder cannot be written.
    """
    sidecar = Path(f"{path}{INDEX_SUFFIX}")
    partial = Path(f"{sidecar}.{os.getpid()}.partial")
    try:
        partial.write_text(index.to_json(), encoding="utf-8")
        os.replace(partial, sidecar)
    finally:
        partial.unlink(missing_ok=True)
    return sidecar


def index_tar(path: str | Path) -> ShardIndex:
    """Walk the headers of a local, plain tar.

    A sample that the damage may have cut (the last one, if its image or every text is missing) is left out.

    Args:
        path: the tar.
    Returns:
        its index; `damage` is set where the tar is empty, cut or damaged behind its beginning.
    Raises:
        DataError: missing, a folder, unreadable, or not a plain tar from the first byte on (compressed, for one).
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise DataError("is a folder", item=str(path), expected="a tar file")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError("tar file does not exist", item=str(path)) from error
    except OSError as error:
        raise DataError(f"tar file cannot be read: {error}", item=str(path)) from error
    if size < _BLOCK:
        return _collect(size, [], f"tar file ends within its first header ({size} bytes)")
    found: list[tuple[str, int, int, int]] = []
    end, damage = 0, None
    try:
        # Plain tars only: inside a compressed one there are no places to jump to.
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    if member.offset_data + member.size > size:
                        damage = f"{member.name} is cut: {size} bytes of tar, {member.offset_data + member.size} needed"
                        break
                    end = member.offset_data + (member.size if member.isreg() else 0)
                    match = _MEMBER.fullmatch(member.name)
                    if match and member.isreg() and (column := _COLUMN.get(match[2].lower())) is not None:
                        found.append((match[1], column, member.offset_data, member.size))
            except Exception as error:  # tarfile raises many types for a damaged header
                damage = f"damaged behind byte {end} of {size}: {error}"
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"not a plain tar file: {error}", item=str(path), hint="copy it again, unpack it if compressed"
        ) from error
    if damage is None and not _has_end_mark(path, end):
        # tarfile stops without any error at a damaged header, or where a tar was cut between two members.
        damage = f"cut or damaged behind byte {end} of {size}"
    return _collect(size, found, damage)


def _has_end_mark(path: Path, end: int) -> bool:
    with path.open("rb") as file:
        file.seek(end + -end % _BLOCK)
        return file.read(2 * _BLOCK) == bytes(2 * _BLOCK)


def _collect(size: int, found: list[tuple[str, int, int, int]], damage: str | None) -> ShardIndex:
    """Join neighbouring members with one key to samples."""
    keys: list[str] = []
    members: list[list[list[int]]] = []
    for key, column, offset, length in found:
        if not keys or keys[-1] != key:
            keys.append(key)
            members.append([[_ABSENT, 0] for _ in range(3)])
        place = members[-1][column]
        place[:] = [_SEVERAL, 0] if column == 0 and place[0] != _ABSENT else [offset, length]
    if damage is not None and keys and (members[-1][0][0] < 0 or max(members[-1][1][0], members[-1][2][0]) < 0):
        keys.pop(), members.pop()
    return ShardIndex(size, _key_array(keys), np.array(members, dtype=np.int64).reshape(len(keys), 3, 2), damage)


def _key_array(keys: list[str]) -> np.ndarray:
    return np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
