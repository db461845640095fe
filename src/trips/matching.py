"""Images and texts compared, and sentences judged, batch by batch (sections 5.1.2 and 5.1.3).

The work behind `TripsPipeline.score`, `similarity` and `verify`: an image's prefix and a text's states are computed
once, and every text selects its own patches.

Dimensions: I images, T texts, n images of a statement, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trips.config import SelectionConfig
from trips.images import ImageSource
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.vision import VisionPrefix


def encode_images(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    images: Sequence[ImageSource],
    selection: SelectionConfig | None,
    first: int | None = None,
) -> VisionPrefix:
    """Prefixes of some images.

    Args:
        first: the number of the first in the caller's list, for messages; None for one that stands alone.
    Raises:
        DataError: an image that cannot be read.
    """
    names = [None if first is None else f"images[{first + i}]" for i in range(len(images))]
    pixels = processor.normalise([processor.resize(one, name) for one, name in zip(images, names)])
    return model.trips.encode_prefix(pixels.to(model.device, model.dtype), selection)


def match_probabilities(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    images: Sequence[ImageSource],
    texts: list[str],
    selection: SelectionConfig | None,
    batch_size: int,
) -> Tensor:
    """Probability of the matching head that each text describes each image: (I, T) float32 on the CPU."""
    encoded = processor(text=texts).to(model.device)
    mask = encoded["attention_mask"]
    states = _in_batches(model.trips.encode_text, encoded["input_ids"], mask, batch_size)
    scores = []
    for start in range(0, len(images), batch_size):
        prefix = encode_images(model, processor, images[start : start + batch_size], selection, start)
        pairs = torch.arange(len(prefix.states) * len(texts), device=mask.device)
        for part in pairs.split(batch_size):
            image_index, text_index = part // len(texts), part % len(texts)
            output = model.trips(
                None,
                mask[text_index],
                image_index=image_index,
                prefix=prefix,
                text_states=states[text_index],
                selection=selection,
            )
            logits = model.itm_head(output.last_hidden_state[:, 0])  # "match" is class 1
            scores.append(torch.softmax(logits.float(), dim=-1)[:, 1].cpu())
    return torch.cat(scores).view(len(images), len(texts))


def feature_similarity(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    images: Sequence[ImageSource],
    texts: list[str],
    selection: SelectionConfig | None,
    batch_size: int,
) -> Tensor:
    """Cosine of the contrastive features of each image and text: (I, T) float32 on the CPU."""
    encoded = processor(text=texts).to(model.device)
    text_features = _in_batches(model.encode_texts, encoded["input_ids"], encoded["attention_mask"], batch_size)
    image_features = [
        model.encode_image(
            prefix=encode_images(model, processor, images[start : start + batch_size], selection, start),
            selection=selection,
        )
        for start in range(0, len(images), batch_size)
    ]
    return (torch.cat(image_features) @ text_features.T).float().cpu()


def truth_probabilities(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    images: Sequence[ImageSource],
    sentences: list[str],
    selection: SelectionConfig | None,
    batch_size: int,
) -> list[float]:
    """Probability of each of T sentences being true of the same n images."""
    prefix = encode_images(model, processor, images, selection)
    encoded = processor(text=sentences).to(model.device)
    rows = torch.arange(len(images), device=prefix.states.device)

    def judge(ids: Tensor, mask: Tensor) -> Tensor:
        return model.verify(None, ids, mask, prefix=prefix.take(rows.repeat(ids.shape[0])), selection=selection)

    return _in_batches(judge, encoded["input_ids"], encoded["attention_mask"], batch_size).tolist()


def _in_batches(function: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, size: int) -> Tensor:
    return torch.cat([function(*part) for part in zip(ids.split(size), mask.split(size))])
