"""Small pictures with captions for tests of retrieval, a model for them, and what both stages find, pair by pair."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from pair_shards import SIZE, WORDS, pair_processor
from PIL import Image
from tiny import randomise, tiny_bert_config
from torch import Tensor
from transformers import CLIPVisionConfig

from trips.config import PretrainingConfig, SelectionConfig, TripsConfig
from trips.data.pair_records import PairRecord
from trips.processor import TripsProcessor
from trips.tasks.retrieval import TripsForImageTextRetrieval

NUM_PATCHES = (SIZE // 2) ** 2  # of 2 pixels


def retrieval_processor() -> TripsProcessor:
    """`pair_processor` for patches of 2 pixels: 4 x 4 of them."""
    processor = pair_processor()
    processor.patch_size = 2
    return processor


def retrieval_model(text_width: int = 32, **selection: object) -> TripsForImageTextRetrieval:
    """With random weights; `selection` holds fields of `SelectionConfig`, by default half the patches at 2 and 3."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=2,
    )
    config = TripsConfig(
        vision_config=vision,
        text_config=tiny_bert_config(text_width, vocab_size=len(WORDS)),
        selection=SelectionConfig(**{"layers": (2, 3), "keep_rate": 0.5, **selection}),
        pretraining=PretrainingConfig(projection_dim=8, queue_size=0, alpha=0.0),
    )
    return randomise(TripsForImageTextRetrieval(config))


def picture(number: int) -> bytes:
    """Noise of its own."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def retrieval_records(count: int = 9, repeated: bool = True) -> list[PairRecord]:
    """Pictures with one to three captions of different length; the caption "a photo of a dog" belongs to several."""
    records = []
    for number in range(count):
        texts = [
            f"a photo w{number}",
            f"w{number} left of number w{number + 7} dog cat",
            f"cat w{number * 3 % 11} of w5",
        ]
        texts = texts[: 1 + number % 3]
        if repeated and number % 4 == 1:
            texts[0] = "a photo of a dog"
        records.append(PairRecord(picture(number), tuple(texts), f"image {number}", f"record {number}"))
    return records


@torch.no_grad()
def features_one_by_one(model: TripsForImageTextRetrieval, records: Sequence[PairRecord]) -> tuple[Tensor, Tensor]:
    """(I, P) and (T, P), nothing batched."""
    processor = retrieval_processor()
    images = [model.encode_image(processor(images=record.image)["pixel_values"]) for record in records]
    texts = [model.encode_texts(**processor(text=text)) for record in records for text in record.texts]
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def matches_one_by_one(
    model: TripsForImageTextRetrieval, records: Sequence[PairRecord], selection: SelectionConfig | None = None
) -> Tensor:
    """(I, T) ITM logits, each pair from pixels and ids through the whole model."""
    processor, texts = retrieval_processor(), [text for record in records for text in record.texts]
    scores = torch.empty(len(records), len(texts))
    for i, record in enumerate(records):
        for t, text in enumerate(texts):
            inputs = processor(images=record.image, text=text)
            states = model.trips(**inputs, selection=selection or model.config.selection).last_hidden_state
            scores[i, t] = model.itm_head(states[0, 0])[1]
    return scores


def owners(records: Sequence[PairRecord]) -> Tensor:
    """(T,) record of every text."""
    return torch.tensor([i for i, record in enumerate(records) for _ in record.texts])
