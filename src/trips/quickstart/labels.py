"""What is on each patch: the quick-start's first lesson, which stands in for what CLIP or DINOv2 would know.

Dimensions: I scenes, N patches, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trips.data.scene_batches import SceneBatcher
from trips.data.scenes import BACKGROUND_COLOURS, BANDS, COLOURS, SHAPES, TEXTURES, Scene
from trips.vision import VisionEncoder

LABEL_CLASSES = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "band": len(BANDS),
    "band_colour": len(BACKGROUND_COLOURS),
    "band_texture": len(TEXTURES),
}
_BAND_WEIGHT = 0.3  # of the labels of the background beside those of the objects, which are harder


class PatchLabelModel(nn.Module):
    """A vision tower with one linear head per kind of patch label.

    Args:
        vision: trained in place.
        width: of the tower.
        num_layers: of the tower that are taught; those above neither run nor learn.
    """

    def __init__(self, vision: VisionEncoder, width: int, num_layers: int) -> None:
        super().__init__()
        self.vision, self.num_layers = vision, num_layers
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in LABEL_CLASSES.items()})

    def forward(self, pixel_values: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """(I, 3, S, S) and labels (I, N) by name -> weighted sum of the cross-entropies."""
        reader = self.vision.reader
        states = reader.embed(pixel_values)
        for index in range(self.num_layers):
            states = reader.layer(index, states)
        patches = reader.final_norm(states)[:, 1:].flatten(0, 1)
        losses = {name: F.cross_entropy(head(patches), labels[name].flatten()) for name, head in self.heads.items()}
        weighted = [_BAND_WEIGHT * loss if name.startswith("band") else loss for name, loss in losses.items()]
        return {"loss": torch.stack(weighted).sum()} | {f"loss_{name}": loss.detach() for name, loss in losses.items()}


def patch_labels(scene: Scene, patch_size: int) -> dict[str, np.ndarray]:
    """What is on each patch, (N,) per name: shape and colour (0 for none), and the background band at its centre."""
    things = scene.patch_labels(patch_size)
    on_object = things > 0
    labels = {
        "shape": np.where(on_object, (things - 1) // len(COLOURS) + 1, 0),
        "colour": np.where(on_object, (things - 1) % len(COLOURS) + 1, 0),
    }
    grid = scene.image.shape[0] // patch_size
    centres = (np.arange(grid) * patch_size + patch_size // 2).astype(int)
    band = np.zeros((grid, grid), dtype=np.int64)
    for number, region in enumerate(scene.regions):
        for x0, y0, x1, y1 in region.boxes:
            inside = ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))[None]
            band[inside] = number
    band = band.reshape(-1)
    labels["band"] = band
    colours = [list(BACKGROUND_COLOURS).index(region.colour) for region in scene.regions]
    textures = [TEXTURES.index(region.texture) for region in scene.regions]
    labels["band_colour"], labels["band_texture"] = np.array(colours)[band], np.array(textures)[band]
    return labels


@dataclass(frozen=True)
class PatchLabelData:
    """Training data of the first warm-up stage; see `trips.train.settings.TrainingData`."""

    batcher: SceneBatcher
    num_scenes: int
    patch_size: int

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        """Pixels and labels of fresh scenes, a function of the step."""
        for step in range(start_step, start_step + num_steps):
            scenes = self.batcher.scenes(step * self.num_scenes, self.num_scenes)
            rows = [patch_labels(scene, self.patch_size) for scene in scenes]
            labels = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in LABEL_CLASSES}
            yield {"pixel_values": self.batcher.pixels(scenes), **labels}
