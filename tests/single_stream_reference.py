"""TRIPS-S by hand: embeddings, attention, the row of [CLS], the choice and the fused token, one token at a time."""

from __future__ import annotations

import math

import reference
import torch
from torch import Tensor, nn

from trips.single_stream import TripsSingleStreamModel


def norm(module: nn.LayerNorm, row: Tensor) -> Tensor:
    spread = ((row - row.mean()) ** 2).mean()
    return (row - row.mean()) / torch.sqrt(spread + module.eps) * module.weight + module.bias


def embedded(model: TripsSingleStreamModel, ids: list[int], pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens of one text and of one image of the size that the tower was trained at."""
    table, tower = model.text.embeddings, model.vision.tower.embeddings
    clip = model.config.vision_config.model_type == "clip_vision_model"
    places = tower.position_embedding.weight if clip else tower.position_embeddings[0]
    convolution = tower.patch_embedding if clip else tower.patch_embeddings.projection
    first = (tower.class_embedding if clip else tower.cls_token.flatten()) + places[0]
    words = []
    for place, token in enumerate(ids[1:], start=1):
        row = table.word_embeddings.weight[token] + table.position_embeddings.weight[place]
        words.append(norm(table.LayerNorm, row + table.token_type_embeddings.weight[0]) + modality(model, 0))
    patches, kernel = [], convolution.weight.flatten(1)
    for number in range(16):
        y, x = 8 * (number // 4), 8 * (number % 4)
        row = kernel @ pixels[:, y : y + 8, x : x + 8].flatten()
        row = row + (0 if convolution.bias is None else convolution.bias) + places[number + 1]
        patches.append(row if not clip else norm(model.vision.tower.pre_layrnorm, row))
    if clip:
        first = norm(model.vision.tower.pre_layrnorm, first)
    return [first, *words], [row + modality(model, 1) for row in patches]


def modality(model: TripsSingleStreamModel, number: int) -> Tensor:
    return model.modality_embeddings.weight[number]


def by_role(layer: nn.Module) -> dict[str, nn.Linear]:
    ends = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}
    parts = {role: next(m for name, m in layer.named_modules() if name.endswith(names)) for role, names in ends.items()}
    outs = ("out_proj", "o_proj", "attention.output.dense")
    return parts | {"out": next(m for name, m in layer.named_modules() if name.endswith(outs))}


def activation(kind: str, row: Tensor) -> Tensor:
    if kind == "quick_gelu":
        return row / (1 + torch.exp(-1.702 * row))
    return row * (1 + torch.erf(row / math.sqrt(2))) / 2


def read_by_hand(
    model: TripsSingleStreamModel,
    ids: list[int],
    pixels: Tensor,
    rates: dict[int, float],
    inattentive: str = "fuse",
    bias: dict[int, float] | None = None,
) -> tuple[Tensor, list[int], list[list[float]]]:
    """Token by token and head by head.

    Args:
        bias: added to the attention score of an image token, by its place behind the first selection.
    Returns:
        (S, D) states, grid positions, a_cls of each location.
    """
    text, patches = embedded(model, ids, pixels)
    config, positions, scores, removed = model.config.vision_config, list(range(16)), [], False
    size = 32 // config.num_attention_heads
    for number, layer in enumerate(reference.layers_of(model.vision.tower), start=1):
        parts, tokens = by_role(layer), [*text, *patches]
        normed = [norm(reference.first_norm(layer), token) for token in tokens]
        q, k, v = ([parts[role](token) for token in normed] for role in "qkv")
        seen, row_of_cls = [], [0.0] * len(patches)
        for place in range(len(tokens)):
            heads = []
            for head in range(config.num_attention_heads):
                part = slice(head * size, (head + 1) * size)
                row = [float(q[place][part] @ key[part]) / math.sqrt(size) for key in k]
                if place == 0:
                    image = reference.softmax(row[len(text) :])
                    row_of_cls = [a + b / config.num_attention_heads for a, b in zip(row_of_cls, image)]
                for token, more in (bias or {}).items() if removed else ():
                    row[len(text) + token] += more
                weights = reference.softmax(row)
                heads.append(sum(weight * value[part] for weight, value in zip(weights, v)))
            seen.append(parts["out"](torch.cat(heads)))
        tokens = [token + branch for token, branch in zip(tokens, seen)]
        text, patches = tokens[: len(text)], tokens[len(text) :]
        if number in rates:
            kept = reference.num_kept(len(patches), rates[number])
            # the library decides in float32; the logarithm gives back the softmax
            logits = torch.tensor([math.log(w) for w in row_of_cls], dtype=torch.float32).tolist()
            rows, positions = reference.select(
                [[0.0], *(token.tolist() for token in patches)], logits, kept, positions, inattentive
            )
            patches, removed = [torch.tensor(row, dtype=torch.float64) for row in rows[1:]], True
            scores.append(row_of_cls)
        fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
        tokens = [
            token + fc2(activation(config.hidden_act, fc1(norm(reference.second_norm(layer), token))))
            for token in [*text, *patches]
        ]
        text, patches = tokens[: len(text)], tokens[len(text) :]
    final = getattr(model.vision.tower, "post_layernorm", None) or model.vision.tower.layernorm
    return torch.stack([norm(final, token) for token in [*text, *patches]]), positions, scores
