"""The decision on given timings: mildest first, nothing slower than no selection, the fastest mode on both sides."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trips import cli
from trips.bench.advise import BASELINE, PRESETS, Goal, decide
from trips.bench.timing import Timing
from trips.config import SelectionConfig
from trips.errors import ConfigError

MILD, HARSH = SelectionConfig(layers=(6, 12)), SelectionConfig(layers=(2, 4), keep_rate=0.5)
TOKENS = [400.0, 200.0, 576.0]  # and last those of no selection


def steady(milliseconds: float) -> Timing:
    return Timing((milliseconds / 1e3,) * 5)


def decided(goal: Goal, **milliseconds: dict[str, float]):
    numbers = {"none": BASELINE, "mild": 0, "harsh": 1}
    timings = {
        (numbers[name], mode): steady(value) for name, modes in milliseconds.items() for mode, value in modes.items()
    }
    return decide(timings, [MILD, HARSH], TOKENS, goal)


def layers(choices) -> list[tuple[int, ...]]:
    return [choice.locations for choice in choices]


def test_what_reaches_the_goal_is_offered_the_mildest_first() -> None:
    speeds = {"none": {"eager": 10.0}, "mild": {"eager": 8.0}, "harsh": {"eager": 5.0}}
    offered, refused, missed = decided(Goal(latency_ms=8.5), **speeds)
    assert layers(offered) == [(6, 12), (2, 4)] and not refused and layers(missed) == [()]
    assert offered[0].measured_ratio == pytest.approx(1.25) and offered[0].latency_ms == pytest.approx(8)
    offered, _, missed = decided(Goal(latency_ms=6), **speeds)
    assert layers(offered) == [(2, 4)] and layers(missed) == [(), (6, 12)]
    offered, _, _ = decided(Goal(), **speeds)
    assert layers(offered) == [(), (6, 12), (2, 4)]  # nothing asked: no selection will do


def test_throughput_is_of_the_whole_batch() -> None:
    speeds = {"none": {"eager": 100.0}, "mild": {"eager": 80.0}, "harsh": {"eager": 50.0}}
    offered, _, _ = decided(Goal(batch_size=8, throughput=100), **speeds)
    assert layers(offered) == [(6, 12), (2, 4)] and offered[0].pairs_per_second == pytest.approx(100)


def test_slower_than_no_selection_is_refused_even_if_it_reaches_the_goal() -> None:
    speeds = {"none": {"eager": 10.0}, "mild": {"eager": 11.0}, "harsh": {"eager": 9.0}}
    offered, refused, _ = decided(Goal(latency_ms=50), **speeds)
    assert layers(offered) == [(), (2, 4)] and layers(refused) == [(6, 12)]
    assert refused[0].slower and refused[0].measured_ratio == pytest.approx(10 / 11)


def test_each_side_takes_its_fastest_mode() -> None:
    speeds = {
        "none": {"eager": 10.0, "graphs": 4.0},
        "mild": {"eager": 8.0, "graphs": 3.5},
        "harsh": {"eager": 5.0, "graphs": 6.0},  # faster than no selection in eager mode, but that is not the rival
    }
    offered, refused, _ = decided(Goal(), **speeds)
    assert [(each.locations, each.mode) for each in offered] == [((), "graphs"), ((6, 12), "graphs")]
    assert [(each.locations, each.mode) for each in refused] == [((2, 4), "eager")]


def test_a_median_below_one_is_refused_noise_or_not() -> None:
    timings = {
        (BASELINE, "eager"): Timing((1.0, 1.1, 0.9, 1.0, 1.05)),
        (0, "eager"): Timing((1.02, 1.0, 1.03, 0.95, 1.1)),
        (1, "eager"): Timing((2.0, 2.2, 1.8, 2.0, 2.1)),
    }
    offered, refused, _ = decide(timings, [MILD, HARSH], TOKENS, Goal())
    assert layers(offered) == [()] and layers(refused) == [(6, 12), (2, 4)]
    assert refused[0].ratio_low < refused[0].measured_ratio < 1 < refused[0].ratio_high


@given(
    st.lists(st.floats(1, 100), min_size=1, max_size=6),
    st.floats(1, 100),
    st.one_of(st.none(), st.floats(1, 100)),
    st.one_of(st.none(), st.floats(10, 1000)),
)
def test_every_setting_lands_once_and_never_slower_than_none(presets, base, latency, throughput) -> None:
    settings = [SelectionConfig(layers=(number + 1,)) for number in range(len(presets))]
    tokens = [500.0 - 10 * number for number in range(len(presets))] + [576.0]
    timings = {(number, "eager"): steady(value) for number, value in enumerate(presets)}
    goal = Goal(4, latency, throughput)
    offered, refused, missed = decide({**timings, (BASELINE, "eager"): steady(base)}, settings, tokens, goal)
    assert sorted(layers((*offered, *refused, *missed))) == sorted([(), *(each.layers for each in settings)])
    assert all(each.latency_ms <= base * (1 + 1e-9) and each.reaches for each in offered)
    assert all(each.latency_ms > base * (1 - 1e-9) for each in refused)
    for group in (offered, refused, missed):
        assert list(group) == sorted(group, key=lambda each: -each.mean_tokens)


def test_goals_are_positive() -> None:
    for options in ({"batch_size": 0}, {"latency_ms": -1.0}, {"throughput": 0.0}):
        with pytest.raises(ConfigError, match="must be positive"):
            Goal(**options)


def test_presets_are_settings() -> None:
    kept = [SelectionConfig(layers=places, keep_rate=rate) for places, rate in PRESETS]
    assert SelectionConfig() in kept and len(set(kept)) == len(kept)


COMMAND = ["advise", "--config", "small", "--text_length", "6", "--rounds", "2", "--settings", "5,10x0.5", "2,4x0.5"]


def test_the_verb_answers_and_fails_if_nothing_is_fast_enough(capsys) -> None:
    assert cli.main([*COMMAND, "--latency_ms", "1e6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["image_size"] == 64 and found["environment"]["torch"] == torch.__version__
    assert found["goal"] == {"batch_size": 1, "latency_ms": 1e6, "throughput": None}
    every = [*found["offered"], *found["refused"], *found["missed"]]
    assert sorted(each["locations"] for each in every) == [[], [2, 4], [5, 10]] and not found["missed"]
    assert {each["mode"] for each in every} == {"eager"}

    assert cli.main([*COMMAND, "--throughput", "1e9"]) == 1
    out = capsys.readouterr().out
    assert "nothing reaches it" in out and "at least 1e+09 pairs/s" in out and "[5,10] x 0.5" in out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--settings", "5;10"], ["settings", "5;10", "5,10x0.7"]),
        (["--settings", "5,40x0.7"], ["40", "1 to 12"]),
        (["--latency_ms", "-1"], ["latency_ms", "positive"]),
        (["--modes", "graphs"], ["CUDA graphs"]),
        (["--precision", "fp16"], ["precision", "float16"]),
        (["--device", "abacus"], ["device", "abacus"]),
    ],
)
def test_mistakes_are_one_line(options: list[str], parts: list[str], capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has graphs and float16")
    assert cli.main(["advise", "--config", "small", "--text_length", "6", "--rounds", "1", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("trips: ") and all(part in lines[-1] for part in parts)
