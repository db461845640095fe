"""From statements to batches: n images side by side and one sentence.

Feeds the visual reasoning experiments (section 5.1.2). `AssignmentCollator` makes such batches from pairs of image and
caption: ALBEF's step between pre-training and NLVR2 asks which of the images a caption belongs to.

Legend: B statements of a batch, n images of each, H, W pixels, L tokens of the longest sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from trips.data.pair_batches import PairCollator, PairItem
from trips.data.records import BadSamples
from trips.data.statements import Box, ReasoningRecord
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError
from trips.images import FileSlice, load_image
from trips.processor import TripsProcessor

_AUGMENT, _ORDER, _ASSIGN = 0, 1, 3  # what the generators of one position are for; 2 is that of `trips.data.pairs`


@dataclass(frozen=True)
class StatementItem:
    """One statement with its images, before collation.

    Attributes:
        record: the statement.
        pixels: (n, H, W, 3) uint8, or None if the sample is bad.
        error: why the sample is bad, else None.
    """

    record: ReasoningRecord
    pixels: np.ndarray | None
    error: str | None = None


class StatementDataset(Dataset):
    """Statements as a torch dataset.

    Args:
        records: the samples; all have the same number of images.
        processor: turns images into pixels.
        bad_samples: where to count samples whose images or sentence cannot be used; None raises at the first.
        transform: augmentation of each image on its own, drawn anew each epoch; None resizes by the processor.
        shuffle_images: put the images of a statement into another order each epoch: where sentences do not speak of
            left and right, as those about the boxes of NLVR v1.
        seed: of both; the same seed, epoch and index give the same pixels in any process.
        cache_images: keep resized images in memory as uint8 (n * H * W * 3 bytes a statement), so that each is decoded
            once. Each worker process of a data loader would keep its own copy.
    Raises:
        DataError: no records; or, while reading, see `bad_samples`.
        ConfigError: numbers of images differ; both a cache and an augmentation, which needs whole images.
    """

    def __init__(
        self,
        records: Iterable[ReasoningRecord],
        processor: TripsProcessor,
        bad_samples: BadSamples | None = None,
        transform: TrainTransform | None = None,
        shuffle_images: bool = False,
        seed: int = 0,
        cache_images: bool = False,
    ) -> None:
        self.records = list(records)
        if not self.records:
            raise DataError("no records", item="StatementDataset", hint="did the reader skip every sample?")
        counts = {record.num_images: record.source for record in self.records}
        if len(counts) > 1:
            raise ConfigError("numbers of images differ", item="StatementDataset", found=counts)
        if cache_images and transform is not None:
            raise ConfigError(
                "resized images cannot be augmented", item="data.cache_images", hint="one of it and data.augment"
            )
        self.num_images = self.records[0].num_images
        self.processor, self.bad_samples, self.transform, self.seed = processor, bad_samples, transform, seed
        self.shuffle_images, self.cache_images = shuffle_images, cache_images
        self.epoch = 0
        self._cache: dict[int, np.ndarray] = {}
        self._checked: set[int] = set()
        self._errors: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of augmentation and order."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> StatementItem:
        record = self.records[index]
        if index not in self._errors:
            try:
                pixels = self._read(index)
            except DataError as error:
                if self.bad_samples is None:
                    raise
                self._errors[index] = str(error)
                self.bad_samples.record(record.source, error)
            else:
                return StatementItem(record, pixels[self._order(index)] if self.shuffle_images else pixels)
        return StatementItem(record, None, self._errors[index])

    def _read(self, index: int) -> np.ndarray:
        """Resized pixels; the first time also proof that the sentence can be encoded."""
        if index in self._cache:
            return self._cache[index]
        record = self.records[index]
        if index not in self._checked:
            try:
                self.processor.token_ids([record.sentence])
            except DataError as error:
                raise DataError(f"sentence cannot be used: {error}", item=record.source) from error
        if self.transform is None:
            pictures = [self.processor.resize(image, name=record.source) for image in self._images(record)]
        else:
            rng = np.random.default_rng((self.seed, self.epoch, index, _AUGMENT))
            pictures = [self._augment(image, rng, record) for image in self._images(record)]
        pixels = np.stack(pictures)
        self._checked.add(index)
        if self.bad_samples is not None:
            self.bad_samples.saw(record.source)
        if self.cache_images:
            self._cache[index] = pixels
        return pixels

    def _images(self, record: ReasoningRecord) -> Sequence[bytes | Path | FileSlice | Image.Image]:
        if record.boxes is None:
            return record.images
        return _cut(load_image(record.images[0], name=record.source), record.boxes, record.source)

    def _augment(
        self, image: bytes | Path | FileSlice | Image.Image, rng: np.random.Generator, record: ReasoningRecord
    ) -> np.ndarray:
        if self.processor.jpeg_draft and not isinstance(image, Image.Image):
            try:
                data = image if isinstance(image, bytes) else image.read_bytes()
            except OSError as error:  # the file was there when the list was read
                raise DataError(f"cannot be read: {error.strerror or error}", item=record.source) from error
            return self.transform.decode(data, rng, record.sentence, name=record.source)[0]
        return self.transform(load_image(image, name=record.source), rng, record.sentence)[0]

    def _order(self, index: int) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch, index, _ORDER)).permutation(self.num_images)


def _cut(picture: Image.Image, boxes: Sequence[Box], source: str) -> list[Image.Image]:
    """The parts of a picture.

    Raises:
        DataError: a box reaches beyond the picture.
    """
    width, height = max(box[2] for box in boxes), max(box[3] for box in boxes)
    if picture.width < width or picture.height < height:
        raise DataError(
            "picture is smaller than its boxes", item=source, found=picture.size, expected=f"{width} x {height} pixels"
        )
    return [picture.crop(box) for box in boxes]


class StatementCollator:
    """Joins statements into the batch that `TripsForVisualReasoning` takes.

    Args:
        processor: encodes and pads the sentences.
        num_images: n.
        pad_to_multiple_of: pad L up to a multiple, for few shapes and the GPU's sake; None pads to the longest.
    """

    def __init__(self, processor: TripsProcessor, num_images: int, pad_to_multiple_of: int | None = 8) -> None:
        self.processor, self.num_images, self.pad_to_multiple_of = processor, num_images, pad_to_multiple_of

    def __call__(self, items: Sequence[StatementItem]) -> dict[str, Any]:
        """Collate statements.

        Returns:
            `pixel_values` (B, n, 3, H, W) float32; `input_ids`, `attention_mask` (B, L) long; `labels` (B,) long, 1 for
            true, left out where a statement has none. Beside them the lists `identifiers` (B), `sources` (B), and
            `skipped`, a (source, reason) for each bad sample. If every sample is bad, B = L = 0.
        """
        good = [item for item in items if item.pixels is not None]
        pixels = [image for item in good for image in item.pixels]
        shape = (len(good), self.num_images, 3, *self.processor.image_size)
        batch: dict[str, Any] = {
            "pixel_values": self.processor.normalise(pixels).reshape(shape) if good else torch.zeros(shape),
            "input_ids": torch.zeros(0, 0, dtype=torch.long),
            "attention_mask": torch.zeros(0, 0, dtype=torch.long),
            "identifiers": [item.record.identifier for item in good],
            "sources": [item.record.source for item in good],
            "skipped": [(item.record.source, item.error) for item in items if item.pixels is None],
        }
        if good:
            sentences = [item.record.sentence for item in good]
            texts = self.processor(text=sentences, pad_to_multiple_of=self.pad_to_multiple_of)
            batch |= {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
        labels = [item.record.label for item in good]
        return batch if None in labels else batch | {"labels": torch.tensor(labels, dtype=torch.long)}


class AssignmentCollator(PairCollator):
    """Joins pairs into statements of the kind "this is the caption of image k" (ALBEF's text assignment).

    With probability n / (n + 1) the caption's own image stands in one of the n slots, each as likely as the others,
    else in none; the rest are images of other pairs of the batch, different ones as far as there are. ALBEF takes those
    most like the own image; here they are drawn evenly, a function of the pair's position and the batch alone.

    Args:
        processor: the dataset's.
        num_images: n.
    """

    def __init__(self, processor: TripsProcessor, num_images: int) -> None:
        super().__init__(processor, mlm=False)
        self.num_images = num_images

    def __call__(self, items: Sequence[PairItem]) -> dict[str, Any]:
        """Collate pairs.

        Returns:
            What `PairCollator` returns, with `pixel_values` (B, n, 3, H, W) float32, and `labels` (B,) long, the slot
            of the caption's image, or n.
        Raises:
            DataError: all pairs have one image.
        """
        batch = super().__call__(items)
        slots = torch.empty(len(items), self.num_images, dtype=torch.long)
        labels = torch.empty(len(items), dtype=torch.long)
        rows = {item.image_id: row for row, item in enumerate(items)}  # each image once, whatever its captions
        for row, item in enumerate(items):
            rng = np.random.default_rng((*item.position, _ASSIGN))
            others = [other for image_id, other in rows.items() if image_id != item.image_id]
            if not others:
                raise DataError("no other image in the batch", item=item.source, hint="a larger batch")
            slots[row] = torch.from_numpy(np.resize(rng.permutation(others), self.num_images))
            labels[row] = rng.integers(self.num_images + 1)
            if labels[row] < self.num_images:
                slots[row, labels[row]] = row
        batch["pixel_values"] = batch["pixel_values"][slots]
        return {**batch, "labels": labels}
