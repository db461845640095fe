"""Tiny models of transformers that `trips.accelerate` knows: width 32, 4 vision layers, 16 patches of 8 pixels."""

from __future__ import annotations

from typing import Any

import torch
from tiny import BOS, EOS, VOCABULARY, images, randomise
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
BLIP = {
    "vision_config": {**VISION, "intermediate_size": 64},
    "text_config": {
        **TEXT,
        **TOKENS,
        "encoder_hidden_size": 32,
        "max_position_embeddings": 24,
        "sep_token_id": EOS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "image_text_hidden_size": 16,
}
CLIP_TEXT = {**TEXT, **TOKENS, "hidden_size": 16, "max_position_embeddings": 24}
KINDS = {
    "vqa": (BlipForQuestionAnswering, BlipConfig, BLIP),
    "matching": (BlipForImageTextRetrieval, BlipConfig, BLIP),
    "captioning": (BlipForConditionalGeneration, BlipConfig, BLIP),
    "clip": (
        CLIPModel,
        CLIPConfig,
        {
            "vision_config": {**VISION, "intermediate_size": 64},
            "text_config": CLIP_TEXT,
            "projection_dim": 16,
        },
    ),
    "siglip": (
        SiglipModel,
        SiglipConfig,
        {
            "vision_config": {**VISION, "intermediate_size": 64},
            "text_config": {**TEXT, **TOKENS, "max_position_embeddings": 24, "projection_size": 32},
        },
    ),
    "vit": (ViTModel, ViTConfig, {**VISION, "intermediate_size": 64}),
    "dinov2": (Dinov2Model, Dinov2Config, {**VISION, "mlp_ratio": 2}),
}
TEXT_KINDS = ("vqa", "matching", "captioning", "clip", "siglip")


def host(kind: str, **changes: Any) -> PreTrainedModel:
    """One of `KINDS` with random weights; `changes` are for its configuration, such as attn_implementation."""
    model_class, config_class, values = KINDS[kind]
    return randomise(model_class._from_config(config_class(**values), **changes))


def sentences(count: int = 2, length: int = 6, seed: int = 2) -> dict[str, Tensor]:
    """(count, length) ids from BOS to EOS and their mask; row i ends in i places of padding."""
    ids = torch.randint(4, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    for row in range(count):
        ids[row, length - row - 1] = EOS
        ids[row, length - row :] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def call_of(kind: str, count: int = 2, seed: int = 2) -> dict[str, Tensor]:
    """Arguments of one forward pass: images, and what else the kind reads."""
    inputs = {"pixel_values": images(count, seed=seed)}
    if kind in TEXT_KINDS:
        inputs |= sentences(count, seed=seed)
    if kind == "vqa":
        inputs["decoder_input_ids"] = sentences(count, seed=seed + 1)["input_ids"]
    return inputs


def tower_of(model: PreTrainedModel) -> PreTrainedModel:
    """The vision tower of a host."""
    return getattr(model, "vision_model", model)


def vision_output(output: Any) -> Tensor:
    """(B, T, D) last hidden state of the tower, out of the output of any kind."""
    inner = getattr(output, "vision_model_output", output)
    return inner.last_hidden_state


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor in an output, in order, also inside nested outputs."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else []
    return [tensor for value in values for tensor in tensors_of(value)]
