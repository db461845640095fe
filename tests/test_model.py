"""The whole dual-stream model: text encoder, padding, gradient to the words, saving, dtypes, static shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds, selections, text_masks
from tiny import FAMILIES, VOCABULARY, images, randomise, texts, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel, BertModel

from trips.config import SelectionConfig, TripsConfig, num_kept, token_counts
from trips.errors import ConfigError, ShapeError
from trips.losses import guidance_distillation_loss
from trips.model import TripsModel


def model_of(family: str = "clip", **kwargs) -> TripsModel:
    return randomise(TripsModel(tiny_config(family, **kwargs)))


@pytest.fixture(scope="module")
def model() -> TripsModel:
    return model_of()


@torch.no_grad()
def test_text_encoder_is_transformers_bert(model) -> None:
    """Every hidden state, with padding, on the same weights."""
    bert = BertModel(model.config.text_config, add_pooling_layer=False).eval()
    bert.load_state_dict(model.text.state_dict(), strict=True)
    ids, mask = texts(3)
    theirs = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    caught: list = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: caught.append(args[0])) for layer in model.text.encoder.layer
    ]
    ours = [model.encode_text(ids, mask)]
    for hook in hooks:
        hook.remove()
    assert len(caught) + 1 == len(theirs) == 3
    for a, b in zip([*caught, *ours], theirs, strict=True):
        assert float((a - b)[mask.bool()].abs().max()) < 1e-5


@given(data=st.data(), length=st.integers(2, 8), seed=seeds)
@torch.no_grad()
def test_padding_never_counts(model, data, length, seed) -> None:
    """Other ids under the padding change no fused state, no score and no choice."""
    mask = data.draw(text_masks(2, length))
    torch.manual_seed(seed)
    ids, noise = torch.randint(1, VOCABULARY, (2, length)), torch.randint(1, VOCABULARY, (2, length))
    before = model(ids, mask, images())
    after = model(torch.where(mask.bool(), ids, noise), mask, images())
    assert torch.equal(before.last_hidden_state[mask.bool()], after.last_hidden_state[mask.bool()])
    assert torch.equal(before.image_positions, after.image_positions)
    for a, b in zip(before.selections, after.selections, strict=True):
        assert torch.equal(a.scores, b.scores) and torch.equal(a.kept, b.kept)


@torch.no_grad()
def test_cutting_the_padding_off_changes_nothing(model) -> None:
    ids, mask = texts(2)
    whole, cut = model(ids, mask, images()), model(ids[1:, :5], None, images()[1:])
    torch.testing.assert_close(whole.last_hidden_state[1, :5], cut.last_hidden_state[0], rtol=0, atol=1e-5)
    assert torch.equal(whole.image_positions[1], cut.image_positions[0])


@torch.no_grad()
def test_the_text_decides_what_is_kept(model) -> None:
    ids, mask = texts(6)
    pixels = images(1).expand(6, -1, -1, -1)
    kept = model(ids, mask, pixels).selections[0].kept
    assert len({tuple(row) for row in kept.tolist()}) > 1
    blind = model(ids, mask, pixels, selection=model.config.selection.replace(guide="image")).selections[0].kept
    assert kept.shape == blind.shape and len({tuple(row) for row in blind.tolist()}) == 1


def words_gradient(model: TripsModel, *, through: str, **changes) -> float:
    """Largest gradient at the word embeddings when the loss sees one part of the image states only."""
    model.zero_grad()
    out = model(*texts(2), images(), selection=SelectionConfig(layers=(4,), keep_rate=0.5).replace(**changes))
    part = {"fused": slice(-1, None), "kept": slice(1, 9), "all": slice(0, None)}[through]
    tokens = out.image_states[:, part]
    (tokens * torch.randn(tokens.shape)).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    return 0.0 if gradient is None else float(gradient.abs().max())


def test_words_learn_through_the_fused_token_alone(model) -> None:
    assert words_gradient(model, through="fused") > 1e-6
    assert words_gradient(model, through="kept") == 0
    assert words_gradient(model, through="kept", learning="gate") > 1e-6


@pytest.mark.parametrize("changes", [{"guide": "random"}, {"guide": "image"}, {"inattentive": "drop"}], ids=str)
def test_words_get_nothing_where_they_do_not_guide(model, changes) -> None:
    assert words_gradient(model, through="all", **changes) == 0


def test_distillation_teaches_query_and_words_but_not_its_teacher(model) -> None:
    model.zero_grad()
    out = model(*texts(2), images(), observe=True)
    assert len(out.selections) == 2 and out.image_states.shape[1] == 17
    assert not out.image_attention.requires_grad
    sum(guidance_distillation_loss(record.logits, out.image_attention) for record in out.selections).backward()
    for layer in (1, 2):  # the two locations, 0-based
        assert float(model.vision.tower.encoder.layers[layer].self_attn.q_proj.weight.grad.abs().max()) > 1e-6
    assert float(model.get_input_embeddings().weight.grad.abs().max()) > 1e-6
    assert all(p.grad is None for p in model.fusion.parameters())
    model.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_everything_is_the_baseline(family) -> None:
    model = model_of(family)
    args = (*texts(2), images(2, 24, 40))
    base = model(*args, selection=SelectionConfig(layers=(), guide="none"))
    for selection in (SelectionConfig(layers=(1, 4), keep_rate=1.0), model.config.selection.replace(guide="none")):
        out = model(*args, selection=selection)
        assert float((out.last_hidden_state - base.last_hidden_state).abs().max()) < 1e-5
        assert out.selections == ()


@given(selection=selections(4, guides=("text", "image", "random")), seed=seeds)
@settings(max_examples=15)
@torch.no_grad()
def test_each_call_can_take_another_setting(model, selection, seed) -> None:
    out = model(*texts(2), images(), selection=selection, generator=torch.Generator().manual_seed(seed))
    assert out.image_states.shape[1] == token_counts(16, 4, selection)[-1][1]
    n, kept = 16, []
    for rate in selection.rates:
        if (k := num_kept(n, rate)) < n:
            kept.append(k)
            n = k + (selection.inattentive != "drop")
    assert [record.kept.shape[1] for record in out.selections] == kept
    assert bool(out.last_hidden_state.isfinite().all())
    assert model.config.selection.layers == (2, 3)  # the default stays


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model) -> None:
    ids, mask = texts(4)
    batch = model(ids, mask, images(4))
    for row in range(4):
        alone = model(ids[row : row + 1], mask[row : row + 1], images(4)[row : row + 1])
        real = mask[row].bool()
        torch.testing.assert_close(
            alone.last_hidden_state[0][real], batch.last_hidden_state[row][real], rtol=0, atol=1e-5
        )
        assert torch.equal(alone.image_positions[0], batch.image_positions[row])


@torch.no_grad()
def test_shared_prefix_and_ready_text_states(model) -> None:
    ids, mask = texts(3)
    index = torch.tensor([1, 0, 1])
    whole = model(ids, mask, images()[index])
    shared = model(ids, mask, images(), image_index=index)
    torch.testing.assert_close(whole.last_hidden_state, shared.last_hidden_state, rtol=0, atol=1e-5)
    assert torch.equal(whole.image_positions, shared.image_positions)
    parts = model(
        attention_mask=mask,
        text_states=model.encode_text(ids, mask),
        prefix=model.encode_prefix(images()),
        image_index=index,
    )
    assert torch.equal(parts.last_hidden_state, shared.last_hidden_state)


@pytest.mark.parametrize("text_width", [32, 48])
@torch.no_grad()
def test_saving_and_loading_is_bitwise(tmp_path, text_width) -> None:
    model = model_of("vit", text_width=text_width, width_map="orthogonal", inattentive="renormalise")
    model.save_pretrained(tmp_path)
    args = (*texts(2), images())
    for loaded in (TripsModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is TripsModel and loaded.config.selection == model.config.selection
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys() and ("vision.guide_map" in ours) == (text_width != 32)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(model(*args).last_hidden_state, loaded.eval()(*args).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TripsConfig


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16(family) -> None:
    model, args = model_of(family), (*texts(2), images())
    exact = model(*args)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*args)
    low = model.to(torch.bfloat16)(*args)
    assert low.last_hidden_state.dtype == torch.bfloat16 and low.selections[0].scores.dtype == torch.float32
    for out in (mixed, low):
        assert bool(out.last_hidden_state.isfinite().all())
        # 8 bits of mantissa: the scores are close, though a choice between near equals may fall otherwise
        torch.testing.assert_close(out.selections[0].logits, exact.selections[0].logits, rtol=0.1, atol=0.15)


def test_initial_weights_are_those_of_the_towers() -> None:
    torch.manual_seed(0)
    model = TripsModel(tiny_config("dinov2"))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert len(parameter.unique()) == 1, name  # biases 0, norms 1, LayerScale its constant
        elif "fusion" in name or "text" in name:
            assert 0.01 < float(parameter.detach().std()) < 0.03, name
    assert torch.equal(model.vision.tower.encoder.layer[0].layer_scale1.lambda1, torch.ones(32))


def test_every_attention_of_the_model_is_fused(model, monkeypatch) -> None:
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(query, key, value, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    with torch.no_grad():
        model(*texts(2), images())
    assert calls == [(6, 6)] * 2 + [(17, 17), (17, 17), (10, 10), (7, 7)] + [(6, 6), (6, 7)] * 2
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_static_graph(family) -> None:
    model, args = model_of(family), (*texts(2), images())
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="eager")(*args)
    torch.testing.assert_close(out.last_hidden_state, model(*args).last_hidden_state)


@pytest.mark.parametrize("observe", [False, True])
def test_no_value_is_ever_read_on_the_host(observe) -> None:
    """Tensors of the meta device have no values: reading one would fail."""
    model = model_of(learning="gate").to("meta")
    out = model(*(tensor.to("meta") for tensor in (*texts(2), images())), observe=observe)
    assert out.last_hidden_state.shape == (2, 6, 32)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(*texts(2), images())
        torch.manual_seed(0)
        (out.last_hidden_state * torch.randn(2, 6, 32)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name])


def test_bad_calls_are_named(model) -> None:
    ids, mask = texts(2)
    with pytest.raises(ConfigError, match="pixel_values or prefix"):
        model(ids, mask)
    with pytest.raises(ConfigError, match="pixel_values or prefix"):
        model(ids, mask, images(), prefix=model.encode_prefix(images()))
    with pytest.raises(ConfigError, match="input_ids or text_states"):
        model(pixel_values=images())
    with pytest.raises(ShapeError, match="pixel_values"):
        model(ids, mask, images(1))
    with pytest.raises(ShapeError, match="input_ids"):
        model(ids, mask[:, :-1], images())
    most = model.config.text_config.max_position_embeddings
    long = torch.full((2, most + 1), 5)
    with pytest.raises(ShapeError, match=rf"longer than the model has positions.*{most + 1} tokens.*at most {most}"):
        model(long, torch.ones_like(long), images())
    assert model(long[:, :most], pixel_values=images()).last_hidden_state.shape[1] == most
    with pytest.raises(ShapeError, match="attention_mask"):
        model(attention_mask=mask[:, :-1], text_states=model.encode_text(ids, mask), pixel_values=images())
    with pytest.raises(ConfigError, match="selection.layers"):
        model(ids, mask, images(), selection=SelectionConfig(layers=(9,)))


@torch.no_grad()
def test_where_nothing_is_removed_every_layer_runs_once_per_image() -> None:
    model = model_of().eval()
    rows = []
    for layer in model.vision.reader.layers:
        layer.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    ids, mask = texts(5)
    index = torch.tensor([0, 1, 1, 0, 1])
    whole = model(ids, mask, images(2), image_index=index, selection=model.config.selection.replace(keep_rate=1.0))
    assert set(rows) == {2}
    none = model(ids, mask, images(2), image_index=index, selection=model.config.selection.replace(guide="none"))
    assert torch.equal(whole.last_hidden_state, none.last_hidden_state)
