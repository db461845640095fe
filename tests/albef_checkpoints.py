"""Checkpoints in ALBEF's layout, small, every key of the real ones, and what they compute, written out by hand.

Widths are 128 in both towers (two heads of 64), 3 vision layers, 2 text layers, 2 fusion layers.
"""

from __future__ import annotations

import re

import torch
from checkpoint_forwards import bert_embeddings, bert_layer, linear, mlm_head, timm_vit
from torch import Tensor

WIDTH, INNER, VOCABULARY, PLACES, GRID, PATCH = 128, 192, 40, 24, 4, 8
VISION_LAYERS, TEXT_LAYERS, FUSION_LAYERS, PROJECTION, QUEUE = 3, 2, 2, 16, 12


class _Random:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float | None = None) -> Tensor:
        scale = scale or (0.2 if len(shape) == 1 else shape[-1] ** -0.5)
        return torch.randn(*shape, generator=self.generator) * scale

    def linear(self, name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(out, into), f"{name}.bias": self(out)}

    def norm(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + self(WIDTH), f"{name}.bias": self(WIDTH)}


def _vision(random: _Random) -> dict[str, Tensor]:
    tensors = {"cls_token": random(1, 1, WIDTH), "pos_embed": random(1, 1 + GRID * GRID, WIDTH, scale=0.3)}
    tensors["patch_embed.proj.weight"] = random(WIDTH, 3, PATCH, PATCH, scale=0.05)
    tensors["patch_embed.proj.bias"] = random(WIDTH)
    for n in range(VISION_LAYERS):
        at = f"blocks.{n}."
        tensors |= random.norm(at + "norm1") | random.norm(at + "norm2")
        tensors |= random.linear(at + "attn.qkv", 3 * WIDTH, WIDTH) | random.linear(at + "attn.proj", WIDTH, WIDTH)
        tensors |= random.linear(at + "mlp.fc1", INNER, WIDTH) | random.linear(at + "mlp.fc2", WIDTH, INNER)
    return tensors | random.norm("norm")


def _embeddings(random: _Random) -> dict[str, Tensor]:
    tables = {"word": VOCABULARY, "position": PLACES, "token_type": 2}
    tensors = {f"embeddings.{name}_embeddings.weight": random(rows, WIDTH, scale=0.3) for name, rows in tables.items()}
    return {"embeddings.position_ids": torch.arange(PLACES)[None], **tensors, **random.norm("embeddings.LayerNorm")}


def _layer(random: _Random, at: str, crossed: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in ("attention", *(["crossattention"] if crossed else [])):
        for name in ("query", "key", "value"):
            tensors |= random.linear(f"{at}{part}.self.{name}", WIDTH, WIDTH)
        tensors |= random.linear(f"{at}{part}.output.dense", WIDTH, WIDTH)
        tensors |= random.norm(f"{at}{part}.output.LayerNorm")
    tensors |= random.linear(at + "intermediate.dense", INNER, WIDTH) | random.linear(at + "output.dense", WIDTH, INNER)
    return tensors | random.norm(at + "output.LayerNorm")


def _head(random: _Random, words: Tensor) -> dict[str, Tensor]:
    tensors = {"bias": random(VOCABULARY), **random.linear("transform.dense", WIDTH, WIDTH)}
    tensors |= random.norm("transform.LayerNorm")
    return {**tensors, "decoder.weight": words, "decoder.bias": tensors["bias"]}


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _bert(random: _Random, blocks_per_layer: int = 1) -> dict[str, Tensor]:
    tensors = _embeddings(random)
    for n in range(TEXT_LAYERS + FUSION_LAYERS * blocks_per_layer):
        tensors |= _layer(random, f"encoder.layer.{n}.", n >= TEXT_LAYERS)
    for n in range(TEXT_LAYERS, TEXT_LAYERS + FUSION_LAYERS * blocks_per_layer, blocks_per_layer):
        for name in tuple(tensors):  # the second block of a pair has the keys and values of the first
            if blocks_per_layer == 2 and re.match(rf"encoder\.layer\.{n}\.crossattention\.self\.(key|value)", name):
                tensors[name.replace(f".{n}.", f".{n + 1}.", 1)] = tensors[name]
    return tensors


def _model(random: _Random, kind: str) -> dict[str, Tensor]:
    """One copy: the model's own parameters that have a momentum copy too."""
    bert = _bert(random, 2 if kind == "nlvr" else 1)
    root = "text_encoder.bert." if kind == "pretraining" else "text_encoder."
    tensors = _prefixed("visual_encoder.", _vision(random)) | _prefixed(root, bert)
    words = bert["embeddings.word_embeddings.weight"]
    if kind == "pretraining":
        tensors |= _prefixed("text_encoder.cls.predictions.", _head(random, words))
    if kind in ("pretraining", "retrieval"):
        tensors |= random.linear("vision_proj", PROJECTION, WIDTH) | random.linear("text_proj", PROJECTION, WIDTH)
    if kind == "vqa":
        decoder = _embeddings(random)
        for n in range(FUSION_LAYERS):
            decoder |= _layer(random, f"encoder.layer.{n}.", True)
        tensors |= _prefixed("text_decoder.bert.", decoder)
        head = _head(random, decoder["embeddings.word_embeddings.weight"])
        tensors |= _prefixed("text_decoder.cls.predictions.", head)
    if kind == "nlvr":
        tensors |= random.linear("cls_head.0", WIDTH, WIDTH) | random.linear("cls_head.2", 2, WIDTH)
    return tensors


def checkpoint(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of ALBEF's "pretraining", "retrieval", "vqa" or "nlvr" checkpoint."""
    random = _Random(seed)
    tensors = _model(random, kind)
    for name, value in _model(_Random(seed + 100), kind).items():
        first, rest = name.split(".", 1)
        tensors[f"{first}_m.{rest}"] = value
    if kind in ("pretraining", "retrieval"):
        tensors |= random.linear("itm_head", 2, WIDTH)
        tensors["temp"] = torch.tensor(0.06)
        for name in ("image_queue", "text_queue"):
            tensors[name] = torch.nn.functional.normalize(random(PROJECTION, QUEUE), dim=0)
        tensors["queue_ptr"] = torch.tensor([4])
    if kind == "retrieval":
        tensors["idx_queue"] = torch.cat([torch.arange(4), torch.full((QUEUE - 4,), -100)])[None]
    return tensors


def wrapped(tensors: dict[str, Tensor]) -> dict[str, object]:
    """As its training script saves it."""
    return {"model": tensors, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "lr_scheduler": {"x": 1},
            "config": {"image_res": 32}, "epoch": 29}  # fmt: skip


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def image_states(tensors: dict[str, Tensor], pixels: Tensor, root: str = "visual_encoder.") -> Tensor:
    """(B, 1 + N, D) normed states of the vision tower."""
    return timm_vit(part(tensors, root), pixels)[-1]


def text_states(tensors: dict[str, Tensor], ids: Tensor, mask: Tensor, root: str = "text_encoder.") -> Tensor:
    """(B, L, D) behind the layers without cross-attention."""
    bert = _root(tensors, root)
    x = bert_embeddings(tensors, bert, ids)
    for n in range(TEXT_LAYERS):
        x = bert_layer(tensors, f"{bert}encoder.layer.{n}.", x, mask)
    return x


def fused_states(
    tensors: dict[str, Tensor], x: Tensor, mask: Tensor, images: list[Tensor], root: str = "text_encoder."
) -> Tensor:
    """(B, L, D) behind the layers with cross-attention; several images take turns."""
    bert = _root(tensors, root)
    for n in range(FUSION_LAYERS * len(images)):
        x = bert_layer(tensors, f"{bert}encoder.layer.{TEXT_LAYERS + n}.", x, mask, images[n % len(images)])
    return x


def _root(tensors: dict[str, Tensor], root: str) -> str:
    return f"{root}bert." if f"{root}bert.embeddings.word_embeddings.weight" in tensors else root


def mlm_logits(tensors: dict[str, Tensor], fused: Tensor, root: str = "text_encoder.") -> Tensor:
    """(B, L, V)."""
    words = tensors[f"{root}bert.embeddings.word_embeddings.weight"]
    return mlm_head(tensors, f"{root}cls.predictions.", words, fused)


def itm_logits(tensors: dict[str, Tensor], fused: Tensor) -> Tensor:
    """(B, 2)."""
    return linear(tensors, "itm_head", fused[:, 0])


def answer_logits(tensors: dict[str, Tensor], answers: Tensor, question: Tensor, question_mask: Tensor) -> Tensor:
    """(A, T, V) of the causal decoder."""
    length = answers.shape[1]
    causal = torch.ones(length, length).tril().expand(len(answers), -1, -1)
    x = bert_embeddings(tensors, "text_decoder.bert.", answers)
    for n in range(FUSION_LAYERS):
        x = bert_layer(tensors, f"text_decoder.bert.encoder.layer.{n}.", x, causal, question, question_mask)
    words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
    return mlm_head(tensors, "text_decoder.cls.predictions.", words, x)


def reasoning_logits(tensors: dict[str, Tensor], fused: Tensor) -> Tensor:
    """(B, 2): Linear, ReLU, Linear."""
    return linear(tensors, "cls_head.2", linear(tensors, "cls_head.0", fused[:, 0]).relu())
