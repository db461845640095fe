"""What acceleration is set to: stored in the configuration of the accelerated model as plain values.

Locations and rates mean what they mean in `SelectionConfig`, with one difference: the cut stands at the entry of the
layer, before its attention.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from trips.config import SelectionConfig, check_locations, num_kept
from trips.errors import ConfigError
from trips.options import Inattentive, Options

AccelerationGuide = Literal["text", "image", "keys_mean", "random"]
AccelerationScore = Literal["states", "keys", "shared", "noise"]
Fallback = Literal["none", "image", "keys_mean", "random"]


@dataclasses.dataclass(frozen=True)
class AccelerationConfig(Options):
    """Where, how many and by whose guidance patches are kept in a model of transformers.

    Attributes:
        layers: 1-based vision layers before which tokens are selected, rising, at least one.
        keep_rate: share r of the candidates kept, in (0, 1]; one for all locations or one per location.
        guide: "text": the text that the call brings; "image": the image [CLS]; "keys_mean": the mean of the layer's
            keys, for towers without [CLS]; "random": noise.
        score: what the guide meets. "states": the normalised states, by the query of the layer (Eq. 2 of the paper);
            "keys": the layer's keys, head by head, as in its own attention; "shared": the states through the model's
            own projection into the space of image and text; "noise" for the random guide.
        inattentive: what becomes of the tokens that are not kept.
        fallback: guide of a call that brings no text while the text should guide; "none": that is an error.

    Raises:
        ConfigError: a value outside its range; the error names the field.
    """

    section: ClassVar[str] = "trips_selection"

    layers: tuple[int, ...] = (5, 10)
    keep_rate: float | tuple[float, ...] = 0.7
    guide: AccelerationGuide = "text"
    score: AccelerationScore = "states"
    inattentive: Inattentive = "fuse"
    fallback: Fallback = "none"

    def __post_init__(self) -> None:
        self._check_literals()
        checked = self.selection  # raises for layers and rates that are none
        object.__setattr__(self, "layers", checked.layers)
        object.__setattr__(self, "keep_rate", checked.keep_rate)
        if not self.layers:
            raise ConfigError("nothing to accelerate without a location", item="selection.layers", found=self.layers)

    @property
    def selection(self) -> SelectionConfig:
        """Locations and rates as the models of trips know them."""
        return SelectionConfig(layers=self.layers, keep_rate=self.keep_rate, inattentive=self.inattentive)

    @property
    def rates(self) -> dict[int, float]:
        """Keep rate of every location."""
        return dict(zip(self.layers, self.selection.rates, strict=True))

    def check_acts(self, num_layers: int, num_patches: int) -> None:
        """Raise `ConfigError` unless every location with a rate below 1 removes tokens from images of this size."""
        check_locations(self.selection, num_layers)
        n = num_patches
        for layer, rate in self.rates.items():
            k = count_kept(n, rate, layer)
            n = k + (k < n and self.inattentive != "drop")


def count_kept(num_candidates: int, keep_rate: float, layer: int) -> int:
    """k of n candidates; `ConfigError` if a rate below 1 leaves all of them: the call could not act."""
    k = num_kept(num_candidates, keep_rate)
    if k == num_candidates and keep_rate < 1:
        raise ConfigError(
            "too few patches: this rate removes none of them",
            item=f"layer {layer}",
            found=f"{num_candidates} patches x {keep_rate}",
            expected="ceil(r n) < n",
            hint="larger images, a smaller keep_rate, or keep_rate=1 to change nothing",
        )
    return k
