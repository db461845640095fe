"""The features of an index as FAISS searches them: every one of them up to a size, beyond it the likely ones.

Not part of the paper. Features are kept as float16; products are summed in float32. Up to `EXACT_LIMIT` pictures the
search is exact, and the vectors lie in memory (2 P bytes a picture). Beyond it an inverted file sorts them into cells
around centroids, stays on the disk as a memory map, and a query reads the `PROBED` share of the cells whose centroids
are nearest.

Dimensions: n pictures, P projection width, k hits, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from trips.errors import MissingDependencyError
from trips.search.files import Shard, damaged, file_checksum, write_whole

EXACT_LIMIT = 250_000
PROBED = 1 / 16
_CHECKED_BYTES = 1 << 28  # larger vectors are not read as a whole only to open them
_SAMPLE = 64  # vectors per cell that the centroids come from

Kind = Literal["exact", "cells"]


def need_faiss() -> ModuleType:
    """FAISS.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "needed to search an index", item="faiss-cpu", hint='pip install "trips-vlm[search]"'
        ) from error
    return faiss


class Vectors:
    """n features of P numbers, in the order of the shards that they came from.

    Args:
        found: an index of FAISS.
    """

    def __init__(self, found: Any) -> None:
        self._found = found

    def __len__(self) -> int:
        return self._found.ntotal

    def nearest(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest inner products.

        Args:
            query: (P,) float32.
        Returns:
            (k,) products, largest first, and (k,) rows; fewer where there are not so many.
        """
        products, rows = self._found.search(query[None].astype(np.float32), min(k, len(self)))
        return products[0][rows[0] >= 0], rows[0][rows[0] >= 0]


def write_vectors(path: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """Make the vectors of shards, one shard after the other.

    Returns:
        what `open_vectors` compares the file with.
    Raises:
        CheckpointError: a damaged shard, or the file cannot be written.
    """
    faiss, total = need_faiss(), sum(len(shard.rows) for shard in shards)
    kind: Kind = "exact" if total <= EXACT_LIMIT else "cells"
    width = shards[0].features().shape[1]
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    if kind == "exact":
        found = faiss.IndexScalarQuantizer(width, half, product)
    else:
        cells = min(total, int(4 * math.sqrt(total)))
        found = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, cells, half, product, False)
        found.cp.spherical, found.cp.min_points_per_centroid = True, 1  # less says faiss on stderr
        found.nprobe = max(1, math.ceil(cells * PROBED))
        found.train(_sample(shards, min(total, _SAMPLE * cells)))
    for shard in shards:
        found.add(shard.features().astype(np.float32))
    write_whole(path, lambda partial: faiss.write_index(found, str(partial)))
    return {"name": path.name, "kind": kind, "size": path.stat().st_size, "checksum": file_checksum(path)}


def open_vectors(path: Path, size: int, checksum: str, kind: Kind) -> Vectors:
    """Open what `write_vectors` wrote.

    Raises:
        CheckpointError: missing, of another length, or damaged.
    """
    faiss = need_faiss()
    try:
        if path.stat().st_size != size:
            raise damaged(path, f"{path.stat().st_size} of {size} bytes")
        if size <= _CHECKED_BYTES and file_checksum(path) != checksum:
            raise damaged(path, "checksum differs")
        return Vectors(faiss.read_index(str(path), faiss.IO_FLAG_MMAP if kind == "cells" else 0))
    except (OSError, RuntimeError) as error:
        raise damaged(path, error) from error


def _sample(shards: Sequence[Shard], count: int) -> np.ndarray:
    """(count, P) rows, the same share of every shard, drawn alike each time."""
    generator, total = np.random.default_rng(0), sum(len(shard.rows) for shard in shards)
    parts = []
    for shard in shards:
        features = shard.features()
        share = math.ceil(len(features) * count / total)
        parts.append(features[np.sort(generator.permutation(len(features))[:share])])
    return np.concatenate(parts).astype(np.float32)
