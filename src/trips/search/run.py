"""An indexing run as its first process sees it: lock, plan, one index of what all processes have made, report.

Not part of the paper. The index lies in a folder of its own, by default inside the collection.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trips.data.records import BadSamples
from trips.errors import CheckpointError, DataError
from trips.search import files
from trips.search.build import Work, merge_shards, plan_work
from trips.search.features import Trained
from trips.search.sources import Photo, check_source, list_photos
from trips.search.vectors import open_vectors, write_vectors

logger = logging.getLogger("trips")

INDEX_FOLDER = ".trips-index"


@dataclass(frozen=True)
class IndexReport:
    """What an indexing run did.

    Attributes:
        total: pictures in the index.
        computed: new or changed ones, this run's work.
        kept: those whose features were there already, also from a run that was killed.
        removed: pictures of the last index that are gone.
        bad: pictures, tars and folders that cannot be read, each with the reason.
        seconds: of the run.
    """

    total: int
    computed: int
    kept: int
    removed: int
    bad: dict[str, str] = field(repr=False)
    seconds: float


@dataclass
class IndexingRun:
    """What the first process of an indexing run does before the work and after it.

    Args:
        root: the collection. folder: of the index.
        model: with its `fingerprint`.
        hashed: see `trips.search.index.ImageIndex.build`.
        bad: counts what cannot be read.
    """

    root: Path
    folder: Path
    model: Trained
    fingerprint: str
    hashed: bool | None
    bad: BadSamples
    _lock: FileLock | None = None
    _manifest: dict[str, Any] | None = None
    _work: Work | None = None

    def start(self) -> list[Photo]:
        """Lock the index, compare it with the collection: the pictures that are to be computed."""
        check_source(self.root)  # before a folder for the index is made in it
        self._acquire()
        self._manifest = files.read_manifest(self.folder)
        if self._manifest is not None:
            check_model(self.folder, self._manifest, self.fingerprint)
        if self.hashed is None:
            self.hashed = bool(self._manifest and self._manifest["hashed"])
        photos = list_photos(self.root, self.bad, hashed=self.hashed)
        if not photos:
            hint = self.bad.summary() if len(self.bad) else None
            raise DataError("holds no images", item=self.root, hint=hint)
        listed = self._manifest["shards"] if self._manifest else []
        self._work = plan_work(self.folder, self.fingerprint, photos, listed)
        return self._work.todo

    def finish(self, bad: dict[str, str], begun: float) -> IndexReport:
        """Make one index of all shards: the vectors, then the manifest; then what neither needs is deleted."""
        work = self._work
        shards = merge_shards(self.folder, self.fingerprint, work)
        total = sum(len(shard.rows) for shard in shards)
        if not total:
            reason = next(iter(bad.values()))
            raise DataError("no image can be read", item=self.root, found=f"{len(work.wanted)} files", hint=reason)
        names, before = [shard.path.name for shard in shards], self._manifest or {"shards": [], "vectors": None}
        if names != before["shards"] or not self._whole(before["vectors"]):
            vectors = write_vectors(self.folder / f"vectors-{uuid.uuid4().hex}.faiss", shards)
        else:
            vectors = before["vectors"]
        relative = self.folder == default_folder(self.root)  # such an index moves with its pictures
        content = {
            "source": os.path.relpath(self.root, self.folder) if relative else str(self.root),
            "model": {"fingerprint": self.fingerprint, "name": self.model.model.config._name_or_path},
            "hashed": self.hashed,
            "shards": names,
            "vectors": vectors,
        }
        old = {row[0] for shard in work.known if shard.path.name in before["shards"] for row in shard.rows}
        files.write_manifest(self.folder, content)
        files.clean(self.folder, {*names, vectors["name"]})
        computed = total - (len(work.wanted) - len(work.todo))
        removed = len(old - work.wanted.keys())
        return IndexReport(total, computed, total - computed, removed, bad, time.perf_counter() - begun)

    def release(self) -> None:
        """Give the lock back; without one, nothing happens."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _whole(self, vectors: dict[str, Any]) -> bool:
        try:
            open_vectors(self.folder / vectors["name"], vectors["size"], vectors["checksum"], vectors["kind"])
        except CheckpointError as error:
            logger.warning("made anew: %s", error)
            return False
        return True

    def _acquire(self) -> None:
        """Take the index for this run; the system takes the lock back from a process that dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / files.LOCK_FILE, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise CheckpointError("another run is writing this index", item=self.folder, hint="wait for it") from error
        except OSError as error:
            hint = "choose another folder for the index"
            raise CheckpointError("cannot be written", item=self.folder, found=str(error), hint=hint) from error
        self._lock = lock


def check_model(folder: Path, manifest: dict[str, Any], fingerprint: str) -> None:
    """Refuse a model that did not make the index: features of two models do not compare.

    Raises:
        CheckpointError: as said.
    """
    made = manifest["model"]
    if made["fingerprint"] != fingerprint:
        raise CheckpointError(
            "the index was made by another model",
            item=folder,
            found=made.get("name") or made["fingerprint"],
            expected="the model given",
            hint="open it with its own model, or index into another folder",
        )


def default_folder(source: Path) -> Path:
    """Where the index of a collection is by default: in its folder, or beside its tar."""
    return source.with_name(source.name + INDEX_FOLDER) if source.is_file() else source / INDEX_FOLDER


def find_index(path: str | Path) -> Path:
    """The folder of an index: what was given, or the default folder of the collection that was given."""
    folder = Path(os.path.abspath(path))
    return folder if (folder / files.MANIFEST_FILE).is_file() else default_folder(folder)


def model_of(path: str | Path) -> str | None:
    """Folder or name of the model that an index was made with, as it was then; None if it is not known.

    Raises:
        CheckpointError: no index, or a damaged one.
    """
    folder = find_index(path)
    manifest = files.read_manifest(folder)
    if manifest is None:
        raise CheckpointError("no image index", item=path, expected=f"{INDEX_FOLDER} in it", hint="trips index")
    return manifest["model"].get("name") or None
