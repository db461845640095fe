"""trips.data.pairs, order, pair_records: which pair comes when, what a bad one does, and what a batch holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_shards import SIZE, WORDS, jpeg, pair_processor, sample, write_corpus, write_tar
from PIL import Image

from trips.data.masking import mask_tokens
from trips.data.order import CorpusOrder, MixedOrder, Place
from trips.data.pair_batches import PairCollator
from trips.data.pair_records import parse_pair
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.shards import Members
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError, ShapeError
from trips.images import load_image

counts_of_shards = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any)


def order(counts: list[list[int]], weights: list[float], block: int = 2, seed: int = 3) -> MixedOrder:
    return MixedOrder([CorpusOrder(c, (seed, i), block) for i, c in enumerate(counts)], weights, seed)


def epoch_of(made: MixedOrder, epoch: int) -> list[Place]:
    return [made.locate(epoch, position) for position in range(len(made))]


@given(counts=st.lists(counts_of_shards, min_size=1, max_size=3), block=st.integers(1, 7), epoch=st.integers(0, 40))
def test_weight_1_is_every_sample_once_per_epoch(counts: list[list[int]], block: int, epoch: int) -> None:
    found = epoch_of(order(counts, [1.0] * len(counts), block), epoch)
    expected = {(c, s, i) for c, shards in enumerate(counts) for s, n in enumerate(shards) for i in range(n)}
    assert len(found) == len(expected) and {place[:3] for place in found} == expected
    assert {place.round for place in found} == {epoch}


@given(counts=counts_of_shards, other=counts_of_shards, weight=st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 0.3, 1.7]))
def test_weights_are_exact(counts: list[int], other: list[int], weight: float) -> None:
    made, total = order([counts, other], [weight, 1.0]), sum(counts)
    share = max(1, round(weight * total))
    assert len(made) == share + sum(other)
    whole = Counter()
    for epoch in range(8):
        mine = [place for place in epoch_of(made, epoch) if place.corpus == 0]
        assert len(mine) == share
        whole.update(place[1:3] for place in mine)
        # Never a sample again before all others had their turn.
        assert max(whole.values()) - min(whole.values() if len(whole) == total else [0]) <= 1
    if weight in (2.0, 3.0):
        assert set(whole.values()) == {int(8 * weight)}
    if weight in (0.25, 0.5) and total % 4 == 0:
        assert set(whole.values()) == {int(8 * weight)}


def test_half_of_them_and_then_the_other_half() -> None:
    made = order([[4, 6]], [0.5])
    halves = [{place[:3] for place in epoch_of(made, epoch)} for epoch in range(4)]
    assert all(len(half) == 5 for half in halves)
    assert not halves[0] & halves[1] and not halves[2] & halves[3] and halves[0] != halves[2]


@given(counts=counts_of_shards, block=st.integers(1, 4), round_=st.integers(0, 3))
def test_samples_are_mixed_inside_blocks_of_shards(counts: list[int], block: int, round_: int) -> None:
    corpus, total = CorpusOrder(counts, (1,), block), sum(counts)
    shards = [corpus.locate(round_ * total + i)[0] for i in range(total)]
    first = list(dict.fromkeys(shards))
    last = {shard: total - shards[::-1].index(shard) for shard in first}
    # At any place, the shards that have begun and not ended belong to one block.
    for i in range(total):
        assert len({shard for shard in shards[: i + 1] if last[shard] > i}) <= block


def test_orders_differ_between_rounds_seeds_and_corpora_and_mix_evenly() -> None:
    counts = [[50] * 8, [50] * 8]
    a, b = order(counts, [1.0, 1.0]), order(counts, [1.0, 1.0], seed=4)
    runs = [epoch_of(a, 0), epoch_of(a, 1), epoch_of(b, 0)]
    assert epoch_of(order(counts, [1.0, 1.0]), 0) == runs[0] and len({tuple(run) for run in runs}) == 3
    mine = [[place[1:3] for place in runs[0] if place.corpus == corpus] for corpus in (0, 1)]
    assert mine[0] != mine[1]
    # 400 of 800: 100 draws of each quarter would be a standard deviation of about 6 off.
    for start in range(0, 800, 200):
        assert 75 < sum(place.corpus for place in runs[0][start : start + 200]) < 125
    shards = [place.shard for place in runs[0] if place.corpus == 0]
    assert len(set(shards[:100])) == 2 and shards[:100] != sorted(shards[:100])
    assert len({tuple(dict.fromkeys(p.shard for p in epoch_of(a, e) if p.corpus == 0)) for e in range(5)}) > 3


def test_no_block_repeats_the_permutation_of_another() -> None:
    corpus = CorpusOrder([10] * 6, (3,), 1)
    samples = [corpus.locate(i)[1] for i in range(60)]
    assert len({tuple(samples[start : start + 10]) for start in range(0, 60, 10)}) == 6


def test_wrong_orders_are_refused() -> None:
    for weight in (0, -1.0, float("inf"), float("nan"), "1", True):
        with pytest.raises(ConfigError, match="weight"):
            order([[2]], [weight])
    with pytest.raises(ConfigError, match="shuffle_shards"):
        order([[2]], [1.0], block=0)
    for place in ((0, 2), (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            order([[2]], [1.0]).locate(*place)


def members(meta: object = None, txt: bytes | None = None, image: bytes | None = b"x", number: int = 1) -> Members:
    return Members(image, meta if meta is None or isinstance(meta, bytes) else json.dumps(meta).encode(), txt, number)


def test_layouts_of_annotations() -> None:
    for given_, texts, name in (
        (members(txt=b" a dog \n"), ("a dog",), None),
        (members({"caption": "a", "url": "u", "key": "0"}, b"b"), ("a",), "u"),
        (members({"captions": ["a", "b"], "image_id": 7}), ("a", "b"), "7"),
        (members({"questions": [{"question": "what"}, {"question": "who", "answer": "x"}]}), ("what", "who"), None),
        (members({"caption": None, "status": "success"}, b"b"), ("b",), None),
        (members({"captions": ["", "b", "\0\0", "c\0", "\ud800"]}), ("b",), None),
    ):
        record = parse_pair(given_, "c/s.tar:k")
        assert (record.texts, record.image_id, record.image, record.source) == (texts, name, b"x", "c/s.tar:k")


BAD = {
    "image": {"jpg": jpeg(1)[:-200], "txt": b"a dog"},
    "noise": {"jpg": b"\0" * 300, "txt": b"a dog"},
    "blank": {"jpg": jpeg(1), "txt": b" \n"},
    "nul": {"jpg": jpeg(1), "json": json.dumps({"caption": "\0\0\0"}).encode()},
    "dropped": {"jpg": jpeg(1), "txt": "\ufffd".encode()},  # nothing is left of it behind BERT's normaliser
    "textless": {"jpg": jpeg(1)},
    "imageless": {"txt": b"a dog"},
    "twofold": {"jpg": jpeg(1), "png": jpeg(1), "txt": b"a dog"},
    "json": {"jpg": jpeg(1), "json": b"{"},
    "list": {"jpg": jpeg(1), "json": b"[1]"},
    "number": {"jpg": jpeg(1), "json": b'{"captions": [1]}'},
    "string": {"jpg": jpeg(1), "json": b'{"captions": "a"}'},
    "none": {"jpg": jpeg(1), "json": b'{"captions": []}'},
    "question": {"jpg": jpeg(1), "json": b'{"questions": [{"answer": "x"}]}'},
    "latin": {"jpg": jpeg(1), "txt": "übel".encode("latin-1")},
    "deep": {"jpg": jpeg(1), "json": b"[" * 100_000},
}


def dataset(pattern: Any, bad: BadSamples | None = None, **options: Any) -> PairDataset:
    corpora = pattern if isinstance(pattern, list) else [Corpus("made", pattern)]
    return PairDataset(corpora, pair_processor(), bad_samples=bad, **options)


def test_bad_samples_are_named_and_replaced_by_a_function_of_the_position(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {f"{i}": sample(i) for i in range(4)} | BAD)
    write_tar(tmp_path / "00001.tar", {f"{i}": sample(i) for i in range(4, 12)})
    made = dataset(str(tmp_path / "*.tar"), BadSamples())
    items = [made[0, position] for position in range(len(made))]
    skipped = dict(entry for item in items for entry in item.skipped)
    assert skipped.keys() == {f"made/00000.tar:{key}" for key in BAD}
    assert all(reason.startswith(source) for source, reason in skipped.items())
    good = Counter(item.source for item in items)
    assert len(items) == 28 and good.keys() == {f"made/0000{i // 4 > 0:d}.tar:{i}" for i in range(12)}
    again = [dataset(str(tmp_path / "*.tar"), BadSamples())[0, position] for position in reversed(range(28))]
    assert [item.source for item in again[::-1]] == [item.source for item in items]
    for size in (1, 5, 28):  # asked for together, they are the same
        batches = [
            made.__getitems__([(0, i) for i in range(start, min(28, start + size))]) for start in range(0, 28, size)
        ]
        for one, other in zip(items, (item for batch in batches for item in batch), strict=True):
            assert one.input_ids == other.input_ids and np.array_equal(one.pixels, other.pixels)
            assert dataclasses.replace(one, pixels=None) == dataclasses.replace(other, pixels=None)
    # Most stand-ins are of the shard at hand: of it come 20, less the few for which eight draws did not do.
    assert sum(count for source, count in good.items() if "/00000" in source) > 14
    strict = dataset(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match=r"^made/00000\.tar:"):
        [strict[0, position] for position in range(28)]
    write_tar(tmp_path / "x.tar", BAD)
    with pytest.raises(DataError, match=r"no sample can stand in.*epoch 0, position 3|epoch 0, position 3: no sample"):
        dataset(str(tmp_path / "x.tar"), BadSamples())[0, 3]


def test_damaged_shards_are_used_up_to_the_damage_and_named(tmp_path: Path) -> None:
    pattern = write_corpus(tmp_path, [4, 4])
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    bad = BadSamples()
    made = dataset(pattern, bad)
    assert (
        4 < len(made) < 8 and list(bad.errors) == [str(path)] and "samples before it are used" in bad.errors[str(path)]
    )
    assert len({made[0, i].source for i in range(len(made))}) == len(made)
    with pytest.raises(DataError, match=r"00001\.tar: (damaged|cut)"):
        dataset(pattern)
    path.write_bytes(b"")
    assert len(dataset(pattern, BadSamples())) == 4
    with pytest.raises(DataError, match="^made: no samples in any shard"):
        dataset(str(path), BadSamples())


def test_arguments_are_checked(tmp_path: Path) -> None:
    pattern = write_corpus(tmp_path, [1])
    for corpora, options, match in (
        ([], {}, "corpora"),
        ([Corpus("a", pattern), Corpus("a", pattern)], {}, "corpora"),
        ([Corpus("a", pattern, 0)], {}, "weight"),
        (pattern, {"seed": -1}, "seed"),
        (pattern, {"shuffle_shards": 0}, "shuffle_shards"),
    ):
        with pytest.raises(ConfigError, match=match):
            dataset(corpora, **options)
    with pytest.raises(DataError, match="^made: no file matches"):
        dataset(str(tmp_path / "none*.tar"))


def test_one_text_of_several_is_drawn_per_epoch(tmp_path: Path) -> None:
    made = dataset(write_corpus(tmp_path, [6, 6], num_texts=3))
    drawn: dict[str, list[int]] = {}
    for epoch in range(20):
        for position in range(12):
            item = made[epoch, position]
            number, text = (int(WORDS[i][1:]) for i in item.input_ids[-2:])
            assert item.source.endswith(f":{number:05d}") and WORDS[item.input_ids[0]] == "[CLS]"
            drawn.setdefault(item.source, []).append(text)
    assert all(set(texts) == {0, 1, 2} for texts in drawn.values())
    assert len({tuple(texts) for texts in drawn.values()}) == 12
    other = dataset(str(tmp_path / "*.tar"), seed=1)
    assert [made[0, i].caption_id for i in range(12)] != [other[0, i].caption_id for i in range(12)]


def test_ids_are_hashes_of_image_and_text(tmp_path: Path) -> None:
    same = {"jpg": jpeg(3), "json": json.dumps({"image_id": 5, "caption": "a dog"}).encode()}
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"x": same, "y": same, "z": {"jpg": jpeg(3), "txt": b"a cat"}})
    write_tar(tmp_path / "b.tar", {"x": same, "z": {"jpg": jpeg(3), "txt": b"a cat"}})
    made = dataset([Corpus("a", str(tmp_path / "a.tar")), Corpus("b", str(tmp_path / "b.tar"))])
    items = {item.source: item for item in (made[0, i] for i in range(5))}
    images = {source: item.image_id for source, item in items.items()}
    assert images["a/a.tar:x"] == images["a/a.tar:y"] != images["b/b.tar:x"] and len(set(images.values())) == 4
    texts = {source: item.caption_id for source, item in items.items()}
    assert texts["a/a.tar:x"] == texts["b/b.tar:x"] == texts["a/a.tar:y"] != texts["a/a.tar:z"] == texts["b/b.tar:z"]
    digest = hashlib.blake2b(b"a dog", digest_size=8).digest()
    assert texts["a/a.tar:x"] == int.from_bytes(digest, "big") // 2 < 2**63


def test_a_transform_gets_picture_generator_and_text(tmp_path: Path) -> None:
    pattern = write_corpus(tmp_path, [8])

    def transform(image: Image.Image, rng: np.random.Generator, text: str) -> tuple[np.ndarray, str]:
        assert image.mode == "RGB"
        return np.full((SIZE, SIZE, 3), rng.integers(256), np.uint8), text.replace("photo", "left")

    runs = [[dataset(pattern, transform=transform, seed=seed)[epoch, i] for i in range(8)]
            for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]  # fmt: skip
    values = [[int(item.pixels[0, 0, 0]) for item in run] for run in runs]
    assert values[0] == values[1] and len(set(map(tuple, values))) == 3 and len(set(values[0])) > 5
    assert WORDS.index("left") in runs[0][0].input_ids
    plain = dataset(pattern)[0, 0]
    assert plain.caption_id != runs[0][0].caption_id  # of what the model reads
    augmented = dataset(pattern, transform=TrainTransform(SIZE))[0, 0]
    assert augmented.pixels.shape == (SIZE, SIZE, 3) and augmented.source == plain.source
    for wrong in (np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE, 3), np.float32)):
        with pytest.raises(ShapeError, match=r"made/00000\.tar"):
            dataset(pattern, BadSamples(), transform=lambda *_, wrong=wrong: (wrong, "a"))[0, 0]


def test_jpeg_draft_holds_for_crops_too(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    image.save(tmp_path / "a.jpg")
    data, transform = (tmp_path / "a.jpg").read_bytes(), TrainTransform(SIZE)
    write_tar(tmp_path / "a.tar", {"k": {"jpg": data, "txt": b"a dog"}})
    made, found = dataset(str(tmp_path / "a.tar"), transform=transform), []
    for draft in (False, True):
        made.processor.jpeg_draft = draft
        found.append(made[0, 0].pixels)
    assert np.array_equal(found[0], transform(load_image(data), np.random.default_rng((0, 0, 0, 0)), "")[0])
    assert np.array_equal(found[1], transform.decode(data, np.random.default_rng((0, 0, 0, 0)), "")[0])
    assert not np.array_equal(*found)


def test_a_batch_is_that_of_its_pairs_one_by_one(tmp_path: Path) -> None:
    made = dataset(write_corpus(tmp_path, [5], num_texts=2), seed=2)
    items, collator = [made[3, i] for i in range(5)], PairCollator(made.processor)
    batch = collator(items)
    alone = [collator([item]) for item in items]
    length = made.processor.max_text_length
    for key in (
        "pixel_values",
        "input_ids",
        "attention_mask",
        "mlm_input_ids",
        "image_ids",
        "caption_ids",
        "mlm_labels",
    ):
        assert torch.equal(batch[key], torch.cat([one[key] for one in alone])), key
        assert batch[key].dtype == (torch.float32 if key == "pixel_values" else torch.long)
    offsets = torch.cat([one["mlm_positions"] + row * length for row, one in enumerate(alone)])
    assert torch.equal(batch["mlm_positions"], offsets)
    assert batch["pixel_values"].shape == (5, 3, SIZE, SIZE) and batch["input_ids"].shape == (5, length)
    assert torch.equal(batch["input_ids"].flatten()[batch["mlm_positions"]], batch["mlm_labels"])
    changed = (batch["input_ids"] != batch["mlm_input_ids"]).flatten().nonzero().flatten()
    assert set(changed.tolist()) <= set(batch["mlm_positions"].tolist())
    for row, item in enumerate(items):
        image = load_image(made.read(made.locate(3, row)).image)
        assert torch.equal(batch["pixel_values"][row], made.processor(images=image)["pixel_values"][0])
        number = len(item.input_ids)
        assert batch["input_ids"][row].tolist() == item.input_ids + [0] * (length - number)
        assert batch["attention_mask"][row].tolist() == [1] * number + [0] * (length - number)
        rng = np.random.default_rng((2, 3, row, 1))
        expected = mask_tokens(item.input_ids, {0, 1, 2, 3, 4}, len(WORDS), 4, rng)
        assert torch.equal(batch["mlm_input_ids"][row, :number], expected.masked_ids)
    assert batch["sources"] == [item.source for item in items] and batch["skipped"] == [] and batch["retries"] == 0
    bare = PairCollator(made.processor, mlm=False)(items)
    assert set(batch) - set(bare) == {"mlm_input_ids", "mlm_positions", "mlm_labels"}
    masks = {tuple(PairCollator(made.processor)([made[e, 0]])["mlm_positions"].tolist()) for e in range(20)}
    assert len(masks) > 2


def test_long_texts_are_cut(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"k": {"jpg": jpeg(), "txt": b"dog " * 500}})
    made = dataset(str(tmp_path / "a.tar"))
    batch = PairCollator(made.processor)([made[0, 0]])
    assert batch["input_ids"].shape == (1, 10) and bool(batch["attention_mask"].all())


def test_mlm_needs_a_mask_token() -> None:
    processor = pair_processor()
    processor.tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="tokenizer"):
        PairCollator(processor)
    PairCollator(processor, mlm=False)


def test_real_corpora(shared_dir: Path) -> None:
    folder = shared_dir / "data"
    flickr = Corpus("flickr", str(folder / "flickr8k-mini-val-*.tar"), 2.0)
    daquar = Corpus("daquar", str(folder / "daquar-train-{000..001}.tar"), 0.25)
    made = dataset([flickr, daquar], BadSamples(0))
    assert made.num_samples == 50 + 794 and len(made) == 100 + 198
    items = [made[1, i] for i in range(0, len(made), 3)]
    assert {item.source.partition("/")[0] for item in items} == {"flickr", "daquar"}
    batch = PairCollator(made.processor)(items)
    assert batch["pixel_values"].shape[0] == 100 and bool((batch["attention_mask"].sum(1) > 2).all())
