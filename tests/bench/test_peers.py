"""Peers with tiny sizes: shapes, whether attention is fused as they say, and transformers' parts equal to our model."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, images, randomise, texts, tiny_config
from torch import nn

from trips.bench.peers import PEERS, PeerSize, peer, transformers_pair
from trips.errors import ConfigError
from trips.model import TripsModel

SMALL = PeerSize(48, num_layers=2, num_heads=3, intermediate_size=64, vocab_size=50, patch_size=8)
EXPECTED = {"vilt": (2, 6 + 1 + 16, 48), "blip": (2, 6, 48), "clip": (2, 2)}


def small(name: str, **changes: object):
    return peer(name, **{"image_size": 32, "text_length": 6, "size": SMALL, **changes})


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_a_pair_runs_through(name) -> None:
    found = small(name)
    pixels, ids = found.inputs(2)
    out = found.call(pixels, ids)
    assert out.shape == EXPECTED[name] and bool(out.isfinite().all())
    assert not found.module.training and not torch.equal(out[0], out[1])
    other = found.call(found.inputs(2, seed=1)[0], ids)
    assert not torch.allclose(out, other, atol=1e-6)  # the image matters
    assert not torch.allclose(out, found.call(pixels, found.inputs(2, seed=1)[1]), atol=1e-6)  # so does the text
    assert small(name, text_length=90).call(*small(name, text_length=90).inputs(1)).isfinite().all()


@pytest.mark.parametrize("name", PEERS)
def test_inputs_are_valid_and_repeat(name) -> None:
    found = small(name)
    (pixels, ids), again = found.inputs(3, seed=7), found.inputs(3, seed=7)
    assert pixels.shape == (3, 3, 32, 32) and ids.shape == (3, 6) and 0 <= int(ids.min()) <= int(ids.max()) < 50
    assert torch.equal(pixels, again[0]) and torch.equal(ids, again[1])
    assert not torch.equal(ids, found.inputs(3, seed=8)[1])
    if name == "clip":  # whose text feature is that of the first end token
        assert ids.argmax(1).tolist() == [5, 5, 5] and ids[:, -1].tolist() == [49, 49, 49]


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_attention_is_what_it_says(name, monkeypatch) -> None:
    found, calls, fused = small(name), [], nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    found.call(*found.inputs())
    layers = {"vilt": 2, "blip": 2 + 2 * 2, "clip": 2 + 2}[name]
    assert len(calls) == (layers if found.attention == "sdpa" else 0)
    assert found.attention == ("sdpa" if type(found.module)._supports_sdpa else "eager")
    assert small("clip").attention == "sdpa"


@torch.no_grad()
def test_vilt_is_its_own_forward() -> None:
    """On the words, which do not see the order that transformers draws the patches in."""
    found = small("vilt")
    randomise(found.module)
    pixels, ids = found.inputs(2)
    own = found.module(input_ids=ids, pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found.call(pixels, ids)[:, :7], own[:, :7], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blip_is_its_own_forward() -> None:
    found = small("blip")
    randomise(found.module)
    pixels, ids = found.inputs(2)
    own = found.module(input_ids=ids, pixel_values=pixels, use_itm_head=True).question_embeds
    torch.testing.assert_close(found.call(pixels, ids), own, rtol=1e-4, atol=1e-5)


def stack(tokens: int, width: int, inner: int, seen: int | None = None) -> int:
    """Multiply-adds of one layer over tokens, and its cross-attention to the tokens seen."""
    own = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * inner
    return own if seen is None else own + 2 * (tokens + seen) * width**2 + 2 * tokens * seen * width


def test_the_count_is_that_of_the_published_sizes() -> None:
    """Closed forms of a full-size pair on the meta device; a multiply-add is two operations."""
    length, pixels = 40, 3 * 384**2 * 768
    seen = 24**2 + 1
    expected = {
        "vilt": pixels + 12 * stack(length + 12**2 + 1, 768, 3072),
        "blip": pixels + 12 * (stack(seen, 768, 3072) + stack(length, 768, 3072, seen)),
        "clip": pixels + 12 * (stack(seen, 768, 3072) + stack(length, 512, 2048)) + (768 + 512 + 1) * 512,
    }
    for name, products in expected.items():
        assert peer(name, device="meta").count() == pytest.approx(2 * products / 1e9, rel=1e-6)


def test_precision_and_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = small("blip", dtype=torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert found.call(*found.inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "albef"}, "albef.*vilt"),
        ({"image_size": 30}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"text_length": 0}, "text_length"),
        ({"size": PeerSize(50, num_heads=3)}, "size"),
        ({"name": "clip", "size": PeerSize(32, num_heads=4, patch_size=8)}, "size"),
    ],
    ids=str,
)
def test_misuse_is_named(changes, match) -> None:
    with pytest.raises(ConfigError, match=match):
        small(**{"name": "vilt", **changes})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_parts_compute_our_model_without_selection(family) -> None:
    model = randomise(TripsModel(tiny_config(family, guide="none")))
    pair, (ids, _) = transformers_pair(model, text_length=5), texts()
    for side in (32, 48):
        expected = model(ids, None, images(2, side, side)).last_hidden_state
        torch.testing.assert_close(pair.call(images(2, side, side), ids), expected, rtol=1e-4, atol=1e-5)
    assert pair.call(*pair.inputs(3)).shape == (3, 5, 32)
    assert pair.attention == "sdpa"


@torch.no_grad()
def test_transformers_parts_are_fused_and_not_ours(monkeypatch) -> None:
    model = TripsModel(tiny_config(guide="none")).half().eval()
    pair, calls = transformers_pair(model, text_length=6), []
    assert {type(module).__module__.split(".")[0] for module in pair.module.modules()} == {
        "transformers",
        "torch",
        "trips",
    }
    assert [type(m) for m in pair.module.modules() if type(m).__module__.startswith("trips")] == [type(pair.module)]
    assert next(pair.module.parameters()).dtype == torch.float16
    shared = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in shared for parameter in pair.module.parameters())
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    pair.module.float()
    pair.call(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in pair.inputs()))
    assert len(calls) == 4 + 2 + 2 * 2


def test_what_transformers_parts_cannot_do_is_named() -> None:
    model = TripsModel(tiny_config(text_width=16, width_map="orthogonal"))
    with pytest.raises(ConfigError, match="width"):
        transformers_pair(model)
    with pytest.raises(ConfigError, match="text_length.*24"):
        transformers_pair(TripsModel(tiny_config()))
