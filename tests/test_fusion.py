"""The fusion encoder against transformers' BertModel with plain attention, and what it must and must not see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, text_masks
from tiny import randomise, tiny_bert_config
from torch import Tensor, nn
from transformers import BertModel

from trips.errors import ConfigError
from trips.fusion import FusionEncoder, bidirectional_mask, image_attention

CROSSED = {"is_decoder": True, "add_cross_attention": True}


@pytest.fixture(scope="module")
def host() -> BertModel:
    """BertModel in its decoder form, attention written out (no fused kernel)."""
    bert = BertModel(tiny_bert_config(num_layers=3, **CROSSED), add_pooling_layer=False)
    bert.set_attn_implementation("eager")
    return randomise(bert)


@pytest.fixture(scope="module")
def fusion(host: BertModel) -> FusionEncoder:
    """The same weights."""
    encoder = FusionEncoder(tiny_bert_config(num_layers=3, **CROSSED))
    encoder.layer.load_state_dict(host.encoder.layer.state_dict(), strict=True)
    return encoder.eval()


def run_host(host: BertModel, embeds: Tensor, mask: Tensor, image: Tensor):
    """Bidirectional by a ready-made boolean mask of four dimensions."""
    open_ = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return host(
        inputs_embeds=embeds,
        attention_mask=torch.where(open_, 0.0, torch.finfo(torch.float32).min),
        encoder_hidden_states=image,
        use_cache=False,
        output_attentions=True,
    )


@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 7), tokens=st.integers(2, 9), seed=seeds)
@torch.no_grad()
def test_states_and_teacher_equal_berts(host, fusion, data, batch, length, tokens, seed) -> None:
    mask = data.draw(text_masks(batch, length))
    torch.manual_seed(seed)
    embeds, image = torch.randn(batch, length, 32), torch.randn(batch, tokens, 32)
    theirs = run_host(host, embeds, mask, image)
    states, attention = fusion(host.embeddings(inputs_embeds=embeds), mask, image, output_image_attention=True)
    assert float((states - theirs.last_hidden_state)[mask.bool()].abs().max()) < 1e-5

    expected = []  # the teacher, a loop over rows, layers, heads and real text tokens
    for row in range(batch):
        total, count = torch.zeros(tokens), 0
        for layer in theirs.cross_attentions:
            for head in layer[row]:
                for place in range(length):
                    if mask[row, place]:
                        total, count = total + head[place], count + 1
        total = (total / count)[1:]
        expected.append(total / total.sum())
    torch.testing.assert_close(attention, torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(batch))


@torch.no_grad()
def test_a_later_token_changes_an_earlier_output(fusion) -> None:
    text, mask, image = torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.long), torch.randn(1, 4, 32)
    before = fusion(text, mask, image)[0]
    text[0, 4] += torch.randn(32)
    after = fusion(text, mask, image)[0]
    assert float((before[0, 0] - after[0, 0]).abs().max()) > 1e-3


@given(data=st.data(), length=st.integers(2, 7), seed=seeds)
@torch.no_grad()
def test_padding_is_never_read(fusion, data, length, seed) -> None:
    mask = data.draw(text_masks(2, length))
    torch.manual_seed(seed)
    text, image = torch.randn(2, length, 32), torch.randn(2, 5, 32)
    other = torch.where(mask.bool().unsqueeze(-1), text, 100 * torch.randn_like(text))
    before, teacher = fusion(text, mask, image, output_image_attention=True)
    after, other_teacher = fusion(other, mask, image, output_image_attention=True)
    assert torch.equal(before[mask.bool()], after[mask.bool()])
    assert torch.equal(teacher, other_teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mask_closes_padding_in_every_dtype(dtype) -> None:
    mask = bidirectional_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]), dtype)
    assert mask.shape == (2, 1, 3, 3) and mask.dtype == dtype and bool(mask.isfinite().all())
    for row, length in enumerate((2, 1)):
        weights = torch.softmax(mask[row, 0].double(), dim=-1)
        assert torch.equal(weights[:, :length], torch.full((3, length), 1 / length, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 25])
def test_mask_lies_as_fused_attention_wants_it(length: int) -> None:
    given = (torch.arange(length) < torch.tensor([[length], [1]])).long()
    mask = bidirectional_mask(given, torch.float32)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1]) and mask.stride(-1) == 1
    assert torch.equal(
        mask, torch.where(given.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None].expand_as(mask)
    )


def test_teacher_carries_no_gradient_and_fusion_does(fusion) -> None:
    image = torch.randn(1, 4, 32, requires_grad=True)
    states, attention = fusion(torch.randn(1, 3, 32), torch.ones(1, 3), image, output_image_attention=True)
    assert not attention.requires_grad
    (states * torch.randn(states.shape)).sum().backward()
    assert float(image.grad.abs().min()) > 0


def test_image_attention_skips_cls_and_renormalises() -> None:
    maps = [torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]]), torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]])]
    only_first = image_attention(maps, torch.tensor([[1, 0]]))
    torch.testing.assert_close(only_first, torch.tensor([[0.75, 0.25]]))


@torch.no_grad()
def test_every_attention_is_fused(fusion, monkeypatch) -> None:
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        assert not kwargs.get("is_causal")
        return fused(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    fusion(torch.randn(1, 5, 32), torch.ones(1, 5), torch.randn(1, 9, 32))
    assert calls == [(5, 5), (5, 9)] * 3


@torch.no_grad()
def test_unlike_image_width_is_projected(fusion) -> None:
    wide = FusionEncoder(tiny_bert_config(num_layers=3, **CROSSED), image_width=48).eval()
    wide.load_state_dict(fusion.state_dict(), strict=False)
    text, mask, image = torch.randn(1, 3, 32), torch.ones(1, 3), torch.randn(1, 4, 48)
    linear, norm = wide.image_projection
    assert torch.equal(wide(text, mask, image)[0], fusion(text, mask, norm(linear(image)))[0])
    assert FusionEncoder(tiny_bert_config(**CROSSED), image_width=32).image_projection is None


@pytest.mark.parametrize("missing", [{"is_decoder": False}, {"add_cross_attention": False}], ids=str)
def test_configuration_must_have_cross_attention(missing) -> None:
    with pytest.raises(ConfigError, match="fusion_encoder_config"):
        FusionEncoder(tiny_bert_config(**{**CROSSED, **missing}))
