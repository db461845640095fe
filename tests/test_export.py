"""Exported files: read by onnxruntime and torch alone, they must say what the model says, for any batch."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CANDIDATES, tiny_processor
from reasoning_models import tiny_reasoning_model
from tiny import images, randomise, texts, tiny_pretraining_model, tiny_vision_config, tiny_vqa_model
from torch import Tensor
from transformers import ViTModel

import trips
from trips import cli, export, export_onnx
from trips.errors import ConfigError, MissingDependencyError, ShapeError, UnsupportedModelError
from trips.export import ExportReport, export_model
from trips.saved import ANSWERS_FILE

LENGTH = 6
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra 'export' is not installed",
)


def batch(count: int, seed: int) -> dict[str, Tensor]:
    ids, mask = texts(count, LENGTH, seed=seed)
    return {"pixel_values": images(count, seed=seed), "input_ids": ids, "attention_mask": mask}


def run_onnx(file: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By a session of its own: nothing of `trips` reads the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, values)))


def check_kept(found: dict[str, Tensor], selections: Any) -> None:
    for record in selections:
        assert torch.equal(found[f"kept_layer_{record.layer}"], record.kept)


@needs_onnx
def test_onnx_of_a_run_gives_answers_and_patches_for_any_batch(tmp_path: Path, capsys) -> None:
    model, processor = tiny_vqa_model(), tiny_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / ANSWERS_FILE).write_text(json.dumps({"answers": CANDIDATES}))
    argv = ["export", str(tmp_path), str(tmp_path / "out" / "vqa"), "--part=answers", f"--text_length={LENGTH}"]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    file = tmp_path / "out" / "vqa.onnx"
    assert report == json.loads((tmp_path / "out" / "vqa.onnx.json").read_text())
    assert report["written_to"] == str(file) and report["opset"] == 18 and report["kept_identical"]
    assert report["layers"] == [2, 3] and report["keep_rates"] == [0.5, 0.5] and report["kept"] == [8, 5]
    assert report["inputs"]["pixel_values"] == ["batch", 3, 32, 32] and report["inputs"]["input_ids"] == ["batch", 6]
    assert report["outputs"]["answer_log_likelihoods"] == ["batch", 5] and report["answers"] == CANDIDATES
    assert report["processor"]["image_size"] == [32, 32] and 0 < report["max_difference"] < 1e-4

    encoded = processor.encode_answers(CANDIDATES)
    seen = set()
    for count, seed in ((1, 5), (2, 6), (5, 7), (5, 8)):
        inputs = batch(count, seed)
        with torch.no_grad():
            output = model(**inputs)
            numbers, scores = model.rank_answers(
                output.question_states, inputs["attention_mask"], encoded["input_ids"], encoded["attention_mask"]
            )
        found = run_onnx(file, inputs)
        check_kept(found, output.selections)
        likelihood = found["answer_log_likelihoods"]
        assert torch.equal(likelihood.argsort(dim=1, descending=True, stable=True), numbers)
        assert float((likelihood.gather(1, numbers) - scores).abs().max()) < 1e-4
        seen |= set(map(tuple, found["kept_layer_2"].tolist()))
    assert len(seen) > 5, "the kept patches depend on image and text"


@needs_onnx
def test_the_text_selects_in_an_exported_matching_model(tmp_path: Path) -> None:
    model = tiny_pretraining_model()
    report = export_model(model, tmp_path / "match.onnx", "onnx", text_length=LENGTH, batch_size=3)
    assert report.part == "match" and report.outputs["match_probability"] == [3]
    inputs = batch(3, 4)
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(3, -1, -1, -1).clone()
    found = run_onnx(tmp_path / "match.onnx", inputs)
    with torch.no_grad():
        prefix = model.trips.encode_prefix(inputs["pixel_values"])
        logits = model.trips(**inputs)
        index = torch.arange(3)
        match = model.match(prefix, index, inputs["input_ids"], inputs["attention_mask"])
        other = model.itm_head(logits.last_hidden_state[:, 0])[:, 0]
    check_kept(found, logits.selections)
    assert float((found["match_probability"] - torch.sigmoid(match - other)).abs().max()) < 1e-5
    assert len(set(map(tuple, found["kept_layer_2"].tolist()))) > 1, "one image, other texts, other patches"


@needs_onnx
def test_an_accelerated_model_of_transformers(tmp_path: Path) -> None:
    model = randomise(ViTModel(tiny_vision_config("vit"), add_pooling_layer=False))
    trips.accelerate(model, layers=(2, 3), keep_rate=0.5)
    with torch.no_grad():
        model(images(1))
    before = trips.explain_last(model)
    report = export_model(model, tmp_path / "vit.onnx", "onnx")
    assert report.part == "output" and list(report.inputs) == ["pixel_values"] and report.layers == (2, 3)
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(before, trips.explain_last(model), strict=True))
    pixels = images(4, seed=9)
    found = run_onnx(tmp_path / "vit.onnx", {"pixel_values": pixels})
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    check_kept(found, trips.explain_last(model))
    assert float((found["last_hidden_state"] - expected).abs().max()) < 1e-4


def test_programs_of_torch_equal_the_model(tmp_path: Path) -> None:
    model = tiny_vqa_model(family="dinov2").train()
    selection = model.config.selection.replace(keep_rate=0.25)
    report = export_model(model, tmp_path / "vqa", text_length=LENGTH, selection=selection)
    assert report.written_to.endswith("vqa.pt2") and report.kept == (4, 2) and report.opset is None
    assert model.training, "the model is left as it was"
    program = torch.export.load(tmp_path / "vqa.pt2").module()
    for count in (1, 4):
        inputs = batch(count, count)
        with torch.no_grad():
            expected = model.eval()(**inputs, selection=selection)
            found = program(**inputs)
        check_kept(found, expected.selections)
        assert float((found["question_states"] - expected.question_states).abs().max()) < 1e-5


MERGING = trips.SelectionConfig(layers=(2, 3), keep_rate=0.3, guide="similarity")


def check_batches(model: Any, run: Any, selection: trips.SelectionConfig, name: str, shape: tuple[int, ...]) -> None:
    """A file against the model, for batches that it has not been traced with."""
    for count in (1, 5):
        inputs = batch(count, count)
        inputs["pixel_values"] = images(count * math.prod(shape[:-3]), seed=count).view(count, *shape)
        with torch.no_grad():
            expected = model(**inputs, selection=selection)
            found = run(inputs)
        check_kept(found, expected.selections)
        value = torch.softmax(expected.logits, dim=-1) if name == "class_probabilities" else expected.question_states
        assert float((found[name] - value).abs().max()) < 1e-4


@pytest.mark.parametrize("which", ["single", "statements", "merging"])
def test_every_kind_of_model_leaves_the_batch_free(tmp_path: Path, which: str) -> None:
    """TRIPS-S, statements about two images, patches that merge."""
    name, shape = "question_states", (3, 32, 32)
    if which == "statements":
        model, name, shape = tiny_reasoning_model({"fusion": "stacked"}), "class_probabilities", (2, 3, 32, 32)
    else:
        model = tiny_vqa_model(architecture="single" if which == "single" else "dual")
    selection = MERGING if which == "merging" else model.config.selection
    report = export_model(model, tmp_path / "x", text_length=LENGTH, selection=selection)
    assert report.inputs["pixel_values"] == ["batch", *shape] and report.kept_identical and len(report.kept) == 2
    program = torch.export.load(tmp_path / "x.pt2").module()
    check_batches(model, lambda inputs: program(**inputs), selection, name, shape)


@needs_onnx
def test_onnx_of_statements_in_one_stack_whose_patches_merge(tmp_path: Path) -> None:
    model = tiny_reasoning_model(architecture="single")
    report = export_model(model, tmp_path / "x.onnx", "onnx", text_length=LENGTH, selection=MERGING)
    assert report.outputs["class_probabilities"] == ["batch", 2] and report.outputs["kept_layer_2"] == ["2 batch", 5]
    run = functools.partial(run_onnx, tmp_path / "x.onnx")
    check_batches(model, run, MERGING, "class_probabilities", (2, 3, 32, 32))


def test_a_fixed_batch(tmp_path: Path) -> None:
    """Statements about two images, with a baseline that keeps everything."""
    reasoning = tiny_reasoning_model()
    baseline = trips.SelectionConfig(guide="none")
    report = export_model(reasoning, tmp_path / "r", text_length=LENGTH, batch_size=2, selection=baseline)
    assert report.part == "classes" and report.inputs["pixel_values"] == [2, 2, 3, 32, 32]
    assert not report.kept and not report.layers and list(report.outputs) == ["class_probabilities"]
    inputs = batch(2, 1)
    inputs["pixel_values"] = images(4).view(2, 2, 3, 32, 32)
    with torch.no_grad():
        expected = reasoning.verify(**inputs, selection=baseline)
        found = torch.export.load(tmp_path / "r.pt2").module()(**inputs)["class_probabilities"][:, 1]
    assert float((found - expected).abs().max()) < 1e-5


def test_features_know_no_pair(tmp_path: Path) -> None:
    model, inputs = tiny_pretraining_model(), batch(2, 3)
    report = export_model(model, tmp_path / "f", part="features", text_length=LENGTH)
    assert not report.kept and not report.layers
    with torch.no_grad():
        found = torch.export.load(tmp_path / "f.pt2").module()(**inputs)
    text = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    for name, expected in (("image_features", model.encode_image(inputs["pixel_values"])), ("text_features", text)):
        assert float((found[name] - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("what", ["states", "patches", "shape"])
def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch, what: str) -> None:
    model = tiny_vqa_model()

    class Nothing(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    def wrong(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        output = model(**inputs)
        states = output.question_states + (1e-2 if what == "states" else 0)
        found = {"question_states": states[:, 1:] if what == "shape" else states}
        kept = {f"kept_layer_{record.layer}": record.kept.clone() for record in output.selections}
        kept["kept_layer_3"][0, 0] += what == "patches"
        return {**found, **kept}

    program = torch.export.export(Nothing(), (torch.zeros(1),))
    monkeypatch.setattr(export, "_trace", lambda graph, batch_size: program)
    monkeypatch.setattr(export, "_open_program", lambda file: wrong)
    expected = {"states": "another question_states", "patches": "keeps other patches", "shape": "another shape"}
    with pytest.raises(UnsupportedModelError, match=expected[what]):
        export_model(model, tmp_path / "x", text_length=LENGTH)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    model, out = tiny_vqa_model(), tmp_path / "x"

    def refused(error: type[Exception], match: str, subject: Any = model, **options: Any) -> None:
        with pytest.raises(error, match=match):
            export_model(subject, out, **options)

    refused(ConfigError, "format", format="tflite")
    refused(ConfigError, "part.*match", part="match")
    refused(ConfigError, "answers", part="answers")
    refused(ConfigError, "answers", answers=["a"])
    refused(ConfigError, "processor", part="answers", answers=["a"])
    refused(ConfigError, "random", selection=trips.SelectionConfig(layers=(2,), guide="random"))
    refused(ConfigError, "text_length", text_length=25)
    refused(ConfigError, "batch_size", batch_size=0)
    refused(ShapeError, "image_size", image_size=4)
    refused(ConfigError, "float64", tiny_vqa_model().double())
    refused(UnsupportedModelError, "ViTModel", ViTModel(tiny_vision_config("vit")))
    with pytest.raises(ConfigError, match="beyond"):
        export_model(model, out, selection=trips.SelectionConfig(layers=(9,)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        export_model(model, tmp_path / "file" / "x", text_length=LENGTH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_without_the_extra_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"onnx: .*trips-vlm\[export\]"):
        export_model(tiny_vqa_model(), tmp_path / "x.onnx", "onnx")


@needs_onnx
@pytest.mark.parametrize("opset", [17, 999, True])
def test_an_opset_that_does_not_exist(tmp_path: Path, opset: int) -> None:
    with pytest.raises(ConfigError, match="opset"):
        export_model(tiny_vqa_model(), tmp_path / "x.onnx", "onnx", opset=opset)


def test_the_table_for_people() -> None:
    report = ExportReport(
        "x.onnx", "TripsForQuestionAnswering", "answers", "onnx", 18, {"pixel_values": ["batch", 3]}, {"y": [1]},
        (5, 10), (0.7, 0.5), (403, 202), None, None, 3, 2e-6, True,
    )  # fmt: skip
    from rich.console import Console

    from trips import cli_models

    console = Console(width=140, record=True)
    console.print(cli_models.render("export", report))
    text = console.export_text()
    for part in ("pixel_values (batch, 3)", "403 patches at layer 5 (rate 0.7)", "2.0e-06", "x.onnx.json", "opset 18"):
        assert part in text
