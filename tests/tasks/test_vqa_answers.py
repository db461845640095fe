"""Answers of the decoder: likelihood and ranking against brute force, generation against a plain loop."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from tiny import ANSWER_MASK, ANSWERS, BOS, EOS, VOCABULARY, images, texts, tiny_config, tiny_vqa_model
from torch import Tensor

from trips.errors import ConfigError, ShapeError
from trips.tasks.vqa import TripsForQuestionAnswering, predicted_tokens


@pytest.fixture(scope="module")
def model() -> TripsForQuestionAnswering:
    return tiny_vqa_model()


def tokens_of(row: Tensor) -> list[int]:
    return [token for token in row.tolist() if token]


def random_answers(mask: Tensor) -> Tensor:
    """[CLS] pieces [SEP] padding, as long as the mask says."""
    ids = torch.randint(4, VOCABULARY, mask.shape) * mask
    ids[:, 0] = BOS
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        ids[row, length - 1] = EOS
    return ids


@given(lengths=st.lists(st.integers(2, 5), min_size=1, max_size=4), extra=st.integers(0, 2), seed=seeds)
@settings(max_examples=12)
@torch.no_grad()
def test_any_answers_count_and_rank_as_one_by_one(model, lengths, extra, seed) -> None:
    """Any lengths, also with padding that no answer needs."""
    torch.manual_seed(seed)
    width = max(lengths) + extra
    answer_mask = torch.tensor([[int(place < length) for place in range(width)] for length in lengths])
    answers, (ids, mask) = random_answers(answer_mask), texts(2)
    index, weights = torch.randint(2, (len(lengths),)), torch.rand(len(lengths))
    losses = [
        model(images(), ids, mask, answers, answer_mask, index, weights, answer_tokens=tokens).loss
        for tokens in (None, predicted_tokens(answer_mask))
    ]
    states = model.trips(ids, mask, images()).last_hidden_state
    every = [
        [reference.answer_log_likelihood(model.decoder, states[b], mask[b], tokens_of(a)) for a in answers]
        for b in range(2)
    ]
    expected = -sum(w * every[b][a] for a, (b, w) in enumerate(zip(index.tolist(), weights.tolist(), strict=True))) / 2
    assert [float(loss) for loss in losses] == pytest.approx([expected] * 2, rel=1e-4)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    numbers, scores = model.rank_answers(states, mask, answers, answer_mask)
    for row in range(2):
        assert sorted(numbers[row].tolist()) == list(range(len(lengths)))
        assert scores[row].tolist() == pytest.approx([every[row][a] for a in numbers[row].tolist()], rel=1e-4)
        assert scores[row].tolist() == sorted(scores[row].tolist(), reverse=True)


@torch.no_grad()
def test_ranking_all_equals_brute_force(model) -> None:
    ids, mask = texts(3)
    states = model(images(3), ids, mask).question_states
    numbers, scores = model.rank_answers(states, mask, ANSWERS, ANSWER_MASK, top_k=128)
    for row in range(3):
        every = [
            reference.answer_log_likelihood(model.decoder, states[row], mask[row], tokens_of(answer))
            for answer in ANSWERS
        ]
        assert numbers[row].tolist() == sorted(range(4), key=lambda a: -every[a])
        assert scores[row].tolist() == pytest.approx(sorted(every, reverse=True), rel=1e-4)


def question(model: TripsForQuestionAnswering, count: int) -> tuple[Tensor, Tensor]:
    """Fused states and mask of as many questions."""
    ids, mask = texts(count)
    return model(images(count), ids, mask).question_states, mask


def one_by_one(model: TripsForQuestionAnswering, states: Tensor, mask: Tensor, answers: Tensor) -> list[list[float]]:
    """Full log-likelihood of every answer to every question, without cache, padding or batch."""
    return [
        [reference.answer_log_likelihood(model.decoder, states[b], mask[b], tokens_of(answer)) for answer in answers]
        for b in range(len(states))
    ]


@torch.no_grad()
def test_ranking_a_shortlist_takes_the_best_first_tokens_ties_in_order(model) -> None:
    states, mask = question(model, 3)
    every = one_by_one(model, states, mask, ANSWERS)
    for k in (1, 2, 3):
        numbers, scores = model.rank_answers(states, mask, ANSWERS, ANSWER_MASK, top_k=k)
        assert numbers.shape == scores.shape == (3, k)
        for row in range(3):
            first = [
                reference.answer_log_likelihood(model.decoder, states[row], mask[row], [BOS, int(answer[1])])
                for answer in ANSWERS
            ]
            first = [round(score, 4) for score in first]  # equal first tokens are a tie
            shortlist = reference.best(first, k)
            assert numbers[row].tolist() == sorted(shortlist, key=lambda a: -every[row][a])
            assert scores[row].tolist() == pytest.approx([every[row][a] for a in numbers[row].tolist()], abs=1e-5)


@torch.no_grad()
def test_the_double_count_adds_the_first_token_and_can_change_the_order(model) -> None:
    torch.manual_seed(3)
    states, mask = question(model, 2)
    answer_mask = torch.tensor([[1] * n + [0] * (5 - n) for n in (3, 4, 5, 3, 4, 3)])
    answers = random_answers(answer_mask)
    every = one_by_one(model, states, mask, answers)
    orders = []
    for double in (False, True):
        numbers, scores = model.rank_answers(states, mask, answers, answer_mask, double_first_token=double)
        for row in range(2):
            first = [
                reference.answer_log_likelihood(model.decoder, states[row], mask[row], [BOS, int(answer[1])])
                for answer in answers
            ]
            expected = [full + double * one for full, one in zip(every[row], first, strict=True)]
            assert numbers[row].tolist() == sorted(range(6), key=lambda a, e=expected: -e[a])
            assert scores[row].tolist() == pytest.approx(sorted(expected, reverse=True), abs=2e-5)
        orders.append(numbers.tolist())
    assert orders[0] != orders[1]


@torch.no_grad()
def test_ranking_one_answer_is_its_likelihood_also_of_a_lone_end(model) -> None:
    states, mask = question(model, 2)
    for answer in (ANSWERS[2:3], torch.tensor([[BOS, EOS]])):
        numbers, scores = model.rank_answers(states, mask, answer, torch.ones_like(answer))
        assert numbers.tolist() == [[0], [0]]
        expected = one_by_one(model, states, mask, answer)
        assert scores.flatten().tolist() == pytest.approx([row[0] for row in expected], abs=1e-5)


@torch.no_grad()
def test_padding_of_a_question_never_counts(model) -> None:
    states, mask = question(model, 3)
    noise = states + 5 * torch.randn_like(states) * (1 - mask)[..., None]
    wide = torch.nn.functional.pad(noise, (0, 0, 0, 4), value=9.0), torch.nn.functional.pad(mask, (0, 4))
    expected = model.rank_answers(states, mask, ANSWERS, ANSWER_MASK)
    for changed in ((noise, mask), wide):
        numbers, scores = model.rank_answers(*changed, ANSWERS, ANSWER_MASK)
        assert torch.equal(numbers, expected[0])
        torch.testing.assert_close(scores, expected[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_question_is_projected_once_whatever_the_candidates(model, monkeypatch: pytest.MonkeyPatch) -> None:
    states, mask = question(model, 3)
    expected = model.rank_answers(states, mask, ANSWERS, ANSWER_MASK)
    seen: list[int] = []
    projections = [
        module for layer in model.decoder.bert.encoder.layer for module in (layer.crossattention.self.key,
                                                                              layer.crossattention.self.value)
    ]  # fmt: skip
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0])) for m in projections]
    starts: list[int] = []
    embed = model.decoder.bert.embeddings.word_embeddings
    hooks.append(embed.register_forward_pre_hook(lambda _, args: starts.append(int((args[0] == BOS).sum()))))
    # Read one row after the other, too: how many are read at once is a matter of memory alone.
    monkeypatch.setattr("trips.tasks.answers._MOST_NUMBERS", 1)
    try:
        numbers, scores = model.rank_answers(states, mask, ANSWERS, ANSWER_MASK)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [3] * len(projections) and sum(starts) == 3  # nor is [CLS] read again
    assert len(starts) == 1 + 3 * 4
    assert torch.equal(numbers, expected[0])
    torch.testing.assert_close(scores, expected[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_ranking_in_half_precision_is_near_and_counts_in_float32() -> None:
    half = tiny_vqa_model().to(torch.bfloat16)
    ids, mask = texts(2)
    states = half(images().to(torch.bfloat16), ids, mask).question_states
    numbers, scores = half.rank_answers(states, mask, ANSWERS, ANSWER_MASK)
    assert states.dtype == torch.bfloat16 and scores.dtype == torch.float32
    exact = one_by_one(tiny_vqa_model(), states.float(), mask, ANSWERS)
    for row in range(2):
        assert scores[row].tolist() == pytest.approx([exact[row][a] for a in numbers[row].tolist()], abs=0.15)


def test_what_does_not_fit_is_named(model) -> None:
    states, mask = torch.zeros(2, 6, 32), torch.ones(2, 6, dtype=torch.long)
    for error, words, changes in (
        (ConfigError, "top_k", {"top_k": 0}),
        (ShapeError, "answer_ids", {"answer_ids": ANSWERS[:0], "answer_mask": ANSWER_MASK[:0]}),
        (ShapeError, "answer_ids", {"answer_ids": ANSWERS[:, :1], "answer_mask": ANSWER_MASK[:, :1]}),
        (ShapeError, "answer_mask", {"answer_mask": ANSWER_MASK[:2]}),
        (ShapeError, "attention_mask", {"attention_mask": mask[:, :5]}),
        (ShapeError, "question_states", {"question_states": states[0]}),
    ):
        given = {"question_states": states, "attention_mask": mask, "answer_ids": ANSWERS, "answer_mask": ANSWER_MASK}
        with pytest.raises(error, match=words):
            model.rank_answers(**{**given, **changes})


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


def beam(model: TripsForQuestionAnswering, states: Tensor, mask: Tensor, width: int, steps: int) -> list[int]:
    """The most likely answer that as many beams find, one after the other and without a cache."""
    running: list[tuple[list[int], float]] = [([BOS], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for _ in range(steps):
        grown = []
        for answer, score in running:
            logits = model.decoder(
                input_ids=torch.tensor([answer]),
                encoder_hidden_states=states.unsqueeze(0),
                encoder_attention_mask=mask.unsqueeze(0),
                use_cache=False,
            ).logits[0, -1]
            grown += [
                ([*answer, token], score + log) for token, log in enumerate(torch.log_softmax(logits, 0).tolist())
            ]
        grown.sort(key=lambda pair: -pair[1])
        ended += [pair for pair in grown[:width] if pair[0][-1] == EOS]
        running = [pair for pair in grown if pair[0][-1] != EOS][:width]
    return max(ended + running, key=lambda pair: pair[1])[0]


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
    """As a loop would; with as many beams as words, two steps see every answer, and the best must be found."""
    ids, mask = texts(2)
    states = model(images(2), ids, mask).question_states
    alone = [model.generate(images(2)[r : r + 1], ids[r : r + 1], mask[r : r + 1], num_beams=3) for r in range(2)]
    both = model.generate(images(2), ids, mask, num_beams=3)
    for row in range(2):
        assert tokens_of(both[row]) == tokens_of(alone[row][0])
    plain = model.generate(images(2), ids, mask, num_beams=3, max_new_tokens=5, length_penalty=0.0)
    for row in range(2):
        best = beam(model, states[row], mask[row], width=3, steps=5)
        assert plain[row].tolist()[: len(best)] == best
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


def test_generation_needs_to_know_start_and_end() -> None:
    config = tiny_config()
    config.decoder_config.bos_token_id = None
    with pytest.raises(ConfigError, match="bos_token_id"):
        TripsForQuestionAnswering(config).eval().generate(images(), *texts(2))
