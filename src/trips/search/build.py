"""The steps of an indexing run: what is there already, what is to be computed, and one set of shards of both.

Not part of the paper. The first process plans and merges; every process computes a part. Features are written as they
come, so memory holds those of one shard, and beside them the names of all pictures.

Dimensions: n pictures, P projection width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trips.data.records import BadSamples
from trips.errors import CheckpointError
from trips.search.features import Trained, encode_photos
from trips.search.files import SHARD_SUFFIX, SHARDS_FOLDER, Shard, read_shard, write_shard
from trips.search.sources import Photo, Row

logger = logging.getLogger("trips")

SHARD_SIZE = 4096  # pictures; a shard of at least half of it is left as it is when others are joined
SAVE_EVERY = 20.0  # seconds of work that a kill may cost, besides the batch that is being computed


@dataclass(frozen=True)
class Work:
    """What an indexing run has to do.

    Attributes:
        wanted: what is in the collection, by key.
        todo: those without features, in the order of keys.
        known: whole shards, those of the last index first.
        seen: names of all shards that were there, the damaged ones among them.
    """

    wanted: dict[str, Row]
    todo: list[Photo]
    known: list[Shard]
    seen: set[str]


def plan_work(folder: Path, fingerprint: str, photos: Sequence[Photo], listed: Sequence[str]) -> Work:
    """Compare a collection with the shards of an index, those of a killed run among them.

    Args:
        folder: of the index.
        fingerprint: of the model; shards of another do not count.
        photos: the collection.
        listed: names of the shards of the last index; one that is damaged is named in the log, its pictures are due.
    """
    known = []
    names = [*listed, *sorted({path.name for path in _shard_files(folder)} - set(listed))]
    for name in names:
        try:
            shard = read_shard(folder / SHARDS_FOLDER / name)
            if shard.fingerprint == fingerprint:
                shard.features()  # so that damage shows while its pictures can still be computed
                known.append(shard)
        except CheckpointError as error:
            logger.warning("computed anew: %s", error)
    wanted = {photo.key: photo.row for photo in photos}
    done = {row for shard in known for row in shard.rows}
    return Work(wanted, [photo for photo in photos if photo.row not in done], known, set(names))


def add_features(
    folder: Path,
    fingerprint: str,
    trained: Trained,
    photos: Sequence[Photo],
    bad: BadSamples,
    *,
    workers: int = 0,
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Compute the features of pictures into shards, each written as soon as it is full or `SAVE_EVERY` has passed."""
    rows: list[Row] = []
    parts: list[np.ndarray] = []
    saved = time.monotonic()
    for used, features, count in encode_photos(trained, photos, bad, workers=workers):
        rows += [photo.row for photo in used]
        parts.append(features.astype(np.float16))
        if rows and (len(rows) >= SHARD_SIZE or time.monotonic() - saved >= SAVE_EVERY):
            write_shard(folder, fingerprint, rows, np.concatenate(parts))
            rows, parts, saved = [], [], time.monotonic()
        on_done(count)
    if rows:
        write_shard(folder, fingerprint, rows, np.concatenate(parts))


def merge_shards(folder: Path, fingerprint: str, work: Work) -> list[Shard]:
    """One shard for every picture of the collection that has features: the good ones as they are, the rest joined.

    Small shards and those with pictures that are gone are written anew; the old ones stay until the manifest is.
    """
    new = sorted(path for path in _shard_files(folder) if path.name not in work.seen)
    shards = [*work.known, *map(read_shard, new)]
    taken: set[str] = set()
    whole, parts = [], []
    for shard in shards:
        live = []
        for place, row in enumerate(shard.rows):
            if shard.fingerprint == fingerprint and work.wanted.get(row[0]) == row and row[0] not in taken:
                taken.add(row[0])
                live.append(place)
        if len(live) == len(shard.rows) and len(live) >= SHARD_SIZE / 2:
            whole.append(shard)
        elif live:
            parts.append((shard, live))
    if len(parts) == 1 and len(parts[0][1]) == len(parts[0][0].rows):
        return [*whole, parts[0][0]]
    return [*whole, *(write_shard(folder, fingerprint, *part) for part in _joined(parts))]


def _joined(parts: Sequence[tuple[Shard, list[int]]]) -> Iterator[tuple[list[Row], np.ndarray]]:
    """Rows and features of the live pictures of shards, `SHARD_SIZE` at a time."""
    rows: list[Row] = []
    features: list[np.ndarray] = []
    for shard, live in parts:
        rows += [shard.rows[place] for place in live]
        features.append(shard.features()[live])
        while len(rows) >= SHARD_SIZE:
            held = np.concatenate(features)
            yield rows[:SHARD_SIZE], held[:SHARD_SIZE]
            rows, features = rows[SHARD_SIZE:], [held[SHARD_SIZE:]]
    if rows:
        yield rows, np.concatenate(features)


def _shard_files(folder: Path) -> Iterator[Path]:
    return (folder / SHARDS_FOLDER).glob(f"*{SHARD_SUFFIX}")
