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

from trips.errors import ConfigError
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


@torch.no_grad()
def test_ranking_a_shortlist_takes_the_best_first_tokens_ties_in_order(model) -> None:
    ids, mask = texts(3)
    states = model(images(3), ids, mask).question_states
    for k in (1, 2, 3):
        numbers, scores = model.rank_answers(states, mask, ANSWERS, ANSWER_MASK, top_k=k)
        assert numbers.shape == scores.shape == (3, k)
        for row in range(3):
            first = [
                reference.answer_log_likelihood(model.decoder, states[row], mask[row], [BOS, int(answer[1])])
                for answer in ANSWERS
            ]
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


def test_generation_needs_to_know_start_and_end() -> None:
    config = tiny_config()
    config.decoder_config.bos_token_id = None
    with pytest.raises(ConfigError, match="bos_token_id"):
        TripsForQuestionAnswering(config).eval().generate(images(), *texts(2))
