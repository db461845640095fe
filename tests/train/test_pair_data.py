"""Batches of pairs are a function of the step: any start, any number of processes or workers gives the same."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_server import serve
from hypothesis import given
from hypothesis import strategies as st
from pair_shards import SIZE, jpeg, pair_processor, sample, write_corpus, write_tar
from PIL import Image

from trips.data.order import CorpusOrder, MixedOrder
from trips.data.pair_batches import PairCollator
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.errors import ConfigError, DataError, TripsError
from trips.train.pair_data import PairTrainingData

PROCESSOR = pair_processor()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Two corpora of 11 and 6 samples in 4 and 1 shards; one of two texts, with two bad samples."""
    folder = tmp_path_factory.mktemp("corpora")
    first = write_corpus(folder / "first", [3, 4, 0, 4], num_texts=2)
    write_tar(
        folder / "second" / "00000.tar",
        {str(i): sample(100 + i) for i in range(4)}
        | {"bad": {"jpg": jpeg()[:99], "txt": b"a dog"}, "nul": {"jpg": jpeg(), "txt": b"\0"}},
    )
    return [Corpus("first", first), Corpus("second", str(folder / "second" / "*.tar"), 0.5)]


def data(corpora: list[Corpus], batch_size: int = 4, counted: bool = True, **options: Any) -> PairTrainingData:
    arrangement = {key: options.pop(key) for key in ("seed", "cache", "shuffle_shards") if key in options}
    made = PairDataset(corpora, PROCESSOR, bad_samples=BadSamples() if counted else None, **{"seed": 3, **arrangement})
    return PairTrainingData(made, PairCollator(PROCESSOR), batch_size, **{"rank": 0, "num_processes": 1, **options})


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [1, 2, 3])  # more than the shards of the second corpus
def test_workers_change_nothing(corpora: list[Corpus], workers: int) -> None:
    alone, shared = data(corpora), data(corpora, num_workers=workers)
    before = torch.get_rng_state()
    batches = list(alone.batches(0, 7))
    assert all(same(a, b) for a, b in zip(batches, shared.batches(0, 7), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert alone.dataset.bad_samples.errors == shared.dataset.bad_samples.errors
    assert alone.dataset.bad_samples.errors.keys() == {"second/00000.tar:bad", "second/00000.tar:nul"}
    assert alone.dataset.bad_samples.num_seen == shared.dataset.bad_samples.num_seen == 17


def test_workers_leave_ctrl_c_to_their_parent(corpora: list[Corpus]) -> None:
    def transform(image: Image.Image, rng: np.random.Generator, text: str) -> tuple[np.ndarray, str]:
        return np.full((SIZE, SIZE, 3), signal.getsignal(signal.SIGINT) is signal.SIG_IGN, np.uint8), text

    for workers in (0, 1):
        made = data(corpora, num_workers=workers)
        made.dataset.transform = transform
        pixels = next(made.batches(0, 1))["pixel_values"]
        assert torch.equal(pixels[:1], PROCESSOR.normalise([np.full((SIZE, SIZE, 3), workers, np.uint8)]))


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_in_their_order_make_up_the_batch_of_one_process(corpora: list[Corpus], processes: int) -> None:
    size = 2 * processes
    ranks = [data(corpora, size, num_processes=processes, rank=rank).batches(1, 4) for rank in range(processes)]
    for whole, *parts in zip(data(corpora, size).batches(1, 4), *ranks, strict=True):
        assert all(len(part["sources"]) == 2 for part in parts)
        for key in whole.keys() - {"mlm_positions", "retries"}:
            if isinstance(whole[key], torch.Tensor):
                assert torch.equal(whole[key], torch.cat([part[key] for part in parts])), key
            else:
                assert whole[key] == [entry for part in parts for entry in part[key]]
        length = whole["input_ids"].shape[1]
        places = [part["mlm_positions"] + rank * 2 * length for rank, part in enumerate(parts)]
        assert torch.equal(whole["mlm_positions"], torch.cat(places))


class _Positions:
    """Stands in for a dataset where only the order matters."""

    def __init__(self, order: MixedOrder) -> None:
        self.order, self.locate = order, order.locate

    def __len__(self) -> int:
        return len(self.order)


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), min_size=1, max_size=3),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    share=st.integers(1, 5),
    processes=st.integers(1, 3),
    start=st.integers(0, 60),
    seed=st.integers(0, 9),
)
def test_any_start_of_any_mix_is_the_tail_and_an_epoch_has_every_sample_once(
    counts: list[list[int]], weight: float, share: int, processes: int, start: int, seed: int
) -> None:
    orders = [CorpusOrder(shards, (seed, i), 2) for i, shards in enumerate(counts)]
    mixed = MixedOrder(orders, [weight] + [1.0] * (len(counts) - 1), seed)
    size = share * processes
    if size > len(mixed):
        return

    def steps(first: int, number: int) -> list[list[tuple[int, ...]]]:
        # Built anew: nothing may be remembered.
        fresh = _Positions(
            MixedOrder([CorpusOrder(o.counts, o.seed, 2) for o in orders], [weight, 1.0, 1.0][: len(orders)], seed)
        )
        ranks = [PairTrainingData(fresh, None, size, rank=r, num_processes=processes) for r in range(processes)]  # type: ignore[arg-type]
        places = [[key for rank in ranks for key in rank.positions(step)] for step in range(first, first + number)]
        return [[(epoch, *fresh.locate(epoch, position)) for epoch, position in step] for step in places]

    per_epoch = len(mixed) // size
    assert steps(start, 3) == steps(0, start + 3)[start:]
    epoch = start // per_epoch
    flat = [place for step in steps(epoch * per_epoch, per_epoch) for place in step]
    assert {place[0] for place in flat} == {epoch} and len(flat) == per_epoch * size > len(mixed) - size
    repeats = Counter(place[1:4] for place in flat if place[1] != 0 or weight == 1.0)
    assert set(repeats.values()) <= {1}


@given(start=st.integers(0, 12), number=st.integers(1, 3))
def test_batches_from_any_step_are_the_tail(corpora: list[Corpus], start: int, number: int) -> None:
    whole = _whole(corpora)
    part = list(data(corpora).batches(start, number))
    assert len(part) == number and all(same(a, b) for a, b in zip(whole[start:], part))


_WHOLE: list[dict[str, Any]] = []


def _whole(corpora: list[Corpus]) -> list[dict[str, Any]]:
    if not _WHOLE:
        _WHOLE.extend(data(corpora).batches(0, 15))
    return _WHOLE


def test_resuming_with_other_workers_in_the_middle_of_an_epoch(corpora: list[Corpus]) -> None:
    made = data(corpora, num_workers=2)
    assert made.steps_per_epoch == 3
    assert all(same(a, b) for a, b in zip(_whole(corpora)[5:], made.batches(5, 10), strict=True))
    other = next(data(corpora, seed=4).batches(5, 1))
    assert not same(other, _whole(corpora)[5])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_network_loses_nothing(tmp_path: Path, workers: int) -> None:
    write_corpus(tmp_path / "www", [4] * 40)
    waits: list[float] = []
    with serve(tmp_path / "www", drop_every=20, cut_every=50) as server:
        # Room for a quarter of the shards, so that many are fetched more than once.
        sizes = [path.stat().st_size for path in sorted((tmp_path / "www").iterdir())]
        store = ShardCache(tmp_path / "cache", max_bytes=sum(sizes[:10]), sleep=waits.append)
        corpus = Corpus("web", f"{server.url}/{{00000..00039}}.tar")
        made = data([corpus], 8, cache=store, shuffle_shards=4, num_workers=workers)
        sources = [source for batch in made.batches(0, 60) for source in batch["sources"]]
        assert all(len(set(sources[i : i + 160])) == 160 for i in (0, 160, 320)) and not made.dataset.bad_samples.errors
        assert server.dropped >= 4 and server.cut >= 2
        assert server.cut <= made.retries <= server.cut + server.dropped
        if not workers:
            assert made.retries == len(waits)
    local = data([Corpus("web", str(tmp_path / "www" / "*.tar"))], 8, shuffle_shards=4)
    assert [source for batch in local.batches(0, 60) for source in batch["sources"]] == sources


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_they_were_raised(tmp_path: Path, corpora: list[Corpus], workers: int) -> None:
    with pytest.raises(DataError, match=r"^second/00000\.tar:(bad|nul): ") as caught:
        list(data(corpora, counted=False, num_workers=workers).batches(0, 6))
    assert "Traceback" not in str(caught.value)
    limited = data(corpora, num_workers=workers)
    limited.dataset.bad_samples.limit = 1
    with pytest.raises(DataError, match="too many bad samples"):
        list(limited.batches(0, 6))
    write_corpus(tmp_path / "www", [8] * 3)
    with serve(tmp_path / "www") as server:
        store = ShardCache(tmp_path / "cache", max_tries=2, sleep=lambda _: None)
        made = data([Corpus("web", f"{server.url}/{{00000..00002}}.tar")], cache=store, num_workers=workers)
        for path in store.folder.glob("*.tar"):
            path.unlink()
    with pytest.raises(DataError, match=r"^http.*cannot be fetched in 2 attempts") as caught:
        list(made.batches(0, 6))
    assert "Traceback" not in str(caught.value) and isinstance(caught.value, TripsError)


def test_a_batch_without_negatives_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {str(i): {"jpg": jpeg(i), "txt": b"a dog"} for i in range(4)})
    with pytest.raises(DataError, match="^batch of step 1, rank 0: no hard negative"):
        list(data([Corpus("a", str(tmp_path / "a.tar"))], 2).batches(1, 1))


def test_a_cache_too_small_for_a_block_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "www", [1] * 3)
    size = (tmp_path / "www" / "00000.tar").stat().st_size
    with serve(tmp_path / "www") as server:
        corpus = Corpus("web", f"{server.url}/{{00000..00002}}.tar")
        store = ShardCache(tmp_path / "cache", max_bytes=2 * size)
        data([corpus], 3, cache=store, shuffle_shards=2)
        with pytest.raises(ConfigError, match=f"max_bytes.*at least {3 * size}"):
            data([corpus], 3, cache=store)


def test_batch_size_must_fit(corpora: list[Corpus]) -> None:
    for batch_size, processes in ((15, 1), (0, 1), (3, 2)):
        with pytest.raises(ConfigError, match="batch_size"):
            data(corpora, batch_size, num_processes=processes)
