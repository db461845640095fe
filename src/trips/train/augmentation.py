"""The augmentation of training images that a recipe asks for, the same for every task (section 5.1, appendix B)."""

from __future__ import annotations

from trips.data.transforms import TrainTransform
from trips.processor import TripsProcessor
from trips.train.recipe import DataSection

_RANDAUGMENT = (2, 7)  # operations per image and their strength: ALBEF's


def train_transform(data: DataSection, processor: TripsProcessor) -> TrainTransform | None:
    """Augmentation of a recipe; None resizes by the processor."""
    if data.augment == "none" and data.flip == "none":
        return None
    return TrainTransform(
        processor.image_size,
        scale=(1.0, 1.0) if data.augment == "none" else data.crop_scale,
        randaugment=_RANDAUGMENT if data.augment == "randaugment" else None,
        flip=data.flip,
    )
