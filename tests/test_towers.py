"""Towers read part by part equal transformers' own forward pass, for every family, no weight at its initial value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import first_half, layers_of, second_half
from tiny import FAMILIES, images, randomise, tiny_vision_config
from torch import nn
from transformers import BertConfig, CLIPVisionModel, Dinov2Model, PreTrainedModel, ViTModel

from trips.config import SelectionConfig
from trips.errors import UnsupportedModelError
from trips.importers import load_vision_tower
from trips.towers import TowerReader, build_tower, family_of, find_module
from trips.vision import VisionEncoder

SIZES = [(32, 32), (24, 56)]
# Nothing is removed: the baseline, and a selection that keeps everything.
IDENTITIES = [SelectionConfig(layers=(2, 4), guide="none"), SelectionConfig(layers=(2, 4), keep_rate=1.0)]


def host(family: str) -> PreTrainedModel:
    """transformers' own model, built without the library."""
    config = tiny_vision_config(family)
    if family == "clip":
        return randomise(CLIPVisionModel(config))
    return randomise(ViTModel(config, add_pooling_layer=False) if family == "vit" else Dinov2Model(config))


def run_host(model: PreTrainedModel, pixels: torch.Tensor):
    """Its forward at any resolution."""
    kwargs = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    return model(pixels, output_hidden_states=True, **kwargs)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) < 1e-5


@pytest.mark.parametrize("selection", IDENTITIES, ids=["none", "rate-1"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_removal_every_hidden_state_is_the_hosts(family, size, selection) -> None:
    model = host(family)
    encoder = VisionEncoder(model.config, selection).eval()
    encoder.tower.load_state_dict(model.state_dict(), strict=True)
    pixels = images(2, *size)
    theirs = run_host(model, pixels)
    ours = encoder(pixels, torch.randn(2, 32), output_hidden_states=True)
    assert ours.selections == () and ours.grid == (size[0] // 8, size[1] // 8)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(a, b)
    if family == "clip":  # its last state is before the post norm, which transformers gives to [CLS] alone
        close(ours.last_hidden_state, model.post_layernorm(theirs.last_hidden_state))
        close(ours.last_hidden_state[:, 0], theirs.pooler_output)
    else:
        close(ours.last_hidden_state, theirs.last_hidden_state)


@torch.no_grad()
def test_real_dinov2_weights(dinov2_dir: Path) -> None:
    theirs_model = Dinov2Model.from_pretrained(dinov2_dir, dtype=torch.float32).eval()  # stored in half precision
    ours_model = load_vision_tower(dinov2_dir)
    encoder = VisionEncoder(ours_model.config, SelectionConfig(layers=(5, 10), keep_rate=1.0)).eval()
    encoder.tower.load_state_dict(ours_model.state_dict())
    pixels = images(1, 56, 84)
    theirs = run_host(theirs_model, pixels)
    ours = encoder(pixels, torch.randn(1, 384), output_hidden_states=True)
    close(ours.last_hidden_state, theirs.last_hidden_state)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        # states of this tower reach 50: the bound is relative to their size
        assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_two_halves_make_a_layer(family) -> None:
    model = host(family)
    reader, states = TowerReader(model), torch.randn(2, 9, 32)
    assert list(reader.layers) == layers_of(model)
    for index, layer in enumerate(layers_of(model)):
        middle = reader.attend(index, states)
        close(middle, first_half(layer, states))
        close(reader.feed_forward(index, middle), second_half(layer, middle))
        close(reader.feed_forward(index, middle), reader.layer(index, states))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_query_and_keys_are_those_of_the_attention(family, monkeypatch) -> None:
    """What the layer hands to fused attention is what the reader gives to Eq. 2."""
    model, calls = host(family), []
    fused = nn.functional.scaled_dot_product_attention

    def catch(query, key, value, **kwargs):
        calls.append((query, key))
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", catch)
    reader, states = TowerReader(model), torch.randn(2, 9, 32)
    for index in range(4):
        calls.clear()
        reader.layer(index, states)
        ((query, key),) = calls
        close(reader.keys(index, states), key.transpose(1, 2).flatten(2))
        close(reader.query(index, states[:, 3], through_norm=True), query.transpose(1, 2).flatten(2)[:, 3])
        raw = reader.query(index, states[:, 3], through_norm=False)
        assert float((raw - query[:, :, 3].flatten(1)).abs().max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_fused_by_default_and_weights_are_the_hosts_own(family) -> None:
    tower = build_tower(tiny_vision_config(family))
    assert tower.config._attn_implementation == "sdpa"
    assert set(tower.state_dict()) == set(host(family).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_another_dtype_are_cast(family) -> None:
    tower = build_tower(tiny_vision_config(family)).to(torch.bfloat16).eval()
    assert TowerReader(tower).embed(images(1)).dtype == torch.bfloat16


def test_unknown_family_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="vision_config.model_type.*bert"):
        family_of(BertConfig())
    with pytest.raises(UnsupportedModelError, match="Linear.*a.b | c"):
        find_module(nn.Linear(1, 1), ("a.b", "c"))
