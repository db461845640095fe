"""Pre-training by its packaged recipe: what a run writes, what it refuses, and what starts from it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.pretraining_runs import KEYS, recorded, steps, write_shards
from safetensors.torch import load_file
from train.test_run import write_tar

from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.errors import CheckpointError, ConfigError, DataError
from trips.model import TripsModel
from trips.processor import TripsProcessor
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train import pretraining
from trips.train.checkpoint import list_checkpoints, read_checkpoint
from trips.train.lock import RunLock
from trips.train.pretraining import read_pairs
from trips.train.recipe import Recipe
from trips.train.recipe_io import load_recipe
from trips.train.run import evaluate_run, run_recipe

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipe_for(tmp_path_factory: pytest.TempPathFactory) -> Make:
    shards = write_shards(tmp_path_factory.mktemp("shards"))

    def make(out: Path, **changes: Any) -> Recipe:
        keys = {**KEYS, **shards, "optim.steps": 6, "run.out": str(out)}
        return load_recipe("debug/pretrain_tiny", {**keys, **changes})

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_for: Make) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, run_recipe(recipe_for(out))


def test_a_run_writes_what_it_promises(finished: tuple[Path, dict[str, Any]], recipe_for: Make) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert load_recipe(out / "recipe.yaml") == recipe_for(out)
    assert not list(out.rglob("*.partial"))
    assert (results["steps"], results["num_samples"], results["num_images"], results["num_texts"]) == (6, 38, 6, 12)
    assert results["contrastive_batch"] == 4 and results["bad_samples"]["count"] == 0
    assert results["losses"].keys() >= {"loss", "loss_itc", "loss_itm", "loss_mlm"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and "loss_itc" in lines[0]
    again = evaluate_run(out)
    for key in ("text_recall", "image_recall", "mean_recall", "num_images", "num_texts"):
        assert again[key] == results[key], key
    assert results["untrained"].keys() <= results.keys()
    assert evaluate_run(out, ["--model.selection.keep_rate=1.0"])["selection"]["keep_rate"] == 1.0


def test_the_model_folder_is_the_last_checkpoint(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    trained = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])["model"]
    whole, trunk = (kind.from_pretrained(out / "model") for kind in (TripsForPreTraining, TripsModel))
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, trained[f"trips.{name}"]), name
    for name, value in whole.state_dict().items():
        if not name.startswith(("momentum.", "queue.")):  # state of the training: the file leaves it out
            assert torch.equal(value, trained[name]), name
    names = load_file(out / "model" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("momentum.", "queue."))]


def test_recalls_equal_a_search_pair_by_pair(finished: tuple[Path, dict[str, Any]], recipe_for: Make) -> None:
    out, results = finished
    model = TripsForPreTraining.from_pretrained(out / "model").eval()
    processor = TripsProcessor.from_pretrained(out / "model")
    records = list(read_pairs(recipe_for(out).data.test, ShardCache(), BadSamples()))
    texts = [(i, text) for i, record in enumerate(records) for text in record.texts]
    scores = np.zeros((6, 12))
    for i, record in enumerate(records):
        image = model.encode_image(processor(images=[record.image])["pixel_values"])
        for j, (_, text) in enumerate(texts):
            inputs = processor(text=[text])
            scores[i, j] = (image * model.encode_texts(inputs["input_ids"], inputs["attention_mask"])).sum()
    for k in (1, 5, 10):
        best = np.argsort(-scores, axis=1)[:, :k]
        found = [any(texts[j][0] == i for j in row) for i, row in enumerate(best)]
        assert results["text_recall"][k] == pytest.approx(np.mean(found))
        best = np.argsort(-scores, axis=0)[:k]
        assert results["image_recall"][k] == pytest.approx(np.mean([i in best[:, j] for j, (i, _) in enumerate(texts)]))


def test_epochs_and_weights_become_steps(tmp_path: Path, recipe_for: Make) -> None:
    changes = {"optim.steps": None, "optim.epochs": 1, "schedule.alpha_ramp_epochs": 2}
    with recorded(tmp_path / "steps"):
        results = run_recipe(recipe_for(tmp_path / "out", **changes))
    # 25 samples and half of 13, six or seven of which come; four a step.
    assert results["steps"] == 31 // 4 and results["num_samples"] == 38
    sources = [source for line in steps(tmp_path / "steps") for source in line["sources"]]
    assert len(set(sources)) == 28 and 4 <= sum("/second/" in source for source in sources) <= 6
    assert TripsForPreTraining.from_pretrained(tmp_path / "out" / "model").config.pretraining.alpha_ramp_steps == 14


def test_augmentation_changes_the_images_and_nothing_else(tmp_path: Path, recipe_for: Make) -> None:
    seen = []
    for name, changes in (
        ("plain", {}),
        ("crop", {"data.augment": "crop", "data.flip": "swap"}),
        ("again", {"data.augment": "crop", "data.flip": "swap", "data.num_workers": 1}),
    ):
        with recorded(tmp_path / f"{name}.jsonl"):
            run_recipe(recipe_for(tmp_path / name, **{"optim.steps": 2, **changes}))
        seen.append(steps(tmp_path / f"{name}.jsonl"))
    plain, cropped, again = seen
    assert cropped == again and cropped != plain
    assert [line["sources"] for line in cropped] == [line["sources"] for line in plain]


def test_an_interrupted_run_has_no_results(tmp_path: Path, recipe_for: Make) -> None:
    """Not those of an earlier one in its folder either."""
    run_recipe(recipe_for(tmp_path / "out", **{"optim.steps": 1}))
    assert (tmp_path / "out" / "results.json").exists()

    def interrupt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    changes = {"run.resume": "never", "optim.lr": 2e-3}
    with recorded(tmp_path / "steps", interrupt):
        assert run_recipe(recipe_for(tmp_path / "out", **changes)) == {}
    assert len(steps(tmp_path / "steps")) == 3 and not (tmp_path / "out" / "results.json").exists()
    with pytest.raises(CheckpointError, match=r"not the folder of a finished run.*results\.json"):
        evaluate_run(tmp_path / "out")
    results = run_recipe(recipe_for(tmp_path / "out", **{"optim.lr": 2e-3}))
    assert results["steps"] == 6 and evaluate_run(tmp_path / "out")["mean_recall"] == results["mean_recall"]


def test_two_runs_in_one_folder(tmp_path: Path, finished: tuple[Path, dict[str, Any]], recipe_for: Make) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != "run.lock"}
    with RunLock(out), pytest.raises(CheckpointError, match="another run is writing here"):
        run_recipe(recipe_for(out, **{"run.resume": "never"}))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    refused = []

    def again(step: int) -> None:
        with pytest.raises(CheckpointError, match="another run is writing here"):
            run_recipe(recipe_for(tmp_path / "out"))
        refused.append(step)

    with recorded(tmp_path / "steps", again):
        run_recipe(recipe_for(tmp_path / "out", **{"optim.steps": 2}))
    assert refused == [1, 2]
    with pytest.raises(ConfigError, match=r"another run.*optim\.steps 2 there, 6 here"):
        run_recipe(recipe_for(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data.train": [], "data.weights": None}, ConfigError, r"data\.train: no files given"),
        ({"data.train": ["/none/*.tar"], "data.weights": None}, DataError, r"no file matches.*/none/"),
        ({"data.weights": [1.0]}, ConfigError, r"data\.weights.*1.*2"),
        ({"data.weights": [1.0, 0.0]}, ConfigError, "weight.*0"),
        ({"optim.batch_size": 64}, ConfigError, "batch_size.*64"),
        ({"model.selection.layers": [9]}, ConfigError, "beyond the last layer"),
        ({"model.start_from": "no/such/folder"}, CheckpointError, "no/such/folder"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, recipe_for: Make, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run_recipe(recipe_for(tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_pre_training_starts_from_a_pre_trained_model(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], recipe_for: Make
) -> None:
    """Without a step the new model is the old one: of other shards, and so of the same words by no accident."""
    model = finished[0] / "model"
    other = str(write_shards(tmp_path / "other")["data.test"])
    changes = {"data.train": other, "data.weights": None, "optim.steps": 0}
    run_recipe(recipe_for(tmp_path / "out", **{**changes, "model.start_from": str(model)}))
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out" / "model"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    with pytest.raises(CheckpointError, match="another architecture.*fusion"):
        run_recipe(recipe_for(tmp_path / "no", **{"model.start_from": str(model), "model.num_fusion_layers": 2}))


def test_question_answering_starts_from_a_pre_trained_model(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    model = finished[0] / "model"
    tar = str(write_tar(tmp_path / "vqa.tar", 6, 0))
    keys = {"data.train": [tar], "data.test": [tar], "data.image_size": 32, "optim.batch_size": 2, "optim.steps": 0}
    layers = {f"model.num_{part}_layers": 1 for part in ("text", "fusion", "decoder")}
    keys = {**keys, **layers, "model.start_from": str(model), "run.out": str(tmp_path / "out")}
    run_recipe(load_recipe("debug/vqa_tiny", keys))
    source = TripsForPreTraining.from_pretrained(model)
    vqa = TripsForQuestionAnswering.from_pretrained(tmp_path / "out" / "model")
    for name, value in source.trips.state_dict().items():
        assert torch.equal(vqa.trips.state_dict()[name], value), name
    for ours, theirs in (
        (vqa.decoder.bert.encoder.layer[0], source.trips.fusion.layer[0]),
        (vqa.decoder.bert.embeddings, source.trips.text.embeddings),
        (vqa.decoder.cls.predictions.transform, source.mlm_head.transform),
    ):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    with pytest.raises(CheckpointError, match="fewer fusion layers than the decoder needs"):
        run_recipe(
            load_recipe("debug/vqa_tiny", {**keys, "model.num_decoder_layers": 2, "run.out": str(tmp_path / "b")})
        )
    with pytest.raises(CheckpointError, match="is not a pre-trained model.*task is pretrain"):
        run_recipe(
            load_recipe(
                "debug/vqa_tiny",
                {**keys, "model.start_from": str(tmp_path / "out" / "model"), "run.out": str(tmp_path / "c")},
            )
        )


@pytest.mark.parametrize("clean", [False, True])
def test_held_out_texts_have_the_form_of_the_training_texts(finished, monkeypatch, clean: bool) -> None:
    out, _ = finished
    seen = []
    monkeypatch.setattr(pretraining, "evaluate_losses", lambda model, pairs, batch: seen.append(pairs.clean) or {})
    evaluate_run(out, [f"--data.clean_captions={str(clean).lower()}"])
    assert seen == [clean]
