"""Take models in: trips import."""

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


VERBS: dict[str, Callable[..., Any]] = {"import": import_}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`, which are those of its function."""
    command.add_function_arguments(VERBS[name], as_group=False, as_positional=True, skip={"as_json"})


def render(name: str, result: Any) -> RenderableType:
    """What a verb has found as a table for people; the names of what was loaded are left to ``--json``."""
    table = Table(title=f"trips {name}", title_justify="left")
    table.add_column("what")
    table.add_column("value", overflow="fold")
    report = result.report
    rows = {
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
    for what, value in rows.items():
        table.add_row(what, Text(value))
    return table
