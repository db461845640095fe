"""Timing of several functions in one process, so that the ratio of two survives a machine that others use too.

Subjects take turns: every round calls each of them once, on the same number of a small pool of inputs, so that nothing
is answered from a cache; every second round goes backwards, so that none always follows the same neighbour. A ratio is
taken within a round, where both sides have met the same machine, and the median over rounds is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from trips.errors import ConfigError

Key = TypeVar("Key", bound=Hashable)
Subject = Callable[[int], Any]  # runs once on the input of this number


@dataclass(frozen=True)
class Timing:
    """What a subject took.

    Attributes:
        seconds: of its call in every round, in the order of rounds.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return float(np.median(self.seconds))

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the rounds stay under, between samples by linear interpolation."""
        return float(np.quantile(self.seconds, 0.95))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a subject is as the baseline.

    Attributes:
        median: of the ratios within rounds; above 1 the subject is faster.
        low, high: their 10 % and 90 % quantiles: what noise does to it.
    """

    median: float
    low: float
    high: float


def interleave(
    subjects: Mapping[Key, Subject],
    rounds: int,
    *,
    warmup: int = 1,
    pool: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> dict[Key, Timing]:
    """Call all subjects in turn and say what each call took.

    Args:
        subjects: by name or another key.
        rounds: calls of each that count.
        warmup: calls of each before, which do not.
        pool: inputs that there are; round i runs on number i modulo it.
        now: the clock in seconds, see `device_clock`.
    Raises:
        ConfigError: no rounds.
    """
    if rounds < 1:
        raise ConfigError("nothing to measure", item="rounds", found=rounds, expected=">= 1")
    names, seconds = list(subjects), {name: [] for name in subjects}
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else reversed(names):
            start = now()
            subjects[name](number % pool)
            taken = now() - start
            if number >= 0:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(baseline: Timing, subject: Timing) -> Ratio:
    """Baseline's seconds over the subject's, within each of the rounds that they shared."""
    each = np.divide(baseline.seconds, subject.seconds)
    low, median, high = np.quantile(each, (0.1, 0.5, 0.9))
    return Ratio(float(median), float(low), float(high))


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device first: the time that a caller waits, launches included."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
