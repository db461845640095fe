"""Pairs straight from lists: the same samples as packed, in the same order, and every mistake by its name."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_shards import SIZE, WORDS, jpeg, pair_processor, write_corpus, write_tar
from PIL import Image

from trips.data.listed_shards import ListedShard, open_shards
from trips.data.pack import pack
from trips.data.pair_batches import PairCollator
from trips.data.pair_records import PairRecord
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError
from trips.images import FileSlice, load_image
from trips.train.pair_data import PairTrainingData
from trips.train.pretraining import read_pairs

PROCESSOR = pair_processor()
COUNTS = {"a.jpg": 5, "sub/b.png": 2, "c.jpg": 1, "sub/d.jpg": 5, "e.jpg": 3}
CAPTIONS = {
    name: [f"a photo of number w{number} w{text}" for text in range(count)]
    for number, (name, count) in enumerate(COUNTS.items())
}
ROWS = [(name, caption) for name, captions in CAPTIONS.items() for caption in captions]


def write_photos(folder: Path) -> Path:
    for number, name in enumerate(CAPTIONS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(noise).resize((120, 80)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def write_table(path: Path, delimiter: str, header: tuple[str, str] = ("image", "caption")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *ROWS])
    return path


def write_albef(path: Path) -> Path:
    rows = [{"image": name, "caption": texts if len(texts) > 1 else texts[0]} for name, texts in CAPTIONS.items()]
    path.write_text(json.dumps(rows))
    return path


def write_karpathy(path: Path) -> Path:
    """COCO's file: folder and name apart, train and restval, and others' test images."""
    images = [
        {
            "filepath": os.path.dirname(name),
            "filename": os.path.basename(name),
            "split": "restval" if number == 3 else "train",
            "cocoid": 100 + number,
            "sentences": [{"raw": text, "tokens": text.split()} for text in texts],
        }
        for number, (name, texts) in enumerate(CAPTIONS.items())
    ]
    images.insert(2, {"filename": "none.jpg", "split": "test", "cocoid": 9, "sentences": [{"raw": "a dog"}]})
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def write_coco(path: Path) -> Path:
    images = [{"id": i, "file_name": name} for i, name in enumerate(CAPTIONS)]
    notes = [{"id": i, "image_id": list(CAPTIONS).index(name), "caption": text} for i, (name, text) in enumerate(ROWS)]
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    return path


def write_lines(path: Path) -> Path:
    rows = [json.dumps({"file_name": name, "text": caption}) for name, caption in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())  # as some editors save it
    return path


def write_flickr(path: Path) -> Path:
    path.write_text(
        "".join(f"{name}#{i}\t{text}\n" for name, texts in CAPTIONS.items() for i, text in enumerate(texts))
    )
    return path


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "list.json": (write_albef, ""),
    "dataset_coco.json": (write_karpathy, "#train+restval"),
    "captions_val.json": (write_coco, ""),
    "list.csv": (lambda path: write_table(path, ","), ""),
    "list.tsv": (lambda path: write_table(path, "\t"), ""),
    "list.jsonl": (write_lines, ""),
    "token.txt": (write_flickr, ""),
}


def dataset(entry: Any, bad: BadSamples | None = None, images: Any = (), columns: Any = None, **options: Any):
    corpus = Corpus("made", entry, options.pop("weight", 1.0), images, columns)
    return PairDataset([corpus], PROCESSOR, bad_samples=bad, **options)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


# --- the same as packed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_list_gives_the_batches_of_its_shard(tmp_path: Path, photos: Path, layout: str) -> None:
    write, splits = LAYOUTS[layout]
    path = write(tmp_path / layout)
    packed = pack(path, tmp_path / "packed", images=photos, splits=splits.strip("#").split("+") if splits else ())
    options = {"weight": 2.0, "seed": 4, "transform": TrainTransform(SIZE, flip="swap"), "clean": True}
    listed, tars = dataset(f"{path}{splits}", images=[photos], **options), dataset(packed.shards, **options)
    assert len(listed) == len(tars) == 10 and listed.num_samples == 5
    for draft in (False, True):
        PROCESSOR.jpeg_draft = draft
        for epoch in range(2):
            keys = [(epoch, position) for position in range(10)]
            ours, theirs = (PairCollator(PROCESSOR)(made.__getitems__(keys)) for made in (listed, tars))
            sources = ours.pop("sources"), theirs.pop("sources")
            assert same(ours, theirs)
            assert {source.partition(":")[0] for source in sources[0]} == {f"made/{layout}"}
            assert {source.partition(":")[2] for source in sources[0]} == set(CAPTIONS)
    PROCESSOR.jpeg_draft = False


def test_a_folder_is_a_list(tmp_path: Path) -> None:
    for name, texts in CAPTIONS.items():
        path = (tmp_path / "pairs" / name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts))
    write_photos(tmp_path / "pairs")
    packed = pack(tmp_path / "pairs", tmp_path / "packed")
    listed, tars = dataset(str(tmp_path / "pairs")), dataset(packed.shards)
    for position in range(5):
        one, other = listed[0, position], tars[0, position]
        assert one.input_ids == other.input_ids and np.array_equal(one.pixels, other.pixels)


def test_batches_start_anywhere_and_with_any_workers(tmp_path: Path, photos: Path) -> None:
    path = write_albef(tmp_path / "list.json")

    def data(workers: int = 0) -> PairTrainingData:
        made = dataset(str(path), BadSamples(), [photos], weight=5.0, seed=2)
        return PairTrainingData(made, PairCollator(PROCESSOR, mlm=False), 4, workers, 0, 1)

    whole = list(data().batches(0, 9))
    assert all(same(a, b) for a, b in zip(whole[5:], data(1).batches(5, 4), strict=True))
    assert not {name for batch in whole for name in batch} & {"mlm_input_ids", "mlm_positions", "mlm_labels"}


def test_lists_and_tars_stand_side_by_side(tmp_path: Path, photos: Path) -> None:
    tars = write_corpus(tmp_path / "tars", [2, 2])
    path = write_albef(tmp_path / "list.json")
    made = dataset([str(path), tars], BadSamples(0), [photos])
    assert Counter(made[0, i].source.split(":")[0] for i in range(9)) == {
        "made/list.json": 5, "made/00000.tar": 2, "made/00001.tar": 2
    }  # fmt: skip
    # Read for evaluation, images of local files stay where they are.
    records = list(read_pairs([str(path), tars], ShardCache(), BadSamples(0), images=[str(photos)]))
    assert [len(record.texts) for record in records] == [*COUNTS.values(), 1, 1, 1, 1]
    assert [type(record.image) for record in records[4:6]] == [type(photos), FileSlice]
    assert records[0].source == "list.json:a.jpg" and records[0].image_id == "a"
    found = load_image(records[5].image).getpixel((0, 0))
    assert found == load_image(made.read(made.locate(0, 0)._replace(shard=1, sample=0)).image).getpixel((0, 0))


def test_a_list_is_one_block_of_bytes(tmp_path: Path, photos: Path) -> None:
    """Not an object for each of millions of captions, whose counters would part the pages of forked workers."""
    shard = open_shards(str(write_albef(tmp_path / "list.json")), "x", ShardCache(), images=[photos])[0]
    assert isinstance(shard, ListedShard) and isinstance(shard.rows, bytes) and shard.ends.shape == (5,)
    assert [json.loads(shard.read(i).json)["captions"] for i in range(5)] == list(CAPTIONS.values())


# --- captions in turn


@given(st.integers(1, 7), st.integers(0, 2**31), st.text(max_size=5), st.integers(0, 50))
def test_every_caption_once_before_any_comes_again(count: int, seed: int, name: str, turn: int) -> None:
    made = object.__new__(PairDataset)
    made.seed = seed
    record = PairRecord(b"", tuple(map(str, range(count))), name, "s")
    drawn = [made._choose(record, round_) for round_ in range(count * turn, count * (turn + 1))]
    assert sorted(drawn, key=int) == list(record.texts)
    assert drawn == [made._choose(record, round_) for round_ in range(count * turn, count * (turn + 1))]


def test_weight_5_is_every_caption_once_per_epoch(tmp_path: Path) -> None:
    made = dataset(write_corpus(tmp_path, [6, 6], num_texts=5), weight=5.0)
    orders = []
    for epoch in range(2):
        seen = [tuple(made[epoch, position].input_ids[-2:]) for position in range(60)]
        assert Counter(seen) == {(WORDS.index(f"w{i}"), WORDS.index(f"w{j}")): 1 for i in range(12) for j in range(5)}
        orders += [tuple(text for image, text in seen if image == WORDS.index(f"w{i}")) for i in range(12)]
    assert len(set(orders)) > 15  # each image, and each epoch, has an order of its own


# --- where images lie, and what fields are called


def test_folders_are_tried_in_turn(tmp_path: Path) -> None:
    for folder, value in (("one", 10), ("two", 200)):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "same.jpg").write_bytes(jpeg(value))
    (tmp_path / "two" / "sub" / "late.jpg").write_bytes(jpeg(200))
    rows = ["image,caption", "same.jpg,a dog", "sub/late.jpg,a cat", f"{tmp_path}/two/same.jpg,a photo"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    made = dataset(str(tmp_path / "list.csv"), None, [tmp_path / "one", str(tmp_path / "two")])
    value = {made[0, i].source.split(":")[1]: round(int(made[0, i].pixels.mean()), -1) for i in range(3)}
    assert value == {"same.jpg": 10, "sub/late.jpg": 200, f"{tmp_path}/two/same.jpg": 200}
    assert len({made[0, i].image_id for i in range(3)}) == 3
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "inner.jpg").write_bytes(jpeg(50))
    (tmp_path / "inner.csv").write_text("image,caption\ninner.jpg,a dog\n")
    assert (
        round(int(dataset(str(tmp_path / "inner.csv"))[0, 0].pixels.mean()), -1) == 50
    )  # beside the list, or in its images/
    with pytest.raises(DataError, match=r"three.*not a folder of images"):
        dataset(str(tmp_path / "list.csv"), None, [tmp_path / "three"])


def test_columns_rename_fields(tmp_path: Path, photos: Path) -> None:
    path = write_table(tmp_path / "mine.tsv", "\t", ("datei", "satz"))
    with pytest.raises(DataError, match=r"mine\.tsv.*header names no image.*columns"):
        dataset(str(path), None, [photos])
    columns = {"image": "datei", "caption": "satz"}
    made, plain = (
        dataset(str(path), None, [photos], columns),
        dataset(str(write_table(tmp_path / "list.tsv", "\t")), None, [photos]),
    )
    assert [made[1, i].input_ids for i in range(5)] == [plain[1, i].input_ids for i in range(5)]
    rows = [{"image": "a.jpg", "caption": "wrong", "de": "a dog", "part": "x"}, {"image": "c.jpg", "caption": "a cat"}]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))  # the second row has only the usual names
    columns = {"caption": "de", "split": "part"}
    records = list(
        read_pairs([str(tmp_path / "two.jsonl")], ShardCache(), BadSamples(0), False, [str(photos)], columns)
    )
    assert [record.texts for record in records] == [("a dog",), ("a cat",)]
    with pytest.raises(ConfigError, match=r"columns.*question.*image, caption, image_id, split"):
        dataset(str(path), None, [photos], {"question": "q"})


def test_a_dataset_of_hugging_face(tmp_path: Path, photos: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {
        "picture": [{"bytes": (photos / name).read_bytes(), "path": None} for name in CAPTIONS],
        "caption": list(CAPTIONS.values()),
        "img_number": list(range(5)),
    }
    whole = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image(decode=False))
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "saved"))
    names = {"image": "picture", "image_id": "img_number"}
    entry = f"hf:{tmp_path / 'saved'}#train"
    made = dataset(entry, None, (), names, seed=1)
    rows = [{"image": n, "caption": t, "image_id": i} for i, (n, t) in enumerate(CAPTIONS.items())]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    listed = dataset(str(tmp_path / "list.json"), None, [photos], seed=1)
    for position in range(5):
        one, other = made[3, position], listed[3, position]
        assert one.input_ids == other.input_ids and one.image_id == other.image_id
        assert np.array_equal(one.pixels, other.pixels) and "#train row" in one.source
    paths = datasets.Dataset.from_dict({"file_name": ["a.jpg", "none.jpg", None], "text": ["a dog", "a cat", "a cat"]})
    paths.save_to_disk(str(tmp_path / "paths"))
    bad = BadSamples()
    found = list(read_pairs([f"hf:{tmp_path / 'paths'}"], ShardCache(), bad, False, [str(photos)]))
    assert [record.texts for record in found] == [("a dog",)] and len(bad) == 2
    with pytest.raises(DataError, match=r"no column with the image.*picture"):
        dataset(entry)
    questions = datasets.Dataset.from_dict({"image": ["a.jpg"], "question": ["what"], "answer": ["x"]})
    questions.save_to_disk(str(tmp_path / "questions"))
    with pytest.raises(DataError, match="looks like questions, not images with captions"):
        dataset(f"hf:{tmp_path / 'questions'}")


# --- what is wrong


def test_missing_and_damaged_images_are_named_and_replaced(tmp_path: Path) -> None:
    rows = ["image,caption", *(f"{i}.jpg,a photo of number w{i}" for i in range(8)), "bad.jpg,a dog", "none.jpg,a cat"]
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "bad.jpg").write_bytes(jpeg(1)[:-200])
    (tmp_path / "list.csv").write_text("\n".join(rows))
    items = [dataset(str(tmp_path / "list.csv"), BadSamples())[0, i] for i in range(10)]
    skipped = dict(entry for item in items for entry in item.skipped)
    assert skipped.keys() == {"made/list.csv:bad.jpg", "made/list.csv:none.jpg"}
    reason = skipped["made/list.csv:none.jpg"]
    assert reason == f"made/list.csv:none.jpg: image file does not exist in {tmp_path}"
    assert {item.source.split(":")[1] for item in items} == {f"{i}.jpg" for i in range(8)}
    with pytest.raises(DataError, match=r"made/list\.csv:(bad|none)\.jpg"):
        [dataset(str(tmp_path / "list.csv"))[0, i] for i in range(10)]
    counted = BadSamples()
    assert len(list(read_pairs([str(tmp_path / "list.csv")], ShardCache(), counted))) == 9  # damage shows when decoded
    assert list(counted.errors) == ["list.csv:none.jpg"]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    rows = [{"image": "a.jpg", "caption": "a dog"}, {"image": "a.jpg", "caption": " "}, {"image": "a.jpg"},
            {"caption": "a dog"}, {"image": "../b.jpg", "caption": "a dog"}, {"image": "b.jpg", "captions": []},
            {"image": "c.jpg", "caption": 3}, {"image": "d.jpg", "caption": "x", "image_id": "a"}, "row"]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(rows))
    bad = BadSamples()
    assert len(dataset(str(tmp_path / "list.json"), bad)) == 1
    assert set(bad.errors) == {f"list.json [{i}]" for i in range(1, 9)}
    with pytest.raises(DataError, match=r"^list\.json \[1\]: a\.jpg: caption is empty"):
        dataset(str(tmp_path / "list.json"))
    # A share is of the whole list, not of what was seen before it.
    many = [{"image": f"{i}.jpg", "captions": ["a dog"] * (i % 2)} for i in range(60)]
    (tmp_path / "many.json").write_text(json.dumps(many))
    dataset(str(tmp_path / "many.json"), BadSamples(0.5, 0))
    with pytest.raises(DataError, match="too many bad samples"):
        dataset(str(tmp_path / "many.json"), BadSamples(0.4, 0))


WRONG = {
    "vqa.json": ({"questions": [{"image_id": 1, "question": "what", "question_id": 1}]}, "VQA v2 questions.*task: vqa"),
    "instances.json": (
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
        "COCO instances",
    ),
    "nlvr2.jsonl": ({"identifier": "dev-1-0-0", "sentence": "a dog", "label": "True"}, "NLVR2 statements.*task: nlvr2"),
    "asked.jsonl": ({"image": "a.jpg", "question": "what", "answer": "x"}, "looks like questions"),
    "list.json": ({"a": 1}, "is no list of images"),
    "empty.json": ([], "holds no image with a caption.*an empty list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_of_other_tasks_are_told(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_text(json.dumps(content))
    for bad in (BadSamples(), None):
        with pytest.raises(DataError, match=message) as caught:
            dataset(str(tmp_path / name), bad)
        assert str(tmp_path / name) in str(caught.value)


def test_lists_are_read_by_what_they_hold(tmp_path: Path, photos: Path) -> None:
    """Lines of JSON called .json, and the semicolons of some spreadsheets, are what they are under any name."""
    rows = [{"image": "a.jpg", "caption": "a dog"}, {"image": "c.jpg", "caption": "a cat; or two"}]
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "semicolon.csv").write_bytes('\ufeffimage;caption\r\na.jpg;a dog\r\nc.jpg;"a cat; or two"\r\n'.encode())
    for name in ("lines.json", "semicolon.csv"):
        records = list(read_pairs([str(tmp_path / name)], ShardCache(), BadSamples(0), False, [str(photos)]))
        assert [record.texts for record in records] == [("a dog",), ("a cat; or two",)]


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ("questions.csv", DataError, r"questions\.csv: looks like questions"),
        ("cut.json", DataError, r"cut\.json: cannot be read.*is the file whole"),
        ("none.json", DataError, r"none\.json: does not exist"),
        ("karpathy.json", DataError, r"holds several splits.*restval.*train.*choose: .*karpathy\.json#restval"),
        ("karpathy.json#val", ConfigError, r"karpathy\.json#val: is not in the list"),
        ("karpathy.json#", ConfigError, "does not say which splits"),
        ("dev.json", DataError, r"dev\.json: looks like NLVR2 statements.*task: nlvr2"),
        ("daquar.txt", DataError, r"daquar\.txt: looks like DAQUAR questions.*task: vqa"),
        ("bare", DataError, r"bare: holds no image with a caption.*captions\.csv"),
        ("blank.json", DataError, r"blank\.json: is empty"),
        ("tars", DataError, r"tars: holds tars and no list of images.*tars/\*\.tar"),
        ("http://127.0.0.1:9/list.json", ConfigError, "local files"),
        ("list.parquet", DataError, "no file matches"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, photos: Path, entry: str, kind: type[Exception], message: str) -> None:
    (tmp_path / "questions.csv").write_text("image,question,answer\na.jpg,what,x\n")
    (tmp_path / "cut.json").write_text('[{"image": "a.jpg", "cap')
    (tmp_path / "dev.json").write_text('{"identifier": "dev-1-0-0", "sentence": "a dog", "label": "True"}\n' * 2)
    (tmp_path / "daquar.txt").write_text("what is on the table, in the image1 ?\ncup\n")
    (tmp_path / "blank.json").write_text("\ufeff \n", encoding="utf-8")
    (tmp_path / "bare").mkdir()
    write_karpathy(tmp_path / "karpathy.json")
    write_tar(tmp_path / "tars" / "a.tar", {"k": {"jpg": jpeg(), "txt": b"a dog"}})
    place = entry if entry.startswith("http") else str(tmp_path / entry)
    with pytest.raises(kind, match=message):
        dataset(place, BadSamples(), () if entry == "tars" else [photos])
