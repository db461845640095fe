"""Operations of question answering: closed forms against torch's counter on a running model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ANSWER_MASK, ANSWERS, BOS, EOS, images, texts, tiny_vqa_model

from trips.bench.answer_flops import (
    count_answer_ranking_flops,
    count_answer_training_flops,
    count_answer_writing_flops,
)
from trips.bench.counter import counted_flops
from trips.bench.flops import count_flops
from trips.config import TripsConfig
from trips.errors import ConfigError
from trips.tasks.vqa import predicted_tokens

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"guide": "none"},
    {"score": "keys"},
    {"text_width": 16, "width_map": "orthogonal"},
    {"architecture": "single"},
)


def answers(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, length) different answers of the same length, and two places of padding behind them."""
    ids = torch.zeros(count, length + 2, dtype=torch.long)
    ids[:, 0], ids[:, length - 1] = BOS, EOS
    for place in range(1, length - 1):
        ids[:, place] = 4 + (torch.arange(count) + place) % 8
    return ids, (ids != 0).long()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_learning_answers(setting: dict[str, Any]) -> None:
    """Two questions about one image with three answers each."""
    model, (ids, mask) = tiny_vqa_model(**setting), texts(2)
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    learns = model.config.selection.active and model.config.architecture == "dual"
    kinds = ((2, False), (4, False), *([(4, True)] if learns else []))
    for length, distill in kinds:
        answer_ids, answer_mask = answers(6, length)
        answer_ids, answer_mask = answer_ids[:, :length], answer_mask[:, :length]
        inputs = (images(1), ids, mask, answer_ids, answer_mask, index)
        tokens = predicted_tokens(answer_mask)
        found = counted_flops(model, *inputs, answer_tokens=tokens, image_index=torch.tensor([0, 0]), distill=distill)
        options = {"answers": 3, "answer_length": length, "texts_per_image": 2, "distill": distill}
        count = count_answer_training_flops(model.config, (4, 4), 6, **options)
        assert 2 * count.total == pytest.approx(found, rel=1e-9)
    assert count.decoder > 0 and count.total == count.vision + count.text + count.fusion + count.decoder


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@torch.no_grad()
def test_ranking_candidates(setting: dict[str, Any], length: int) -> None:
    model, (ids, mask), candidates = tiny_vqa_model(**setting), texts(2), answers(6, length)

    def answer(top_k: int) -> None:
        states = model(images(2), ids, mask).question_states
        model.rank_answers(states, mask, *candidates, top_k)

    for top_k in (1, 4, 100):
        count = count_answer_ranking_flops(model.config, (4, 4), 6, candidates=6, top_k=top_k, answer_length=length)
        assert 2 * count.total == pytest.approx(counted_flops(answer, top_k), rel=1e-9)


@torch.no_grad()
def test_candidates_of_different_lengths_cost_their_mean_but_for_attention() -> None:
    model, states, mask = tiny_vqa_model(), torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.long)
    found = counted_flops(model.rank_answers, states, mask, ANSWERS, ANSWER_MASK, 4)
    mean = ANSWER_MASK.sum().item() / len(ANSWERS)
    count = count_answer_ranking_flops(model.config, (4, 4), 6, candidates=4, answer_length=mean).decoder
    layers = model.config.decoder_config.num_hidden_layers
    squares = sum((length - 2) ** 2 for length in ANSWER_MASK.sum(1).tolist()) - 4 * (mean - 2) ** 2
    assert found - count == pytest.approx(2 * 2 * layers * 32 * squares / 1e9, rel=1e-6)


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_writing_an_answer(setting: dict[str, Any], length: int) -> None:
    model, (ids, mask) = tiny_vqa_model(**setting), texts(2)
    steps = {"max_new_tokens": length - 1, "min_new_tokens": length - 1}
    found = counted_flops(model.generate, images(2), ids, mask, **steps)
    count = count_answer_writing_flops(model.config, (4, 4), 6, answer_length=length)
    assert 2 * count.total == pytest.approx(found, rel=1e-9)


def test_price_of_an_answer_at_the_size_of_the_paper() -> None:
    """384 px, 40 text tokens, 128 candidates of one word piece, by hand."""
    config = TripsConfig()
    count = count_answer_ranking_flops(config, (24, 24), 40)
    token = 6 * (4 + 2 + 8) * 768**2  # four projections, query and output of the cross-attention, FFN
    attention = 6 * 2 * 768 * (129 * 40 + 1 + 128 * 2)
    products = 6 * 2 * 40 * 768**2 + 129 * (token + 768 * (768 + 30522)) + attention
    assert count.decoder * 1e9 == pytest.approx(2 * products)
    assert count.decoder == pytest.approx(19.65, abs=0.006)
    assert count.total - count.decoder == count_flops(config, (24, 24), 40).total
    assert count_answer_ranking_flops(config, (24, 24), 40, candidates=3).decoder < 1.2


@pytest.mark.parametrize("count", [count_answer_training_flops, count_answer_ranking_flops, count_answer_writing_flops])
def test_an_answer_has_a_start_and_an_end(count: Any) -> None:
    with pytest.raises(ConfigError, match="answer_length"):
        count(TripsConfig(), (14, 14), 40, answer_length=1)
