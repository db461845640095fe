"""The keep rate falls in few levels to the base's, and distillation steps are where they are said to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.train.schedule import SelectionSchedule


@given(
    total=st.integers(1, 300),
    share=st.floats(0, 1),
    levels=st.integers(2, 6),
    rates=st.lists(st.floats(0.05, 1), min_size=2, max_size=2),
)
def test_keep_rate_warm_up(total: int, share: float, levels: int, rates: list[float]) -> None:
    base = SelectionConfig(layers=(2, 4), keep_rate=tuple(rates))
    schedule = SelectionSchedule(base, total, share, levels)
    seen = [schedule.at(step)[0] for step in range(total + 1)]
    assert len(set(seen)) <= levels
    assert all(a >= b for x, y in zip(seen, seen[1:]) for a, b in zip(x.rates, y.rates))
    assert seen[-1] == base and all(s == base for s in seen[round(total * share) :])
    assert all(s.replace(keep_rate=base.keep_rate) == base for s in seen)
    if round(total * share) >= levels:
        assert seen[0].rates == (1.0, 1.0)
        # Every level lasts as long as the others, to within a step.
        lengths = [
            sum(s.rates == r for s in seen[: round(total * share)]) for r in dict.fromkeys(s.rates for s in seen)
        ]
        if min(rates) < 0.9 and share < 1:
            assert max(lengths[:-1]) - min(lengths[:-1]) <= 1


def test_levels_by_hand() -> None:
    schedule = SelectionSchedule(SelectionConfig(keep_rate=0.7), total_steps=12, keep_rate_warmup=0.5, levels=4)
    rates = [schedule.at(step)[0].keep_rate for step in range(8)]
    assert rates == [1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7]


def test_distillation_steps() -> None:
    base = SelectionConfig(learning="distill")
    schedule = SelectionSchedule(base, total_steps=12, keep_rate_warmup=0.5, levels=3, distill_every=4)
    assert [step for step in range(12) if schedule.at(step)[1]] == [0, 1, 2, 4, 8]
    off = SelectionSchedule(base, total_steps=12, distill_every=4)
    assert [step for step in range(12) if off.at(step)[1]] == [0, 4, 8]


@pytest.mark.parametrize(
    "base",
    [SelectionConfig(), SelectionConfig(learning="gate"), SelectionConfig(learning="distill", guide="none")],
    ids=["literal", "gate", "baseline"],
)
def test_nothing_to_distil(base: SelectionConfig) -> None:
    schedule = SelectionSchedule(base, total_steps=8, keep_rate_warmup=0.5)
    assert not any(schedule.at(step)[1] for step in range(8))


def test_the_baseline_and_an_empty_warm_up_stay_at_the_base() -> None:
    for base, share in ((SelectionConfig(guide="none"), 0.5), (SelectionConfig(), 0.0)):
        schedule = SelectionSchedule(base, total_steps=8, keep_rate_warmup=share)
        assert all(schedule.at(step) == (base, False) for step in range(9))


@pytest.mark.parametrize(
    "change", [{"keep_rate_warmup": 1.5}, {"levels": 1}, {"distill_every": 0}, {"total_steps": -1}]
)
def test_bad_values_name_the_field(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SelectionSchedule(**{"base": SelectionConfig(), "total_steps": 4, **change})
