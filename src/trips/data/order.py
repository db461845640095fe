"""In which order samples come: a pure function of seed, epoch and position, and of nothing else.

Feeds pre-training (4.1). Each epoch the shards of a corpus are permuted and taken in blocks of a few, and the samples
of a block are permuted: near to a full shuffle, yet only the shards of a block are open, or in a local cache, at once.
Several corpora are mixed by one more permutation.

The pipeline of the webdataset library is not used: its shuffle buffers fill in the order in which workers read, so
that the samples depend on the number of workers and processes, and a run cannot be resumed in the middle of an epoch
without reading all that came before. Here resuming is starting at another position.

Legend: N samples of a corpus; a round is one pass over a corpus, which is an epoch where the weight is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from trips.errors import ConfigError


class Place(NamedTuple):
    """Where a sample lies.

    Attributes:
        corpus, shard, sample: positions in the lists of corpora, of shards, of samples.
        round: how many whole passes over this corpus came before.
    """

    corpus: int
    shard: int
    sample: int
    round: int


class CorpusOrder:
    """Endless order of one corpus: rounds, each a permutation of all N samples.

    Args:
        counts: samples of each shard.
        seed: two corpora with different seeds have independent orders.
        block_shards: shards whose samples are mixed.
    Raises:
        ConfigError: `block_shards` below 1, or no samples.
    """

    def __init__(self, counts: Sequence[int], seed: tuple[int, ...], block_shards: int) -> None:
        if block_shards < 1:
            raise ConfigError("must be positive", item="shuffle_shards", found=block_shards)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.block_shards = seed, block_shards
        self.num_samples = int(self.counts.sum())
        if not self.num_samples:
            raise ConfigError("no samples to put in order", item="counts", found=len(counts))
        self._rounds: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def locate(self, position: int) -> tuple[int, int, int]:
        """Shard, sample and round at a position, 0 or more, of the endless order."""
        round_, place = divmod(position, self.num_samples)
        shards, ends, block_starts = self._round(round_)
        block = int(np.searchsorted(block_starts, place, side="right")) - 1
        start = int(block_starts[block])
        size = int(block_starts[block + 1]) - start
        place = start + int(_permutation((*self.seed, round_, 1 + block), size)[place - start])
        k = int(np.searchsorted(ends, place, side="right"))
        return int(shards[k]), place - int(ends[k] - self.counts[shards[k]]), round_

    def _round(self, round_: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Permuted shards, the running sum of their samples, and the places where blocks start, the end included."""
        if round_ not in self._rounds:
            if len(self._rounds) >= 4:  # neighbouring rounds alternate where an epoch ends; more are never in use
                self._rounds.clear()
            shards = _permutation((*self.seed, round_, 0), len(self.counts))
            ends = np.cumsum(self.counts[shards])
            # An empty block repeats a start; the search from the right never stops there.
            starts = np.append(np.append(0, ends)[: len(ends) : self.block_shards], ends[-1])
            self._rounds[round_] = shards, ends, starts
        return self._rounds[round_]


class MixedOrder:
    """Epochs over several corpora, each of the same length and mixed evenly at random.

    A corpus of weight w gives round(w * N) samples to every epoch, at least 1, and goes on in the next epoch where it
    stopped: weight 1 is every sample once, 0.5 half of them and then the other half, 2 every sample twice.

    Args:
        corpora: their orders.
        weights: one positive number each.
        seed: of the mixing.
    Raises:
        ConfigError: a weight is not a positive number.
    """

    def __init__(self, corpora: Sequence[CorpusOrder], weights: Sequence[float], seed: int) -> None:
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise ConfigError("not a positive number", item="weight", found=weight)
        self.corpora, self.seed = list(corpora), seed
        self.per_epoch = tuple(
            max(1, round(weight * corpus.num_samples)) for corpus, weight in zip(corpora, weights, strict=True)
        )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.per_epoch)

    def locate(self, epoch: int, position: int) -> Place:
        """Sample at a position of an epoch.

        Raises:
            IndexError: position not in 0 to len - 1, or a negative epoch.
        """
        if not 0 <= position < len(self) or epoch < 0:
            raise IndexError(f"position {position} of epoch {epoch}; an epoch has {len(self)}")
        corpus = 0
        if len(self.corpora) > 1:
            corpora, ranks = _mixture((self.seed, epoch), self.per_epoch)
            corpus, position = int(corpora[position]), int(ranks[position])
        shard, sample, round_ = self.corpora[corpus].locate(epoch * self.per_epoch[corpus] + position)
        return Place(corpus, shard, sample, round_)


# Kept, because neighbouring positions ask for the same; a function of its arguments alone, so nothing can go stale.
@lru_cache(maxsize=32)
def _permutation(seed: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(count, dtype=np.int32))


@lru_cache(maxsize=2)
def _mixture(seed: tuple[int, ...], per_epoch: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Corpus at each position of an epoch, and how many of that corpus came before; 6 bytes a position."""
    corpora = np.repeat(np.arange(len(per_epoch), dtype=np.int16), per_epoch)
    corpora = np.random.default_rng((*seed, 0)).permutation(corpora)
    ranks = np.empty(len(corpora), dtype=np.int32)
    for corpus, count in enumerate(per_epoch):
        ranks[corpora == corpus] = np.arange(count, dtype=np.int32)
    return corpora, ranks
