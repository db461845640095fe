"""Trained models for runtimes without this library: a program of torch.export, or a file of ONNX (sections 3.1, 3.2).

What is written is the inference path of a pair at fixed keep rates. The number of tokens depends on settings and
resolution only, so selection has no place in the way of a static graph: image size, text length and kept counts are
fixed, the batch may vary. The positions that every location keeps come out beside the result. Nothing is reported
before the file has been read again and agrees with the model.

Dimensions: B pairs, n images of a statement, L text tokens, D width, P projection width, C answers, k kept.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trips.config import SelectionConfig
from trips.errors import ConfigError, UnsupportedModelError
from trips.export_graphs import PairGraph, Part, pair_graph
from trips.export_onnx import OLDEST_OPSET, check_onnx, open_onnx, write_onnx
from trips.processor import TripsProcessor
from trips.processor_checks import positive_int

ExportFormat = Literal["torch", "onnx"]

_TOLERANCE = 1e-4  # between two orders of summation in float32, over all layers
_BATCHES = (1, 3, 2)  # sizes that a file of a free batch is checked with
_SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
_PIXELS = ("image_size", "patch_size", "image_mean", "image_std", "resample", "max_text_length", "add_sep")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the model; also the JSON file beside it.

    Attributes:
        written_to: the file. model: class of the model. part: what it computes.
        format: "torch" or "onnx". opset: of ONNX, else None.
        inputs, outputs: shape of each tensor, "batch" where it may vary; inputs are float32 pixels and int64 ids.
        layers, keep_rates, kept: locations, their rates and the patches that each keeps; empty without selection.
        answers: candidates in the order of ``answer_log_likelihoods``; None where there are none.
        processor: how images and texts are prepared; None if none was given.
        batches: random batches that were compared.
        max_difference: largest difference from the model, relative where the value is above 1.
        kept_identical: all kept positions are the model's.
    """

    written_to: str
    model: str
    part: str
    format: str
    opset: int | None
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    layers: tuple[int, ...]
    keep_rates: tuple[float, ...]
    kept: tuple[int, ...]
    answers: list[str] | None = field(repr=False)
    processor: dict[str, Any] | None = field(repr=False)
    batches: int
    max_difference: float
    kept_identical: bool


def export_model(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    format: ExportFormat = "torch",
    *,
    part: Part | None = None,
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    text_length: int | None = None,
    selection: SelectionConfig | None = None,
    answers: Sequence[str] | None = None,
    processor: TripsProcessor | None = None,
    opset: int = OLDEST_OPSET,
    seed: int = 0,
) -> ExportReport:
    """Write the inference path of a model as a file for other runtimes, and compare the file with the model.

    The file takes ``pixel_values``, ``input_ids`` and ``attention_mask``, padded to the text length, and gives by part:
    "question_states" (B, L, D) of a question answering model; "answers", the exact ``answer_log_likelihoods`` (B, C)
    of a fixed list, whose largest is what `rank_answers` puts first with all candidates read; "match", the
    ``match_probability`` (B,) of a retrieval or pre-training model; "features", its ``image_features`` and
    ``text_features`` (B, P); "classes", the ``class_probabilities`` of a reasoning model; "fused", the
    ``fused_states`` of `TripsModel`; "output", the tensors that an accelerated model of transformers returns. But for
    "features" also ``kept_layer_J`` (B, k) for every location J: positions in the patch grid, -1 for a fused token.

    Args:
        model: on the CPU, in float32.
        out: file to write; ".pt2" or ".onnx" is added where there is no suffix. A JSON file of the report is put
            beside it.
        format: "torch" for `torch.export.load`, "onnx" for ONNX runtimes.
        part: what to compute; by default the first that the model's class has.
        batch_size: B, None for any.
        image_size: pixels, one number or (height, width); by default the processor's, else the tower's.
        text_length: L; by default the processor's ``max_text_length``, else 40 or the longest the model takes.
        selection: setting, else the model's.
        answers: candidates of the part "answers".
        processor: settings for the report; needed for answers.
        opset: of ONNX.
        seed: of the random batches.
    Raises:
        ConfigError: an argument that does not fit the model; the random guide. ShapeError: no patch in such an image.
        UnsupportedModelError: the model cannot be exported so, or the file computes something else; nothing is written.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    if format not in _SUFFIXES:
        raise ConfigError("no such format", item="format", found=format, expected=" | ".join(_SUFFIXES))
    if format == "onnx":
        check_onnx(opset)
    _check_place(model)
    if batch_size is not None:
        positive_int(batch_size, "batch_size")
    graph = pair_graph(
        model,
        part,
        image_size=image_size,
        text_length=text_length,
        selection=selection,
        answers=answers,
        processor=processor,
    )
    target = Path(out) if Path(out).suffix else Path(out).with_suffix(_SUFFIXES[format])
    sizes = _BATCHES if batch_size is None else (batch_size,) * len(_BATCHES)
    batches = [graph.draw(size, seed + number) for number, size in enumerate(sizes)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _evaluating(graph), tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
            expected = [graph(**batch) for batch in batches]
            program = _trace(graph, batch_size)
            file = Path(folder) / target.name  # one name throughout: large weights lie beside it under it
            if format == "onnx":
                write_onnx(program, file, list(graph.inputs), list(expected[0]), opset)
                run = open_onnx(file)
            else:
                torch.export.save(program, file)
                run = _open_program(file)
            difference, identical = _compare(run, batches, expected, target)
            for written in sorted(Path(folder).iterdir()):
                os.replace(written, target.parent / written.name)
    except OSError as error:
        raise ConfigError(f"cannot be written there ({error.strerror or error})", item=target) from error
    kept = [value.shape[1] for name, value in expected[0].items() if name.startswith("kept_")]
    shown = batch_size or "batch"
    report = ExportReport(
        written_to=str(target),
        model=type(model).__name__,
        part=graph.part,
        format=format,
        opset=opset if format == "onnx" else None,
        inputs={name: [shown, *shape] for name, shape in graph.inputs.items()},
        outputs={name: _shape([values[name] for values in expected], sizes) for name in expected[0]},
        layers=graph.layers if kept else (),
        keep_rates=graph.rates if kept else (),
        kept=tuple(kept),
        answers=graph.answers,
        processor=None if processor is None else {name: getattr(processor, name) for name in _PIXELS},
        batches=len(batches),
        max_difference=difference,
        kept_identical=identical,
    )
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    target.with_name(f"{target.name}.json").write_text(f"{text}\n", encoding="utf-8")
    return report


def _shape(values: Sequence[Tensor], sizes: Sequence[int]) -> list[int | str]:
    """Shape of an output in batches of several sizes; what grows with the batch is written as a multiple of it."""
    shape: list[int | str] = []
    for first, second in zip(values[0].shape, values[1].shape, strict=True):
        each = first // sizes[0]
        shape.append(first if first == second else "batch" if each == 1 else f"{each} batch")
    return shape


def _check_place(model: PreTrainedModel) -> None:
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ConfigError(
            "is exported from the CPU in float32",
            item=type(model).__name__,
            found=f"{weight.dtype} on {weight.device}",
            hint='model.float().to("cpu")',
        )


@contextmanager
def _evaluating(graph: PairGraph) -> Iterator[None]:
    """Without dropout and without gradient; the model is afterwards in the mode that it was in."""
    training = graph.model.training
    graph.eval()
    try:
        with torch.no_grad(), graph.unrecorded():
            yield
    finally:
        graph.model.train(training)


def _trace(graph: PairGraph, batch_size: int | None) -> torch.export.ExportedProgram:
    """The graph as a program; of a free batch with two rows, since one is a size of its own to torch."""
    example = graph.draw(batch_size or 2, 0)
    free = None if batch_size else {name: {0: torch.export.Dim("batch", min=1)} for name in example}
    try:
        # Not strict: hooks and dataclasses run as the Python that they are, only tensors are recorded.
        return torch.export.export(graph, (), example, dynamic_shapes=free, strict=False)
    except Exception as error:  # torch raises many types for what it cannot follow
        reason = " ".join(str(error).split())[:300]
        hint = "give a batch_size" if batch_size is None else None
        raise UnsupportedModelError(
            f"cannot be traced ({reason})", item=f"{type(graph.model).__name__}, part {graph.part}", hint=hint
        ) from error


def _open_program(file: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    module = torch.export.load(file).module()
    return lambda batch: module(**batch)


def _compare(
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    batches: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
    target: Path,
) -> tuple[float, bool]:
    """Largest difference, and whether the kept positions are equal; refuses a file that computes something else."""
    largest = 0.0
    for batch, values in zip(batches, expected, strict=True):
        found = run(batch)
        for name, value in values.items():
            if found[name].shape != value.shape:
                raise UnsupportedModelError(
                    f"the exported file gives another shape of {name}",
                    item=target,
                    found=tuple(found[name].shape),
                    expected=tuple(value.shape),
                )
            if not value.is_floating_point():
                if not torch.equal(found[name], value):
                    raise UnsupportedModelError(f"the exported file keeps other patches ({name})", item=target)
                continue
            difference = ((found[name] - value).abs() / value.abs().clamp_min(1)).max().item()
            if not difference <= _TOLERANCE:  # nor NaN
                raise UnsupportedModelError(
                    f"the exported file computes another {name}",
                    item=target,
                    found=difference,
                    expected=f"a difference of at most {_TOLERANCE}",
                )
            largest = max(largest, difference)
    return largest, True
