"""Operations of the second stage of retrieval: closed form against torch's counter, and figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from pair_shards import WORDS
from retrieval_records import NUM_PATCHES, retrieval_model

from trips.bench.counter import counted_flops
from trips.bench.retrieval_flops import count_reranking_flops
from trips.config import SelectionConfig, TripsConfig
from trips.tasks.reranking import Reranker, TextTable

SETTINGS = (
    {},
    {"score": "keys", "inattentive": "drop", "layers": (1, 4)},
    {"guide": "image"},
    {"guide": "none"},
    {"keep_rate": 1.0},
    {"text_width": 16, "width_map": "orthogonal"},
)


@pytest.mark.parametrize("guide", ["text", "image"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@torch.no_grad()
def test_closed_form_equals_the_counter(setting, guide) -> None:
    """Two images, three texts of five tokens, all six pairs."""
    model = retrieval_model(**setting)
    texts = TextTable.of(torch.randint(5, len(WORDS), (3, 5)).tolist())
    reranker = Reranker(model, texts, lambda numbers: torch.randn(len(numbers), 3, 8, 8), NUM_PATCHES, guide=guide)
    found = counted_flops(reranker.score, torch.arange(2).repeat_interleave(3), torch.arange(3).repeat(2))
    count = count_reranking_flops(model.config, (4, 4), 5, guide=guide)
    total = 2 * count.image + 3 * count.text + 6 * count.pair
    assert total == pytest.approx(found, rel=1e-9)


def test_price_of_a_pair_at_the_size_of_the_paper() -> None:
    """GFLOPs at 384 px and 30 text tokens, ViT-B/16 and BERT-base."""
    config = TripsConfig()

    def count(selection, guide="text"):
        return count_reranking_flops(config, (24, 24), 30, selection, guide)

    baseline, text, image = (
        count(SelectionConfig(guide="none")),
        count(SelectionConfig()),
        count(SelectionConfig(), "image"),
    )
    assert baseline.pair == pytest.approx(11.5, abs=0.06)
    assert text.pair == pytest.approx(49.8, abs=0.06)
    assert text.image + text.pair == pytest.approx(91.0, abs=0.06)
    assert image.pair == pytest.approx(7.2, abs=0.06)
    assert image.image + image.pair == pytest.approx(text.image + text.pair, rel=1e-3)
    assert text.pair / baseline.pair == pytest.approx(4.3, abs=0.05)  # selection makes reranking dearer
