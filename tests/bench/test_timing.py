"""Interleaving, ratios, batch search and memory, on a clock that is not the machine's."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trips.bench import memory
from trips.bench.matching import match_time
from trips.bench.memory import fitting, free_bytes, largest_batch, peak_bytes
from trips.bench.timing import Timing, interleave, ratio
from trips.errors import ConfigError

seconds = st.floats(1e-4, 1e2)


class FakeMachine:
    """A clock that moves only when a subject runs, and remembers who ran on which input."""

    def __init__(self) -> None:
        self.time, self.calls = 0.0, []

    def subject(self, name: str, takes):
        def run(number: int) -> None:
            self.calls.append((name, number))
            self.time += takes(len(self.calls))

        return run

    def now(self) -> float:
        return self.time


def test_every_round_calls_each_once_on_one_input_and_turns_the_order() -> None:
    machine = FakeMachine()
    subjects = {name: machine.subject(name, lambda calls: 1.0) for name in "abc"}
    interleave(subjects, 5, warmup=2, pool=3, now=machine.now)
    rounds = [machine.calls[start : start + 3] for start in range(0, 21, 3)]
    assert ["".join(name for name, _ in each) for each in rounds] == ["abc", "cba"] * 3 + ["abc"]
    assert [{number for _, number in each} for each in rounds] == [{1}, {2}, {0}, {1}, {2}, {0}, {1}]


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=12))
def test_samples_are_those_of_the_clock_without_the_warm_up(pairs: list[tuple[float, float]]) -> None:
    machine, queues = FakeMachine(), {name: iter([77.0, *each]) for name, each in zip("ab", zip(*pairs))}
    subjects = {name: machine.subject(name, lambda calls, queue=queue: next(queue)) for name, queue in queues.items()}
    found = interleave(subjects, len(pairs), warmup=1, now=machine.now)
    for name, expected in zip("ab", zip(*pairs)):
        assert found[name].seconds == pytest.approx(expected, abs=1e-9)
        assert found[name].median == pytest.approx(statistics.median(expected), abs=1e-9)
        assert min(expected) - 1e-9 <= found[name].p95 <= max(expected) + 1e-9


@given(st.lists(seconds, min_size=3, max_size=15), st.floats(0.2, 5), st.data())
def test_a_ratio_within_rounds_survives_what_slows_both_sides(base, speed, data) -> None:
    busy = [data.draw(st.floats(1, 10)) for _ in base]
    slowed = Timing(tuple(value * load for value, load in zip(base, busy)))
    subject = Timing(tuple(value * load / speed for value, load in zip(base, busy)))
    found = ratio(slowed, subject)
    assert (found.median, found.low, found.high) == pytest.approx((speed,) * 3)


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    found = ratio(Timing((1.0, 2.0, 30.0)), Timing((1.0, 4.0, 10.0)))
    assert found.median == 1.0 and 0.5 < found.low < 1 < found.high < 3
    assert Timing((1.0, 2.0, 3.0)).p95 == pytest.approx(2.9)


def test_no_rounds() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        interleave({"a": lambda number: None}, 0)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_largest_batch_comes_within_a_sixteenth_and_never_asks_beyond_a_failure(limit: int, cap: int) -> None:
    asked, failed = [], []

    def fits(size: int) -> bool:
        assert size <= cap and all(size < bad for bad in failed)
        asked.append(size)
        if size > limit:
            failed.append(size)
        return size <= limit

    best, truth = largest_batch(fits, cap), min(limit, cap)
    assert truth - max(1, truth // 16) < best <= truth
    assert len(asked) == len(set(asked)) <= 30


def test_largest_batch_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="not even one"):
        largest_batch(lambda size: False, 8)
    with pytest.raises(ConfigError, match="max_batch"):
        largest_batch(lambda size: True, 0)


def test_peak_counts_what_is_held_at_once() -> None:
    def run() -> None:
        first = torch.zeros(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB held
        del first
        torch.zeros(500, 1000).add_(second[:500])  # 4 and 2 MB

    assert peak_bytes(run, torch.device("cpu")) == pytest.approx(8e6, rel=1e-3)


def test_on_a_cpu_a_batch_is_predicted_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(batch: int) -> torch.Tensor:
        tried.append(batch)
        return torch.zeros(50_000 + batch * 250_000)  # 0.2 MB and 1 MB a pair

    monkeypatch.setattr(memory, "free_bytes", lambda: int(12.7e6 / 0.8))
    fits = fitting(run, torch.device("cpu"))
    assert [fits(size) for size in (1, 12, 13)] == [True, True, False] and tried == [1, 2]
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    assert fitting(run, torch.device("cpu"))(10**9) and tried == [1, 2]


def test_free_memory_is_plausible() -> None:
    free = free_bytes()
    assert free is None or 2**20 < free < 2**50


@given(st.integers(1, 40), st.floats(0.05, 45))
def test_match_time_finds_the_nearest_setting(last: int, equal_at: float) -> None:
    asked = []

    def speed(setting: int) -> float:
        asked.append(setting)
        return equal_at / setting

    found = match_time(speed, 1, last)
    assert abs(found - min(max(equal_at, 1), last)) <= 1
    assert len(asked) == len(set(asked)) <= 8
    low, high = int(equal_at), int(equal_at) + 1
    if 1 <= low and high <= last:  # the better of the two neighbours
        best = min(low, high, key=lambda each: max(equal_at / each, each / equal_at))
        assert found == best or max(equal_at / found, found / equal_at) == pytest.approx(
            max(equal_at / best, best / equal_at)
        )


def test_match_time_needs_a_range() -> None:
    with pytest.raises(ConfigError, match="no setting"):
        match_time(lambda setting: 1.0, 2, 1)
