"""trips.data.question_files: every layout as handed out, equal where the content is, and bad input."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trips.data.question_files import read_questions
from trips.data.records import BadSamples, Question, VqaRecord, read_vqa_shards
from trips.errors import ConfigError, DataError

RECORDS = {
    "dish": [("7", "what is red ?", ["apple"]), ("9", "苹果在哪里 ?", ["左边"])],
    "desk": [("8", "how many cups are there ?", ["2"])],
}
TEN = ["yes", "yes", "no", "yes", "maybe", "yes", "yes", "yes", "no", "yes"]


def picture(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def rows(**names: str) -> list[dict]:
    """RECORDS with a row per question, its fields renamed."""
    plain = [
        {"image": f"{image}.jpg", "question_id": name, "question": text, "answer": answers[0]}
        for image, questions in RECORDS.items()
        for name, text, answers in questions
    ]
    return [{names.get(key, key): value for key, value in row.items()} for row in plain]


def table(rows: list[dict], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def content(records: list[VqaRecord]) -> dict[str, list[Question]]:
    return {record.image_id: list(record.questions) for record in records}


EXPECTED = {
    image: [Question(name, text, tuple(a), (1.0,), tuple(a)) for name, text, a in questions]
    for image, questions in RECORDS.items()
}


# Lists and tables


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_same_questions_in_every_list_and_table(tmp_path: Path, bom: str, newline: str) -> None:
    picture(tmp_path, "dish.jpg", "desk.jpg")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows())
    texts = {
        "a.json": json.dumps(rows(), indent=1),
        "dev.json": lines,  # JSON lines in a file of another name, as NLVR's
        "a.jsonl": lines + "\n\n",
        "a.csv": table(rows()).replace("\r\n", "\n"),
        "b.csv": table(rows(), ";").replace("\r\n", "\n"),
        "c.csv": table(rows(image="File_Name", question=" Question")).replace("\r\n", "\n"),
        "a.tsv": table(rows(), "\t").replace("\r\n", "\n"),
        "a.txt": table(rows(), "\t").replace("\r\n", "\n"),
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes((bom + text.replace("\n", newline)).encode())
        records = read_questions(str(path))
        assert content(records) == EXPECTED, name
        assert [record.image for record in records] == [tmp_path / "dish.jpg", tmp_path / "desk.jpg"]
        assert [record.source for record in records] == [f"{name}:dish.jpg", f"{name}:desk.jpg"]


def test_fields_of_other_names_and_images_by_their_id(tmp_path: Path) -> None:
    picture(tmp_path / "pictures", "dish.jpg", "desk.jpg")
    path = write(tmp_path / "a.csv", table(rows(image="img_file", question="q", answer="a")))
    columns = {"image": "img_file", "question": "q", "answers": "a"}
    assert content(read_questions(path, [tmp_path / "none" / "..", tmp_path / "pictures"], columns)) == EXPECTED
    usual = write(tmp_path / "b.csv", table(rows()))  # an entry of the usual names beside it
    assert content(read_questions(usual, [tmp_path / "pictures"], columns)) == EXPECTED
    by_id = [{**row, "image_id": row.pop("image").removesuffix(".jpg")} for row in rows()]
    assert content(read_questions(write(tmp_path / "c.jsonl", by_id), [tmp_path / "pictures"])) == EXPECTED
    with pytest.raises(
        ConfigError, match=r"data.columns.image: is not in the list; found 'img'; expected .*'img_file'"
    ):
        read_questions(path, columns={**columns, "image": "img"})
    with pytest.raises(ConfigError, match="data.columns.picture: is no field of a question; expected image, image_id"):
        read_questions(path, columns={"picture": "img"})


def test_a_row_per_person_joins_in_tables_only(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "b.jpg")
    people = [{"image": "a.jpg", "question_id": 1, "question": "is it ?", "answer": answer} for answer in TEN]
    [record] = read_questions(write(tmp_path / "a.csv", table(people)))
    assert record.questions == (Question("1", "is it ?", ("yes", "no", "maybe"), (0.7, 0.2, 0.1), tuple(TEN)),)
    grouped = [{**people[0], "answers": TEN}]
    assert read_questions(write(tmp_path / "a.json", grouped))[0].questions == record.questions
    dictionaries = [{**people[0], "answer": [{"answer": answer, "answer_id": i} for i, answer in enumerate(TEN)]}]
    assert read_questions(write(tmp_path / "b.json", dictionaries))[0].questions == record.questions
    with pytest.raises(DataError, match=r"a.jsonl line 2: question id occurs twice; found '1'"):
        read_questions(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, people))))
    for change in ({"image": "b.jpg"}, {"question": "was it ?"}):
        with pytest.raises(DataError, match=r"b.csv line 3: question id occurs twice; found '1'"):
            read_questions(write(tmp_path / "b.csv", table([people[0], {**people[1], **change}])))


def test_question_ids_are_made_of_file_and_row(tmp_path: Path) -> None:
    plain = [{key: value for key, value in row.items() if key != "question_id"} for row in rows()]
    for folder in ("x", "y"):
        picture(tmp_path / folder, "dish.jpg", "desk.jpg")
        write(tmp_path / folder / "metadata.csv", table(plain))
    ids = [
        question.question_id
        for folder in ("x", "y")
        for record in read_questions(str(tmp_path / folder))
        for question in record.questions
    ]
    assert ids[:3] == [f"{tmp_path}/x/metadata.csv line {n}" for n in (2, 3, 4)] and len(set(ids)) == 6
    # The files that a pattern matches are one set.
    assert len(read_questions(f"{tmp_path}/*/metadata.csv")) == 4
    with pytest.raises(DataError, match="metadata.jsonl line 1: question id occurs twice"):
        for folder in ("x", "y"):
            write(tmp_path / folder / "metadata.jsonl", "\n".join(map(json.dumps, rows())))
        read_questions(f"{tmp_path}/*/metadata.jsonl")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "questions.csv", "questions.jsonl"])
def test_a_folder_of_images_beside_their_list(tmp_path: Path, name: str) -> None:
    picture(tmp_path, "dish.jpg", "desk.jpg")
    text = table(rows()) if name.endswith("csv") else "\n".join(map(json.dumps, rows()))
    write(tmp_path / name, text)
    assert content(read_questions(str(tmp_path))) == EXPECTED
    write(tmp_path / "questions.tsv", "x")
    with pytest.raises(DataError, match="folder needs one list beside its images; found .*questions.tsv"):
        read_questions(tmp_path)


def test_splits_are_chosen_and_never_mixed(tmp_path: Path) -> None:
    picture(tmp_path, "dish.jpg")  # the desk is not at hand: it belongs to the test split
    splits = [{**row, "split": "test" if "desk" in row["image"] else "train"} for row in rows()]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, splits)))
    assert content(read_questions(f"{path}#train")) == {"dish": EXPECTED["dish"]}
    with pytest.raises(DataError, match=r"holds several splits; found 'test \(1\), train \(2\)' \(choose: .*#test\)"):
        read_questions(path)
    with pytest.raises(ConfigError, match=r"a.jsonl#val: is not in the list; found 'test \(1\), train \(2\)'"):
        read_questions(f"{path}#val")
    with pytest.raises(ConfigError, match="does not say which splits"):
        read_questions(f"{path}#train+")
    picture(tmp_path, "desk.jpg")
    assert content(read_questions(f"{path}#train+test")) == EXPECTED
    plain = write(tmp_path / "odd#name.csv", table(rows()))  # a "#" in a file's own name
    assert content(read_questions(plain)) == EXPECTED
    with pytest.raises(ConfigError, match="has no field split"):
        read_questions(f"{plain}#train")


def test_albef_files_weigh_visual_genome_half(tmp_path: Path) -> None:
    picture(tmp_path / "coco", "train2014/COCO_train2014_000000000009.jpg")
    picture(tmp_path / "vg", "image/713545.jpg")
    vqa = {"question_id": 9000, "question": "is it ?", "answer": TEN, "dataset": "vqa"}
    vqa["image"] = "train2014/COCO_train2014_000000000009.jpg"
    vg = {
        "question_id": 1,
        "question": "what color ?",
        "answer": ["green"],
        "image": "image/713545.jpg",
        "dataset": "vg",
    }
    first, second = read_questions(write(tmp_path / "vqa_train.json", [vqa, vg]), [tmp_path / "coco", tmp_path / "vg"])
    assert first.questions == (Question("9000", "is it ?", ("yes", "no", "maybe"), (0.7, 0.2, 0.1), tuple(TEN)),)
    assert second.questions == (Question("1", "what color ?", ("green",), (1.0,), ("green",), loss_weight=0.5),)
    test = [{key: value for key, value in vqa.items() if key != "answer"}]
    [record] = read_questions(write(tmp_path / "vqa_test.json", test), [tmp_path / "coco"])
    assert record.questions == (Question("9000", "is it ?", (), ()),)


# VQA 2.0, Visual Genome, DAQUAR, tars


def vqa_v2(folder: Path, subtype: str = "train2014", annotated: bool = True) -> Path:
    """Three questions about two images, in the files of the authors."""
    asked = [(458752000, 458752), (458752001, 458752), (9000, 9)]
    head = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": subtype}
    questions = [{"image_id": image, "question": f"is it {name}?", "question_id": name} for name, image in asked]
    notes = [
        {
            "question_type": "is it",
            "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(TEN, 1)],
            "image_id": image,
            "question_id": name,
        }
        for name, image in reversed(asked)
    ]
    if annotated:
        write(folder / f"v2_mscoco_{subtype}_annotations.json", {**head, "annotations": notes})
    return write(folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json", {**head, "questions": questions})


def expected_v2(answers: bool = True) -> dict[str, list[Question]]:
    people = {"question_type": "is it", "answer_type": "yes/no"} if answers else {}
    asked = {"458752": ["458752000", "458752001"], "9": ["9000"]}
    return {
        image: [Question.of(name, f"is it {name}?", TEN if answers else [], **people) for name in names]
        for image, names in asked.items()
    }


@pytest.mark.parametrize(
    "names",
    [
        ("COCO_train2014_000000458752.jpg", "train2014/COCO_train2014_000000000009.jpg"),
        ("train2017/000000458752.jpg", "val2017/000000000009.jpg"),
        ("000000458752.jpg", "9.jpg"),
    ],
)
def test_vqa_v2_as_released(tmp_path: Path, names: tuple[str, str]) -> None:
    path, images = vqa_v2(tmp_path), picture(tmp_path / "coco", *names)
    bad = BadSamples(limit=0)
    records = read_questions(path, [images], bad_samples=bad)
    assert content(records) == expected_v2() and bad.num_seen == 3
    assert [record.image for record in records] == [images / name for name in names]
    assert [record.source for record in records] == [f"{path.name}:{name}" for name in names]
    notes = path.with_name("v2_mscoco_train2014_annotations.json").rename(tmp_path / "notes.json")
    assert content(read_questions(f"{path}::{notes}", [images])) == expected_v2()
    with pytest.raises(DataError, match="has no annotations beside it; expected v2_mscoco_train2014_annotations.json"):
        read_questions(path, [images])


@pytest.mark.parametrize("subtype", ["test2015", "test-dev2015"])
def test_vqa_v2_test_sets_have_no_answers(tmp_path: Path, subtype: str) -> None:
    path = vqa_v2(tmp_path, subtype, annotated=False)
    picture(tmp_path / "images", "COCO_test2015_000000458752.jpg", "test2015/COCO_test2015_000000000009.jpg")
    assert content(read_questions(path)) == expected_v2(answers=False)


def test_vqa_v2_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    path, notes = vqa_v2(tmp_path), tmp_path / "v2_mscoco_train2014_annotations.json"
    picture(tmp_path, "COCO_train2014_000000458752.jpg", "COCO_train2014_000000000009.jpg")
    with pytest.raises(DataError, match="looks like VQA v2 annotations: answers without their questions .name the q"):
        read_questions(notes)
    with pytest.raises(DataError, match="looks like VQA v2 questions, not VQA v2 annotations"):
        read_questions(f"{path}::{path}")
    with pytest.raises(DataError, match="none.json: cannot be read: No such file"):
        read_questions(f"{path}::{tmp_path}/none.json")
    with pytest.raises(ConfigError, match="VQA v2 questions have no splits to choose from"):
        read_questions(f"{path}#train")
    with pytest.raises(ConfigError, match="answers in a file of their own; found 'questions'"):
        read_questions(f"{write(tmp_path / 'a.json', rows())}::{notes}")
    whole = json.loads(notes.read_text())
    changed = json.loads(notes.read_text())
    changed["annotations"][0]["image_id"] = 5
    changed["annotations"].pop(1)
    changed["annotations"][1]["answers"][3]["answer"] = ""  # one of ten said nothing: the others count
    write(notes, changed)
    bad = BadSamples(limit=2)
    [record] = read_questions(path, bad_samples=bad)
    assert [len(q.given) for q in record.questions] == [10] and record.questions[0].weights == (6 / 9, 2 / 9, 1 / 9)
    assert [reason.split(": ", 1)[1] for reason in bad.errors.values()] == [
        "has no annotation; found '458752001'",
        "annotation is about another image; found 5; expected 9",
    ]
    write(notes, {**whole, "annotations": whole["annotations"] * 2})
    with pytest.raises(DataError, match=r"annotations\[3\]: annotates a question a second time; found '9000'"):
        read_questions(path)


def test_visual_genome_as_released(tmp_path: Path) -> None:
    def pair(name: int, image: int, answer: str) -> dict:
        return {"a_objects": [], "question": "What color?", "image_id": image, "qa_id": name, "answer": answer}

    layout = [
        {"id": 1, "qas": [pair(11, 1, "Green."), pair(12, 1, "At 3 p.m.")]},
        {"id": 2, "qas": [pair(13, 2, "Blue")]},
        {"id": 3, "qas": [pair(14, 3, "Red.")]},
        {"id": 4, "qas": []},
    ]
    path = write(tmp_path / "question_answers.json", layout)
    images = picture(tmp_path / "vg", "VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg")
    records = read_questions(path, [images])
    assert content(records) == {
        "1": [Question.of("11", "What color?", ["Green"]), Question.of("12", "What color?", ["At 3 p.m."])],
        "2": [Question.of("13", "What color?", ["Blue"])],
        "3": [Question.of("14", "What color?", ["Red"])],
    }
    assert [record.image for record in records] == [
        images / "VG_100K/1.jpg",
        images / "VG_100K_2/2.jpg",
        images / "3.jpg",
    ]


def test_daquar_as_released_equals_its_tars(tmp_path: Path, shared_dir: Path, daquar_tars) -> None:
    pytest.importorskip("webdataset")
    path = shared_dir / "data" / "official" / "daquar_qa.894.raw.test.txt"
    picture(tmp_path, "image1.png", "image2.jpg")
    records = read_questions(path, [tmp_path])
    assert [len(record.questions) for record in records] == [5, 5]
    assert [record.image.name for record in records] == ["image1.png", "image2.jpg"]
    packed = {record.image_id: record.questions for record in read_vqa_shards(daquar_tars["test"])}
    compared = [record for record in records if record.image_id in packed]
    assert compared and all(record.questions == packed[record.image_id][:5] for record in compared)


def test_daquar_lines_out_of_step_are_named(tmp_path: Path) -> None:
    lines = [
        "what is the image3 made of ?", "wood",
        "what is red in the image3 ?",
        "what is blue in the image3 ?", "",
        "nonsense",
        "what is in image4 ?", "lamp", "",
    ]  # fmt: skip
    path, bad = write(tmp_path / "qa.txt", "\r\n".join(lines)), BadSamples(limit=3)
    picture(tmp_path, "image3.png", "image4.jpg")
    assert content(read_questions(path, bad_samples=bad)) == {
        "image3": [Question.of("image3-0", "what is the image3 made of ?", ["wood"])],
        "image4": [Question.of("image4-0", "what is in image4 ?", ["lamp"])],
    }
    assert list(bad.errors) == ["qa.txt line 3", "qa.txt line 4", "qa.txt line 6"]


def test_tars_are_read_as_before(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for image, questions in RECORDS.items():
        entries = [{"question_id": n, "question": text, "answers": answers} for n, text, answers in questions]
        files = {"jpg": image.encode(), "json": json.dumps({"image_id": image, "questions": entries}).encode()}
        with tarfile.open(tmp_path / f"{image}.tar", "w") as tar:
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{image}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "dish.tar.index.json").write_text("{}")
    records = read_questions(f"{tmp_path}/d*")
    assert content(records) == EXPECTED
    assert [record.image.read_bytes() for record in records] == [b"desk", b"dish"]
    (tmp_path / "renamed").write_bytes((tmp_path / "dish.tar").read_bytes())
    assert content(read_questions(tmp_path / "renamed")) == {"dish": EXPECTED["dish"]}
    write(tmp_path / "d.csv", table(rows()))
    with pytest.raises(ConfigError, match="tars and other files together"):
        read_questions(f"{tmp_path}/d*")
    with pytest.raises(ConfigError, match="tars have no splits"):
        read_questions(f"{tmp_path}/*.tar#train")


# Bad input

KARPATHY = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a"}]}]}
COCO = {"images": [{"file_name": "a.jpg", "id": 1}]}
NLVR2 = json.dumps({"sentence": "a", "label": "True", "identifier": "dev-1-0-0", "left_url": "http"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.x: is empty"),
        ("\ufeff \n", "f.x: is empty"),
        ('[{"question": "a", ', "f.x: broken JSON: .*is the file whole"),
        ('{"questions": [{"image_id": 3}', "f.x: broken JSON"),
        ("[" * 100_000, "f.x: broken JSON"),
        ("[]", "f.x: holds no questions about images; found 'no rows'"),
        ("[1, 2]", "f.x: holds no questions about images; found 'int'; expected fields question, image"),
        ("just words", "f.x: holds no questions about images"),
        ("image,question\n", "f.x: holds no question"),
        ('image,question,answer\na.jpg,"what ?,x\n', "f.x: cannot be read behind line 1: unexpected end of data"),
        ("image,question,question\n", "f.x: header names a column twice; found 'question'"),
        (KARPATHY, "looks like Karpathy's captions, not questions about images.*task: retrieval"),
        (COCO | {"annotations": [{"image_id": 1, "caption": "a"}]}, "looks like COCO captions, not"),
        (COCO | {"annotations": [{"image_id": 1, "bbox": [], "category_id": 1}]}, "looks like COCO instances, not"),
        ([{"image": "a.jpg", "caption": "a"}], "looks like captions, not questions"),
        ("a.jpg#0\ta man\na.jpg#1\ta boy\n", "looks like Flickr's captions, not"),
        ("image,caption\na.jpg,b\n", "looks like captions, not"),
        ([{"question_id": 1, "answer": "yes"}], "looks like VQA results, not"),
        ([{"id": 1, "regions": []}], "looks like Visual Genome regions, not"),
        (f"{NLVR2}\n{NLVR2}\n", "looks like NLVR2 statements, not questions about images.*task: nlvr2"),
        ({"rows": [1]}, "holds no questions about images; found .*rows"),
    ],
)  # fmt: skip
def test_files_that_hold_no_questions_say_what_they_are(tmp_path: Path, text: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "f.x", text), bad_samples=BadSamples(limit=5))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, data, message in [
        ("a.zip", b"PK\x03\x04rest", r"a.zip: is compressed \(zip\) \(unpack it first"),
        ("a.json", "[\u00e9]".encode("latin-1"), "a.json: is not UTF-8 text.*save it as UTF-8"),
        ("b.csv", "a,b".encode("utf-16"), "b.csv: is not UTF-8 text"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_questions(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match="folder needs one list beside its images; found 'none'; expected metadata.jsonl"
    ):
        read_questions(tmp_path / "empty")
    with pytest.raises(DataError, match="no file matches; found '.*none.json'"):
        read_questions(tmp_path / "none.json")
    for entry, message in [("", "names no file"), ("https://x.org/a.json", "read from local files.*download")]:
        with pytest.raises(ConfigError, match=message):
            read_questions(entry)
    path = write(tmp_path / "a.csv", table(rows()))
    with pytest.raises(ConfigError, match="nowhere: is not a folder of images"):
        read_questions(path, [tmp_path / "nowhere"])


GOOD = {"image": "a.jpg", "question_id": "g", "question": "what ?", "answer": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " \t"}, "question is empty; found"),
        ({"question": None}, "has no question"),
        ({"question": ""}, "has no question"),
        ({"question": 3}, "question is no text but int; found 3"),
        ({"question": float("nan")}, "question is no text but float; found nan"),
        ({"question": "a\ud800"}, "question is not valid Unicode"),
        ({"answer": ""}, "has no answers, though others have"),
        ({"answer": []}, "has no answers, though others have"),
        ({"answer": ["_", " "]}, "has no answers; found"),
        ({"answer": float("nan")}, "answer is not text; found nan"),
        ({"answer": True}, "answer is not text; found True"),
        ({"answer": ["a", None]}, "answer is not text"),
        ({"answer": "a\ud800"}, "answer is not text"),
        ({"image": "none.jpg"}, "image file does not exist; found 'none.jpg'; expected in .*folders: data.images"),
        ({"image": ""}, "names no image"),
        ({"image": 3}, "names no image; found 3"),
        ({"image": {"path": "/etc/hosts"}}, "names no image"),
        ({"image": "../a.jpg"}, "path leads out of the folder of the images; found '../a.jpg'"),
        ({"image": "/etc/hosts"}, "path leads out of the folder"),
        ({"image": "a\0.jpg"}, "path leads out of the folder"),
        ({"image": "."}, "image file does not exist"),
        ({"question_id": "g"}, "question id occurs twice; found 'g'"),
        ({"question_id": 1.5}, "question_id is no text or whole number; found 1.5"),
        ({"image_id": False}, "image_id is no text or whole number"),
    ],
)
def test_bad_questions_raise_or_are_counted_and_named(tmp_path: Path, change: dict, message: str) -> None:
    picture(tmp_path / "in", "a.jpg")
    picture(tmp_path, "a.jpg")
    good = [GOOD, {**GOOD, "question_id": "h"}]
    path = write(tmp_path / "in" / "f.json", json.dumps([good[0], {**GOOD, "question_id": "b", **change}, good[1]]))
    with pytest.raises(DataError, match=rf"^f.json \[1\]: {message}"):
        read_questions(path)
    bad = BadSamples(limit=1)
    [record] = read_questions(path, bad_samples=bad)
    assert [question.question_id for question in record.questions] == ["g", "h"]
    assert list(bad.errors) == ["f.json [1]"] and bad.num_seen == 3
    with pytest.raises(DataError, match="too many bad samples"):
        read_questions(path, bad_samples=BadSamples(limit=0))


def test_bad_rows_among_good_ones(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg")
    path = write(tmp_path / "a.jsonl", json.dumps(GOOD) + '\n{"question": \n[1]\n')
    bad = BadSamples(limit=2)
    assert len(read_questions(path, bad_samples=bad)) == 1
    assert list(bad.errors) == ["a.jsonl line 2", "a.jsonl line 3"]
    assert "broken JSON" in bad.errors["a.jsonl line 2"] and "no object" in bad.errors["a.jsonl line 3"]
    path = write(tmp_path / "a.csv", "image,question,answer\na.jpg,what ?,x\na.jpg,why,not,so\na.jpg\n")
    bad = BadSamples(limit=2)
    assert len(read_questions(path, bad_samples=bad)) == 1
    assert "more cells than the header has; found ['so']" in bad.errors["a.csv line 3"]
    assert "has no question" in bad.errors["a.csv line 4"]
    with pytest.raises(DataError, match="a.json: holds no question that can be used; found .*has no question"):
        read_questions(write(tmp_path / "a.json", [{**GOOD, "question": ""}]), bad_samples=BadSamples())


def test_missing_images_are_a_share_of_the_whole_file(tmp_path: Path) -> None:
    # The first eleven of 1,100 are missing: one in a hundred, though so far all.
    picture(tmp_path, "a.jpg")
    listed = [{**GOOD, "question_id": i, "image": "none.jpg" if i < 11 else "a.jpg"} for i in range(1100)]
    bad = BadSamples(limit=0.01, minimum=0)
    [record] = read_questions(write(tmp_path / "a.json", listed), bad_samples=bad)
    assert (len(record.questions), len(bad), bad.num_seen) == (1089, 11, 1100)
    with pytest.raises(DataError, match=r"too many bad samples .limit 1.00%.*none.jpg"):
        read_questions(write(tmp_path / "b.json", listed[:-1]), bad_samples=BadSamples(limit=0.01, minimum=0))


# Joining


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["what ?", "why ?"]), st.sampled_from("xyz")), min_size=1))
def test_joining_equals_counting(asked: list[tuple[int, str, str]]) -> None:
    """Rows of a table against a brute-force count of who said what."""
    with tempfile.TemporaryDirectory() as folder:
        picture(Path(folder), *(f"{image}.jpg" for image in range(5)))
        listed = [
            {"image": f"{image}.jpg", "question_id": f"{image}{text}", "question": text, "answer": answer}
            for image, text, answer in asked
        ]
        records = read_questions(write(Path(folder, "a.csv"), table(listed)))
    counts = Counter((str(image), text, answer) for image, text, answer in asked)
    people = Counter((str(image), text) for image, text, _ in asked)
    found = {
        (record.image_id, question.text, answer): weight
        for record in records
        for question in record.questions
        for answer, weight in zip(question.answers, question.weights, strict=True)
    }
    assert found == pytest.approx({key: count / people[key[:2]] for key, count in counts.items()})
    assert sum(len(record.questions) for record in records) == len(people)
    for record in records:
        for question in record.questions:
            assert list(question.given) == [a for i, t, a in asked if (str(i), t) == (record.image_id, question.text)]


def test_questions_of_one_image_named_twice_are_joined(tmp_path: Path) -> None:
    picture(tmp_path, "in/a.jpg")
    listed = [{**GOOD, "image": "in/a.jpg"}, {**GOOD, "image": "./in//a.jpg", "question_id": "h"}]
    [record] = read_questions(write(tmp_path / "a.json", listed))
    assert replace(record, questions=()) == VqaRecord("in/a", tmp_path / "in/a.jpg", (), "a.json:in/a.jpg")
    assert len(record.questions) == 2
