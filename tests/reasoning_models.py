"""Tiny models of several images and their batches."""

from __future__ import annotations

import torch
from tiny import images, randomise, texts, tiny_config
from torch import Tensor

from trips.config import ReasoningConfig, TripsConfig
from trips.tasks.nlvr2 import TripsForVisualReasoning


def reasoning_config(reasoning: dict[str, object] | None = None, **kwargs: object) -> TripsConfig:
    """`kwargs` as in `tiny_config`."""
    config = tiny_config(**kwargs)
    config.reasoning = ReasoningConfig(**(reasoning or {}))
    return config


def tiny_reasoning_model(reasoning: dict[str, object] | None = None, **kwargs: object) -> TripsForVisualReasoning:
    """With random weights, other ones on every path."""
    return randomise(TripsForVisualReasoning(reasoning_config(reasoning, **kwargs)))


def reasoning_batch(count: int = 3, n: int = 2) -> dict[str, Tensor]:
    """`count` statements about n images each, labels false and true in turn."""
    ids, mask = texts(count)
    pixels = images(count * n).unflatten(0, (count, n))
    labels = torch.arange(count) % 2
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}
