"""ViT-TRIPS: selection in a running tower against a loop version, its gradient, its two parts, its static shapes."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds, selections
from tiny import FAMILIES, images, tiny_encoder, tiny_vision_config
from torch import nn

from trips.config import SelectionConfig, num_kept
from trips.errors import ConfigError, ShapeError
from trips.vision import VisionEncoder, semi_orthogonal

HALF = SelectionConfig(layers=(2, 3), keep_rate=0.5)


def encoder_of(family: str = "clip", selection: SelectionConfig = HALF, **kwargs) -> VisionEncoder:
    return tiny_encoder(family, selection, **kwargs)


@pytest.fixture(scope="module")
def doubles() -> dict[str, VisionEncoder]:
    """Encoders in float64: choices then differ from the loop version's only where float32 scores tie."""
    return {family: encoder_of(family, width=16).double() for family in FAMILIES}


@given(
    selection=selections(4),
    family=st.sampled_from(FAMILIES),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=seeds,
)
@torch.no_grad()
def test_suffix_equals_the_loop_version(doubles, selection, family, grid, seed) -> None:
    encoder = doubles[family]
    torch.manual_seed(seed)
    pixels = torch.randn(2, 3, 8 * grid[0], 8 * grid[1], dtype=torch.float64)
    text_cls = torch.randn(2, 16, dtype=torch.float64)
    ours = encoder(pixels, text_cls, selection, output_hidden_states=True)
    expected, positions = reference.vision_suffix(
        encoder.tower,
        ours.hidden_states[0],
        text_cls,
        dict(zip(selection.layers, selection.rates, strict=True)),
        guide=selection.guide,
        score=selection.score,
        query_norm=selection.query_norm,
        heads=4 if selection.heads == "per_head" else 1,
        inattentive=selection.inattentive,
    )
    assert ours.positions.tolist() == positions.tolist()
    # the weights of the fused token are float32 by design
    torch.testing.assert_close(ours.hidden_states[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(2, 3), (1, 2, 4), (4,), (1, 4)], ids=str)
@torch.no_grad()
def test_positions_compose_over_locations(layers) -> None:
    """Every image token can be traced: kept within kept, and its place counts on the original grid."""
    selection = SelectionConfig(layers=layers, keep_rate=0.6)
    out = encoder_of(selection=selection)(images(2), torch.randn(2, 32))
    assert [record.layer for record in out.selections] == list(layers)
    before, n = torch.arange(16).expand(2, -1), 16
    for record in out.selections:
        k = num_kept(n, 0.6)
        assert torch.equal(record.candidates, before)
        assert record.kept.shape == record.index.shape == (2, k) and record.scores.shape == (2, n)
        for row in range(2):
            best = reference.best(record.logits[row].tolist(), k)
            assert record.index[row].tolist() == best
            assert record.kept[row].tolist() == [int(before[row, place]) for place in best]
        before, n = torch.cat([record.kept, torch.full((2, 1), -1)], dim=1), k + 1
    assert torch.equal(out.positions, before)
    assert out.last_hidden_state.shape == (2, n + 1, 32)


@torch.no_grad()
def test_fused_token_is_a_candidate_at_the_next_location() -> None:
    out = encoder_of(selection=SelectionConfig(layers=(1, 3), keep_rate=(0.5, 0.8)))(images(3), torch.randn(3, 32))
    assert out.selections[1].candidates[:, -1].tolist() == [-1, -1, -1]
    kept = [row.count(-1) for row in out.selections[1].kept.tolist()]
    assert max(kept) == 1  # here it is among the kept of some row


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_added(family) -> None:
    for selection in (HALF, HALF.replace(learning="gate"), HALF.replace(learning="distill", heads="per_head")):
        encoder = VisionEncoder(tiny_vision_config(family), selection)
        names = {name.removeprefix("tower.") for name in encoder.state_dict()}
        assert names == set(encoder.tower.state_dict())
        assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in encoder.tower.parameters())


@pytest.mark.parametrize("guide", ["text", "image", "random", "none"])
@torch.no_grad()
def test_prefix_and_suffix_are_the_forward_bitwise(guide) -> None:
    encoder, selection, text_cls = encoder_of(), HALF.replace(guide=guide), torch.randn(2, 32)
    whole = encoder(images(), text_cls, selection, generator=torch.Generator().manual_seed(5))
    prefix = encoder.prefix(images(), selection)
    assert prefix.layer == (None if guide == "none" else 2)
    parts = encoder.suffix(prefix, text_cls, selection, generator=torch.Generator().manual_seed(5))
    assert torch.equal(whole.last_hidden_state, parts.last_hidden_state)
    assert torch.equal(whole.positions, parts.positions)


@torch.no_grad()
def test_many_texts_share_one_image() -> None:
    encoder, text_cls, index = encoder_of(), torch.randn(5, 32), torch.tensor([0, 0, 1, 0, 1])
    shared = encoder(images(), text_cls, image_index=index)
    assert shared.positions.shape[0] == 5
    for row, image in enumerate(index.tolist()):
        alone = encoder(images()[image : image + 1], text_cls[row : row + 1])
        torch.testing.assert_close(alone.last_hidden_state[0], shared.last_hidden_state[row], rtol=0, atol=1e-5)
        assert torch.equal(alone.positions[0], shared.positions[row])
    assert len({tuple(row) for row in shared.positions[[0, 1, 3]].tolist()}) > 1  # the text makes a difference


LAST = SelectionConfig(layers=(4,), keep_rate=0.5)  # behind the last attention tokens do not mix any more


def text_gradient(selection: SelectionConfig, part: slice) -> torch.Tensor | None:
    """Gradient of t_cls when only some of the image tokens count in the loss."""
    encoder = encoder_of(selection=selection)
    text_cls = torch.randn(2, 32, requires_grad=True)
    tokens = encoder(images(), text_cls).last_hidden_state[:, part]
    (tokens * torch.randn(tokens.shape)).sum().backward()
    return text_cls.grad


def test_text_learns_through_the_fused_token_alone() -> None:
    fused, others = slice(-1, None), slice(0, -1)
    assert float(text_gradient(LAST, fused).abs().max()) > 1e-6
    through_others = text_gradient(LAST, others)
    assert through_others is None or float(through_others.abs().max()) == 0


def test_gate_lets_the_text_learn_through_the_kept_tokens() -> None:
    gated = LAST.replace(learning="gate")
    assert float(text_gradient(gated, slice(1, -1)).abs().max()) > 1e-6
    assert float(text_gradient(gated.replace(inattentive="drop"), slice(1, None)).abs().max()) > 1e-6


@pytest.mark.parametrize(
    "changes", [{"guide": "random"}, {"guide": "image"}, {"guide": "none"}, {"inattentive": "drop"}], ids=str
)
def test_where_the_text_has_no_say_it_gets_no_gradient(changes) -> None:
    gradient = text_gradient(HALF.replace(**changes), slice(0, None))
    assert gradient is None or float(gradient.abs().max()) == 0


@torch.no_grad()
def test_observing_scores_everywhere_and_removes_nothing() -> None:
    encoder, text_cls = encoder_of(), torch.randn(2, 32)
    seen = encoder(images(), text_cls, observe=True)
    plain = encoder(images(), selection=HALF.replace(guide="none"))
    torch.testing.assert_close(seen.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
    assert [record.layer for record in seen.selections] == [2, 3]
    assert all(record.logits.shape == (2, 16) for record in seen.selections)
    acting = encoder(images(), text_cls)
    assert torch.equal(seen.selections[0].logits, acting.selections[0].logits)


@torch.no_grad()
def test_random_guide_follows_its_generator() -> None:
    encoder, selection = encoder_of(), HALF.replace(guide="random")
    runs = [encoder(images(), None, selection, generator=torch.Generator().manual_seed(s)).positions for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_is_fused_and_no_map_is_made(family, monkeypatch) -> None:
    """One fused call a layer, and no tensor anywhere that is quadratic in the number of tokens."""
    encoder, calls = encoder_of(family), []
    fused = nn.functional.scaled_dot_product_attention

    class NoMap(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
                    assert tensor.shape[-1] not in (57, 30, 17) or tensor.shape[-1] != tensor.shape[-2]
            return out

    def count(query, key, value, attn_mask=None, **kwargs):
        assert attn_mask is None
        calls.append(query.shape[2])
        return fused(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    with torch.no_grad(), NoMap():
        encoder(images(1, 64, 56), torch.randn(1, 32))  # 56 patches, unlike every width here
    assert calls == [57, 57, 30, 17]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_static_graph(family) -> None:
    encoder, text_cls = encoder_of(family), torch.randn(2, 32)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    out, plain = compiled(images(), text_cls), encoder(images(), text_cls)
    torch.testing.assert_close(out.last_hidden_state, plain.last_hidden_state)
    assert torch.equal(out.positions, plain.positions)


@pytest.mark.parametrize("guide", ["text", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_is_ever_read_on_the_host(family, guide) -> None:
    """Tensors of the meta device have no values: reading one would fail."""
    encoder = encoder_of(family, HALF.replace(guide=guide, learning="gate")).to("meta")
    out = encoder(images().to("meta"), torch.empty(2, 32, device="meta"))
    assert out.last_hidden_state.shape == (2, 7, 32) and out.positions.device.type == "meta"


@given(rows=st.integers(1, 4), selection=selections(4), seed=seeds)
@settings(max_examples=15)
@torch.no_grad()
def test_rows_do_not_know_each_other(doubles, rows, selection, seed) -> None:
    encoder = doubles["dinov2"]
    torch.manual_seed(seed)
    pixels, text_cls = torch.randn(rows, 3, 24, 24, dtype=torch.float64), torch.randn(rows, 16, dtype=torch.float64)
    batch = encoder(pixels, text_cls, selection)
    alone = encoder(pixels[-1:], text_cls[-1:], selection)
    assert torch.equal(alone.positions[0], batch.positions[-1])
    torch.testing.assert_close(alone.last_hidden_state[0], batch.last_hidden_state[-1], rtol=1e-5, atol=1e-6)


def test_semi_orthogonal_keeps_lengths_on_its_smaller_side() -> None:
    for rows, columns in ((5, 9), (9, 5), (4, 4)):
        basis = semi_orthogonal(rows, columns)
        gram = basis @ basis.T if rows <= columns else basis.T @ basis
        torch.testing.assert_close(gram, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)
        assert torch.equal(basis, semi_orthogonal(rows, columns)) and basis.is_contiguous()
        assert not torch.equal(basis, semi_orthogonal(rows, columns, seed=1))


def test_unlike_text_width_goes_through_the_fixed_map() -> None:
    encoder = VisionEncoder(tiny_vision_config(), HALF.replace(width_map="orthogonal"), guide_width=48)
    assert [name for name in encoder.state_dict() if "tower" not in name] == ["guide_map"]
    assert "guide_map" not in dict(encoder.named_parameters())
    text_cls = torch.randn(2, 48)
    mapped = encoder_of()
    mapped.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "guide_map"})
    expected = mapped(images(), text_cls @ semi_orthogonal(48, 32))
    assert torch.equal(encoder.eval()(images(), text_cls).positions, expected.positions)


@pytest.mark.parametrize(
    ("pixels", "text_cls", "error", "match"),
    [
        ((2, 3, 32), (2, 32), ShapeError, "pixel_values"),
        ((2, 1, 32, 32), (2, 32), ShapeError, "pixel_values"),
        ((2, 3, 7, 32), (2, 32), ShapeError, "pixel_values"),
        ((2, 3, 32, 32), (1, 32), ShapeError, "text_cls"),
        ((2, 3, 32, 32), (2, 16), ShapeError, "text_cls"),
        ((2, 3, 32, 32), (2,), ShapeError, "text_cls"),
        ((2, 3, 32, 32), None, ConfigError, "text_cls"),
    ],
)
def test_bad_input_is_named(pixels, text_cls, error, match) -> None:
    with pytest.raises(error, match=match):
        encoder_of()(torch.zeros(pixels), None if text_cls is None else torch.zeros(text_cls))


def test_a_prefix_serves_only_its_own_first_location() -> None:
    encoder = encoder_of()
    prefix = encoder.prefix(images())
    for other in (HALF.replace(layers=(3,)), HALF.replace(guide="none"), HALF.replace(layers=(1, 2))):
        with pytest.raises(ConfigError, match="selection.layers"):
            encoder.suffix(prefix, torch.randn(2, 32), other)
    encoder.suffix(prefix, torch.randn(2, 32), HALF.replace(layers=(2, 4), keep_rate=0.3))
    with pytest.raises(ConfigError, match="selection.layers"):
        encoder.prefix(images(), SelectionConfig(layers=(5,)))
