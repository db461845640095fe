"""Retrieval in both stages on records, against full matrices of features and matches made one by one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pair_shards import jpeg
from retrieval_records import (
    features_one_by_one,
    matches_one_by_one,
    owners,
    retrieval_model,
    retrieval_processor,
    retrieval_records,
)
from torch import Tensor

from trips.bench.retrieval_flops import count_reranking_flops
from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples
from trips.errors import ConfigError, DataError
from trips.metrics import recall_at_k
from trips.train import progress
from trips.train.pair_evaluation import evaluate_retrieval
from trips.train.reranking import evaluate_two_stage

PROCESSOR, RECORDS = retrieval_processor(), retrieval_records(9)
GUIDES = ("text", "image")


def measured(model, records: Sequence[PairRecord] = RECORDS, **options: Any) -> dict[str, Any]:
    return evaluate_two_stage(
        model, records, PROCESSOR, options.pop("bad_samples", BadSamples()), **{"batch_size": 2, **options}
    )


def recalls_by_sorting(
    features: Tensor, matches: Tensor, records: Sequence[PairRecord], k: int
) -> dict[str, dict[int, float]]:
    """Of (I, T) similarities and matches: each query's k best by the first, sorted by the second; lists and loops.

    Relevant candidates stand last among equals in both.
    """
    relevant = owners(records)[None] == torch.arange(len(records))[:, None]
    found = {}
    for name, first, second, right in (
        ("text_recall", features, matches, relevant),
        ("image_recall", features.T, matches.T, relevant.T),
    ):
        ranks = []
        for row in range(len(first)):
            listed = sorted(range(first.shape[1]), key=lambda c: (-round(first[row, c].item(), 5), right[row, c]))[:k]
            best = sorted(listed, key=lambda c: (-round(second[row, c].item(), 4), right[row, c]))
            ranks.append(next((place for place, c in enumerate(best) if right[row, c]), 99))
        found[name] = {n: pytest.approx(sum(rank < n for rank in ranks) / len(ranks)) for n in (1, 5, 10)}
    return found


@pytest.mark.parametrize("k", [10, 99])
def test_equals_brute_force(k) -> None:
    model = retrieval_model()
    images, texts = features_one_by_one(model, RECORDS)
    found, features = measured(model, guides=GUIDES, shortlist=k), images @ texts.T
    relevant = owners(RECORDS)[None] == torch.arange(len(RECORDS))[:, None]
    first = found["first_stage"]
    assert first["text_recall"] == pytest.approx(recall_at_k(features, relevant))
    assert first["image_recall"] == pytest.approx(recall_at_k(features.T, relevant.T))
    for guide in GUIDES:
        selection = model.config.selection.replace(guide=guide)
        matches = matches_one_by_one(model, RECORDS, selection)
        expected, of_guide = recalls_by_sorting(features, matches, RECORDS, k), found["reranked"][guide]
        assert {name: of_guide[name] for name in expected} == expected
        six = [*of_guide["text_recall"].values(), *of_guide["image_recall"].values()]
        assert of_guide["mean_recall"] == pytest.approx(sum(six) / 6)
        if k == 99:
            assert of_guide["text_recall"] == pytest.approx(recall_at_k(matches.double().round(decimals=4), relevant))
    distinct = len({text for record in RECORDS for text in record.texts})
    assert found["num_images"] == 9 and found["num_texts"] == 18 > distinct
    assert found["pairs"] == 9 * distinct if k == 99 else 9 * 10 <= found["pairs"] <= 9 * distinct


def test_guides_cost_what_is_counted_for_them() -> None:
    model = retrieval_model()
    found = measured(model, guides=GUIDES, shortlist=20)["reranked"]
    assert found["text"]["gflops_per_pair"] > found["image"]["gflops_per_pair"] > 0
    for guide in GUIDES:
        count = count_reranking_flops(model.config, (4, 4), found[guide]["text_length"], guide=guide)
        assert (found[guide]["gflops_per_pair"], found[guide]["gflops_per_image"]) == (count.pair, count.image)
        assert found[guide]["pairs_per_second"] > 0 and found[guide]["selection_guide"] == guide
    assert measured(retrieval_model(guide="none"))["reranked"]["text"]["selection_guide"] == "none"


def without_times(found: dict[str, Any]) -> Any:
    if not isinstance(found, dict):
        return found
    return {key: without_times(value) for key, value in found.items() if not str(key).endswith(("seconds", "second"))}


@pytest.mark.parametrize("options", [{"memory_gb": 0.0}, {"memory_gb": 1e-5}, {"batch_size": 5}, {"progress": False}])
def test_memory_and_batches_change_nothing(options) -> None:
    model = retrieval_model()
    expected = without_times(measured(model, guides=GUIDES, shortlist=12))
    assert without_times(measured(model, guides=GUIDES, shortlist=12, **options)) == expected


def test_what_cannot_be_used_is_left_out_with_its_texts_and_counted() -> None:
    model, bad = retrieval_model(), BadSamples()
    records = list(RECORDS)
    records[2:2] = [PairRecord(jpeg()[:99], ("a dog", "w1"), None, "cut off")]
    records.append(PairRecord(jpeg(), ("a dog", "\x07"), None, "mute"))
    found = measured(model, records, bad_samples=bad, shortlist=12)
    assert without_times(found) == without_times(measured(model, shortlist=12))
    assert list(bad.errors) == ["cut off", "mute"] and bad.num_seen == 11


def test_the_first_stage_is_that_of_zero_shot_retrieval() -> None:
    model, records = retrieval_model(), retrieval_records(15, repeated=False)
    expected, found = evaluate_retrieval(model, records, PROCESSOR, BadSamples()), measured(model, records)
    for name in ("text_recall", "image_recall", "mean_recall"):
        assert found["first_stage"][name] == pytest.approx(expected[name]), name


def test_nothing_to_read_and_too_much_that_cannot_be_read_end_it() -> None:
    cut = [PairRecord(jpeg()[:99], ("a dog",), None, f"cut {i}") for i in range(3)]
    with pytest.raises(DataError, match="no image can be read"):
        measured(retrieval_model(), cut)
    with pytest.raises(DataError, match="too many bad samples.*cut 0"):
        measured(retrieval_model(), [*cut, *RECORDS], bad_samples=BadSamples(2))
    with pytest.raises(DataError, match="no text"):
        measured(retrieval_model(), [dataclasses.replace(RECORDS[0], texts=("\x07",))])


class Vanishing(Sequence):
    """Records of which one loses its picture between the stages."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(RECORDS)

    def __getitem__(self, number: int) -> PairRecord:
        self.reads += number == 4
        return dataclasses.replace(RECORDS[number], image=b"") if number == 4 and self.reads > 2 else RECORDS[number]


def test_a_picture_that_is_gone_in_the_second_stage_is_named() -> None:
    model = retrieval_model().train()
    with pytest.raises(DataError, match="record 4"):
        measured(model, Vanishing(), shortlist=20)
    assert model.training


def test_one_image_and_one_text() -> None:
    found = measured(retrieval_model(), RECORDS[:1], shortlist=1)
    assert found["pairs"] == 1 and found["reranked"]["text"]["mean_recall"] == found["first_stage"]["mean_recall"] == 1


def test_the_same_caption_of_two_images_is_found_for_neither() -> None:
    """Equal scores to the bit, however batches are made up: nobody can tell the two apart."""
    records = [dataclasses.replace(record, texts=("a photo of a dog",)) for record in RECORDS]
    for batch_size in (1, 3):
        found = measured(retrieval_model(), records, shortlist=10, batch_size=batch_size)
        assert found["pairs"] == 9
        assert found["first_stage"]["text_recall"] == found["reranked"]["text"]["text_recall"] == {1: 0, 5: 0, 10: 1}


def test_a_model_without_numbers_finds_nothing() -> None:
    model = retrieval_model()
    model.itm_head.weight.data.fill_(torch.nan)
    found = measured(model, retrieval_records(12, repeated=False), shortlist=20)
    assert found["first_stage"]["mean_recall"] > 0
    assert found["reranked"]["text"]["mean_recall"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"shortlist": 9}, "shortlist"), ({"shortlist": 0}, "shortlist"), ({"guides": ("both",)}, "guides"),
     ({"guides": ()}, "guides"), ({"batch_size": 0}, "batch_size"), ({"memory_gb": -1.0}, "memory_gb"),
     ({"memory_gb": float("inf")}, "memory_gb")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(options, named) -> None:
    with pytest.raises(ConfigError, match=named):
        measured(retrieval_model(), **options)


def test_log_lines_where_there_is_no_terminal(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    with caplog.at_level(logging.INFO, "trips"):
        measured(retrieval_model(), shortlist=20)
        lines = [record.message for record in caplog.records]
        assert any(line.startswith("images 9/9") for line in lines) and any("about" in line for line in lines)
        assert any("pairs (text guides)" in line for line in lines)
        caplog.clear()
        measured(retrieval_model(), shortlist=20, progress=False)
        assert not caplog.records
