"""What lies on disk of an index: shards of features, the manifest that names them, the vectors that are searched.

Not part of the paper. Every file is written under another name, then renamed, and never changed: whoever is killed
leaves whole files. A shard says itself which model and pictures it is of, so those of an indexing run that was killed
are found again. The manifest is replaced last; what it names is the index, what it does not name is work to take up.

Dimensions: n pictures of a shard, P projection width.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from trips.errors import CheckpointError
from trips.search.sources import Row

SHARDS_FOLDER, MANIFEST_FILE, LOCK_FILE = "shards", "manifest.json", "index.lock"
SHARD_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_FORMAT, _VERSION = "trips-image-index", 1
_AGAIN = "index the collection again: what is damaged is computed anew, the rest is kept"


@dataclass(frozen=True)
class Shard:
    """A file of features.

    Attributes:
        path: where it is.
        fingerprint: of the model that made it.
        rows: of its n pictures.
    """

    path: Path
    fingerprint: str
    rows: tuple[Row, ...]

    def features(self) -> np.ndarray:
        """(n, P) float16.

        Raises:
            CheckpointError: damaged.
        """
        try:
            with safe_open(self.path, "numpy") as file:
                features, checksum = file.get_tensor("features"), file.metadata()["checksum"]
        except Exception as error:  # safetensors raises several types
            raise damaged(self.path, error) from error
        if checksum != _checksum(features) or len(features) != len(self.rows):
            raise damaged(self.path, "checksum differs")
        return features


def write_shard(folder: Path, fingerprint: str, rows: Sequence[Row], features: np.ndarray) -> Shard:
    """Write a shard in one step.

    Args:
        folder: of the index.
        fingerprint: of the model.
        rows: of each picture.
        features: (n, P), stored as float16.
    Raises:
        CheckpointError: the folder cannot be written.
    """
    features = np.ascontiguousarray(features, dtype=np.float16)
    path = folder / SHARDS_FOLDER / f"{uuid.uuid4().hex}{SHARD_SUFFIX}"
    metadata = {"model": fingerprint, "rows": json.dumps(rows), "checksum": _checksum(features)}
    write_whole(path, lambda partial: save_file({"features": features}, partial, metadata))
    return Shard(path, fingerprint, tuple(rows))


def read_shard(path: Path) -> Shard:
    """Open a shard: its rows, not yet its features.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:  # compares the length of the file with its header
            metadata = file.metadata()
            rows = tuple((str(key), str(stamp), int(offset)) for key, stamp, offset in json.loads(metadata["rows"]))
            return Shard(path, metadata["model"], rows)
    except Exception as error:
        raise damaged(path, error) from error


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Replace the manifest: from here on the index is what it names."""
    text = json.dumps({"format": _FORMAT, "version": _VERSION, **content}, indent=1)
    write_whole(folder / MANIFEST_FILE, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None where there is none yet.

    Raises:
        CheckpointError: damaged, or of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"], content["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot be read ({error!r})", item=path, hint="delete it and index again: the shards are kept"
        ) from error
    if found != (_FORMAT, _VERSION):
        raise CheckpointError("not an index of this version of trips", item=path, found=found, expected=_VERSION)
    return content


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, bring it to the disk, and rename it.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f"{uuid.uuid4().hex}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # faiss raises the latter
        raise CheckpointError("cannot be written", item=path, found=str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def clean(folder: Path, keep: set[str]) -> None:
    """Delete shards, vectors and half-written files that the index does not need; `keep` holds names."""
    for place in (folder, folder / SHARDS_FOLDER):
        for path in place.iterdir() if place.is_dir() else ():
            ours = path.suffix in (SHARD_SUFFIX, _PARTIAL) or path.name.startswith("vectors-")
            if ours and path.name not in keep:
                path.unlink(missing_ok=True)


def file_checksum(path: Path) -> str:
    """Checksum of a whole file, against damage only."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error of a file that belongs to an index and cannot be used."""
    return CheckpointError(f"part of an image index is missing or damaged ({reason})", item=path, hint=_AGAIN)


def _checksum(features: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(features).view(np.uint8)):08x}"
