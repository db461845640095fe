"""Visual reasoning by its packaged recipe: it learns, its figures are those of a plain loop, mistakes are named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.pretraining_runs import KEYS, write_shards
from pair_shards import write_tar
from PIL import Image

from trips.data.records import BadSamples
from trips.data.statement_batches import StatementDataset
from trips.errors import ConfigError, DataError
from trips.images import load_image
from trips.processor import TripsProcessor
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.train.checkpoint import list_checkpoints, read_checkpoint
from trips.train.reasoning import read_records
from trips.train.reasoning_evaluation import ReasoningMeasurement, evaluate_reasoning, majority_accuracy
from trips.train.recipe import Recipe
from trips.train.recipe_io import load_recipe
from trips.train.run import evaluate_run, run_recipe

COLOURS = {"red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220), "white": (250, 250, 250)}
Make = Callable[..., Recipe]


def png(*boxes: str, width: int = 100, gap: int = 50) -> bytes:
    """Boxes of one colour each, side by side."""
    picture = np.full((100, len(boxes) * width + (len(boxes) - 1) * gap, 3), 128, np.uint8)
    for i, colour in enumerate(boxes):
        picture[:, i * (width + gap) : i * (width + gap) + width] = COLOURS[colour]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_nlvr1(path: Path, count: int, permutations: int = 2, bad: tuple[int, ...] = ()) -> Path:
    """A picture for each statement "one box is COLOUR": half are true, of each colour too."""
    rng, names, samples = np.random.default_rng(0), list(COLOURS), {}
    for i in range(count):
        colour, label = names[i // 2 % 4], i % 2 == 0
        others = [name for name in names if name != colour]
        boxes = [others[rng.integers(3)] for _ in range(3)]
        if label:
            boxes[rng.integers(3)] = colour
        for k in range(permutations):
            meta = {"statement_id": f"dev-{i // 4}-{i % 4}", "permutation": k, "label": label}
            meta["sentence"] = f"one box is {colour}"
            image = b"broken" if i in bad else png(*np.roll(boxes, k))
            samples[f"{i}-{k}"] = {"png": image, "json": json.dumps(meta).encode()}
    return write_tar(path, samples)


@pytest.fixture(scope="module")
def recipe_for(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("shards")
    train, test = write_nlvr1(folder / "train.tar", 16), write_nlvr1(folder / "test.tar", 12, bad=(3,))

    def make(out: Path, **changes: Any) -> Recipe:
        keys = {"data.train": [str(train)], "data.test": [str(test)], "run.trackers": [], "run.precision": "fp32"}
        return load_recipe("debug/nlvr_tiny", {**keys, "run.out": str(out), **changes})

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_for: Make) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, run_recipe(recipe_for(out))


def test_a_run_learns_what_it_sees(tmp_path: Path, recipe_for: Make) -> None:
    tar = [str(write_nlvr1(tmp_path / "few.tar", 16, 1))]
    changes = {"data.train": tar, "data.test": tar, "data.shuffle_images": False, "model.dropout": 0.0}
    rates = {"optim.steps": 100, "optim.lr": 3e-3, "optim.vision_lr": 3e-3, "run.save_every": 0}
    results = run_recipe(recipe_for(tmp_path / "out", **changes, **rates))
    assert results["accuracy"] > 0.9 and results["losses"]["loss"] < 0.3
    assert results["accuracy_blank_images"] == 0.5 == results["majority"]  # of each sentence half are true
    assert (results["num_statements"], results["num_samples"]) == (16, 16)


def test_figures_equal_a_plain_loop(finished: tuple[Path, dict[str, Any]], recipe_for: Make) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    model = TripsForVisualReasoning.from_pretrained(out / "model").eval()
    processor = TripsProcessor.from_pretrained(out / "model")
    records = read_records(recipe_for(out), "test", BadSamples(1.0))
    right: dict[str, list[bool]] = {}
    with (out / "verdicts_test.csv").open(newline="") as file:
        written = dict(csv.reader(file))
    for record in records:
        if record.statement == "dev-0-3":  # broken: no verdict, which is wrong
            assert written[record.identifier] == ""
            right.setdefault(record.statement, []).append(False)
            continue
        picture = load_image(record.images[0])
        boxes = processor([picture.crop((x, 0, x + 100, 100)) for x in (0, 150, 300)])["pixel_values"]
        text = processor(text=[record.sentence])
        verdict = bool(model.verify(boxes[None], text["input_ids"], text["attention_mask"])[0] > 0.5)
        assert written[record.identifier] == str(verdict).lower()
        right.setdefault(record.statement, []).append(verdict == record.label)
    every = [correct for of_statement in right.values() for correct in of_statement]
    assert len(every) == results["num_statements"] == 24 and results["accuracy"] == sum(every) / 24
    assert results["consistency_permutations"] == sum(map(all, right.values())) / 12
    sentences = {name.rpartition("-")[0] for name in right}
    consistent = [all(all(right[name]) for name in right if name.startswith(f"{one}-")) for one in sentences]
    assert results["consistency"] == sum(consistent) / 3
    assert results["bad_samples"]["count"] == 2 and "test.tar:3-0" in results["bad_samples"]["named"]


def test_a_run_can_be_measured_again_and_goes_on(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], recipe_for: Make
) -> None:
    out, results = finished
    again = evaluate_run(out, out=tmp_path / "again")
    for key in ("accuracy", "accuracy_blank_images", "consistency", "consistency_permutations", "num_statements"):
        assert again[key] == results[key], key
    assert (tmp_path / "again" / "verdicts_test.csv").read_bytes() == (out / "verdicts_test.csv").read_bytes()
    assert evaluate_run(out, ["--model.selection.keep_rate=1.0"])["selection"]["keep_rate"] == 1.0
    # Half way, and then the rest from its checkpoint: the same parameters as in one go.
    (half := tmp_path / "half").mkdir()
    (half / "checkpoints").mkdir()
    middle = list_checkpoints(out / "checkpoints")[0]
    (half / "checkpoints" / middle.name).hardlink_to(middle)
    assert run_recipe(recipe_for(half))["steps"] == 20
    assert json.loads((half / "metrics.jsonl").read_text().splitlines()[0])["step"] == 15  # the first line behind 10
    ends = [read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])["model"] for folder in (out, half)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_labels_may_be_missing_where_nothing_is_learnt(tmp_path: Path, finished: tuple[Path, Any]) -> None:
    meta = {"statement_id": "dev-0-0", "permutation": 0, "sentence": "one box is red"}
    tar = write_tar(tmp_path / "a.tar", {"a": {"png": png("red", "red", "red"), "json": json.dumps(meta).encode()}})
    figures = evaluate_run(finished[0], {"data.test": [str(tar)]}, out=tmp_path)
    assert figures["num_statements"] == 1 and "accuracy" not in figures
    assert (tmp_path / "verdicts_test.csv").read_text() in ("dev-0-0-0,true\n", "dev-0-0-0,false\n")


def test_nlvr2_layout_from_files_to_figures(tmp_path: Path, recipe_for: Make) -> None:
    """Pairs on disk, the official file, augmentation, workers and distillation; images keep their order."""
    names, lines = list(COLOURS), {"train": [], "dev": []}
    for split, count in (("train", 8), ("dev", 4)):
        for i in range(count):
            folder = tmp_path / "images" / (f"train/{i % 2}" if split == "train" else split)
            folder.mkdir(parents=True, exist_ok=True)
            for k in (0, 1):
                (folder / f"{split}-7-{i}-img{k}.png").write_bytes(png(names[(i + k) % 4]))
            row = {
                "identifier": f"{split}-7-{i}-0",
                "sentence": f"the left one is {names[0]}",
                "label": str(i % 4 == 0),
            }
            lines[split].append(json.dumps(row | ({"directory": i % 2} if split == "train" else {})))
        (tmp_path / f"{split}.json").write_text("\n".join(lines[split]))
    changes = {
        "data.train": [f"{tmp_path}/train.json"],
        "data.test": [f"{tmp_path}/dev.json"],
        "data.shuffle_images": False,
        "data.cache_images": False,
        "data.augment": "randaugment",
        "data.num_workers": 1,
        "model.reasoning.num_images": 2,
        "model.reasoning.fusion": "stacked",
        "model.selection.learning": "distill",
        "schedule.distill_every": 2,
        "optim.batch_size": 4,
        "optim.steps": 4,
    }
    results = run_recipe(recipe_for(tmp_path / "out", **changes))
    assert results["num_statements"] == 4 and results["num_samples"] == 8 and "loss_distill" in results["losses"]
    assert results["majority"] == 0.75 and results["consistency"] in (0.0, 1.0)  # one sentence in all
    assert "consistency_permutations" not in results and results["bad_samples"]["count"] == 0


def test_captions_are_assigned_and_statements_start_from_there(tmp_path: Path, recipe_for: Make) -> None:
    shards = write_shards(tmp_path / "shards")
    changes = {
        **shards,
        "model.reasoning.objective": "assignment",
        "data.shuffle_images": False,
        "data.cache_images": False,
        "optim.batch_size": 8,
        "optim.steps": 3,
        "run.eval_batch_size": 3,
    }
    results = run_recipe(recipe_for(tmp_path / "assign", **changes))
    assert results["chance"] == 0.25 and results["accuracy"] * 6 == pytest.approx(round(results["accuracy"] * 6))
    assert results["num_samples"] == 38 and np.isfinite(results["losses"]["loss"])
    assert evaluate_run(tmp_path / "assign")["accuracy"] == results["accuracy"]
    model = str(tmp_path / "assign" / "model")
    run_recipe(recipe_for(tmp_path / "out", **{"model.start_from": model, "optim.steps": 0}))
    old, new = (TripsForVisualReasoning.from_pretrained(folder) for folder in (model, tmp_path / "out" / "model"))
    assert all(torch.equal(value, new.trips.state_dict()[name]) for name, value in old.trips.state_dict().items())


def test_statements_start_from_pre_training(tmp_path: Path, recipe_for: Make) -> None:
    shards = write_shards(tmp_path / "shards")
    run_recipe(load_recipe("debug/pretrain_tiny", {**KEYS, **shards, "optim.steps": 1, "run.out": f"{tmp_path}/pre"}))
    changes = {"model.start_from": f"{tmp_path}/pre/model", "data.max_text_length": 10, "optim.steps": 1}
    results = run_recipe(recipe_for(tmp_path / "out", **changes))
    assert results["steps"] == 1 and 0 <= results["accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data.train": []}, ConfigError, r"data\.train: no files given"),
        ({"data.test": []}, ConfigError, r"data\.test: no files given"),
        ({"data.train": ["/none/*.tar"]}, DataError, r"no file matches.*/none/"),
        ({"model.reasoning.num_images": 2}, ConfigError, r"num_images: is not the number .*2.*3, as in train\.tar"),
        ({"data.augment": "crop"}, ConfigError, r"data\.cache_images.*data\.augment"),
        ({"optim.batch_size": 64}, ConfigError, "batch_size.*64"),
        ({"data.flip": "swap"}, ConfigError, r"data\.flip: task nlvr2 has no use"),
        ({"task": "vqa", "model.reasoning.num_images": 2}, ConfigError, r"data\.shuffle_images: task vqa has no use"),
        ({"model.reasoning.objective": "assignment", "data.train": []}, ConfigError, r"data\.train: no files given"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    tmp_path: Path, recipe_for: Make, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run_recipe(recipe_for(tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_statements_that_do_not_fit_are_counted(tmp_path: Path, recipe_for: Make) -> None:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(png(name))
    rows = [{"sentence": "s", "label": i % 2, "images": ["red.png", "blue.png"]} for i in range(6)]
    rows[2]["images"] = ["red.png"]
    rows[3]["label"] = None
    rows[4]["identifier"] = rows[5]["identifier"] = "x"
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[:5] if name == "a" else rows[5:]))
    entries = [f"{tmp_path}/{name}.json" for name in "ab"]
    recipe = recipe_for(tmp_path, **{"data.train": entries, "data.test": entries, "model.reasoning.num_images": 2})
    bad = BadSamples()
    assert len(read_records(recipe, "train", bad)) == 3
    assert list(bad.errors) == ["a.json [2]", "a.json [3]", "b.json [0]"]
    for reason, text in zip(("another number of images; found 1", "no label", "occurs twice"), bad.errors.values()):
        assert reason in text
    assert len(read_records(recipe, "test", BadSamples())) == 4


def test_majority_and_measurement_leave_the_model_as_it_was(recipe_for: Make, finished: tuple[Path, Any]) -> None:
    model = TripsForVisualReasoning.from_pretrained(finished[0] / "model").train()
    processor = TripsProcessor.from_pretrained(finished[0] / "model")
    records = read_records(recipe_for(finished[0]), "train", BadSamples())
    shuffled = StatementDataset(records, processor, shuffle_images=True, cache_images=True)
    scores = evaluate_reasoning(model, shuffled, 5)
    assert scores == evaluate_reasoning(model, StatementDataset(records, processor), 32) and model.training
    assert ReasoningMeasurement(model, shuffled, 7)()["accuracy"] == scores.accuracy
    true, false = ([r for r in records if r.label is label] for label in (True, False))
    assert majority_accuracy(true + false[:3], true[:1] + false[:3]) == 0.25
