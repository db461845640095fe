"""Visual question answering: the loss against a loop, ranking against brute force, generation against a plain loop."""

from __future__ import annotations

import pytest
import reference
import torch
from tiny import BOS, EOS, VOCABULARY, images, randomise, texts, tiny_bert_config, tiny_config
from torch import Tensor, nn

from trips.config import TripsConfig
from trips.errors import ConfigError, ShapeError
from trips.tasks.vqa import TripsForQuestionAnswering

# [CLS] pieces [SEP] padding; the first two share their first token, the last two differ in length only at the end
ANSWERS = torch.tensor([[BOS, 7, EOS, 0, 0], [BOS, 7, 8, EOS, 0], [BOS, 9, 10, 11, EOS], [BOS, 9, 10, EOS, 0]])
MASK = (ANSWERS != 0).long()


def model_of(**kwargs) -> TripsForQuestionAnswering:
    model = randomise(TripsForQuestionAnswering(tiny_config(**kwargs)))
    model.decoder.get_output_embeddings().weight.data.mul_(0.5)  # tied: keeps likelihoods away from 0 and 1
    return model


@pytest.fixture(scope="module")
def model() -> TripsForQuestionAnswering:
    return model_of()


def log_likelihood(model: TripsForQuestionAnswering, states: Tensor, mask: Tensor, answer: list[int]) -> float:
    """One answer, one token after the other: the decoder is run on each beginning anew, without padding or cache."""
    total = 0.0
    for place in range(1, len(answer)):
        logits = model.decoder(
            input_ids=torch.tensor([answer[:place]]),
            encoder_hidden_states=states.unsqueeze(0),
            encoder_attention_mask=mask.unsqueeze(0),
            use_cache=False,
        ).logits[0, -1]
        total += float(torch.log_softmax(logits, dim=0)[answer[place]])
    return total


def tokens_of(row: Tensor) -> list[int]:
    return [token for token in row.tolist() if token]


@torch.no_grad()
def test_loss_is_the_weighted_sum_over_answers(model) -> None:
    ids, mask = texts(2)
    index, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([0.6, 0.3, 0.7, 0.4])
    out = model(images(), ids, mask, ANSWERS, MASK, index, weights)
    plain = model.trips(ids, mask, images()).last_hidden_state
    assert torch.equal(out.question_states, plain)
    expected = 0.0
    for answer, question, weight in zip(ANSWERS, index.tolist(), weights.tolist(), strict=True):
        expected -= weight * log_likelihood(model, plain[question], mask[question], tokens_of(answer))
    assert float(out.loss) == pytest.approx(expected / 2, rel=1e-4)
    assert torch.equal(out.loss, out.loss_answer) and out.loss_distill is None


@torch.no_grad()
def test_one_answer_per_question_needs_no_index(model) -> None:
    ids, mask = texts(2)
    short = model(images(), ids, mask, ANSWERS[:2], MASK[:2])
    full = model(images(), ids, mask, ANSWERS[:2], MASK[:2], torch.arange(2), torch.ones(2))
    assert torch.equal(short.loss, full.loss)
    assert model(images(), ids, mask).loss is None


@torch.no_grad()
def test_padding_of_answer_and_question_never_counts(model) -> None:
    ids, mask = texts(2)
    noise = torch.randint(4, VOCABULARY, ANSWERS.shape)
    other_ids = torch.where(mask.bool(), ids, torch.full_like(ids, 5))
    index = torch.tensor([0, 1, 1, 0])
    before = model(images(), ids, mask, ANSWERS, MASK, index).loss
    after = model(images(), other_ids, mask, torch.where(MASK.bool(), ANSWERS, noise), MASK, index).loss
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


@torch.no_grad()
def test_ranking_all_equals_brute_force(model) -> None:
    ids, mask = texts(3)
    states = model(images(3), ids, mask).question_states
    numbers, scores = model.rank_answers(states, mask, ANSWERS, MASK, top_k=128)
    for row in range(3):
        every = [log_likelihood(model, states[row], mask[row], tokens_of(answer)) for answer in ANSWERS]
        assert numbers[row].tolist() == sorted(range(4), key=lambda a: -every[a])
        assert scores[row].tolist() == pytest.approx(sorted(every, reverse=True), rel=1e-4)


@torch.no_grad()
def test_ranking_a_shortlist_takes_the_best_first_tokens_ties_in_order(model) -> None:
    ids, mask = texts(3)
    states = model(images(3), ids, mask).question_states
    for k in (1, 2, 3):
        numbers, scores = model.rank_answers(states, mask, ANSWERS, MASK, top_k=k)
        assert numbers.shape == scores.shape == (3, k)
        for row in range(3):
            first = [log_likelihood(model, states[row], mask[row], [BOS, int(answer[1])]) for answer in ANSWERS]
            first = [round(score, 4) for score in first]  # equal first tokens are a tie
            assert sorted(numbers[row].tolist()) == reference.best(first, k)


def greedy(model: TripsForQuestionAnswering, states: Tensor, mask: Tensor, steps: int) -> list[int]:
    answer = [BOS]
    while len(answer) <= steps and answer[-1] != EOS or len(answer) == 1:
        logits = model.decoder(
            input_ids=torch.tensor([answer]),
            encoder_hidden_states=states.unsqueeze(0),
            encoder_attention_mask=mask.unsqueeze(0),
            use_cache=False,
        ).logits[0, -1]
        answer.append(int(logits.argmax()))
    return answer


@torch.no_grad()
def test_generation_equals_a_greedy_loop_without_cache(model) -> None:
    ids, mask = texts(4)
    written = model.generate(images(4), ids, mask, max_new_tokens=6)
    states = model(images(4), ids, mask).question_states
    expected = [greedy(model, states[row], mask[row], 6) for row in range(4)]
    assert [tokens_of(row) for row in written] == [[t for t in answer if t] for answer in expected]
    assert len({tuple(answer) for answer in expected}) > 1  # different questions, different answers
    longer = model.generate(images(4), ids, mask, max_new_tokens=2)
    assert longer.shape[1] <= 3


@torch.no_grad()
def test_beams_search_each_row_on_its_own(model) -> None:
    """With as many beams as words, two steps of search see every answer: the best must be found."""
    ids, mask = texts(2)
    states = model(images(2), ids, mask).question_states
    alone = [model.generate(images(2)[r : r + 1], ids[r : r + 1], mask[r : r + 1], num_beams=3) for r in range(2)]
    both = model.generate(images(2), ids, mask, num_beams=3)
    for row in range(2):
        assert tokens_of(both[row]) == tokens_of(alone[row][0])
    wide = model.generate(images(2), ids, mask, num_beams=VOCABULARY, max_new_tokens=2, length_penalty=0.0)
    for row in range(2):
        candidates = [[BOS, EOS]]
        candidates += [[BOS, a, b] for a in range(VOCABULARY) if a != EOS for b in range(VOCABULARY)]
        batch = torch.tensor([answer + [0] * (3 - len(answer)) for answer in candidates])
        logits = model.decoder(
            input_ids=batch,
            encoder_hidden_states=states[row].expand(len(batch), -1, -1),
            encoder_attention_mask=mask[row].expand(len(batch), -1),
            use_cache=False,
        ).logits
        logs = torch.log_softmax(logits, dim=-1)
        scores = [
            float(sum(logs[i, t, answer[t + 1]] for t in range(len(answer) - 1))) for i, answer in enumerate(candidates)
        ]
        best = candidates[max(range(len(scores)), key=scores.__getitem__)]
        assert wide[row].tolist()[: len(best)] == best


@torch.no_grad()
def test_generation_shares_images_and_prefixes(model) -> None:
    ids, mask = texts(3)
    index = torch.tensor([0, 1, 0])
    whole = model.generate(images(2)[index], ids, mask)
    assert torch.equal(whole, model.generate(images(2), ids, mask, image_index=index))
    prefix = model.trips.encode_prefix(images(2))
    assert torch.equal(whole, model.generate(None, ids, mask, image_index=index, prefix=prefix))


def test_distillation_step_adds_its_weighted_loss() -> None:
    model = model_of(distill_weight=2.0)
    ids, mask = texts(2)
    out = model(images(), ids, mask, ANSWERS[:2], MASK[:2], distill=True)
    plain = model.trips(ids, mask, images(), observe=True)
    expected = sum(
        reference.kl_divergence(record.logits.tolist(), plain.image_attention.tolist()) for record in plain.selections
    )
    assert float(out.loss_distill) == pytest.approx(expected / 2, rel=1e-3)
    torch.testing.assert_close(out.loss.detach(), out.loss_answer + 2 * out.loss_distill)
    assert out.image_positions.shape[1] == 16  # all patches were seen
    out.loss.backward()
    assert float(model.get_input_embeddings().weight.grad.abs().max()) > 0


def test_distillation_step_in_mixed_precision_reaches_every_weight() -> None:
    """The teacher is computed without gradient from weights that need it: a cached cast must not cut it off."""
    gradients = []
    for mixed in (False, True):
        model = model_of().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(images(), *texts(2), ANSWERS[:2], MASK[:2], distill=True).loss
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
        out = model(images(4), ids, mask, ANSWERS, MASK, distill=distill)
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
    args = (images(), *texts(2), ANSWERS[:2], MASK[:2])
    assert torch.equal(model(*args).loss, loaded(*args).loss)
    for each in (model, loaded):
        assert each.decoder.get_output_embeddings().weight is each.decoder.get_input_embeddings().weight


def test_training_step_reads_no_value_on_the_host() -> None:
    """Tensors of the meta device have no values: reading one would fail."""
    model = model_of().to("meta")
    args = [tensor.to("meta") for tensor in (images(), *texts(2), ANSWERS, MASK, torch.tensor([0, 1, 1, 0]))]
    for distill in (False, True):
        model(*args, distill=distill).loss.backward()


def test_every_attention_of_the_decoder_is_fused(model, monkeypatch) -> None:
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(query, key, value, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    with torch.no_grad():
        model(images(), *texts(2), ANSWERS[:2], MASK[:2])
    assert calls[-4:] == [(5, 5), (5, 6)] * 2 and len(calls) == 2 + 4 + 4 + 4


def test_bad_calls_are_named(model) -> None:
    ids, mask = texts(2)
    with pytest.raises(ShapeError, match="answer_ids"):
        model(images(), ids, mask, ANSWERS, MASK)
    for name, place, value in (
        ("answer_mask", 4, MASK[:, :-1]),
        ("answer_index", 5, torch.tensor([0, 1])),
        ("answer_weights", 6, torch.ones(4, 1)),
    ):
        args = [images(), ids, mask, ANSWERS, MASK, torch.tensor([0, 1, 1, 0]), torch.ones(4)]
        args[place] = value
        with pytest.raises(ShapeError, match=name):
            model(*args)
    for changes in ({"guide": "none"}, {"guide": "random"}, {"layers": ()}):
        with pytest.raises(ConfigError, match="distill"):
            selection = model.config.selection.replace(**changes)
            model(images(), ids, mask, ANSWERS[:2], MASK[:2], selection=selection, distill=True)


def test_decoder_without_cross_attention_is_refused() -> None:
    config = tiny_config()
    parts = {"vision_config": config.vision_config, "text_config": config.text_config, "selection": config.selection}
    with pytest.raises(ConfigError, match="decoder_config"):
        TripsForQuestionAnswering(TripsConfig(**parts, decoder_config=tiny_bert_config()))


def test_generation_needs_to_know_start_and_end() -> None:
    config = tiny_config()
    config.decoder_config.bos_token_id = None
    with pytest.raises(ConfigError, match="bos_token_id"):
        TripsForQuestionAnswering(config).eval().generate(images(), *texts(2))
