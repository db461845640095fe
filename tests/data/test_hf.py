"""trips.data.hf: datasets as people save them, against the files that they were made of."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trips.data.annotation_kinds import describe
from trips.data.hf import DatasetRows, is_dataset, picture
from trips.data.question_files import read_questions
from trips.data.records import BadSamples, Question
from trips.errors import ConfigError, DataError, MissingDependencyError
from trips.images import load_image

datasets = pytest.importorskip("datasets")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURES = {"a.png": png(10), "b.png": png(200)}
COLUMNS = {"image": ["a.png", "a.png", "b.png"], "question": ["what ?", "why ?", "苹果 ?"], "answer": ["x", "y", "左"]}
EXPECTED = [[("what ?", ("x",)), ("why ?", ("y",))], [("苹果 ?", ("左",))]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name, data in PICTURES.items():
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


def embedded(**columns: list) -> datasets.Dataset:
    """The pictures inside the dataset, as the hub holds them."""
    images = [{"bytes": PICTURES[name], "path": None} for name in COLUMNS["image"]]
    made = datasets.Dataset.from_dict({**COLUMNS, "image": images, **columns})
    return made.cast_column("image", datasets.Image())


def asked(records: list) -> list[list[tuple]]:
    return [[(question.text, question.answers) for question in record.questions] for record in records]


def test_embedded_pictures_stay_encoded_and_are_held_once(tmp_path: Path) -> None:
    embedded(question_id=[4, 5, 6]).save_to_disk(tmp_path / "saved")
    bad = BadSamples(limit=0)
    records = read_questions(f"hf:{tmp_path}/saved", bad_samples=bad)
    assert asked(records) == EXPECTED and bad.num_seen == 3
    assert [record.image for record in records] == list(PICTURES.values())
    assert [q.question_id for record in records for q in record.questions] == ["4", "5", "6"]
    assert np.asarray(load_image(records[1].image))[0, 0, 0] == 200
    assert len({record.image_id for record in records}) == 2


def test_paths_in_a_dataset(tmp_path: Path, photos: Path) -> None:
    # As text they start at data.images; in a column of pictures the dataset knows where they are.
    datasets.Dataset.from_dict(COLUMNS).save_to_disk(tmp_path / "text")
    whole = {**COLUMNS, "image": [str(photos / name) for name in COLUMNS["image"]]}
    rows = datasets.Dataset.from_dict(whole).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "pictures")
    for name, images in (("text", [photos]), ("pictures", [])):
        records = read_questions(f"hf:{tmp_path}/{name}", images)
        assert asked(records) == EXPECTED
        read = [record.image if isinstance(record.image, bytes) else record.image.read_bytes() for record in records]
        assert read == list(PICTURES.values())
    with pytest.raises(DataError, match=r"text#?\w* row 0: image file does not exist; found 'a.png'"):
        read_questions(f"hf:{tmp_path}/text")
    bad = BadSamples(limit=3)
    with pytest.raises(DataError, match="holds no question that can be used"):
        read_questions(f"hf:{tmp_path}/text", bad_samples=bad)
    assert len(bad) == 3


def test_a_folder_of_images_with_metadata(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [dict(zip(("file_name", "question", "answer"), row)) for row in zip(*COLUMNS.values())]
    (photos / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    by_library, by_us = read_questions(f"hf:{photos}#train"), read_questions(photos)
    assert asked(by_library) == asked(by_us) == EXPECTED
    assert [Path(record.image) for record in by_library] == [record.image for record in by_us]


def test_columns_people_and_classes(tmp_path: Path) -> None:
    people = [[{"answer": answer, "answer_id": 1} for answer in "xxy"], [{"answer": "y", "answer_id": 1}]]
    rows = datasets.Dataset.from_dict(
        {
            "img": [{"bytes": png(1), "path": "one.png"}] * 2,
            "q": ["what ?", "why ?"],
            "a": people,
            "image_id": [77, 77],
            "answer_type": [1, 0],
        },
    )
    rows = rows.cast_column("img", datasets.Image()).cast_column(
        "answer_type", datasets.ClassLabel(names=["other", "number"])
    )
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    columns = {"image": "img", "question": "q", "answers": "a"}
    [record] = read_questions(f"hf:{tmp_path}/saved#train", columns=columns)
    place = f"{tmp_path}/saved#train row"
    assert record.image_id == "77" and record.source == f"{tmp_path}/saved:77"
    assert record.questions == (
        Question(f"{place} 0", "what ?", ("x", "y"), (2 / 3, 1 / 3), ("x", "x", "y"), answer_type="number"),
        Question.of(f"{place} 1", "why ?", ["y"], answer_type="other"),
    )
    assert len(DatasetRows(f"hf:{tmp_path}/saved#train+test")) == 3
    assert [place[-14:] for place, _ in DatasetRows(f"hf:{tmp_path}/saved#test+train")][:2] == [
        "ved#test row 0",
        "ed#train row 0",
    ]
    with pytest.raises(DataError, match=r"holds several splits; found \['train', 'test'\] .choose: hf:.*/saved#test"):
        read_questions(f"hf:{tmp_path}/saved", columns=columns)
    with pytest.raises(ConfigError, match=r"saved#val: is not in the dataset; found \['train', 'test'\]"):
        read_questions(f"hf:{tmp_path}/saved#val", columns=columns)
    with pytest.raises(ConfigError, match="data.columns.question: is not in the list; found 'text'; expected .*'q'"):
        read_questions(f"hf:{tmp_path}/saved#train", columns={**columns, "question": "text"})


def test_lists_of_pictures_and_other_tasks(tmp_path: Path) -> None:
    pair = [{"bytes": data, "path": None} for data in PICTURES.values()]
    rows = datasets.Dataset.from_dict({"images": [pair, pair[:1]], "sentence": ["a", "b"], "label": [True, False]})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(tmp_path / "saved")
    (_, first), (_, second) = DatasetRows(f"hf:{tmp_path}/saved")
    assert [picture(value) for value in first["images"]] == list(PICTURES.values())
    assert len(second["images"]) == 1 and describe([first]) == "statements about images"
    with pytest.raises(DataError, match="looks like statements about images, not questions about images.*task: nlvr2"):
        read_questions(f"hf:{tmp_path}/saved")
    with pytest.raises(DataError, match="needs one list.*a saved dataset is called hf:"):
        read_questions(tmp_path / "saved")


def test_datasets_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_dataset("hf:x") and not is_dataset("x/hf:y")
    embedded().save_to_disk(tmp_path / "cut")
    [file] = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="dataset cannot be (loaded|read): "):
        read_questions(f"hf:{tmp_path}/cut", bad_samples=BadSamples(limit=9))
    (tmp_path / "nothing").mkdir()
    for name in (f"{tmp_path}/nothing", f"{tmp_path}/nowhere"):
        with pytest.raises(DataError, match=f"hf:{name}: dataset cannot be loaded"):
            read_questions(f"hf:{name}")
    with pytest.raises(ConfigError, match="names no dataset; expected hf:NAME"):
        read_questions("hf:")
    for value in (None, {"bytes": None, "path": None}, 3, "", [b"x"]):
        with pytest.raises(DataError, match="has no image"):
            picture(value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"datasets: needed to read hf:x .pip install .trips-vlm\[train\]"):
        read_questions("hf:x")


def test_a_dataset_of_the_hub_by_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    loaded = datasets.DatasetDict({"train": embedded()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: calls.append(given) or loaded)
    for entry in ("hf:them/theirs", "hf:them/theirs:small#train"):
        assert asked(read_questions(entry)) == EXPECTED
    assert calls == [("them/theirs", None), ("them/theirs", "small")]
    loaded["train"] = embedded().select([])
    with pytest.raises(DataError, match="hf:them/theirs: dataset has no rows"):
        read_questions("hf:them/theirs")
