"""Trained models in folders: what opens, with what, and how ``trips ask`` and ``trips score`` use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pipelines import CANDIDATES, picture, same, tiny_processor
from tiny import randomise, tiny_config, tiny_pretraining_model, tiny_vqa_model

import trips
from trips import cli
from trips.answering import Answer
from trips.errors import CheckpointError, ConfigError
from trips.pipeline import TripsPipeline
from trips.saved import ANSWERS_FILE, MODEL_FOLDER


@pytest.fixture(scope="module")
def processor() -> trips.TripsProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def answering(processor) -> TripsPipeline:
    return TripsPipeline(tiny_vqa_model(), processor, CANDIDATES, batch_size=2)


@pytest.fixture(scope="module")
def matching(processor) -> TripsPipeline:
    return TripsPipeline(tiny_pretraining_model(), processor, batch_size=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, answering, matching, processor) -> Path:
    """A question answering run and a pre-training run, as training leaves them, and a picture."""
    folder = tmp_path_factory.mktemp("runs")
    for name, pipeline in (("vqa", answering), ("pretrain", matching)):
        pipeline.model.save_pretrained(folder / name / MODEL_FOLDER)
        processor.save_pretrained(folder / name / MODEL_FOLDER)
    (folder / "vqa" / ANSWERS_FILE).write_text(json.dumps({"answers": CANDIDATES}))
    picture(0).save(folder / "photo.png")
    return folder


def test_a_run_opens_with_its_answers(runs, answering, matching) -> None:
    from trips.train import task, vqa

    assert (MODEL_FOLDER, ANSWERS_FILE) == (task.MODEL_FOLDER, vqa.ANSWERS_FILE)
    expected = answering.ask(picture(0), "what is it?", 3)
    for path in (runs / "vqa", str(runs / "vqa"), runs / "vqa" / MODEL_FOLDER):
        opened = trips.load(path, device="cpu")
        assert opened.answers == CANDIDATES and not opened.model.training
        assert same(opened.ask(picture(0), "what is it?", 3), expected)
    other = trips.load(runs / "pretrain")
    assert type(other.model) is trips.TripsForPreTraining and other.answers is None
    scores = [pipeline.score(picture(0), "two") for pipeline in (other, matching)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)


def test_a_saved_model_keeps_what_stands_beside_it(runs, answering, tmp_path: Path) -> None:
    shutil.copytree(runs / "vqa" / MODEL_FOLDER, tmp_path / "saved")
    assert trips.load(tmp_path / "saved").answers is None
    (tmp_path / "saved" / ANSWERS_FILE).write_text(json.dumps({"answers": ["dog"]}))
    assert trips.load(tmp_path / "saved").answers == ["dog"]


def test_every_class_with_a_task_opens(processor, tmp_path: Path) -> None:
    for name, verb in (("TripsForImageTextRetrieval", "score"), ("TripsForVisualReasoning", "verify")):
        model = randomise(getattr(trips, name)(tiny_config()))
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        opened = trips.load(tmp_path / name)
        assert type(opened.model).__name__ == name and verb in opened.verbs


def test_what_cannot_be_opened_is_named(runs, matching, processor, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def copied(name: str) -> Path:
        return Path(shutil.copytree(runs / "pretrain" / MODEL_FOLDER, tmp_path / name))

    (tmp_path / "empty").mkdir()
    damaged, part, wrong, bare = (copied(name) for name in ("damaged", "part", "wrong", "bare"))
    weights = part / "model.safetensors"
    (damaged / "model.safetensors").write_bytes(weights.read_bytes()[:1000])
    save_file({name: t for name, t in load_file(weights).items() if "itm_head" not in name}, weights, {"format": "pt"})
    values = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**values, "architectures": ["BertModel"]}))
    (bare / "processor_config.json").unlink()
    for path, words in (
        ("/no/such/run", "/no/such/run: no such folder"),
        (tmp_path / "empty", "empty: neither the folder of a finished run"),
        (damaged, "damaged: model cannot be read"),
        (part, r"part: weights are missing; found \['itm_head.bias', 'itm_head.weight'\]"),
        (wrong, r"wrong: not a trained model of trips; found \['BertModel'\]"),
        (bare, "processor_config.json: file is missing"),
        ("no-such-owner/no-such-name", "no-such-owner/no-such-name"),
    ):
        with pytest.raises(CheckpointError, match=words):
            trips.load(path)
    with pytest.raises(ConfigError, match="device: no such device; found 'abacus'"):
        trips.load(runs / "pretrain", device="abacus")


def test_ask_on_the_command_line(runs, answering, capsys) -> None:
    argv = ["ask", str(runs / "photo.png"), "what is it?", "--model", str(runs / "vqa")]
    assert cli.main([*argv, "--top_k=2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = answering.ask(picture(0), "what is it?", 2)
    assert said["question"] == "what is it?"
    assert same([Answer(**answer) for answer in said["answers"]], expected)
    assert cli.main([*argv, "--answers", "[dog]", "two"]) == 0
    table = capsys.readouterr().out
    assert "what is it?" in table and "[dog]" in table and "two" in table and "red" not in table


def test_score_on_the_command_line(runs, matching, capsys) -> None:
    photo = str(runs / "photo.png")
    argv = ["score", f"--model={runs / 'pretrain'}", "--images", photo, photo, "--texts", "two", "a red bus"]
    assert cli.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = matching.score([picture(0)] * 2, ["two", "a red bus"])
    assert (said["images"], said["texts"]) == ([photo, photo], ["two", "a red bus"])
    torch.testing.assert_close(torch.tensor(said["probabilities"]), expected, rtol=0, atol=1e-6)
    assert cli.main(argv) == 0
    table = capsys.readouterr().out
    assert "photo.png" in table and "a red bus" in table and f"{float(expected[0, 1]):.3f}" in table


def test_mistakes_on_the_command_line(runs, capsys) -> None:
    photo = str(runs / "photo.png")
    for argv, words in (
        (["ask", "/none.jpg", "what", f"--model={runs / 'vqa'}"], "/none.jpg: image file does not exist"),
        (["ask", photo, "what", f"--model={runs / 'pretrain'}"], "expected score() and similarity()"),
        (["ask", photo, "what", "--model=/no/such/run"], "/no/such/run"),
        (["ask", photo, "what", f"--model={runs / 'vqa'}", "--top_k=0"], "top_k"),
        (["ask", photo, "what"], "model"),
        (["ask", photo, f"--model={runs / 'vqa'}"], "question"),
        (["score", f"--model={runs / 'vqa'}", "--images", photo, "--texts", "two"], "expected ask()"),
        (["score", f"--model={runs / 'pretrain'}", "--images", photo], "texts"),
    ):
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err
