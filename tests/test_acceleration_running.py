"""Accelerated models at work: generate, half precision, training, checkpointing, hidden states, compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import images
from tiny_hosts import KINDS, TEXT_KINDS, call_of, host, sentences, tensors_of, tower_of, vision_output
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

import trips
from trips.acceleration import guided_by
from trips.errors import ConfigError

LAYERS = (2, 3)
FUSED = ("clip", "siglip", "vit", "dinov2")  # BLIP's own vision attention is written out


@pytest.mark.parametrize("kind", ["vqa", "captioning"])
def test_generate_is_guided_by_its_text(kind: str) -> None:
    model, inputs = host(kind), {"pixel_values": images(2), **sentences()}
    search = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    plain = model.generate(**inputs, **search)
    trips.accelerate(model, LAYERS, 1.0, "text")
    assert torch.equal(model.generate(**inputs, **search), plain)
    trips.restore(model)
    trips.accelerate(model, LAYERS, 0.3, "text")
    assert model.generate(**inputs, **search).shape == plain.shape
    scores = trips.explain_last(model)[0].scores
    with guided_by(model, **sentences(seed=21)):  # wins over the text of the call
        model.generate(**inputs, **search)
    assert not torch.allclose(trips.explain_last(model)[0].scores, scores)
    model.generate(**inputs, **search)
    assert torch.equal(trips.explain_last(model)[0].scores, scores)
    trips.restore(model)
    assert torch.equal(model.generate(**inputs, **search), plain)
    assert "generate" not in model.__dict__


@torch.no_grad()
def test_the_guide_of_generate_is_that_of_forward() -> None:
    model, inputs = trips.accelerate(host("vqa"), LAYERS, 0.5), call_of("vqa")
    model(**inputs)
    scores = trips.explain_last(model)[0].scores
    del inputs["decoder_input_ids"]
    model.generate(**inputs, max_new_tokens=2)
    torch.testing.assert_close(trips.explain_last(model)[0].scores, scores, rtol=0, atol=0)
    model.generate(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], max_new_tokens=2)
    torch.testing.assert_close(trips.explain_last(model)[0].scores, scores, rtol=0, atol=0)


def test_captioning_refuses_the_caption_as_its_own_guide() -> None:
    model = trips.accelerate(host("captioning"), LAYERS, 0.5, "text")
    inputs = call_of("captioning")
    with pytest.raises(ConfigError, match="labels: the text that guides"):
        model(**inputs, labels=inputs["input_ids"])
    with guided_by(model, input_ids=inputs["input_ids"][:, :2]):
        assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    with pytest.raises(ConfigError, match="brings no text"):
        model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=2)
    with pytest.raises(ConfigError, match="prompt is empty"):
        model.generate(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"][:, :1], max_new_tokens=2)
    assert model._trips_acceleration.call.guide is None


@torch.no_grad()
def test_the_guide_is_forgotten_with_its_call_even_when_it_fails() -> None:
    model, inputs = trips.accelerate(host("vqa"), LAYERS, 0.5), call_of("vqa")
    del inputs["decoder_input_ids"]
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(**inputs)
    with pytest.raises(ConfigError, match="brings no text"):
        model.vision_model(inputs["pixel_values"])
    with pytest.raises(ConfigError), guided_by(model):
        pass


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    model, inputs = trips.accelerate(host(kind), LAYERS, 0.5), call_of(kind)
    exact = vision_output(model(**inputs))
    first = trips.explain_last(model)[0].scores
    got = vision_output(model.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}))
    assert got.dtype == dtype and got.shape == exact.shape and got.isfinite().all()
    torch.testing.assert_close(trips.explain_last(model)[0].scores, first, rtol=0.2, atol=0.02)  # 8 bits of mantissa
    with torch.autocast("cpu", torch.bfloat16):
        assert vision_output(model.float()(**inputs)).shape == exact.shape


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_any_resolution_and_batch(kind: str) -> None:
    model = trips.accelerate(host(kind), LAYERS, 0.7)
    inputs = {**call_of(kind, count=3), "pixel_values": images(3, 40, 64)}
    if kind != "dinov2":  # which interpolates by itself
        inputs["interpolate_pos_encoding"] = True
    whole = vision_output(model(**inputs))
    assert whole.shape[1] == 21 + 1 + (kind != "siglip")  # 40 -> 28 + 1 -> 21 + 1
    for row in range(3):
        one = {key: value[row : row + 1] if torch.is_tensor(value) else value for key, value in inputs.items()}
        torch.testing.assert_close(vision_output(model(**one))[0], whole[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_attentions_shrink_with_the_tokens(kind: str) -> None:
    model = trips.accelerate(host(kind, attn_implementation="eager"), LAYERS, 0.5)
    lead = kind != "siglip"
    with guided_by(model, **sentences()) if model.config.trips_selection["guide"] == "text" else torch.no_grad():
        output = tower_of(model)(images(2), output_hidden_states=True, output_attentions=True)
    assert [states.shape[1] - lead for states in output.hidden_states] == [16, 16, 9, 6, 6]
    assert [weights.shape[-1] - lead for weights in output.attentions] == [16, 9, 6, 6]


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = sum(tensor.float().square().mean() for tensor in tensors_of(model(**inputs)) if tensor.requires_grad)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_same_gradients_with_checkpointing(kind: str, reentrant: bool) -> None:
    if reentrant and "__call__" in vars(GradientCheckpointingLayer) and kind in TEXT_KINDS:
        pytest.skip("this release checkpoints hooks too, and the reentrant way gives no gradient to what they bring")
    model, inputs = trips.accelerate(host(kind), LAYERS, 0.5), call_of(kind)
    loss, gradients = loss_and_gradients(model.train(), inputs)
    kept = [record.kept for record in trips.explain_last(model)]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients.values())
    assert not any(record.logits.requires_grad for record in trips.explain_last(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, repeated = loss_and_gradients(model, inputs)
    assert loss == again and gradients.keys() == repeated.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(repeated[name], gradient, rtol=1e-5, atol=1e-6)
    # what the backward pass repeats does not reach the record
    assert all(map(torch.equal, kept, (record.kept for record in trips.explain_last(model))))


def test_the_text_learns_through_the_fused_token() -> None:
    model = trips.accelerate(host("vqa"), LAYERS, 0.5)
    tower = model.vision_model
    guide = model.text_encoder(**sentences()).last_hidden_state[:, 0]
    with model._trips_acceleration.held(guide):
        tower(images(2)).last_hidden_state.square().sum().backward()
    gradient = model.text_encoder.embeddings.word_embeddings.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", FUSED)
def test_fused_attention_stays_fused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fused call for each layer, on the tokens that are left, and no map returned."""
    model, inputs = trips.accelerate(host(kind), LAYERS, 0.5), call_of(kind)
    assert tower_of(model).config._attn_implementation == "sdpa"
    lengths, original = [], functional.scaled_dot_product_attention

    def counting(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(query.shape[-2])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counting)
    with guided_by(model, **sentences()) if kind in ("clip", "siglip") else torch.no_grad():
        lengths.clear()
        output = tower_of(model)(inputs["pixel_values"])
    lead = kind != "siglip"
    assert lengths[:4] == [16 + lead, 9 + lead, 6 + lead, 6 + lead]  # SigLIP's pooling head comes behind them
    assert output.attentions is None


@torch.no_grad()
@pytest.mark.parametrize(("kind", "graphs"), [("clip", 2), ("vit", 1)])
def test_compiling_follows_the_hooks(kind: str, graphs: int) -> None:
    """One graph; where the text guides, one more, for the pass of the text. No recompiling for other inputs."""
    model, inputs = trips.accelerate(host(kind), LAYERS, 0.5), call_of(kind)
    want = vision_output(model(**inputs))
    kept = trips.explain_last(model)[1].kept
    model._trips_acceleration.records = None
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(vision_output(compiled(**inputs)), want)
    assert torch.equal(trips.explain_last(model)[1].kept, kept)
    compiled(**call_of(kind, seed=7))
    assert not torch.equal(trips.explain_last(model)[1].kept, kept)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@torch.no_grad()
def test_accelerating_what_is_compiled_already_does_not_go_unnoticed() -> None:
    """A compiled graph does not look for new hooks on its layers."""
    model, inputs = host("dinov2"), call_of("dinov2")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs)
    trips.accelerate(model, LAYERS, 0.5)
    with pytest.raises(ConfigError, match="before torch.compile"):
        compiled(**inputs)
    with pytest.raises(ConfigError, match="before torch.compile"):
        trips.explain_last(model)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_mask_over_patches_is_refused() -> None:
    model = trips.accelerate(host("vit"), LAYERS, 0.5)
    with pytest.raises(ConfigError, match="attention_mask"):
        model(images(1), attention_mask=torch.ones(1, 17))
    with pytest.raises(ConfigError, match="attention_mask"):
        model(images(1), None, None, torch.ones(1, 17))


@torch.no_grad()
def test_a_mask_that_transformers_makes_itself_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """While tracing, some releases make one of nothing but "see everything", as long as the tower's first input."""
    model, inputs = trips.accelerate(host("vit"), LAYERS, 0.5), call_of("vit")
    want = vision_output(model(**inputs))
    made = []

    def everything(inputs_embeds: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        made.append(inputs_embeds.new_zeros(2, 1, 17, 17))
        return made[-1]

    monkeypatch.setattr("transformers.models.vit.modeling_vit.create_bidirectional_mask", everything)
    torch.testing.assert_close(vision_output(model(**inputs)), want)
    assert made
