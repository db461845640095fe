"""Retrieval by its packaged recipe: from a list of photos to both stages, and between it and the other tasks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_shards import write_tar as write_samples
from PIL import Image
from safetensors.torch import load_file
from train.test_run import write_tar

from trips import TripsForImageTextRetrieval, TripsForPreTraining, TripsForQuestionAnswering
from trips.calibration import calibrate
from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.errors import CheckpointError, ConfigError, TripsError
from trips.processor import TripsProcessor
from trips.train.pair_evaluation import evaluate_retrieval
from trips.train.pretraining import join_images, read_pairs
from trips.train.recipe import Recipe
from trips.train.recipe_io import load_recipe
from trips.train.run import evaluate_run, run_recipe

COLOURS = {"red": (220, 30, 30), "green": (20, 180, 60), "blue": (20, 40, 230), "white": (250, 250, 250)}
SHAPES = {"wide": (0, 12, 32, 20), "tall": (12, 0, 20, 32), "big": (2, 2, 30, 30)}

Make = Callable[..., Recipe]


def write_photos(folder: Path) -> Path:
    """Twelve pictures, a coloured shape each, with two captions a row, an empty row and an image that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["image,caption,split"]
    for colour, value in COLOURS.items():
        for shape, box in SHAPES.items():
            image = Image.new("RGB", (32, 32), (90, 90, 90))
            image.paste(value, box)
            image.save(folder / f"{colour}-{shape}.png")
            rows += [
                f"{colour}-{shape}.png,a {shape} {colour} box,train",
                f"{colour}-{shape}.png,{colour} and {shape},train",
            ]
    rows += ["red-big.png,,train", "none.png,a box,train", "red-tall.png,a red box,test"]
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def recipe_for(tmp_path_factory: pytest.TempPathFactory) -> Make:
    path = write_photos(tmp_path_factory.mktemp("photos"))
    keys = {
        "data.train": [f"{path}#train"],
        "data.test": [f"{path}#train"],
        "data.image_size": 32,
        "data.max_text_length": 8,
        "optim.batch_size": 6,
        "run.precision": "fp32",
        "run.trackers": "[]",
        "run.shortlist": 10,
    }

    def make(out: Path, recipe: str = "debug/retrieval_tiny", **changes: Any) -> Recipe:
        given = {key: value for key, value in keys.items() if "retrieval" in recipe or key != "run.shortlist"}
        return load_recipe(recipe, {**given, "run.out": str(out), **changes})

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_for: Make) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, run_recipe(recipe_for(out, **{"data.weights": [2.0], "optim.steps": None, "optim.epochs": 1}))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, recipe_for: Make) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    run_recipe(recipe_for(out, "debug/pretrain_tiny", **{"optim.steps": 2}))
    return out / "model"


def test_a_run_from_a_csv_measures_both_stages(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    # Twelve images and one that is missing, twice an epoch; 12 of them can be tested.
    assert (results["steps"], results["num_samples"]) == (26 // 6, 13)
    assert (results["num_images"], results["num_texts"], results["shortlist"]) == (12, 24, 10)
    assert set(results["bad_samples"]["named"]) >= {"list.csv line 26"}
    assert any("none.png" in name for name in results["bad_samples"]["named"])
    assert results["losses"].keys() == {"loss", "loss_itc", "loss_itm"} and results["contrastive_batch"] == 6
    for measured in (results, results["untrained"]):
        assert set(measured["reranked"]) == {"text", "image"}
        for stage in (measured["first_stage"], *measured["reranked"].values()):
            assert 0 <= stage["mean_recall"] <= 1 and set(stage["text_recall"]) == {1, 5, 10}
    again = evaluate_run(out, ["--run.rerank_guide=text"])
    assert again["first_stage"]["image_recall"] == results["first_stage"]["image_recall"]
    assert set(again["reranked"]) == {"text"}
    assert again["reranked"]["text"]["text_recall"] == results["reranked"]["text"]["text_recall"]
    for same in ("--model.selection.guide=none", "--model.selection.keep_rate=1.0", "--model.selection.guide=image"):
        assert set(evaluate_run(out, [same])["reranked"]) == {"text"}  # one second stage, not two alike


def test_what_is_bad_in_training_counts_once(tmp_path: Path, recipe_for: Make) -> None:
    """The words of a tiny text tower are read from the same list before; nothing in it is bad twice for that."""
    write_photos(tmp_path)
    (tmp_path / "test.csv").write_text("image,caption\nred-big.png,a box\nblue-big.png,a blue box\n")
    changes = {"data.test": [str(tmp_path / "test.csv")], "data.weights": [2.0], "optim.epochs": 1, "optim.steps": None}
    named = run_recipe(recipe_for(tmp_path / "out", **changes))["bad_samples"]["named"]
    assert len(named) == 2 and sum("none.png" in name for name in named) == 1


def test_the_first_stage_is_that_of_pretraining(finished: tuple[Path, dict[str, Any]], recipe_for: Make) -> None:
    out, results = finished
    model = TripsForImageTextRetrieval.from_pretrained(out / "model").eval()
    entries = recipe_for(out).data.test
    found = evaluate_retrieval(
        model,
        list(read_pairs(entries, ShardCache(), BadSamples())),
        TripsProcessor.from_pretrained(out / "model"),
        BadSamples(),
    )
    for name in ("text_recall", "image_recall"):
        assert found[name] == pytest.approx(results["first_stage"][name])


def test_it_learns_to_find(tmp_path: Path, recipe_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder of the list, since the name of a corpus seeds its order: under the temporary folder's, another at
    each run, the gain of so few steps lay anywhere from 0.18 to 0.64.
    """
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    changes = {"data.train": ["list.csv#train"], "data.test": ["list.csv#train"], "optim.steps": 150}
    changes |= {"optim.batch_size": 12, "run.log_every": 50, "run.save_every": 0}
    changes |= {"model.dropout": 0.0, "optim.lr": 3e-3, "optim.vision_lr": 3e-3, "model.pretraining.alpha": 0.0,
                "model.pretraining.queue_size": 0, "run.rerank_guide": "text"}  # fmt: skip
    results = run_recipe(recipe_for(tmp_path, **changes))
    gain = results["first_stage"]["mean_recall"] - results["untrained"]["first_stage"]["mean_recall"]
    assert gain > 0.2
    assert results["losses"]["loss_itc"] < 2.0  # chance: 2.48


# --- from and to other tasks


def test_starts_from_a_pretrained_or_retrieval_model(tmp_path: Path, pretrained: Path, recipe_for: Make) -> None:
    """Without a step the new model is the old one, but for the head of masked words."""
    model = pretrained
    for name in ("first", "second"):
        changes = {"optim.steps": 0, "model.start_from": str(model)}
        run_recipe(recipe_for(tmp_path / name, **changes))
        old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / name / "model"))
        assert {key for key in old if key not in new} == {key for key in old if key.startswith("mlm_head.")}
        assert all(torch.equal(old[key], value) for key, value in new.items())
        model = tmp_path / name / "model"
    with pytest.raises(CheckpointError, match=r"first: is not a saved model.*a run keeps it in .*first/model"):
        run_recipe(recipe_for(tmp_path / "no", **{"model.start_from": str(tmp_path / "first")}))
    with pytest.raises(CheckpointError, match=r"mlm_head.*missing.*task is pretrain"):
        run_recipe(recipe_for(tmp_path / "no", "debug/pretrain_tiny", **{"model.start_from": str(model)}))
    with pytest.raises(CheckpointError, match=r"another architecture.*fusion"):
        run_recipe(recipe_for(tmp_path / "no", **{"model.start_from": str(model), "model.num_fusion_layers": 2}))


def test_question_answering_starts_from_a_retrieval_model(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model, tar = finished[0] / "model", str(write_tar(tmp_path / "vqa.tar", 6, 0))
    keys = {"data.train": [tar], "data.test": [tar], "data.image_size": 32, "optim.batch_size": 2, "optim.steps": 0}
    layers = {f"model.num_{part}_layers": 1 for part in ("text", "fusion", "decoder")}
    keys = {**keys, **layers, "model.start_from": str(model), "run.out": str(tmp_path / "out")}
    with caplog.at_level(logging.INFO, "trips"):
        run_recipe(load_recipe("debug/vqa_tiny", keys))
    assert "no head for masked tokens: that of the decoder stays as it was built" in caplog.text
    source = TripsForImageTextRetrieval.from_pretrained(model)
    vqa = TripsForQuestionAnswering.from_pretrained(tmp_path / "out" / "model")
    for name, value in source.trips.state_dict().items():
        assert torch.equal(vqa.trips.state_dict()[name], value), name
    for name, value in source.trips.fusion.layer[0].state_dict().items():
        assert torch.equal(vqa.decoder.bert.encoder.layer[0].state_dict()[name], value)
    with pytest.raises(CheckpointError, match="is not a pre-trained model.*task is pretrain or retrieval"):
        changes = {**keys, "model.start_from": str(tmp_path / "out" / "model"), "run.out": str(tmp_path / "no")}
        run_recipe(load_recipe("debug/vqa_tiny", changes))


def test_samples_of_one_image_are_measured_as_one(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], recipe_for: Make
) -> None:
    """As img2dataset has them: an image again for each of its captions."""
    photos, out = sorted(Path(recipe_for(tmp_path / "none").data.test[0]).parent.glob("*.png")), finished[0]
    texts = [[f"a {photo.stem}", f"{photo.stem} box"] for photo in photos]
    again, once = {}, {}
    for i, photo in enumerate(photos):
        image, name = photo.read_bytes(), {"url": photo.name}
        once[f"{i}"] = {"png": image, "json": json.dumps({**name, "captions": texts[i]}).encode()}
        for j in range(2):
            again[f"{i}-{j}"] = {"png": image, "json": json.dumps({**name, "caption": texts[i][j]}).encode()}
    figures = []
    for name, samples in (("once", once), ("again", again)):
        tar = write_samples(tmp_path / f"{name}.tar", samples)
        figures.append(evaluate_run(out, [f"--data.test=[{tar}]"]))
    for found in figures:
        assert (found["num_images"], found["num_texts"]) == (12, 24)
        assert found["first_stage"]["text_recall"] == figures[0]["first_stage"]["text_recall"]
        assert found["first_stage"]["image_recall"] == figures[0]["first_stage"]["image_recall"]
    same = [
        PairRecord(b"", (text,), image_id, text)
        for text, image_id in (("a", "1"), ("b", None), ("c", None), ("d", "1"))
    ]
    assert [record.texts for record in join_images(same)] == [("a", "d"), ("b",), ("c",)]


def test_pretraining_reads_the_same_lists(pretrained: Path) -> None:
    results = json.loads((pretrained.parent / "results.json").read_text())
    assert (results["num_samples"], results["num_images"], results["num_texts"]) == (13, 12, 24)
    assert isinstance(TripsForPreTraining.from_pretrained(pretrained), TripsForImageTextRetrieval)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train": []}, r"data\.train: no files given"),
        ({"run.shortlist": 5}, "shortlist"),
        ({"data.images": ["no/such/folder"]}, "no/such/folder"),
        ({"data.columns": {"question": "q"}}, "columns.*question"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, recipe_for: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TripsError, match=message):
        run_recipe(recipe_for(tmp_path / "out", **changes))


def test_a_run_goes_on_from_a_calibrated_model(tmp_path: Path, pretrained: Path, recipe_for: Make) -> None:
    """By its fitted guide, which must then be there, or by the layer's own."""
    noise = torch.randint(0, 256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pairs = [(Image.fromarray(one.numpy()), f"{word} box") for one in noise for word in ("red", "tall", "big blue")]
    fitted = calibrate(pretrained, pairs, tmp_path / "fitted", layers=(2,), keep_rate=0.5, held_out=0.3)
    changes = {"optim.steps": 1, "model.selection.layers": [2], "model.selection.keep_rate": 0.5}
    asks = {"model.selection.guide_query": "calibrated"}
    run_recipe(recipe_for(tmp_path / "a", **changes, **asks, **{"model.start_from": fitted.written_to}))
    model = TripsForImageTextRetrieval.from_pretrained(tmp_path / "a" / "model")
    assert model.config.calibrated_layers == (2,) and model.config.selection.guide_query == "calibrated"
    ours, theirs = (one.trips.vision.calibration.weight_2 for one in (model, fitted.pipeline.model))
    assert torch.equal(ours, theirs) and ours.any()
    assert evaluate_run(tmp_path / "a")["first_stage"]
    run_recipe(recipe_for(tmp_path / "b", **changes, **{"model.start_from": fitted.written_to}))
    assert not TripsForImageTextRetrieval.from_pretrained(tmp_path / "b" / "model").config.calibrated_layers
    for start, error, match in ((pretrained, ConfigError, "no calibrated query"), ("/no", CheckpointError, "saved")):
        with pytest.raises(error, match=match):
            run_recipe(recipe_for(tmp_path / "no", **changes, **asks, **{"model.start_from": str(start)}))
