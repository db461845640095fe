"""Statements become batches: the boxes of a picture, orders and crops that a seed decides, captions with a place."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_shards import SIZE, pair_processor
from PIL import Image

from trips.data.pair_batches import PairItem
from trips.data.records import BadSamples
from trips.data.statement_batches import AssignmentCollator, StatementCollator, StatementDataset
from trips.data.statements import NLVR_BOXES, ReasoningRecord
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError

PROCESSOR = pair_processor()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int = 0, images: tuple[Any, ...] | None = None, **fields: Any) -> ReasoningRecord:
    """Three boxes of noise, or some images, under "a photo of number wN"."""
    picture = np.random.default_rng(number).integers(0, 256, (100, 400, 3), dtype=np.uint8)
    values = {"boxes": NLVR_BOXES} if images is None else {}
    values |= {"sentence": f"a photo of number w{number}", "label": number % 2 == 0, **fields}
    name = f"s{number}"
    return ReasoningRecord(name, images or (png(picture),), group=name, statement=name, source=f"made:{name}", **values)


def test_boxes_are_the_images() -> None:
    (item,) = [StatementDataset([record(3)], PROCESSOR)[0]]
    picture = np.random.default_rng(3).integers(0, 256, (100, 400, 3), dtype=np.uint8)
    expected = [PROCESSOR.resize(picture[:100, left : left + 100]) for left in (0, 150, 300)]
    assert item.pixels.shape == (3, SIZE, SIZE, 3) and np.array_equal(item.pixels, np.stack(expected))
    batch = StatementCollator(PROCESSOR, 3)([item])
    assert torch.equal(batch["pixel_values"][0], PROCESSOR([Image.fromarray(one) for one in expected])["pixel_values"])


def test_a_batch_holds_what_the_records_say(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(np.full((9, 9, 3), 7, np.uint8)))
    records = [
        record(1, (tmp_path / "a.png", png(np.zeros((5, 5, 3), np.uint8)))),
        record(2, (tmp_path / "gone.png", b"")),
        record(4, (b"broken", tmp_path / "a.png")),
        record(6, (tmp_path / "a.png",) * 2, sentence="\u200b"),
        record(8, (tmp_path / "a.png",) * 2, sentence="a dog"),
    ]
    bad = BadSamples()
    dataset = StatementDataset(records, PROCESSOR, bad)
    items = [dataset[i] for i in range(5)]
    batch = StatementCollator(PROCESSOR, 2)(items)
    assert batch["identifiers"] == ["s1", "s8"] and batch["sources"] == ["made:s1", "made:s8"]
    assert batch["labels"].tolist() == [0, 1] and batch["pixel_values"].shape == (2, 2, 3, SIZE, SIZE)
    texts = PROCESSOR(text=["a photo of number w1", "a dog"], pad_to_multiple_of=8)
    assert texts["input_ids"].shape == (2, 8) and torch.equal(batch["input_ids"], texts["input_ids"])
    assert torch.equal(batch["attention_mask"], texts["attention_mask"])
    flat = PROCESSOR([tmp_path / "a.png"])["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0, 0], flat) and torch.equal(batch["pixel_values"][1, 1], flat)
    assert [source for source, _ in batch["skipped"]] == list(bad.errors) == ["made:s2", "made:s4", "made:s6"]
    assert "gone.png" in bad.errors["made:s2"] and "sentence cannot be used" in bad.errors["made:s6"]
    assert bad.num_seen == 5 and dataset[1].error == items[1].error
    nothing = StatementCollator(PROCESSOR, 2)(items[1:4])
    assert nothing["pixel_values"].shape == (0, 2, 3, SIZE, SIZE) and nothing["labels"].shape == (0,)
    assert nothing["input_ids"].shape == (0, 0) and nothing["sources"] == []
    unlabelled = StatementDataset([record(label=None)], PROCESSOR)[0]
    assert "labels" not in StatementCollator(PROCESSOR, 3)([unlabelled])
    with pytest.raises(DataError, match="made:s4"):
        StatementDataset(records, PROCESSOR)[2]


def test_pictures_without_room_for_the_boxes() -> None:
    small = record(0, (png(np.zeros((50, 200, 3), np.uint8)),), boxes=NLVR_BOXES)
    with pytest.raises(DataError, match=r"made:s0: picture is smaller than its boxes.*\(200, 50\).*400 x 100"):
        StatementDataset([small], PROCESSOR)[0]


@settings(max_examples=20)
@given(seed=st.integers(0, 99), epoch=st.integers(0, 99), index=st.integers(0, 2))
def test_shuffling_is_a_permutation_that_seed_and_epoch_decide(seed: int, epoch: int, index: int) -> None:
    records = [record(number) for number in range(3)]
    plain = StatementDataset(records, PROCESSOR)[index].pixels
    made = []
    for cached in (False, True):
        dataset = StatementDataset(records, PROCESSOR, shuffle_images=True, seed=seed, cache_images=cached)
        for warm in (epoch + 1, epoch):  # what was drawn before leaves no trace
            dataset.set_epoch(warm)
            pixels = dataset[index].pixels
        made.append(pixels)
    assert np.array_equal(*made)
    places = [next(i for i in range(3) if np.array_equal(plain[i], image)) for image in made[0]]
    assert sorted(places) == [0, 1, 2]


def test_shuffling_brings_every_order() -> None:
    dataset = StatementDataset([record()], PROCESSOR, shuffle_images=True, cache_images=True)
    plain, orders = dataset._read(0), Counter()
    for epoch in range(120):
        dataset.set_epoch(epoch)
        orders[tuple(next(i for i in range(3) if np.array_equal(plain[i], p)) for p in dataset[0].pixels)] += 1
    assert len(orders) == 6 and min(orders.values()) > 5


def test_augmentation_is_drawn_for_each_image_and_epoch() -> None:
    transform = TrainTransform(SIZE, scale=(0.2, 0.5))
    records = [record(0, (png(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)),) * 2)]
    first, again = (StatementDataset(records, PROCESSOR, transform=transform, seed=4) for _ in range(2))
    pixels = first[0].pixels
    assert not np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels, again[0].pixels)
    first.set_epoch(1)
    assert not np.array_equal(first[0].pixels, pixels)
    first.set_epoch(0)
    assert np.array_equal(first[0].pixels, pixels)
    draft = pair_processor()
    draft.jpeg_draft = True
    assert np.array_equal(StatementDataset(records, draft, transform=transform, seed=4)[0].pixels, pixels)
    with pytest.raises(DataError, match="made:s0.*No such file"):
        StatementDataset([record(0, (Path("gone.png"),))], draft, transform=transform)[0]
    boxes = StatementDataset([record()], draft, transform=transform)[0].pixels
    assert boxes.shape == (3, SIZE, SIZE, 3)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="no records"):
        StatementDataset([], PROCESSOR)
    with pytest.raises(ConfigError, match=r"numbers of images differ.*made:s0.*made:s1"):
        StatementDataset([record(0), record(1, (b"", b""))], PROCESSOR)
    with pytest.raises(ConfigError, match=r"data\.cache_images"):
        StatementDataset([record()], PROCESSOR, transform=TrainTransform(SIZE), cache_images=True)


def pair(number: int, position: int, image_id: int | None = None) -> PairItem:
    pixels = np.full((SIZE, SIZE, 3), number, np.uint8)
    image_id = number if image_id is None else image_id
    return PairItem(pixels, [2, 5 + number], image_id, number, f"made:{number}", (0, 0, position))


@settings(max_examples=40)
@given(num_images=st.integers(1, 4), ids=st.lists(st.integers(0, 5), min_size=2, max_size=8), start=st.integers(0, 99))
def test_a_caption_stands_in_its_slot_or_in_none(num_images: int, ids: list[int], start: int) -> None:
    items = [pair(number, start + number, image_id) for number, image_id in enumerate(ids)]
    collator = AssignmentCollator(PROCESSOR, num_images)
    if len(set(ids)) == 1:
        with pytest.raises(DataError, match="made:0: no other image in the batch"):
            collator(items)
        return
    batch, again = collator(items), collator(items)
    assert all(torch.equal(batch[key], again[key]) for key in ("pixel_values", "labels"))
    assert batch["pixel_values"].shape == (len(ids), num_images, 3, SIZE, SIZE)
    plain = PROCESSOR.normalise([item.pixels for item in items])
    for row, label in enumerate(batch["labels"].tolist()):
        shown = [next(i for i in range(len(ids)) if torch.equal(plain[i], p)) for p in batch["pixel_values"][row]]
        others = [ids[i] for slot, i in enumerate(shown) if slot != label]
        assert 0 <= label <= num_images and ids[row] not in others
        assert label == num_images or shown[label] == row
        if len(set(ids)) > num_images:
            assert len(set(others)) == len(others)  # different images while there are enough


def test_every_slot_is_as_likely_as_none() -> None:
    labels = [
        label
        for start in range(0, 3000, 10)
        for label in AssignmentCollator(PROCESSOR, 2)([pair(i, start + i) for i in range(10)])["labels"].tolist()
    ]
    shares = [labels.count(label) / len(labels) for label in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.04)
