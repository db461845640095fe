"""Throughput and latency of the paper's settings on this machine, each beside its baseline in the same rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from trips.bench.subjects import POOL, build_subject, make_inputs
from trips.bench.timing import device_clock, interleave, ratio
from trips.environment import describe_environment
from trips.errors import ConfigError
from trips.paper.cells import Figures
from trips.paper.published import TEXT_LENGTH
from trips.paper.settings import Setting


class SpeedSource:
    """Times a forward pass of pairs, in float32 and eagerly, on a GPU if there is one.

    Ratios compare like with like where the paper's largest batches and unfused attention do not.

    Args:
        baseline: the setting that another is compared with.
        build: a model with random weights for a setting, such as the paper's; one is kept per architecture.
        batch_sizes: latency is that of the smallest, throughput that of the largest.
        rounds: calls that count, after one that does not.
        text_length: L, text tokens.
    Raises:
        ConfigError: no batch sizes, or one that is not positive.
    """

    def __init__(
        self,
        baseline: Callable[[Setting], Setting],
        build: Callable[[Setting], nn.Module],
        batch_sizes: Sequence[int] = (1, 4),
        rounds: int = 3,
        text_length: int = TEXT_LENGTH,
    ) -> None:
        if not batch_sizes or min(batch_sizes) < 1:
            raise ConfigError("not counts", item="batch_sizes", found=list(batch_sizes), expected=">= 1")
        if rounds < 1:
            raise ConfigError("nothing to measure", item="rounds", found=rounds, expected=">= 1")
        self.baseline, self.build = baseline, build
        self.batch_sizes, self.rounds, self.text_length = sorted(set(batch_sizes)), rounds, text_length
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._models: dict[str, nn.Module] = {}

    @property
    def name(self) -> str:
        """What was timed, for a table's footnote."""
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        return f"random weights, float32, ms of {small} and pairs/s of {large} at once, median of {self.rounds} rounds"

    @property
    def key(self) -> str:
        """What stored figures depend on besides the setting: machine, threads, versions, batches."""
        environment = describe_environment()
        machine = {name: environment[name] for name in ("device", "threads", "torch", "transformers", "trips-vlm")}
        return f"speed {json.dumps([machine, self.batch_sizes, self.rounds, self.text_length])}"

    def measure(self, setting: Setting, seed: int) -> Figures:
        """``throughput`` in pairs per second and ``latency_ms``, each with its ratio to the baseline.

        The ratio is the median of those within the rounds; above 1 the setting is faster.
        """
        small = self._timed(setting, self.batch_sizes[0], seed)
        large = small if len(self.batch_sizes) == 1 else self._timed(setting, self.batch_sizes[-1], seed)
        return {
            "throughput": self.batch_sizes[-1] / large[0],
            "throughput_ratio": large[1],
            "latency_ms": 1e3 * small[0],
            "latency_ratio": small[1],
        }

    def _timed(self, setting: Setting, batch: int, seed: int) -> tuple[float, float]:
        """Median seconds of a batch, and how many times as fast it is as the baseline's."""
        subjects: dict[str, Any] = {"subject": self._subject(setting, batch, seed)}
        if (other := self.baseline(setting)) != setting:
            subjects["baseline"] = self._subject(other, batch, seed)
        taken = interleave(subjects, self.rounds, pool=POOL, now=device_clock(self.device))
        return taken["subject"].median, ratio(taken.get("baseline", taken["subject"]), taken["subject"]).median

    def _subject(self, setting: Setting, batch: int, seed: int) -> Callable[[int], Any]:
        model = self._model(setting)
        side = round(setting.image_size * setting.scale)
        return build_subject(model, setting.selection, make_inputs(model, side, batch, self.text_length, seed=seed))

    def _model(self, setting: Setting) -> nn.Module:
        if setting.architecture not in self._models:
            self._models[setting.architecture] = self.build(setting).to(self.device).eval()
        return self._models[setting.architecture]
