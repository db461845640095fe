"""What a speed measurement measures: its plan, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from trips.bench.methods import DOWNSCALE, METHODS
from trips.bench.peers import PEERS
from trips.bench.subjects import Mode, Part, Precision
from trips.config import SelectionConfig
from trips.errors import ConfigError

TRANSFORMERS = "transformers"  # the peer that is made of the same parts and weights


@dataclass(frozen=True)
class SpeedPlan:
    """What is measured: every method at every setting, for each resolution, mode and batch size.

    Attributes:
        selections: settings; each method takes their locations and rates.
        image_sizes: pixels of a side.
        methods: see `trips.bench.methods`.
        peers: other models, see `trips.bench.peers`, with random weights; inference of a pair only.
        batch_sizes: pairs at once; "max" is the largest that fits all subjects.
        modes: "eager", "compiled" (torch.compile), "graphs" (CUDA graphs); both sides alike.
        part: "forward" (a pair's inference), "vision" (the vision pass alone), "train" (a training step).
        precision: of the weights, in training of the products.
        text_length: L, text tokens.
        rounds: calls of each subject that count. warmup: those before.
        max_batch: end of the search for "max"; else 4096 on a GPU and 16 on a CPU.
        equal_time: also find the setting at which every other method takes as long as the text-guided one.
    """

    selections: tuple[SelectionConfig, ...]
    image_sizes: tuple[int, ...] = (384,)
    methods: tuple[str, ...] = ("text",)
    peers: tuple[str, ...] = ()
    batch_sizes: tuple[int | str, ...] = (1, 2, 4, 8)
    modes: tuple[Mode, ...] = ("eager",)
    part: Part = "forward"
    precision: Precision = "fp32"
    text_length: int = 40
    rounds: int = 5
    warmup: int = 1
    max_batch: int | None = None
    equal_time: bool = False

    def __post_init__(self) -> None:
        for size in self.batch_sizes:
            if size != "max" and (not isinstance(size, int) or size < 1):
                raise ConfigError("not a batch size", item="batch_sizes", found=size, expected='>= 1 or "max"')
        for name in self.methods:
            if name not in (*METHODS, DOWNSCALE):
                raise ConfigError(
                    "no such method", item="methods", found=name, expected=" | ".join((*METHODS, DOWNSCALE))
                )
        for name in self.peers:
            if name not in (*PEERS, TRANSFORMERS):
                known = " | ".join((*PEERS, TRANSFORMERS))
                raise ConfigError("no such model", item="peers", found=name, expected=known)
        if self.peers and self.part != "forward":
            raise ConfigError("peers are timed in inference of a pair", item="part", found=self.part)
        if self.equal_time and not self.others:
            raise ConfigError(
                "no other method to compare with", item="equal_time", found=self.methods, hint="such as random"
            )
        for name in ("text_length", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("must be positive", item=name, found=value)

    @property
    def others(self) -> tuple[str, ...]:
        """Methods that can be set to take as long as the text-guided one."""
        return tuple(name for name in self.methods if name not in ("text", "none"))
