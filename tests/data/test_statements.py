"""Statements in every form that people have them in give the same records; what is wrong in a file is named."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_shards import jpeg, write_tar
from PIL import Image

from trips.data.records import BadSamples
from trips.data.statements import NLVR_BOXES, ReasoningRecord, parse_label, read_statements
from trips.errors import ConfigError, DataError

ROWS = [
    {"identifier": "a", "images": ["x/1.jpg", "x/2.jpg"], "sentence": "two dogs, side by side", "label": "True"},
    {"identifier": "b", "images": ["x/2.jpg", "3.jpg"], "sentence": "多くの犬がいる", "label": "False"},
    {"identifier": "c", "images": ["3.jpg", "x/1.jpg"], "sentence": "two dogs, side by side", "label": "False"},
]


def write_pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))


def write_rows(path: Path, rows: list[dict[str, Any]], form: str) -> Path:
    flat = [
        {**{k: v for k, v in row.items() if k != "images"}, **{f"image{i}": n for i, n in enumerate(row["images"], 1)}}
        for row in rows
    ]
    if form == "json":
        text = json.dumps(rows)
    elif form == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    elif form == "numbered jsonl":
        text = "\n".join(json.dumps(row) for row in flat)
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(flat[0]), delimiter="\t" if form == "tsv" else ",")
        writer.writeheader(), writer.writerows(flat)
        text = "\ufeff" + buffer.getvalue()
    path.write_bytes(text.encode("utf-8"))
    return path


def content(records: list[ReasoningRecord]) -> list[tuple[Any, ...]]:
    return [(r.identifier, r.images, r.sentence, r.label, r.group, r.boxes) for r in records]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_pictures(tmp_path, ["x/1.jpg", "x/2.jpg", "3.jpg"])
    return tmp_path


@pytest.mark.parametrize("form", ["json", "jsonl", "numbered jsonl", "csv", "tsv"])
def test_every_form_of_a_list_gives_the_same_statements(pictures: Path, form: str) -> None:
    records = read_statements(write_rows(pictures / "mine.list", ROWS, form))
    assert content(records) == [
        (row["identifier"], tuple(pictures / name for name in row["images"]), row["sentence"], row["label"] == "True",
         row["sentence"], None)
        for row in ROWS
    ]  # fmt: skip
    assert all(record.num_images == 2 and record.statement == record.identifier for record in records)
    folder = pictures / "folder"
    folder.mkdir()
    write_rows(folder / "metadata.csv", ROWS, form)  # told by what is in it
    assert content(read_statements(folder, images=[pictures])) == content(records)


def test_names_of_columns_and_missing_identifiers(pictures: Path) -> None:
    rows = [{"left": "x/1.jpg", "right": "3.jpg", "text": f"statement {i}", "gold": i % 2} for i in range(3)]
    (pictures / "mine.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"image1": "left", "image2": "right", "sentence": "text", "label": "gold"}
    records = read_statements(pictures / "mine.jsonl", columns=columns)
    assert [record.label for record in records] == [False, True, False]
    assert [record.identifier for record in records] == [f"{pictures}/mine.jsonl line {i}" for i in (1, 3, 5)]
    assert records[0].images == (pictures / "x/1.jpg", pictures / "3.jpg")
    with pytest.raises(ConfigError, match=r"columns\.caption: is no field.*sentence"):
        read_statements(pictures / "mine.jsonl", columns={"caption": "text"})


def test_albef_layout_finds_images_in_folders_tried_in_turn(tmp_path: Path) -> None:
    names = ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"]
    write_pictures(tmp_path / "a", names[:1])
    write_pictures(tmp_path / "b", names)
    (tmp_path / "nlvr_dev.json").write_text(json.dumps([{"sentence": "s", "label": "True", "images": names}]))
    (record,) = read_statements(tmp_path / "nlvr_dev.json", images=[tmp_path / "a", tmp_path / "b"])
    assert record.images == (tmp_path / "a" / names[0], tmp_path / "b" / names[1]) and record.label is True


@pytest.mark.parametrize("split", ["dev", "test1"])
@pytest.mark.parametrize("layout", ["images/{}", "images", "{}", "."])
def test_official_nlvr2_file(shared_dir: Path, tmp_path: Path, split: str, layout: str) -> None:
    rows = [
        json.loads(line)
        for line in (shared_dir / "data" / "official" / f"nlvr2_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    pairs = sorted({row["identifier"].rpartition("-")[0] for row in rows})
    folder = tmp_path / layout.format(split)
    write_pictures(folder, [f"{pair}-img{i}.png" for pair in pairs for i in (0, 1)])
    records = read_statements(shared_dir / "data" / "official" / f"nlvr2_{split}.jsonl", images=[tmp_path])
    assert len(records) == len(rows) == 8 and Counter(r.num_images for r in records) == {2: 8}
    assert [r.label for r in records] == [row["label"] == "True" for row in rows]
    for record, row in zip(records, rows, strict=True):
        stem = row["identifier"].rpartition("-")[0]
        assert record.images == tuple(folder / f"{stem}-img{i}.png" for i in (0, 1))
    # One group holds one sentence with all its pairs, as the official script has it.
    groups = {record.group: set() for record in records}
    for record in records:
        groups[record.group].add(record.sentence)
    assert len(groups) == 2 and all(len(sentences) == 1 for sentences in groups.values())
    chosen = read_statements(f"{shared_dir}/data/official/nlvr2_{split}.jsonl#{split}", images=[tmp_path])
    assert content(chosen) == content(records)


def test_training_part_of_nlvr2_lies_in_numbered_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images" / "train" / "35", ["train-7-2-img0.png", "train-7-2-img1.png"])
    row = {"identifier": "train-7-2-1", "directory": 35, "sentence": "a dog", "label": "True"}
    (tmp_path / "train.json").write_text(json.dumps(row) + "\n")
    (record,) = read_statements(tmp_path / "train.json")
    assert record.images[0].parent.name == "35" and record.group == "train-7-1"


def test_official_nlvr1_file(shared_dir: Path, tmp_path: Path) -> None:
    text = (shared_dir / "data" / "official" / "nlvr1_dev.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    kept = (0, 2, 5)
    for row in rows:
        write_pictures(
            tmp_path / "dev" / "images" / row["directory"], [f"dev-{row['identifier']}-{i}.png" for i in kept]
        )
    (tmp_path / "dev" / "dev.json").write_text(text, encoding="utf-8")
    records = read_statements(tmp_path / "dev" / "dev.json")
    assert [r.identifier for r in records] == [f"dev-{row['identifier']}-{i}" for row in rows for i in kept]
    assert {r.boxes for r in records} == {NLVR_BOXES} and {r.num_images for r in records} == {3}
    assert Counter(r.statement for r in records) == {f"dev-{row['identifier']}": len(kept) for row in rows}
    assert records[0].group == "dev-1572" and Counter(r.label for r in records) == {True: 12, False: 6}
    assert content(read_statements(tmp_path / "dev" / "dev.json", images=[tmp_path])) == content(records)
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.json line 1: name of the file does not tell the split"):
        read_statements(tmp_path / "mine.json", images=[tmp_path])


def test_tars_of_nlvr1(shared_dir: Path) -> None:
    data, bad = shared_dir / "data", BadSamples()
    train, test = (read_statements(data / f"nlvr1-{split}-*.tar", bad_samples=bad) for split in ("train", "test"))
    assert (len(train), len(test), len(bad), bad.num_seen) == (5922, 3960, 0, 9882)
    assert sum(record.label for record in test) / len(test) == pytest.approx(0.562, abs=5e-4)
    assert set(Counter(r.statement for r in train).values()) == {3} and len({r.statement for r in test}) == 990
    assert {r.boxes for r in train} == {NLVR_BOXES}
    picture = Image.open(io.BytesIO(train[0].images[0].read_bytes()))
    assert picture.size == (400, 100)


def tar_sample(**fields: Any) -> dict[str, bytes]:
    return {"png": jpeg(), "json": json.dumps({"sentence": "a dog", "label": True, **fields}).encode()}


def test_tars_with_bad_samples(tmp_path: Path) -> None:
    samples = {
        "good": tar_sample(statement_id="dev-5-0", permutation=2),
        "whole": tar_sample(),
        "twice": tar_sample(statement_id="dev-5-0", permutation=2),
        "blank": tar_sample(sentence=" \u200b"),
        "label": tar_sample(label="maybe"),
        "broken": {"png": jpeg(), "json": b"{"},
        "no image": {"json": b"{}"},
        "list": {"png": jpeg(), "json": b"[1]"},
    }
    bad = BadSamples()
    first, second = read_statements(write_tar(tmp_path / "a.tar", samples), bad_samples=bad)
    assert (first.identifier, first.group, first.num_images) == ("dev-5-0-2", "dev-5", 3)
    assert (second.identifier, second.group, second.num_images) == (f"{tmp_path}/a.tar:whole", "a dog", 1)
    assert list(bad.errors) == [f"a.tar:{key}" for key in list(samples)[2:]]
    for key, reason in zip(list(samples)[2:], ("twice", "is empty", "maybe", "broken JSON", "one image", "no object")):
        assert reason in bad.errors[f"a.tar:{key}"], key
    write_tar(tmp_path / "b.tar", {f"s{i}": tar_sample(split=split) for i, split in enumerate(("train", "test"))})
    assert [record.identifier for record in read_statements(f"{tmp_path}/b.tar#test")] == [f"{tmp_path}/b.tar:s1"]
    with pytest.raises(DataError, match=r"b\.tar: holds several splits.*test \(1\), train \(1\)"):
        read_statements(tmp_path / "b.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.tar: tar file is not whole"):
        read_statements(str(tmp_path / "cut.tar"), bad_samples=BadSamples())


def test_bad_rows_are_counted_and_the_others_read(pictures: Path) -> None:
    lines = [
        json.dumps(ROWS[0]),
        '{"identifier": "z", "sentence": ',
        json.dumps({**ROWS[1], "images": ["x/2.jpg", "gone.jpg"]}),
        json.dumps({**ROWS[1], "images": ["../../etc/passwd", "3.jpg"]}),
        json.dumps({**ROWS[1], "images": [], "identifier": "e"}),
        json.dumps({**ROWS[1], "images": [None, "3.jpg"]}),
        json.dumps({**ROWS[1], "label": float("nan")}),
        json.dumps({**ROWS[1], "label": 2}),
        json.dumps({**ROWS[1], "sentence": 5}),
        json.dumps({"identifier": "n", "sentence": "no images", "label": 1}),
        json.dumps(ROWS[0]),
        json.dumps({**ROWS[1], "label": None}),
    ]
    (pictures / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    bad = BadSamples(limit=20)
    records = read_statements(pictures / "mine.jsonl", bad_samples=bad)
    assert [(record.identifier, record.label) for record in records] == [("a", True), ("b", None)]
    reasons = ["broken JSON", "'gone.jpg'", "leads out", "no list", "NoneType", "nan", "found 2", "int",
               "names no images", "occurs twice"]  # fmt: skip
    assert list(bad.errors) == [f"mine.jsonl line {line}" for line in range(2, 12)]
    for text, reason in zip(bad.errors.values(), reasons, strict=True):
        assert reason in text and text.startswith("mine.jsonl line ")
    with pytest.raises(DataError, match=r"mine\.jsonl line 2: broken JSON"):
        read_statements(pictures / "mine.jsonl")
    with pytest.raises(DataError, match=r"too many bad samples.*mine\.jsonl line 2"):
        read_statements(pictures / "mine.jsonl", bad_samples=BadSamples(limit=3))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.json", " \n", "is empty"),
        ("whole.json", '{"sentence": "a dog"}', "names no images"),
        ("cut.json", '[{"sentence": "a"', "broken JSON.*is the file whole"),
        ("none.json", "[]", "no statement can be used; found 'no rows'"),
        ("numbers.json", "[1, 2]", "holds no statements about images; found 'int'"),
        ("vqa.json", '{"questions": [{"question": "q", "image_id": 1}]}', "looks like VQA v2 questions"),
        ("karpathy.json", '{"images": [{"sentences": []}]}', "looks like Karpathy's captions.*task: retrieval"),
        ("captions.csv", "image,caption\na.jpg,a dog\n", "looks like captions"),
        ("flickr.txt", "1.jpg#0\ta man, a dog, a cat\n", "flickr.txt: looks like Flickr's captions.*task: retrieval"),
        ("daquar.txt", "what is on the table in the image1 ?\ncup\n", "looks like DAQUAR questions"),
        ("table.csv", "sentence,label,image1\n\"a\",1,x.jpg\n\"b,1,x.jpg\n", "cannot be read behind line 2"),
        ("cells.csv", "sentence,label,image1\na,1,x.jpg,y.jpg\n", "more cells than the header has"),
        ("none.csv", "sentence,label,image1\na,1,x.jpg\n", "image file does not exist; found 'x.jpg'"),
    ],
)  # fmt: skip
def test_files_that_hold_no_statements(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_statements(tmp_path / name, bad_samples=BadSamples())
    assert name in str(caught.value)


def test_paths_that_are_no_lists(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("sentence,label\nein Löffel,1\n".encode("latin-1"))
    (tmp_path / "two").mkdir()
    for name in ("metadata.csv", "statements.json"):
        (tmp_path / "two" / name).write_text("[]")
    for entry, message in (
        ("latin.csv", "is not UTF-8 text"),
        ("gone.json", "does not exist"),
        ("two", "needs one list.*metadata.csv"),
        (".", "needs one list.*none"),
        ("*.tar", "no file matches"),
        ("gone.tar", "no file matches"),
    ):
        with pytest.raises(DataError, match=message):
            read_statements(tmp_path / entry)
    with pytest.raises(ConfigError, match="read from local files"):
        read_statements("https://localhost/a.tar")
    with pytest.raises(ConfigError, match="does not say which splits"):
        read_statements(f"{tmp_path}/latin.csv#")
    write_rows(tmp_path / "mine.csv", ROWS, "csv")
    with pytest.raises(ConfigError, match=r"nowhere: is not a folder of images"):
        read_statements(tmp_path / "mine.csv", images=[tmp_path / "nowhere"])


def test_splits_are_chosen_by_name(pictures: Path) -> None:
    rows = [{**row, "split": split} for row, split in zip(ROWS, ("train", "dev", "test"))]
    path = write_rows(pictures / "all.csv", rows, "csv")
    with pytest.raises(DataError, match=r"several splits.*dev \(1\), test \(1\), train \(1\)"):
        read_statements(path)
    assert [record.identifier for record in read_statements(f"{path}#train+test")] == ["a", "c"]
    with pytest.raises(ConfigError, match=r"all\.csv#val: is not in the list.*dev \(1\)"):
        read_statements(f"{path}#val")
    named = pictures / "odd#name.csv"
    path.rename(named)
    assert len(read_statements(f"{named}#dev")) == 1


@pytest.mark.parametrize("value", [True, 1, "true", "True", " TRUE ", "1", "yes", "Yes"])
def test_labels_that_are_true(value: object) -> None:
    assert parse_label(value) is True


@pytest.mark.parametrize("value", [False, 0, "false", "False", "0", "no"])
def test_labels_that_are_false(value: object) -> None:
    assert parse_label(value) is False


@given(
    st.one_of(
        st.text(min_size=1), st.integers(), st.floats(), st.lists(st.booleans()), st.dictionaries(st.text(), st.text())
    )
)
def test_a_label_is_a_truth_value_or_an_error(value: object) -> None:
    known = isinstance(value, (int, str)) and str(value).strip().lower() in {"true", "yes", "1", "false", "no", "0"}
    if known:
        assert parse_label(value) is (str(value).strip().lower() in {"true", "yes", "1"})
    else:
        with pytest.raises(DataError, match="label is no truth value"):
            parse_label(value)
    assert parse_label(None) is None and parse_label("") is None


def test_datasets_hold_pictures_or_paths(pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = [(pictures / name).read_bytes() for name in ("x/1.jpg", "3.jpg")]
    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["false", "true"]),
        left=datasets.Image(),
        image2=datasets.Image(),
    )
    rows = {"sentence": ["a dog", "a cat"], "label": [1, 0], "left": pixels, "image2": pixels[::-1]}
    held = datasets.DatasetDict({"dev": datasets.Dataset.from_dict(rows, features)})
    held.save_to_disk(pictures / "saved")
    records = read_statements(f"hf:{pictures}/saved#dev", columns={"image1": "left"})
    assert [(record.sentence, record.label) for record in records] == [("a dog", True), ("a cat", False)]
    assert records[0].images == tuple(pixels) and records[1].images == tuple(pixels[::-1])
    named = {"sentence": ["a dog"], "images": [["x/1.jpg", "3.jpg"]]}
    datasets.Dataset.from_dict(named).save_to_disk(pictures / "named")
    (record,) = read_statements(f"hf:{pictures}/named", images=[pictures])
    assert record.images == (pictures / "x/1.jpg", pictures / "3.jpg") and record.label is None
    with pytest.raises(DataError, match="looks like captions, not statements"):
        datasets.Dataset.from_dict({"caption": ["a dog"], "image": ["3.jpg"]}).save_to_disk(pictures / "other")
        read_statements(f"hf:{pictures}/other", images=[pictures])
