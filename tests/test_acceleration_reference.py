"""Acceleration against slow, plain versions: loops over rows and patches, and the attention that a model returns."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from tiny import images
from tiny_hosts import KINDS, call_of, host, tower_of, vision_output
from torch import Tensor, nn
from transformers import PreTrainedModel

import trips
from trips.acceleration.hosts import host_of

RATES = {2: 0.5, 3: 0.75}
COMBINATIONS = [
    (kind, guide, score)
    for kind in KINDS
    for guide in host_of(host(kind)).guides
    for score in host_of(host(kind)).scores(guide)
    if guide != "random"
]


def queries_and_keys(layer: nn.Module, normed: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention of a layer makes of its normalised input, whatever its modules are called."""
    attention = getattr(layer, "self_attn", None) or layer.attention
    attention = getattr(attention, "attention", attention)
    if hasattr(attention, "qkv"):
        return attention.qkv(normed).chunk(3, dim=-1)[:2]
    if hasattr(attention, "query"):
        return attention.query(normed), attention.key(normed)
    return attention.q_proj(normed), attention.k_proj(normed)


def norm_of(layer: nn.Module) -> nn.Module:
    """The norm before the attention."""
    return next(getattr(layer, name) for name in ("layer_norm1", "layernorm_before", "norm1") if hasattr(layer, name))


def text_of(model: PreTrainedModel, kind: str, score: str, ids: Tensor, mask: Tensor) -> Tensor:
    """What one text without its padding says: the state, or the feature that the model itself compares."""
    if kind == "siglip":  # reads the last place, padding or not
        return model(input_ids=ids[None], attention_mask=mask[None], pixel_values=images(1)).text_embeds[0]
    ids = ids[mask.bool()]
    if kind == "clip":
        return model(input_ids=ids[None], pixel_values=images(1)).text_embeds[0]
    if kind == "captioning":
        return model.text_decoder.bert(input_ids=ids[None], is_decoder=True).last_hidden_state[0, -1]
    states = model.text_encoder(input_ids=ids[None]).last_hidden_state[0, 0]
    if score != "shared":
        return states
    feature = model.text_proj(states)
    return feature / feature.norm()


def shared_patch(model: PreTrainedModel, kind: str, patch: Tensor) -> Tensor:
    """One patch in the space of image and text, through whole modules of the model."""
    patch = model.vision_model.post_layernorm(patch)
    if kind == "matching":
        return model.vision_proj(patch)
    if kind == "clip":
        return model.visual_projection(patch)
    one = patch[None, None]
    return model.vision_model.head.attention(model.vision_model.head.probe, one, one)[0][0, 0]


def logits_of(
    model: PreTrainedModel, kind: str, guide: str, score: str, layer: nn.Module, tokens: Tensor, text: Tensor | None
) -> list[float]:
    """Logits of one row's patches, one product at a time."""
    lead = int(kind != "siglip")
    if score == "shared":
        scale = 1 / 0.07 if kind == "matching" else model.logit_scale.exp().item()
        patches = [shared_patch(model, kind, patch) for patch in tokens[lead:]]
        return [scale * torch.dot(text, patch).item() / patch.norm().item() for patch in patches]
    normed = norm_of(layer)(tokens)
    queries, keys = queries_and_keys(layer, normed)
    if guide == "text":
        query = queries_and_keys(layer, norm_of(layer)(text))[0]
    else:
        query = queries[0] if guide == "image" else keys[lead:].mean(dim=0)
    patches = keys[lead:] if score == "keys" else normed[lead:]
    weights = reference.relevance(query.tolist(), patches.tolist(), heads=4 if score == "keys" else 1)
    return [math.log(weight) for weight in weights]


def slow_tower(
    model: PreTrainedModel, kind: str, guide: str, score: str, inputs: dict[str, Tensor], inattentive: str
) -> tuple[Tensor, list[list[list[int]]]]:
    """Last hidden state and the kept positions of every row and location; one row at a time, cut before the layer."""
    tower, lead = tower_of(model), int(kind != "siglip")
    layers = tower.layers if hasattr(tower, "layers") else getattr(tower.encoder, "layers", None) or tower.encoder.layer
    states, kept = [], []
    for row, pixels in enumerate(inputs["pixel_values"]):
        tokens = tower.embeddings(pixels[None])
        tokens = tower.pre_layrnorm(tokens) if hasattr(tower, "pre_layrnorm") else tokens
        text = None
        if guide == "text":
            text = text_of(model, kind, score, inputs["input_ids"][row], inputs["attention_mask"][row])
        places, kept_here = list(range(16)), []
        for number, layer in enumerate(layers, start=1):
            if number in RATES:
                logits = logits_of(model, kind, guide, score, layer, tokens[0], text)
                rows = tokens[0].tolist() if lead else [[0.0] * 32, *tokens[0].tolist()]
                k = reference.num_kept(len(places), RATES[number])
                rows, places = reference.select(rows, logits, k, places, inattentive)
                kept_here.append(places[:k])
                tokens = torch.tensor(rows[1 - lead :])[None]
            mask = {"attention_mask": None} if kind in ("clip", "siglip") else {}
            tokens = layer(tokens, **mask)
        norm = getattr(tower, "post_layernorm", None) or getattr(tower, "layernorm", None)
        states.append(tokens if kind == "clip" else norm(tokens))  # CLIP normalises its [CLS] alone
        kept.append(kept_here)
    return torch.cat(states), kept


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "guide", "score", "inattentive"),
    [(*row, "fuse") for row in COMBINATIONS]
    + [(kind, host_of(host(kind)).guides[0], None, how) for kind in KINDS for how in ("renormalise", "drop")],
)
def test_the_selected_forward_is_that_of_loops(kind: str, guide: str, score: str | None, inattentive: str) -> None:
    model, inputs = host(kind), call_of(kind)
    score = score or host_of(model).scores(guide)[0]
    want, kept = slow_tower(model, kind, guide, score, inputs, inattentive)
    trips.accelerate(model, tuple(RATES), tuple(RATES.values()), guide, score=score, inattentive=inattentive)
    got = vision_output(model(**inputs))
    records = trips.explain_last(model)
    assert [[record.kept[row].tolist() for record in records] for row in range(2)] == kept
    # Where the softmax is sharp the fused token is small, and the next norm enlarges its rounding.
    torch.testing.assert_close(got, want, rtol=2e-3, atol=3e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vqa", "clip", "vit"])
def test_the_image_guide_asks_as_the_attention_of_the_layer_does(kind: str) -> None:
    """Its scores are the [CLS] row of that layer's own attention, without the column of [CLS], mean over heads."""
    model, inputs = host(kind, attn_implementation="eager"), call_of(kind)
    attentions = tower_of(model)(inputs["pixel_values"], output_attentions=True).attentions
    rows = attentions[2][:, :, 0, 1:]  # (B, h, n) of layer 3
    want = (rows / rows.sum(dim=-1, keepdim=True)).mean(dim=1)
    trips.accelerate(model, (3,), 0.5, "image")
    model(**inputs)
    torch.testing.assert_close(trips.explain_last(model)[0].scores, want)
