"""TRIPS-S: the whole pass against loops and against ViLT of transformers, text that stays, leaks, saving, refusals."""

from __future__ import annotations

import inspect

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from single_stream_reference import by_role, read_by_hand
from strategies import seeds, selections, text_masks
from tiny import BOS, FAMILIES, VOCABULARY, images, randomise, texts, tiny_config
from torch import Tensor, nn
from transformers import AutoModel, ViltConfig, ViltModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from trips.config import SelectionConfig, TripsConfig, token_counts
from trips.errors import ConfigError, ShapeError, UnsupportedModelError
from trips.model import TripsModel
from trips.single_stream import SingleStreamMultiImageModel, TripsSingleStreamModel, build_encoder

NONE = SelectionConfig(layers=(), guide="none")
MASKLESS = "attention_mask" not in inspect.signature(Dinov2Layer.forward).parameters  # in older releases
BY_FAMILY = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "dinov2" or not MASKLESS])


def model_of(family: str = "clip", **kwargs) -> TripsSingleStreamModel:
    return randomise(TripsSingleStreamModel(tiny_config(family, architecture="single", **kwargs)))


@pytest.fixture(scope="module")
def model() -> TripsSingleStreamModel:
    return model_of()


# --- the pass


@pytest.mark.parametrize(
    ("family", "inattentive", "rates"),
    [("clip", "fuse", (0.5, 0.5)), ("vit", "fuse", (0.3, 0.7)), ("clip", "renormalise", (0.6, 0.4)),
     ("vit", "drop", (0.5, 0.5))],
)  # fmt: skip
@torch.no_grad()
def test_pass_equals_loops(family, inattentive, rates) -> None:
    """Padding, embeddings, attention, the row of [CLS], the choice and the fused token, in float64."""
    model = model_of(family, inattentive=inattentive, keep_rate=rates, layers=(2, 4)).double()
    ids, mask = texts(2)
    pixels = images().double()
    out = model(ids, mask, pixels)
    for row in range(2):
        length = int(mask[row].sum())
        states, positions, scores = read_by_hand(
            model, ids[row, :length].tolist(), pixels[row], dict(zip((2, 4), rates)), inattentive
        )
        torch.testing.assert_close(out.last_hidden_state[row, :length], states[:length], rtol=0, atol=1e-5)
        torch.testing.assert_close(out.image_states[row, 1:], states[length:], rtol=0, atol=1e-5)
        assert torch.equal(out.image_states[row, 0], out.last_hidden_state[row, 0])
        assert out.image_positions[row].tolist() == positions
        for record, expected in zip(out.selections, scores, strict=True):
            torch.testing.assert_close(record.scores[row], torch.tensor(expected), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_without_selection_it_is_vilt() -> None:
    """transformers' ViLT on the same weights, with padding: its text [CLS] made to be our multimodal one."""
    model = model_of("vit")
    vision = model.config.vision_config
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    config = ViltConfig(
        vocab_size=VOCABULARY, max_position_embeddings=24, image_size=32, patch_size=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **{name: getattr(vision, name) for name in shared},
    )  # fmt: skip
    vilt = ViltModel(config, add_pooling_layer=False).eval()
    vilt.embeddings.text_embeddings.load_state_dict(model.text.embeddings.state_dict(), strict=False)
    vilt.embeddings.text_embeddings.LayerNorm.eps = model.text.embeddings.LayerNorm.eps
    vilt.embeddings.token_type_embeddings.load_state_dict(model.modality_embeddings.state_dict())
    vilt.layernorm.load_state_dict(model.vision.tower.layernorm.state_dict())
    for ours, theirs in zip(model.vision.reader.layers, vilt.encoder.layer, strict=True):
        parts = by_role(ours)
        pairs = [
            (parts["q"], theirs.attention.attention.query),
            (parts["k"], theirs.attention.attention.key),
            (parts["v"], theirs.attention.attention.value),
            (parts["out"], theirs.attention.output.dense),
            (ours.layernorm_before, theirs.layernorm_before),
            (ours.layernorm_after, theirs.layernorm_after),
            (ours.mlp.fc1, theirs.intermediate.dense),
            (ours.mlp.fc2, theirs.output.dense),
        ]
        for source, target in pairs:
            target.load_state_dict(source.state_dict())
    first = vilt.embeddings.text_embeddings(torch.tensor([[BOS]]))[0, 0] + model.modality_embeddings.weight[0]
    tower = model.vision.tower.embeddings
    tower.cls_token.copy_((first - tower.position_embeddings[0, 0]).view(1, 1, -1))
    ids, mask = texts(3)
    embeddings = model.vision.reader.embed(images(3))[:, 1:]  # without the modality, which ViLT adds itself
    theirs = vilt(
        input_ids=ids, attention_mask=mask, image_embeds=embeddings, pixel_mask=torch.ones(3, 16, dtype=torch.long)
    ).last_hidden_state
    out = model(ids, mask, images(3), selection=NONE)
    real = mask.bool()
    torch.testing.assert_close(out.last_hidden_state[real], theirs[:, :6][real], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.image_states[:, 1:], theirs[:, 6:], rtol=0, atol=2e-5)


# --- what stays, what does not count


@given(
    selection=selections(4, guides=("text", "random", "similarity")),
    length=st.integers(2, 8),
    seed=seeds,
)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_text_stays_and_image_tokens_are_as_counted(model, selection, length, seed) -> None:
    """Every layer sees all text tokens first, and behind them as many image tokens as the arithmetic says."""
    if selection.guide == "similarity":
        selection = selection.replace(inattentive="fuse")
    seen: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
        for layer in model.vision.reader.layers
    ]
    ids, mask = texts(2, length)
    out = model(ids, mask, images(), selection=selection, generator=torch.Generator().manual_seed(seed))
    for hook in hooks:
        hook.remove()
    counts = token_counts(16, 4, selection)
    assert seen == [after - 1 + length for _, after in counts]
    assert out.last_hidden_state.shape == (2, length, 32) and out.image_states.shape[1] == counts[-1][1]
    assert out.image_positions.shape[1] == counts[-1][1] - 1 and bool(out.last_hidden_state.isfinite().all())


@given(data=st.data(), length=st.integers(2, 8), seed=seeds)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_padding_never_counts(model, data, length, seed) -> None:
    mask = data.draw(text_masks(2, length))
    torch.manual_seed(seed)
    ids, noise = torch.randint(1, VOCABULARY, (2, length)), torch.randint(1, VOCABULARY, (2, length))
    before = model(ids, mask, images())
    after = model(torch.where(mask.bool(), ids, noise), mask, images())
    assert torch.equal(before.last_hidden_state[mask.bool()], after.last_hidden_state[mask.bool()])
    assert torch.equal(before.image_states, after.image_states)
    real = int(mask[1].sum())
    cut = model(ids[1:, :real], None, images()[1:])
    torch.testing.assert_close(before.last_hidden_state[1, :real], cut.last_hidden_state[0], rtol=0, atol=1e-5)
    assert torch.equal(model.text_alone(ids, mask)[mask.bool()],
                       model.text_alone(torch.where(mask.bool(), ids, noise), mask)[mask.bool()])  # fmt: skip


@torch.no_grad()
def test_every_token_reads_every_other(model) -> None:
    ids, mask = texts(1)
    before = model(ids, mask, images(1)).last_hidden_state
    last = ids.clone()
    last[0, -1] = 4 if ids[0, -1] != 4 else 5
    for other in (model(last, mask, images(1)), model(ids, mask, images(1, seed=7))):
        assert bool(((before - other.last_hidden_state).abs().amax(-1) > 1e-4).all())


@torch.no_grad()
def test_words_decide_what_is_kept(model) -> None:
    ids, mask = texts(6)
    kept = model(ids, mask, images(1).expand(6, -1, -1, -1)).selections[0].kept
    assert len({tuple(row) for row in kept.tolist()}) > 1


@BY_FAMILY
@torch.no_grad()
def test_keeping_everything_is_no_selection(family) -> None:
    model = model_of(family)
    args = (*texts(2), images(2, 24, 40))
    base = model(*args, selection=NONE)
    assert base.image_states.shape[1] == 16
    for selection in (SelectionConfig(layers=(1, 4), keep_rate=1.0), model.config.selection.replace(guide="none")):
        out = model(*args, selection=selection)
        assert torch.equal(out.last_hidden_state, base.last_hidden_state) and out.selections == ()


@torch.no_grad()
def test_shared_embeddings_and_rows(model) -> None:
    ids, mask = texts(3)
    index = torch.tensor([1, 0, 1])
    whole = model(ids, mask, images()[index])
    for shared in (
        model(ids, mask, images(), image_index=index),
        model(None, mask, None, image_index=index, prefix=model.encode_prefix(images()),
              text_states=model.encode_text(ids, mask)),
    ):  # fmt: skip
        assert torch.equal(whole.last_hidden_state, shared.last_hidden_state)
    for row in range(3):
        alone = model(ids[row : row + 1], mask[row : row + 1], images()[index[row : row + 1]])
        torch.testing.assert_close(alone.image_states[0], whole.image_states[row], rtol=0, atol=1e-5)


# --- the gate


def test_gate_weighs_kept_tokens_where_they_are_read() -> None:
    """Its gradient by finite differences of the pass by hand, in which a kept token's scores are shifted."""
    model = model_of(layers=(2,), learning="gate", inattentive="drop").double()
    ids, mask = texts(1)
    pixels = images(1).double()
    worth = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = model(ids, mask, pixels)
    literal = model(ids, mask, pixels, selection=model.config.selection.replace(learning="literal"))
    torch.testing.assert_close(out.last_hidden_state, literal.last_hidden_state, rtol=0, atol=1e-12)
    record = out.selections[0]
    (found,) = torch.autograd.grad((out.last_hidden_state[0] * worth).sum(), record.logits)

    @torch.no_grad()
    def loss(place: int, change: float) -> float:
        states, _, _ = read_by_hand(model, ids[0].tolist(), pixels[0], {2: 0.5}, "drop", {place: change})
        return float((states[:6] * worth).sum())

    slopes = [(loss(place, 1e-4) - loss(place, -1e-4)) / 2e-4 for place in range(8)]
    expected = reference.gate_gradient(record.logits[0].tolist(), record.index[0].tolist(), slopes, 1.0)
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert not literal.selections[0].logits.requires_grad or torch.autograd.grad(
        (literal.last_hidden_state[0] * worth).sum(), literal.selections[0].logits, allow_unused=True
    ) == (None,)


def test_gates_of_two_locations_multiply(model, monkeypatch) -> None:
    """What the last attention adds to its scores, with scores of the guide that depend on nothing."""
    noise, leaves, masks = torch.Generator().manual_seed(3), [], []

    def logits(self, index: int, cls: Tensor, patches: Tensor, *rest: object) -> Tensor:
        leaves.append(torch.randn(patches.shape[:2], generator=noise).requires_grad_())
        return leaves[-1]

    fused = nn.functional.scaled_dot_product_attention

    def attention(query, key, value, **kwargs):
        masks.append(kwargs["attn_mask"])
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(TripsSingleStreamModel, "_logits", logits)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    out = model(*texts(1), images(1), selection=SelectionConfig(layers=(1, 3), keep_rate=0.5, learning="gate"))
    first, second = out.selections
    added = masks[-1][0, 0, 0, 6:]
    assert added.shape == (6,) and not added.any()
    worth = torch.randn(6, generator=noise)
    found = torch.autograd.grad((added * worth).sum(), leaves)
    earlier = [0.0] * 8
    for place, candidate in enumerate(second.index[0].tolist()):
        if candidate < 8:  # the ninth is the fused token, which has no gate before
            earlier[candidate] = float(worth[place])
    for gradient, record, values in zip(found, (first, second), (earlier, worth[:5].tolist()), strict=True):
        expected = reference.gate_gradient(record.logits[0].tolist(), record.index[0].tolist(), values, 1.0)
        torch.testing.assert_close(gradient[0], torch.tensor(expected), rtol=1e-3, atol=1e-5)


# --- alone


@torch.no_grad()
def test_alone_is_the_stack_over_one_modality(model) -> None:
    """An image alone is the tower's own pass with [CLS] as the guide; a text alone is a joint pass without an image."""
    prefix = model.encode_prefix(images())
    states = prefix.states
    for layer in model.vision.reader.layers:
        states = layer(states, attention_mask=None)
        states = states[0] if isinstance(states, tuple) else states
    whole = model.vision.reader.final_norm(states)
    torch.testing.assert_close(model.image_alone(prefix, NONE), whole, rtol=0, atol=1e-5)
    cut = model.image_alone(prefix, model.config.selection)
    assert cut.shape == (2, 7, 32)
    assert torch.equal(cut, model.image_alone(prefix, model.config.selection.replace(guide="image")))
    ids, mask = texts(2)
    assert model.text_alone(ids, mask).shape == (2, 6, 32)


# --- saving, precision, graph, devices


@torch.no_grad()
def test_saving_and_loading_is_bitwise(tmp_path) -> None:
    model = model_of("vit", inattentive="renormalise")
    model.save_pretrained(tmp_path)
    args = (*texts(2), images())
    for loaded in (TripsSingleStreamModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is TripsSingleStreamModel and loaded.config.architecture == "single"
        assert model.state_dict().keys() == loaded.state_dict().keys()
        assert torch.equal(model(*args).last_hidden_state, loaded.eval()(*args).last_hidden_state)
    with pytest.raises(ConfigError, match="architecture"):
        TripsModel.from_pretrained(tmp_path)
    TripsModel(tiny_config()).save_pretrained(tmp_path / "dual")
    assert type(AutoModel.from_pretrained(tmp_path / "dual")) is TripsModel
    assert type(build_encoder(tiny_config())) is TripsModel


@BY_FAMILY
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
        torch.testing.assert_close(out.selections[0].logits, exact.selections[0].logits, rtol=0.1, atol=0.2)


@torch.no_grad()
def test_one_static_graph() -> None:
    model, args = model_of(learning="gate"), (*texts(2), images())
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="eager")(*args)
    torch.testing.assert_close(out.last_hidden_state, model(*args).last_hidden_state)


@pytest.mark.parametrize("guide", ["text", "similarity"])
def test_no_value_is_ever_read_on_the_host(guide) -> None:
    model = model_of(learning="gate", guide=guide).to("meta")
    out = model(*(tensor.to("meta") for tensor in (*texts(2), images())))
    assert out.last_hidden_state.shape == (2, 6, 32)


def test_every_attention_is_fused(model, monkeypatch) -> None:
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(query, key, value, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    with torch.no_grad():
        model(*texts(2), images())
    assert calls == [(22, 22), (22, 22), (15, 15), (12, 12)]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of(learning="gate").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(*texts(2), images())
        weights = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
        (out.last_hidden_state * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name])


# --- several images, refusals


@torch.no_grad()
def test_several_images_are_passes_side_by_side() -> None:
    model = randomise(SingleStreamMultiImageModel(tiny_config(architecture="single")))
    single = TripsSingleStreamModel(model.config).eval()
    single.load_state_dict(model.state_dict())
    ids, mask = texts(3)
    pixels = images(6).unflatten(0, (3, 2))
    out = model(ids, mask, pixels)
    sides = [single(ids, mask, pixels[:, i]).last_hidden_state for i in range(2)]
    torch.testing.assert_close(out.last_hidden_state, torch.cat(sides, dim=-1))
    prefixed = model(ids, mask, prefix=model.encode_prefix(pixels.flatten(0, 1)))
    assert torch.equal(prefixed.last_hidden_state, out.last_hidden_state)
    with pytest.raises(ShapeError, match="2 image"):
        model(ids, mask, pixels[:, :1])
    with pytest.raises(ShapeError, match="prefix"):
        model(ids, mask, prefix=model.encode_prefix(images(2)))


def test_what_has_no_meaning_is_refused(model) -> None:
    ids, mask = texts(2)
    for changes, item in (
        ({"guide": "image"}, "selection.guide"),
        ({"learning": "distill"}, "selection.learning"),
        ({"layers": (9,)}, "selection.layers"),
    ):
        with pytest.raises(ConfigError, match=item):
            model(ids, mask, images(), selection=model.config.selection.replace(**changes))
        with pytest.raises(ConfigError, match=item):
            tiny_config(architecture="single", **changes)
    with pytest.raises(ConfigError, match="observe"):
        model(ids, mask, images(), observe=True)
    values = tiny_config().to_dict() | {"architecture": "single"}
    for options, item in (({"itc_guide": "text"}, "itc_guide"), ({"itm_guide": "reuse"}, "itm_guide"),
                          ({"mlm_guide": "full"}, "mlm_guide")):  # fmt: skip
        with pytest.raises(ConfigError, match=item):
            TripsConfig(**{**values, "pretraining": options})
    with pytest.raises(ConfigError, match="reasoning.fusion"):
        TripsConfig(**{**values, "reasoning": {"fusion": "stacked"}})
    with pytest.raises(ConfigError, match="architecture"):
        tiny_config(architecture="triple")
    with pytest.raises(ConfigError, match="one width"):
        tiny_config(architecture="single", text_width=48, width_map="orthogonal")
    with pytest.raises(ConfigError, match="architecture"):
        TripsSingleStreamModel(tiny_config())


def test_bad_calls_are_named(model) -> None:
    ids, mask = texts(2)
    with pytest.raises(ConfigError, match="pixel_values or prefix"):
        model(ids, mask)
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


def test_a_tower_whose_layers_take_no_mask_is_refused(monkeypatch) -> None:
    from trips import towers

    monkeypatch.setattr(towers, "_takes_mask", lambda module_class: False)
    with pytest.raises(UnsupportedModelError, match="no mask"):
        model_of("vit")(*texts(2), images())
