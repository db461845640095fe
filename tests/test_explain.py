"""Explanations of a text's choice: the record against the model's own selections, and the verbs that draw it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CANDIDATES, picture, tiny_processor
from tiny import randomise, tiny_config, tiny_pretraining_model, tiny_vqa_model

import trips
from trips import cli
from trips.config import SelectionConfig
from trips.errors import ConfigError, DataError
from trips.explain import draw_figure, read_boxes
from trips.pipeline import TripsPipeline

THREE = {"layers": (1, 2, 3), "keep_rate": 0.6}
CASES = [
    {},
    THREE,
    {"inattentive": "drop"},
    {"guide": "image"},
    {"guide": "similarity"},
    {"architecture": "single"},
    {"architecture": "single", **THREE},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved question answering model with its list of answers, and a photo beside it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_vqa_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder / "answers.json").write_text(json.dumps({"answers": CANDIDATES}))
    picture(0).save(folder / "a.png")
    picture(1).resize((90, 40)).save(folder / "b.png")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("options", CASES, ids=str)
def test_records_are_the_model_s_own(options) -> None:
    model, processor = tiny_vqa_model(**options), tiny_processor()
    texts = ["what is it?", "the cat on the sofa", "two"]
    found = TripsPipeline(model, processor, CANDIDATES, batch_size=2).explain(picture(0), texts)
    fate = {"similarity": "merged"}.get(options.get("guide"), "dropped" if "inattentive" in options else "fused")
    for text, one in zip(texts, found, strict=True):
        record = one.record()
        assert json.loads(json.dumps(record)) == record
        assert (record["text"], record["grid"], record["image_size"]) == (text, [4, 4], [50, 40])
        # The whole model on this text alone, its selections followed by hand.
        own = model(**processor(images=picture(0), text=text)).selections
        present = set(range(16))
        assert [location["layer"] for location in record["locations"]] == [selection.layer for selection in own]
        for location, selection in zip(record["locations"], own, strict=True):
            kept = {place for place in selection.kept[0].tolist() if place >= 0}
            assert location["kept"] == sorted(kept)
            assert location[fate] == sorted(present - kept)
            assert not any(location[other] for other in {"fused", "dropped", "merged"} - {fate})
            weights = dict(zip(selection.candidates[0].tolist(), selection.scores[0].tolist()))
            for place, score in enumerate(location["scores"]):
                assert (score is None) == (place not in present)
                assert score is None or score == pytest.approx(weights[place], abs=1e-5)
            tokens = location["earlier_fused_tokens"]
            assert len(tokens) == selection.candidates[0].tolist().count(-1)
            assert sum(token["kept"] for token in tokens) == selection.kept[0].tolist().count(-1)
            present = kept


def test_models_of_several_images_explain_each_alone() -> None:
    model = randomise(trips.TripsForVisualReasoning(tiny_config()))
    one = TripsPipeline(model, tiny_processor()).explain(picture(0), "the dog")
    inputs = tiny_processor()(images=[picture(0), picture(1)], text=["the dog"])
    with torch.no_grad():
        own = model(inputs["pixel_values"][None], inputs["input_ids"], inputs["attention_mask"]).selections
    assert [list(location.kept) for location in one.locations] == [
        [place for place in selection.kept[0].tolist() if place >= 0] for selection in own
    ]


def test_explain_takes_a_selection_and_refuses_one_that_keeps_all() -> None:
    pipeline = TripsPipeline(tiny_pretraining_model(), tiny_processor())
    one = pipeline.explain(picture(0), "the dog", selection=SelectionConfig(layers=(4,), keep_rate=0.25))
    assert [len(location.kept) for location in one.locations] == [4] and one.mask().sum() == 4
    for selection in (
        SelectionConfig(guide="none"),
        SelectionConfig(layers=()),
        SelectionConfig(layers=(2, 3), keep_rate=1.0),
        SelectionConfig(layers=(2,), keep_rate=0.99),  # ceil(0.99 * 16) is all
    ):
        with pytest.raises(ConfigError, match="keeps every patch"):
            pipeline.explain(picture(0), "the dog", selection=selection)
    with pytest.raises(ConfigError, match="selection"):
        pipeline.explain(picture(0), "the dog", selection={"layers": [2]})
    with pytest.raises(DataError, match=r"none\.jpg"):
        pipeline.explain("none.jpg", "the dog")


def test_save_writes_a_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    pipeline = TripsPipeline(tiny_pretraining_model(), tiny_processor())
    path = pipeline.explain(picture(0), "the dog").save(tmp_path / "kept.png", heat=True, boxes=[(5, 5, 20, 20)])
    assert Image.open(path).size[0] == 1650


# --- the command line


def run(capsys, *arguments: object) -> dict:
    assert cli.main([str(argument) for argument in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_explain_own_photos(saved, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    photos = [saved / "a.png", saved / "b.png"]
    record = tmp_path / "deep" / "kept.json"
    told = run(capsys, "explain", saved, "--images", *photos, "--texts", "what is it?", "--out", tmp_path / "kept.png",
               "--record", record, "--heat")  # fmt: skip
    assert told.pop("written to") == str(tmp_path / "kept.png") and json.loads(record.read_text()) == told
    pipeline = trips.load(saved)
    for photo, row in zip(photos, told["rows"], strict=True):
        assert row["image"] == str(photo)
        assert row["locations"] == pipeline.explain(photo, "what is it?").record()["locations"]
        assert row["said"] == [answer.text for answer in pipeline.ask(photo, "what is it?", 3)]
    arguments = ["explain", saved, "--images", photos[0], "--texts", "a", "--out", tmp_path / "x.svg"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert "kept 8 at layer 2" in capsys.readouterr().out


def test_figures_from_data_leave_out_what_cannot_be_read(saved, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("a.png", "b.png"):
        shutil.copy(saved / name, tmp_path)
    names = ("broken.png", "a.png", "b.png")
    rows = [{"image": name, "question": f"is it {name[0]}?", "answer": "dog"} for name in names]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", saved, "--data", data, "--layers", 1, 3, "--keep_rate", 0.5, "0.25"]
    for number, texts, count in ((1, [], 4), (3, [], 2), (4, ["cat", "dog", "bus"], 3)):
        out = tmp_path / f"figure_{number}.png"
        extra = ["--texts", *texts] if texts else []
        told = run(capsys, "figure", number, *options, *extra, "--out", out)
        assert told["figure"] == number and out.is_file() and len(told["rows"]) == count
        assert all([one["layer"] for one in row["locations"]] == [1, 3] for row in told["rows"])
        assert [len(one["kept"]) for one in told["rows"][0]["locations"]][0] == 8
    assert [row["text"] for row in told["rows"]] == texts


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["figure", "2", "--model", "x", "--images", "a.png", "--texts", "a"], ["no such figure", "1, 3 or 4"]),
        (["figure", "3", "--model", "x"], ["photos or data"]),
        (["figure", "3", "--images", "a.png"], ["model"]),
        (["figure", "3", "--model", "x", "--images", "a.png", "--texts", "a", "--out", "a.doc"], ["a.doc", "format"]),
        (["explain", "x", "--images", "a.png"], ["--texts"]),
        (["explain", "x", "--images", "a.png", "--texts", "a", "--model.selection.keep_rate=1"], ["x", "recipe"]),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, parts, capsys) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(part in told for part in parts)


def test_boxes_of_a_file_are_found_by_the_photo_s_name(saved, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "boxes.json", tmp_path / "kept.png"
    options = {"images": [str(saved / "a.png")], "texts": ["dog"]}
    pipeline = trips.load(saved)
    draw_figure(3, pipeline, out, **options)
    plain = np.asarray(Image.open(out))
    for name in (str(saved / "a.png"), "a.png", "a"):
        file.write_text(json.dumps({name: [[5, 5, 30, 30]], "other": []}))
        assert read_boxes(file) == {name: [(5.0, 5.0, 30.0, 30.0)], "other": []}
        draw_figure(3, pipeline, out, **options, boxes=file)
        assert not np.array_equal(plain, np.asarray(Image.open(out)))
    file.write_text(json.dumps({"else": [[5, 5, 30, 30]]}))
    draw_figure(3, pipeline, out, **options, boxes=file)
    assert np.array_equal(plain, np.asarray(Image.open(out)))
    for content in ("[]", "{", '{"a": [[1, 2, 3]]}', '{"a": [[5, 5, 5, 9]]}', '{"a": [["1", 2, 3, 4]]}', '{"a": 3}'):
        file.write_text(content)
        with pytest.raises(DataError, match=r"boxes\.json"):
            read_boxes(file)
