"""Visual question answering: the loss against a loop, learning, saving, what is computed and what is refused."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import text_masks
from tiny import (
    ANSWER_MASK,
    ANSWERS,
    BOS,
    VOCABULARY,
    images,
    texts,
    tiny_bert_config,
    tiny_config,
    tiny_vqa_model,
)
from torch import nn

from trips.config import TripsConfig
from trips.errors import ConfigError, ShapeError
from trips.tasks.vqa import TripsForQuestionAnswering, predicted_tokens


@pytest.fixture(scope="module")
def model() -> TripsForQuestionAnswering:
    return tiny_vqa_model()


@torch.no_grad()
def test_loss_is_the_weighted_sum_over_answers(model) -> None:
    ids, mask = texts(2)
    index, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([0.6, 0.3, 0.7, 0.4])
    plain = model.trips(ids, mask, images()).last_hidden_state
    expected = 0.0
    for answer, question, weight in zip(ANSWERS, index.tolist(), weights.tolist(), strict=True):
        expected -= weight * reference.answer_log_likelihood(
            model.decoder, plain[question], mask[question], answer[answer != 0].tolist()
        )
    for tokens in (None, predicted_tokens(ANSWER_MASK)):
        out = model(images(), ids, mask, ANSWERS, ANSWER_MASK, index, weights, answer_tokens=tokens)
        assert torch.equal(out.question_states, plain)
        assert float(out.loss) == pytest.approx(expected / 2, rel=1e-4)
        assert torch.equal(out.loss, out.loss_answer) and out.loss_distill is None


def test_answer_tokens_change_no_loss_and_no_gradient() -> None:
    """With and without, for the whole model; the padding of a longer batch leaves no trace either."""
    ids, mask = texts(2)
    index, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([0.6, 0.3, 0.7, 0.4])
    wide, wide_mask = (nn.functional.pad(tensor, (0, 3)) for tensor in (ANSWERS, ANSWER_MASK))
    found = []
    for answers, answer_mask, tokens in (
        (ANSWERS, ANSWER_MASK, None),
        (ANSWERS, ANSWER_MASK, predicted_tokens(ANSWER_MASK)),
        (wide, wide_mask, predicted_tokens(wide_mask)),
        (wide, None, predicted_tokens(wide_mask)),
    ):
        model = tiny_vqa_model(learning="gate")
        loss = model(images(), ids, mask, answers, answer_mask, index, weights, answer_tokens=tokens).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-6)
        assert gradients.keys() == found[0][1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-5, msg=name)


@given(data=st.data(), batch=st.integers(1, 4), length=st.integers(1, 6))
def test_predicted_tokens_equal_a_loop(data, batch, length) -> None:
    mask = data.draw(text_masks(batch, length))
    expected = [a * (length - 1) + t for a in range(batch) for t in range(length - 1) if mask[a, t + 1]]
    assert predicted_tokens(mask).tolist() == expected and predicted_tokens(mask).dtype == torch.long


@torch.no_grad()
def test_only_predicted_places_are_projected_on_the_vocabulary(model) -> None:
    ids, mask = texts(2)
    index, seen = torch.tensor([0, 1, 1, 0]), []
    hook = model.decoder.cls.register_forward_pre_hook(lambda m, args: seen.append(args[0][..., 0].numel()))
    try:
        states = model(
            images(), ids, mask, ANSWERS, ANSWER_MASK, index, answer_tokens=predicted_tokens(ANSWER_MASK)
        ).question_states
        model(images(), ids, mask, ANSWERS, ANSWER_MASK, index)
        model.rank_answers(states, mask, ANSWERS, ANSWER_MASK)
    finally:
        hook.remove()
    # 2 + 3 + 4 + 3 tokens follow one; four places a row without knowing; one first token a question, then what follows
    # it in the answers of two, of three and of four tokens
    assert seen == [12, 16, 2, 2, 8, 6]


def test_gate_changes_no_loss_but_what_the_words_learn() -> None:
    losses, gradients = [], []
    for learning in ("literal", "gate"):
        model = tiny_vqa_model(learning=learning, inattentive="drop")
        out = model(images(), *texts(2), ANSWERS[:2], ANSWER_MASK[:2])
        out.loss.backward()
        losses.append(out.loss.detach())
        queries = {layer: model.trips.vision.tower.encoder.layers[layer].self_attn.q_proj for layer in (1, 2)}
        gradients.append([query.weight.grad for query in queries.values()])
    assert torch.equal(*losses)
    for literal, gated in zip(*gradients, strict=True):  # at both locations
        assert float((literal - gated).abs().max()) > 1e-6


@torch.no_grad()
def test_one_answer_per_question_needs_no_index(model) -> None:
    ids, mask = texts(2)
    short = model(images(), ids, mask, ANSWERS[:2], ANSWER_MASK[:2])
    full = model(images(), ids, mask, ANSWERS[:2], ANSWER_MASK[:2], torch.arange(2), torch.ones(2))
    assert torch.equal(short.loss, full.loss)
    assert model(images(), ids, mask).loss is None


@torch.no_grad()
def test_padding_of_answer_and_question_never_counts(model) -> None:
    ids, mask = texts(2)
    noise = torch.randint(4, VOCABULARY, ANSWERS.shape)
    other_ids = torch.where(mask.bool(), ids, torch.full_like(ids, 5))
    index = torch.tensor([0, 1, 1, 0])
    before = model(images(), ids, mask, ANSWERS, ANSWER_MASK, index).loss
    after = model(images(), other_ids, mask, torch.where(ANSWER_MASK.bool(), ANSWERS, noise), ANSWER_MASK, index).loss
    assert torch.equal(before, after)


def test_decoder_is_causal(model) -> None:
    states, mask = torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.long)
    first, second = (
        model.decoder(
            input_ids=torch.tensor([[BOS, 7, last]]), encoder_hidden_states=states, encoder_attention_mask=mask
        ).logits
        for last in (8, 9)
    )
    assert torch.equal(first[:, :2], second[:, :2]) and not torch.equal(first[:, 2], second[:, 2])


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_distillation_step_adds_its_weighted_loss(temperature) -> None:
    model = tiny_vqa_model(distill_weight=2.0, distill_temperature=temperature)
    ids, mask = texts(2)
    out = model(images(), ids, mask, ANSWERS[:2], ANSWER_MASK[:2], distill=True)
    plain = model.trips(ids, mask, images(), observe=True)
    powers = [[weight ** (1 / temperature) for weight in row] for row in plain.image_attention.tolist()]
    teacher = [[power / sum(row) for power in row] for row in powers]
    expected = sum(reference.kl_divergence(record.logits.tolist(), teacher) for record in plain.selections)
    assert float(out.loss_distill) == pytest.approx(expected / 2, rel=1e-3)
    torch.testing.assert_close(out.loss.detach(), out.loss_answer + 2 * out.loss_distill)
    assert out.image_positions.shape[1] == 16  # all patches were seen
    out.loss.backward()
    assert float(model.get_input_embeddings().weight.grad.abs().max()) > 0


def test_distillation_step_in_mixed_precision_reaches_every_weight() -> None:
    """The teacher is computed without gradient from weights that need it: a cached cast must not cut it off."""
    gradients = []
    for mixed in (False, True):
        model = tiny_vqa_model().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(images(), *texts(2), ANSWERS[:2], ANSWER_MASK[:2], distill=True).loss
        loss.backward()
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())})
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize(
    "changes", [{"learning": "literal"}, {"learning": "gate"}, {"guide": "none"}, {"learning": "distill"}], ids=str
)
def test_tiny_model_learns_its_batch(changes) -> None:
    torch.manual_seed(0)
    model = TripsForQuestionAnswering(tiny_config(**changes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    ids, mask = texts(4)
    distill, losses = changes.get("learning") == "distill", []
    for _ in range(30):
        out = model(images(4), ids, mask, ANSWERS, ANSWER_MASK, distill=distill)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss_answer))
    assert losses[-1] < 0.25 * losses[0]
    if distill:
        assert float(out.loss_distill) < 0.5  # nats


@torch.no_grad()
def test_saving_and_loading_is_bitwise_and_stays_tied(tmp_path, model) -> None:
    model.save_pretrained(tmp_path)
    loaded = TripsForQuestionAnswering.from_pretrained(tmp_path).eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    args = (images(), *texts(2), ANSWERS[:2], ANSWER_MASK[:2])
    assert torch.equal(model(*args).loss, loaded(*args).loss)
    for each in (model, loaded):
        assert each.decoder.get_output_embeddings().weight is each.decoder.get_input_embeddings().weight


def test_training_step_reads_no_value_on_the_host() -> None:
    """Tensors of the meta device have no values: reading one would fail."""
    tokens = predicted_tokens(ANSWER_MASK).to("meta")
    args = [tensor.to("meta") for tensor in (images(), *texts(2), ANSWERS, ANSWER_MASK, torch.tensor([0, 1, 1, 0]))]
    for learning, distill in (("literal", False), ("gate", False), ("distill", True)):
        model = tiny_vqa_model(learning=learning).to("meta")
        for answer_tokens in (None, tokens):
            model(*args, answer_tokens=answer_tokens, distill=distill).loss.backward()


def test_every_attention_of_the_decoder_is_fused(model, monkeypatch) -> None:
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(query, key, value, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    with torch.no_grad():
        model(images(), *texts(2), ANSWERS[:2], ANSWER_MASK[:2])
    # four places of five: the last token of an answer predicts nothing
    assert calls[-4:] == [(4, 4), (4, 6)] * 2 and len(calls) == 2 + 4 + 4 + 4


def test_bad_calls_are_named(model) -> None:
    ids, mask = texts(2)
    with pytest.raises(ShapeError, match="answer_ids"):
        model(images(), ids, mask, ANSWERS, ANSWER_MASK)
    for name, place, value in (
        ("answer_mask", 4, ANSWER_MASK[:, :-1]),
        ("answer_index", 5, torch.tensor([0, 1])),
        ("answer_weights", 6, torch.ones(4, 1)),
    ):
        args = [images(), ids, mask, ANSWERS, ANSWER_MASK, torch.tensor([0, 1, 1, 0]), torch.ones(4)]
        args[place] = value
        with pytest.raises(ShapeError, match=name):
            model(*args)
    for changes in ({"guide": "none"}, {"guide": "random"}, {"layers": ()}):
        with pytest.raises(ConfigError, match="distill"):
            selection = model.config.selection.replace(**changes)
            model(images(), ids, mask, ANSWERS[:2], ANSWER_MASK[:2], selection=selection, distill=True)


def test_decoder_without_cross_attention_is_refused() -> None:
    config = tiny_config()
    parts = {"vision_config": config.vision_config, "text_config": config.text_config, "selection": config.selection}
    with pytest.raises(ConfigError, match="decoder_config"):
        TripsForQuestionAnswering(TripsConfig(**parts, decoder_config=tiny_bert_config()))
