"""Take models in and hand them out: trips import, trips export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def import_(
    source: str,
    out: str,
    *,
    kind: Literal[
        "auto", "clip", "siglip", "vit", "dinov2", "bert", "albef", "albef_retrieval", "albef_vqa", "albef_nlvr"
    ] = "auto",
    text: str | None = None,
    task: Literal["pretraining", "retrieval", "vqa", "nlvr2"] = "pretraining",
    tokenizer: str | None = None,
    layers: list[int] | None = None,
    keep_rate: float | None = None,
    guide: Literal["text", "image", "random", "similarity", "none"] | None = None,
    num_text_layers: int = 6,
    num_fusion_layers: int = 6,
    image_size: int | None = None,
    num_heads: int | None = None,
    activation: Literal["quick_gelu", "gelu"] | None = None,
    pixels: Literal["clip", "imagenet", "half"] | None = None,
    as_json: bool = False,
) -> Any:
    """Write public weights anew as a folder that trips opens, and account for every tensor.

    Reads the forms of transformers, OpenAI, open_clip, timm, Meta and ALBEF. Of a pickle (.pth, .pt, .bin, .ckpt) only
    the tensors are read; one that holds anything that could run is refused.

    Args:
        source: file of weights, folder, or name on the hub.
        out: new folder to write.
        kind: what the source has to be.
        text: BERT, folder or name, to make a whole model of a vision tower.
        task: model that a vision tower and a BERT become.
        tokenizer: folder or name; by default the one beside the BERT.
        layers: where the model selects, as [5,10].
        keep_rate: share of the patches that it keeps there.
        guide: who selects.
        num_text_layers: first layers of the BERT that encode the text.
        num_fusion_layers: last layers of the BERT that fuse.
        image_size: pixels along a side that the positions are interpolated to.
        num_heads: attention heads of a vision tower, where they are not 64 wide.
        activation: of a CLIP, where nothing beside the file tells it.
        pixels: mean and deviation of the images, where nothing beside the file tells them.
        as_json: print one JSON object for machines.
    """
    from trips.config import SelectionConfig
    from trips.importers import import_checkpoint

    chosen = {"layers": layers, "keep_rate": keep_rate, "guide": guide}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return import_checkpoint(
        source,
        out,
        kind=kind,
        text=text,
        task=task,
        tokenizer=tokenizer,
        selection=SelectionConfig(**chosen) if chosen else None,
        num_text_layers=num_text_layers,
        num_fusion_layers=num_fusion_layers,
        image_size=image_size,
        num_heads=num_heads,
        activation=activation,
        pixels=pixels,
    )


def export(
    run: str,
    out: str,
    *,
    format: Literal["torch", "onnx"] = "onnx",
    part: Literal["question_states", "answers", "match", "features", "classes"] | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    text_length: int | None = None,
    layers: list[int] | None = None,
    keep_rate: float | None = None,
    guide: Literal["text", "image", "similarity", "none"] | None = None,
    opset: int = 18,
    as_json: bool = False,
) -> Any:
    """Write a trained model as a file for other runtimes, at fixed keep rates, and compare the file with the model.

    The file takes pixel_values, input_ids and attention_mask, and gives the result and the patches that every location
    keeps. A JSON file beside it says shapes, settings and the largest difference that random batches have shown.

    Args:
        run: folder of a finished run, a saved model's folder, or a name on the hub.
        out: file to write.
        format: "onnx", or "torch" for torch.export.load.
        part: what to compute; by default question_states, match or classes, as the model has it. "answers" ranks the
            run's candidates.
        batch_size: pairs of a call; any number by default.
        image_size: pixels along a side; by default those of the training.
        text_length: tokens that texts are padded to; by default the longest of the training.
        layers: where to select, as [5,10]; by default as trained, like the next two.
        keep_rate: share of the patches to keep there.
        guide: who selects.
        opset: of ONNX.
        as_json: print one JSON object for machines.
    """
    from trips.export import export_model
    from trips.saved import open_saved

    saved = open_saved(run, "cpu")
    chosen = {"layers": layers, "keep_rate": keep_rate, "guide": guide}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return export_model(
        saved.model,
        out,
        format,
        part=part,
        batch_size=batch_size,
        image_size=image_size,
        text_length=text_length,
        selection=saved.model.config.selection.replace(**chosen) if chosen else None,
        answers=saved.answers if part == "answers" else None,
        processor=saved.processor,
        opset=opset,
    )


VERBS: dict[str, Callable[..., Any]] = {"import": import_, "export": export}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`, which are those of its function."""
    command.add_function_arguments(VERBS[name], as_group=False, as_positional=True, skip={"as_json"})


def render(name: str, result: Any) -> RenderableType:
    """What a verb has found as a table for people; the names of what was loaded are left to ``--json``."""
    table = Table(title=f"trips {name}", title_justify="left")
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for what, value in (_exported if name == "export" else _imported)(result).items():
        table.add_row(what, Text(value))
    return table


def _exported(result: Any) -> dict[str, str]:
    shapes = {
        kind: "\n".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in values.items())
        for kind, values in (("inputs", result.inputs), ("outputs", result.outputs))
    }
    kept = [
        f"{count} patches at layer {layer} (rate {rate:g})"
        for layer, rate, count in zip(result.layers, result.keep_rates, result.kept)
    ]
    return {
        "model": f"{result.model}, {result.part}",
        "written to": f"{result.written_to}\n{result.written_to}.json",
        "format": result.format if result.opset is None else f"{result.format}, opset {result.opset}",
        **shapes,
        "kept": "\n".join(kept) or "everything",
        "compared": f"{result.batches} random batches; largest difference {result.max_difference:.1e}"
        + ("; the same patches kept" if result.kept else ""),
    }


def _imported(result: Any) -> dict[str, str]:
    report = result.report
    return {
        "kind": result.kind,
        "model": result.model,
        "written to": result.written_to,
        "processor": "written" if result.processor else "none: give --tokenizer, and to a tower --text",
        "pixels": result.pixels or "none",
        "loaded": f"{len(report.loaded)} tensors",
        "resized": "\n".join(report.resized) or "none",
        "initialised": "\n".join(report.initialised) or "none",
        "ignored": "\n".join(report.ignored) or "none",
    }
