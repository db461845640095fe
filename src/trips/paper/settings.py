"""One row of a table or figure as a setting: what is trained, counted and timed under one name.

A setting names its locations in the 12 layers of the paper's tower. Where the accuracy of a smaller tower is measured,
the source of the accuracy scales them (`Setting.selection_in`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.options import Architecture

PAPER_LAYERS = 12


@dataclass(frozen=True)
class Setting:
    """What a row stands for.

    Attributes:
        name: unique in its table; the key under which measured rows are stored.
        selection: with locations in a tower of `PAPER_LAYERS` layers; ``guide="none"`` is the baseline.
        image_size: pixels of a side, before any down-scaling.
        scale: factor on both sides of the image before it is cut into patches, in (0, 1]: the control that removes
            tokens by resolution alone.
        architecture: "dual" is the model of Figure 2, "single" TRIPS-S.
    """

    name: str
    selection: SelectionConfig
    image_size: int = 384
    scale: float = 1.0
    architecture: Architecture = "dual"

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ConfigError("not a share of the image's side", item="scale", found=self.scale, expected="0 < s <= 1")

    def selection_in(self, num_layers: int) -> SelectionConfig:
        """The selection in a tower of another depth: location l becomes ceil(l · depth / 12).

        Raises:
            ConfigError: two locations would fall on one layer.
        """
        if not self.selection.active or num_layers == PAPER_LAYERS:
            return self.selection
        layers = tuple(-(-layer * num_layers // PAPER_LAYERS) for layer in self.selection.layers)
        if len(set(layers)) < len(layers):
            raise ConfigError(
                f"two locations fall on one layer of a tower of {num_layers}",
                item="selection.layers",
                found=self.selection.layers,
            )
        return dataclasses.replace(self.selection, layers=layers)


class AccuracySource(Protocol):
    """Measures what a setting's model gets right on one data set; trains it first where need be, and keeps the result.

    Attributes:
        name: of the data set, for the column's title.
        unit: what the figure is, such as "accuracy, %".
    """

    name: str
    unit: str

    def measure(self, setting: Setting, seed: int) -> dict[str, float]:
        """``accuracy`` in per cent and ``seconds`` of training, and whatever else is worth storing as numbers."""
        ...
