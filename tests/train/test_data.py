"""Training batches are a function of (seed, step): any start, any number of processes or workers gives the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trips.config import SelectionConfig
from trips.data.loading import VqaCollator, VqaDataset
from trips.data.records import BadSamples, Question, VqaRecord
from trips.errors import ConfigError, DataError
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.data import RecordTrainingData
from trips.train.recipe import DataSection, ModelSection
from trips.train.towers import build_model, build_processor


def records(count: int, bad: tuple[int, ...] = ()) -> list[VqaRecord]:
    """Flat images, each of its own grey, with three questions."""
    return [
        VqaRecord(
            image_id=str(i),
            image=b"broken" if i in bad else np.full((16, 16, 3), i, np.uint8),
            questions=tuple(Question(f"{i}-{j}", f"what is {j}", (f"thing {i}",), (1.0,)) for j in range(3)),
            source=f"made.tar:{i}",
        )
        for i in range(count)
    ]


def texts_of(made: list[VqaRecord]) -> list[str]:
    return [text for record in made for question in record.questions for text in (question.text, *question.answers)]


def data(count: int = 11, bad: tuple[int, ...] = (), counted: bool = True, **options: Any) -> RecordTrainingData:
    made = records(count, bad)
    processor = build_processor(ModelSection(vision="tiny", text="tiny"), DataSection(image_size=16), texts_of(made))
    dataset = VqaDataset(made, processor, BadSamples() if counted else None, max_questions_per_image=2, seed=5)
    return RecordTrainingData(
        dataset, VqaCollator(processor), **{"batch_size": 4, "seed": 3, "rank": 0, "world": 1, **options}
    )


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_gives_the_same_batches(workers: int) -> None:
    whole = list(data().batches(0, 7))
    torch.rand(3)
    part = list(data(num_workers=workers).batches(3, 4))
    assert len(whole) == 7 and all(same(a, b) for a, b in zip(whole[3:], part, strict=True))
    assert not same(whole[0], next(data(seed=4).batches(0, 1)))


def test_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    list(data().batches(0, 3))
    assert torch.equal(before, torch.get_rng_state())


@given(count=st.integers(1, 40), batch=st.integers(1, 8), world=st.sampled_from([1, 2, 4]), step=st.integers(0, 200))
def test_shards_partition_the_batch_and_batches_the_epoch(count: int, batch: int, world: int, step: int) -> None:
    batch = min(batch * world, count // world * world)
    if not batch:
        return
    # Only the length of the dataset is asked for.
    parts = [
        RecordTrainingData(range(count), None, batch, seed=1, rank=rank, world=world)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    per_epoch = parts[0].steps_per_epoch
    assert per_epoch == count // batch
    epoch = step // per_epoch
    seen: Counter[int] = Counter()
    for place in range(per_epoch):
        shares = [part.indices(epoch * per_epoch + place) for part in parts]
        assert {share[0] for share in shares} == {epoch} and all(len(share[1]) == batch // world for share in shares)
        alone = RecordTrainingData(range(count), None, batch, seed=1, rank=0, world=1)  # type: ignore[arg-type]
        joined = alone.indices(epoch * per_epoch + place)[1]
        assert sorted(i for share in shares for i in share[1]) == sorted(joined)
        seen.update(joined)
    assert set(seen.values()) == {1} and set(seen) <= set(range(count)) and len(seen) == per_epoch * batch


def test_epochs_differ_and_draw_other_questions() -> None:
    made = data(count=8)
    first, second = (list(made.batches(start, 2)) for start in (0, 2))
    assert sorted(s for b in first for s in b["sources"]) == sorted(s for b in second for s in b["sources"])
    assert [b["sources"] for b in first] != [b["sources"] for b in second]
    drawn = [{q for b in epoch for q in b["question_ids"]} for epoch in (first, second)]
    assert all(len(questions) == 16 for questions in drawn) and drawn[0] != drawn[1]


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_answers_one_by_one() -> None:
    """The model is told which places predict a token; without that, and for every answer alone, it finds the same."""
    texts = (("red",), ("dark red", "blue"), ("one, two, three",), ("very dark blue", "two"))
    made = [
        dataclasses.replace(
            record,
            questions=tuple(
                dataclasses.replace(q, answers=answers, weights=(0.7, 0.3) if len(answers) == 2 else (1.0,))
                for q, answers in zip(record.questions, texts[i:] + texts[:i])
            ),
        )
        for i, record in enumerate(records(4))
    ]
    section = ModelSection(vision="tiny", text="tiny", selection=SelectionConfig(layers=(2, 3), keep_rate=0.5))
    processor = build_processor(section, DataSection(image_size=16), texts_of(made))
    model = build_model(section, processor, TripsForQuestionAnswering).eval()
    dataset, collator = VqaDataset(made, processor, BadSamples()), VqaCollator(processor)
    (batch,) = RecordTrainingData(dataset, collator, batch_size=4, seed=3, rank=0, world=1).batches(0, 1)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    tokens, lengths = tensors.pop("answer_tokens"), tensors["answer_mask"].sum(dim=1)
    assert int((lengths - 1).sum()) == len(tokens) and len(set(lengths.tolist())) > 2
    loss, num_questions = float(model(**tensors, answer_tokens=tokens).loss), len(batch["question_ids"])
    assert float(model(**tensors).loss) == pytest.approx(loss, rel=1e-6)
    total = 0.0
    for a, (b, weight) in enumerate(zip(tensors["answer_index"].tolist(), tensors["answer_weights"].tolist())):
        image, words = int(tensors["image_index"][b]), int(tensors["attention_mask"][b].sum())
        alone = model(
            tensors["pixel_values"][image : image + 1],
            tensors["input_ids"][b : b + 1, :words],
            answer_ids=tensors["answer_ids"][a : a + 1, : lengths[a]],
        )
        total += weight * float(alone.loss)
    assert loss == pytest.approx(total / num_questions, rel=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_and_left_out(workers: int) -> None:
    made = data(count=8, bad=(2, 5), num_workers=workers)
    batches = list(made.batches(0, 4))
    assert sum(len(b["sources"]) for b in batches) == 12
    assert set(made.dataset.bad_samples.errors) == {"made.tar:2", "made.tar:5"}
    assert made.dataset.bad_samples.num_seen == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_stop_and_are_named(workers: int) -> None:
    made = data(count=8, bad=(2, 5, 6), num_workers=workers)
    made.dataset.bad_samples.limit = 2
    with pytest.raises(DataError, match=r"made\.tar:[256]"):
        list(made.batches(0, 2))
    strict = data(count=8, bad=(2,), counted=False, num_workers=workers)
    with pytest.raises(DataError, match=r"^made\.tar:2") as caught:
        list(strict.batches(0, 2))
    assert "Traceback" not in str(caught.value)


def test_a_batch_of_bad_images_alone_is_replaced() -> None:
    made = data(count=3, bad=(1,), batch_size=1)
    batches = list(made.batches(0, 3))
    assert all(len(b["sources"]) == 1 for b in batches) and {b["sources"][0] for b in batches} == {
        "made.tar:0",
        "made.tar:2",
    }
    assert same(batches[2], next(data(count=3, bad=(1,), batch_size=1).batches(2, 1)))
    with pytest.raises(DataError, match="every record is bad"):
        list(data(count=3, bad=(0, 1, 2), batch_size=1).batches(0, 1))


def test_batch_size_must_fit() -> None:
    for options in ({"batch_size": 12}, {"batch_size": 0}, {"batch_size": 3, "world": 2}):
        with pytest.raises(ConfigError, match="batch_size"):
            data(**options)
