"""Which selection is worth its while on this machine: measured, and never one that is slower than none.

At a small batch a forward pass can wait more for its launches than for its products, and a selection then costs more
than it saves. So every setting is timed in every mode that there is, and stands against no selection in its fastest
mode; what is slower in the median of the rounds is refused, noise or not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trips.bench.measurement import Bench, Variant
from trips.bench.methods import METHODS, NO_SELECTION, mean_tokens
from trips.bench.plan import SpeedPlan
from trips.bench.subjects import Mode, Part, Precision, pair_model
from trips.bench.timing import Timing, ratio
from trips.config import SelectionConfig
from trips.environment import describe_environment
from trips.errors import ConfigError

logger = logging.getLogger(__name__)

# Locations in a tower of 12 layers and keep rates, from mild to harsh; those of the paper's Table 4 among them.
PRESETS: tuple[tuple[tuple[int, ...], float], ...] = (
    ((6, 12), 0.7),
    ((5, 10), 0.7),
    ((4, 8), 0.7),
    ((5, 10), 0.5),
    ((2, 6, 10), 0.7),
    ((4, 8), 0.5),
    ((2, 4), 0.5),
)
BASELINE = -1  # number of "no selection" among the presets

Timings = Mapping[tuple[int, Mode], Timing]  # of preset number and mode


@dataclass(frozen=True)
class Goal:
    """What is wanted of a batch.

    Attributes:
        batch_size: pairs at once.
        latency_ms: most that the median may take. throughput: fewest pairs per second. None asks for nothing.
    Raises:
        ConfigError: a goal that is not positive.
    """

    batch_size: int = 1
    latency_ms: float | None = None
    throughput: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "latency_ms", "throughput"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError("must be positive", item=name, found=value)

    def reached(self, timing: Timing) -> bool:
        """Whether a timing is good enough."""
        fast = self.latency_ms is None or 1e3 * timing.median <= self.latency_ms
        return fast and (self.throughput is None or self.batch_size / timing.median >= self.throughput)


@dataclass(frozen=True)
class Choice:
    """A setting in its fastest mode.

    Attributes:
        locations, keep_rates: empty for no selection.
        mode: the one of those measured in which it is fastest.
        latency_ms, p95_ms, pairs_per_second: of a batch.
        measured_ratio, ratio_low, ratio_high: how many times as fast as no selection in the fastest mode of that,
            within rounds, see `trips.bench.timing.Ratio`.
        mean_tokens: patch tokens that a layer sees on average: the more, the less has been taken away.
        reaches: the goal. slower: than no selection, in the median of the rounds.
    """

    locations: tuple[int, ...]
    keep_rates: tuple[float, ...]
    mode: Mode
    latency_ms: float
    p95_ms: float
    pairs_per_second: float
    measured_ratio: float
    ratio_low: float
    ratio_high: float
    mean_tokens: float
    reaches: bool
    slower: bool


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        ok: whether anything reaches the goal.
        offered: settings that reach it and are not slower than no selection; the mildest first.
        refused: slower than no selection on this machine.
        missed: neither.
        best: the fastest of those not refused.
        goal, environment, image_size: what was asked, of which machine, at which size.
    """

    ok: bool
    offered: tuple[Choice, ...]
    refused: tuple[Choice, ...]
    missed: tuple[Choice, ...]
    best: Choice
    goal: Goal
    image_size: int
    environment: dict[str, Any]


def decide(
    timings: Timings, presets: Sequence[SelectionConfig], tokens: Sequence[float], goal: Goal
) -> tuple[tuple[Choice, ...], tuple[Choice, ...], tuple[Choice, ...]]:
    """What is offered, refused and missed.

    Args:
        timings: of every preset, by its number, and of `BASELINE`, in every mode, from one interleaving.
        presets: settings.
        tokens: their mean tokens, and last those of no selection.
        goal: what is wanted.
    Returns:
        Three lists, the mildest setting first.
    """
    modes: dict[int, list[Mode]] = {}
    for number, mode in timings:
        modes.setdefault(number, []).append(mode)
    fastest = {
        number: min(known, key=lambda mode, number=number: timings[number, mode].median)
        for number, known in modes.items()
    }
    baseline = timings[BASELINE, fastest[BASELINE]]
    offered, refused, missed = [], [], []
    for number, mode in fastest.items():
        timing, selection = timings[number, mode], None if number == BASELINE else presets[number]
        found = ratio(baseline, timing)
        choice = Choice(
            locations=() if selection is None else selection.layers,
            keep_rates=() if selection is None else selection.rates,
            mode=mode,
            latency_ms=1e3 * timing.median,
            p95_ms=1e3 * timing.p95,
            pairs_per_second=goal.batch_size / timing.median,
            measured_ratio=found.median,
            ratio_low=found.low,
            ratio_high=found.high,
            mean_tokens=tokens[number],
            reaches=goal.reached(timing),
            slower=found.median < 1,
        )
        (refused if choice.slower else offered if choice.reaches else missed).append(choice)
    return tuple(tuple(sorted(each, key=lambda choice: -choice.mean_tokens)) for each in (offered, refused, missed))


def advise(
    model: Any,
    goal: Goal,
    presets: Sequence[SelectionConfig],
    *,
    image_size: int | None = None,
    text_length: int = 40,
    modes: Sequence[Mode] | None = None,
    part: Part = "forward",
    precision: Precision = "fp32",
    rounds: int = 9,
) -> Advice:
    """Time settings on this machine and say which reach a goal.

    Args:
        model: a pipeline, a task model or a `TripsModel`, on its device and in the precision.
        goal: what is wanted.
        presets: settings to try.
        image_size: pixels of a side; else those of the vision tower.
        text_length: text tokens.
        modes: to try; None takes all that work here without waiting for a compiler: eager, on a GPU CUDA graphs.
        part: "forward" or "vision".
        precision: that of the model, for the record.
        rounds: calls of each that count.
    Raises:
        ConfigError, UnsupportedModelError: see `trips.bench.speed.measure_speed`.
    """
    inner = pair_model(model).eval()
    size = image_size or inner.config.vision_config.image_size
    device = next(inner.parameters()).device
    if modes is None:
        modes = ("eager", "graphs") if device.type == "cuda" else ("eager",)
    if not presets or not modes:
        raise ConfigError("nothing to compare", item="presets" if modes else "modes")
    text = METHODS["text"]
    plan = SpeedPlan(
        tuple(presets), (size,), part=part, precision=precision, text_length=text_length, rounds=rounds, warmup=2
    )
    bench = Bench(inner, plan)
    variants = [Variant(inner, text, preset) for preset in presets] + [Variant(inner, NO_SELECTION, presets[0])]
    calls = {
        (BASELINE if number == len(presets) else number, mode): call
        for mode in modes
        for number, call in enumerate(bench.subjects(size, mode, goal.batch_size, variants).values())
    }
    logger.info("%d settings in %s at %d px, batch %d", len(variants), ", ".join(modes), size, goal.batch_size)
    timings = bench.time(calls)
    side = size // inner.config.vision_config.patch_size
    tokens = [mean_tokens(inner.config, side, variant.method.selection(variant.base)) for variant in variants]
    offered, refused, missed = decide(timings, presets, tokens, goal)
    if "compiled" in modes:
        torch.compiler.reset()
    best = min((*offered, *missed), key=lambda choice: choice.latency_ms)
    return Advice(bool(offered), offered, refused, missed, best, goal, size, describe_environment(device))
