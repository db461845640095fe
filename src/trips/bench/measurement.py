"""The cells of a measurement: a resolution, a mode and a batch size, in which all subjects meet one baseline.

Subjects of a cell are timed in one interleaving, see `trips.bench.timing`; they share inputs, precision and mode, and
the model where they are no other. Latencies are medians with their 95 % quantile; throughput is the batch over the
median.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trips.bench.matching import match_time
from trips.bench.memory import fitting, largest_batch, peak_bytes
from trips.bench.methods import DOWNSCALE, METHODS, NO_SELECTION, Method, downscaling, methods_for
from trips.bench.peers import PEERS, Peer, PeerSize, peer, transformers_pair
from trips.bench.plan import TRANSFORMERS, SpeedPlan
from trips.bench.products import inner_width
from trips.bench.speed_report import SpeedRow
from trips.bench.subjects import (
    DTYPES,
    POOL,
    Mode,
    build_subject,
    check_precision,
    idle_adamw,
    inference,
    make_inputs,
)
from trips.bench.timing import Subject, Timing, device_clock, interleave, ratio
from trips.config import SelectionConfig

logger = logging.getLogger(__name__)

_RATE_STEP = 0.05  # of the keep rates that are tried for equal time
_LARGEST = {"cuda": 4096, "cpu": 16}  # a CPU gains little beyond, and a batch takes long


@dataclass(frozen=True)
class Variant:
    """One side: a model with a method at a setting, or another model that stands beside it.

    Attributes:
        model, method, base: a model of trips, and the setting that the method takes locations and rates of.
        equal: "tokens" or "time", see `SpeedRow`.
        other: the other model; its operations of a pair in units of 1e9, and the patches that it makes of an image.
    """

    model: nn.Module
    method: Method
    base: SelectionConfig
    equal: str = "tokens"
    other: tuple[Peer, float, int] | None = None


class Bench:
    """A plan at work on a baseline and the subjects beside it."""

    def __init__(self, model: nn.Module, plan: SpeedPlan, baseline: Variant | None = None) -> None:
        self.model, self.plan = model, plan
        self.baseline = baseline or Variant(model, NO_SELECTION, plan.selections[0])
        self.device = next(model.parameters()).device
        check_precision(plan.precision, plan.part, self.device)
        self.optimizers = (
            {id(one): idle_adamw(one) for one in (model, self.baseline.model)} if plan.part == "train" else {}
        )

    def rows(self) -> Iterator[SpeedRow]:
        """Everything that the plan asks for."""
        for size in self.plan.image_sizes:
            variants = [
                Variant(self.model, method, base)
                for base in self.plan.selections
                for method in methods_for(self.plan.methods, self.model.config, size, base)
            ] + [self.peer(name, size) for name in self.plan.peers]
            for mode in self.plan.modes:
                for wanted in self.plan.batch_sizes:
                    batch = self.largest(size, mode, variants) if wanted == "max" else int(wanted)
                    yield from self.cell(size, mode, batch, variants, wanted == "max")
            if self.plan.equal_time:
                batch = next((int(wanted) for wanted in self.plan.batch_sizes if wanted != "max"), 1)
                yield from self.cell(size, "eager", batch, self.at_equal_time(size, batch))

    def cell(
        self, size: int, mode: Mode, batch: int, variants: Sequence[Variant], largest: bool = False
    ) -> list[SpeedRow]:
        """Rows of one interleaving."""
        calls = self.subjects(size, mode, batch, [self.baseline, *variants])
        timings = self.time(calls)
        peaks = {name: self.peak(call, mode) for name, call in calls.items()}
        found = []
        for number, variant in enumerate(variants, start=1):
            figures = self.compare(size, batch, variant, (timings["0"], timings[str(number)]))
            found.append(
                SpeedRow(
                    **figures,
                    **self.describe(size, variant),
                    mode=mode,
                    largest=largest,
                    baseline_peak_mib=peaks["0"],
                    subject_peak_mib=peaks[str(number)],
                )
            )
            logger.info("%s, batch %d: %s", mode, batch, found[-1].line)
        if mode == "compiled":
            torch.compiler.reset()  # the next cell has other shapes
        return found

    def compare(self, size: int, batch: int, variant: Variant, timings: tuple[Timing, Timing]) -> dict[str, Any]:
        """Times and operations of a subject beside those of the baseline."""
        base, own = timings
        measured = ratio(base, own)
        operations = self.gflops(self.baseline, size), self.gflops(variant, size)
        return {
            "batch": batch,
            "baseline_ms": 1e3 * base.median,
            "baseline_p95_ms": 1e3 * base.p95,
            "subject_ms": 1e3 * own.median,
            "subject_p95_ms": 1e3 * own.p95,
            "baseline_pairs_per_second": batch / base.median,
            "subject_pairs_per_second": batch / own.median,
            "measured_ratio": measured.median,
            "ratio_low": measured.low,
            "ratio_high": measured.high,
            "baseline_gflops": operations[0],
            "subject_gflops": operations[1],
            "exact_ratio": operations[0] / operations[1],
        }

    def describe(self, size: int, variant: Variant) -> dict[str, Any]:
        """What a subject is."""
        plan, method, config = self.plan, variant.method, variant.model.config
        selection, grid = method.selection(variant.base), method.grid(size, config.vision_config.patch_size)
        patches = grid[0] * grid[1] if variant.other is None else variant.other[2]
        return {
            "px": size,
            "method": method.name,
            "locations": selection.layers if selection.active else (),
            "keep_rates": selection.rates if selection.active else (),
            "scale": method.scale,
            "equal": variant.equal,
            "precision": plan.precision,
            "part": plan.part,
            "rounds": plan.rounds,
            "image_tokens": patches,
            "tokens": method.tokens(config, size, variant.base),
        }

    def gflops(self, variant: Variant, size: int) -> float:
        """Exact operations of a pair in units of 1e9; the backward pass counts twice its forward."""
        if variant.other is not None:
            return variant.other[1]
        count = variant.method.count(variant.model.config, size, self.plan.text_length, variant.base)
        return count.vision if self.plan.part == "vision" else count.total * (3 if self.plan.part == "train" else 1)

    def subjects(self, size: int, mode: Mode, batch: int, variants: Sequence[Variant]) -> dict[str, Subject]:
        """By their number in the list, on the same inputs."""
        plan, built = self.plan, {}
        inputs = make_inputs(self.model, size, batch, plan.text_length)
        for number, variant in enumerate(variants):
            if variant.other is not None:
                pool = [variant.other[0].inputs(batch, seed) for seed in range(POOL)]
                built[str(number)] = inference(variant.other[0].call, pool, mode)
                continue
            patch = variant.model.config.vision_config.patch_size
            built[str(number)] = build_subject(
                variant.model,
                variant.method.selection(variant.base),
                [each.seen_by(variant.method, patch) for each in inputs],
                part=plan.part,
                mode=mode,
                autocast=DTYPES[plan.precision] if plan.part == "train" and plan.precision != "fp32" else None,
                optimizer=self.optimizers.get(id(variant.model)),
            )
        return built

    def peer(self, name: str, size: int) -> Variant:
        """Another model of the sizes of this one's vision tower."""
        vision, length, kind = self.model.config.vision_config, self.plan.text_length, DTYPES[self.plan.precision]
        if name == TRANSFORMERS:
            found = transformers_pair(self.model, size, length)
            operations, patch = found.count(), vision.patch_size
        else:
            sizes = PeerSize(
                vision.hidden_size,
                vision.num_hidden_layers,
                vision.num_attention_heads,
                inner_width(vision),
                self.model.config.text_config.vocab_size,
            )
            found, patch = peer(name, size, length, self.device, kind, sizes), PEERS[name][1]
            operations = peer(name, size, length, "meta", kind, sizes).count()
        other = (found, operations, (size // patch) ** 2)
        return Variant(self.model, Method(name, "none"), self.plan.selections[0], other=other)

    def time(self, calls: dict[Any, Subject]) -> dict[Any, Timing]:
        clock = device_clock(self.device)
        return interleave(calls, self.plan.rounds, warmup=self.plan.warmup, pool=POOL, now=clock)

    def peak(self, call: Subject, mode: Mode) -> float | None:
        """MiB beyond weights and inputs; a CUDA graph holds its memory apart."""
        return None if mode == "graphs" else peak_bytes(lambda: call(0), self.device) / 2**20

    def largest(self, size: int, mode: Mode, variants: Sequence[Variant]) -> int:
        """The largest batch that fits the baseline and every subject."""
        mode = "graphs" if mode == "graphs" else "eager"  # to compile for every size that is tried takes too long

        def run(batch: int) -> None:
            for call in self.subjects(size, mode, batch, [self.baseline, *variants]).values():
                call(0)

        return largest_batch(fitting(run, self.device), self.plan.max_batch or _LARGEST.get(self.device.type, 16))

    def at_equal_time(self, size: int, batch: int) -> list[Variant]:
        """The text-guided method, and every other at the setting that takes as long: to be timed in the same rounds."""
        found = []
        for base in self.plan.selections:
            text = Variant(self.model, METHODS["text"], base, equal="time")
            found.append(text)
            for name in self.plan.others:
                setting, last = _settings(name, self.model, size, base)

                def speed(number: int, setting=setting, text=text) -> float:
                    timings = self.time(self.subjects(size, "eager", batch, [text, setting(number)]))
                    return ratio(timings["0"], timings["1"]).median

                found.append(replace(setting(match_time(speed, 1, last)), equal="time"))
        return found


def _settings(name: str, model: nn.Module, size: int, base: SelectionConfig) -> tuple[Callable[[int], Variant], int]:
    """The settings of a method as whole numbers from 1: more tokens stay as they rise; and the last."""
    if name == DOWNSCALE:
        patch = model.config.vision_config.patch_size
        return lambda side: Variant(model, downscaling(side, size, patch), base), size // patch
    method = METHODS[name]
    return (
        lambda step: Variant(model, method, base.replace(keep_rate=round(step * _RATE_STEP, 2))),
        round(1 / _RATE_STEP),
    )
