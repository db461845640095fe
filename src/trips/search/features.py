"""The first stage's features: contrastive features of pictures, which have seen no text (section 5.1.3).

A model keeps them only if it was trained so that the image's contrastive feature does not depend on the text it is
paired with. The fingerprint tells models apart: features of two models do not compare.

Dimensions: n pictures of a batch, P projection width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from trips.config import SelectionConfig
from trips.data.records import BadSamples
from trips.errors import ConfigError, DataError, UnsupportedModelError
from trips.processor import TripsProcessor
from trips.search.sources import Photo
from trips.tasks.retrieval import TripsForImageTextRetrieval

# How a tower computes, beside its weights; a few names, so that new defaults of transformers change nothing.
_TOWER_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size", "image_size")


class Trained(Protocol):
    """A model with its processor, as `trips.load` gives it."""

    model: TripsForImageTextRetrieval
    processor: TripsProcessor
    batch_size: int


def check_searchable(trained: Trained) -> None:
    """Refuse a model without text-free image features.

    Raises:
        UnsupportedModelError: without contrastive features at all. ConfigError: with features that a text guides.
    """
    model = trained.model
    if not isinstance(model, TripsForImageTextRetrieval):
        raise UnsupportedModelError(
            "has no contrastive features", item=type(model).__name__, expected="a pre-training or retrieval model"
        )
    selection = model.config.selection
    removes = selection.active and min(selection.rates) < 1
    if removes and selection.guide in ("text", "random") and model.config.pretraining.itc_guide == "text":
        raise ConfigError(
            "the contrastive feature of its images is selected by a text, so that none can be computed beforehand",
            item="pretraining.itc_guide",
            found="text",
            expected='a model trained with "image" or "none"',
        )


def fingerprint_of(trained: Trained) -> str:
    """Tells the model that features are of: weights, settings and what the processor does to a picture or text."""
    config, processor = trained.model.config, trained.processor
    plain = SelectionConfig().to_dict()  # left out, so that an option added later changes no fingerprint
    towers = (config.vision_config, config.text_config, config.fusion_encoder_config)
    settings = {
        "towers": [{name: getattr(tower, name, None) for name in _TOWER_FIELDS} for tower in towers],
        "selection": {name: value for name, value in config.selection.to_dict().items() if value != plain.get(name)},
        "itc_guide": config.pretraining.itc_guide,
        "architecture": config.architecture,
        "pixels": [processor.image_size, processor.image_mean, processor.image_std, processor.resample],
        "draft": processor.jpeg_draft,
        "texts": [processor.max_text_length, processor.add_sep],
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    parts = (*TripsForImageTextRetrieval.taught_parts, "itm_head")
    for name, tensor in sorted(trained.model.state_dict().items()):
        if name.split(".")[0] in parts:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_photos(
    trained: Trained, photos: Sequence[Photo], bad: BadSamples, *, workers: int = 0
) -> Iterator[tuple[list[Photo], np.ndarray, int]]:
    """Features of pictures, batch by batch; while one is computed the next is decoded.

    Args:
        trained: in evaluation mode.
        photos: in this order.
        bad: counts pictures that cannot be read.
        workers: threads that decode; 0 decodes in this one.
    Returns:
        the n readable pictures of a batch, their features (n, P) float32, and how many pictures the batch had.
    """
    model, processor, size = trained.model, trained.processor, trained.batch_size
    batches = [photos[start : start + size] for start in range(0, len(photos), size)]

    def decode(photo: Photo) -> np.ndarray | DataError:
        try:
            return processor.resize(photo.image, name=photo.key)
        except DataError as error:
            return error

    def collect(batch: Sequence[Photo], arrays: list[np.ndarray | DataError]) -> tuple[list[Photo], np.ndarray, int]:
        used = []
        for photo, array in zip(batch, arrays, strict=True):
            if isinstance(array, DataError):
                bad.record(photo.key, array)
            else:
                bad.saw(photo.key)
                used.append((photo, array))
        if not used:
            return [], np.empty((0, model.config.pretraining.projection_dim), np.float32), len(batch)
        pixels = processor.normalise([array for _, array in used]).to(model.device, model.dtype)
        features = model.encode_image(pixels).float().cpu().numpy()
        return [photo for photo, _ in used], features, len(batch)

    if not workers:
        for batch in batches:
            yield collect(batch, [decode(photo) for photo in batch])
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: list[list[Future[np.ndarray | DataError]]] = []
        for i, batch in enumerate(batches):
            for coming in batches[i + len(ahead) : i + 2]:
                ahead.append([pool.submit(decode, photo) for photo in coming])
            yield collect(batch, [future.result() for future in ahead.pop(0)])
