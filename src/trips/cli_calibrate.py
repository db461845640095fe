"""Give a model a text guide that it was never trained for: trips calibrate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def calibrate(
    model: str,
    *,
    data: list[str],
    out: str,
    layers: list[int] | None = None,
    keep_rate: float | None = None,
    images: list[str] | None = None,
    columns: dict[str, str] | None = None,
    pairs: int = 2000,
    held_out: float = 0.2,
    minutes: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    as_json: bool = False,
) -> dict[str, Any]:
    """Give a model that was never trained to select a text guide, from images and texts without labels.

    The fusion encoder's attention in passes with all patches is the teacher. Only the guide's query is fitted; without
    selection the model's outputs stay bitwise what they were. Figures are of held-out images.

    Args:
        model: output folder of "trips train", a saved model's folder, or a name on the hub.
        data: images with texts, as in a recipe's data.train: questions (answers are not looked at) for a model that
            answers, else captions.
        out: new folder for the calibrated model.
        layers: where to select, as [5,10]; the model's own by default.
        keep_rate: share of the patches to keep there; the model's own by default.
        images: folders of the images, for lists.
        columns: other names of the fields, for lists.
        pairs: texts to use at most.
        held_out: share of the images that the figures come from; as many again choose the strength of the fit.
        minutes: no pass over further images begins after this time.
        batch_size: texts at a time.
        seed: of the draw.
        as_json: print one JSON object for machines.
    """
    from trips.calibration import calibrate as calibrate_model

    found = calibrate_model(
        model,
        data,
        out,
        layers=layers,
        keep_rate=keep_rate,
        images=images or (),
        columns=columns,
        pairs=pairs,
        held_out=held_out,
        minutes=minutes,
        batch_size=batch_size,
        seed=seed,
    )
    return found.to_dict()


VERBS: dict[str, Callable[..., Any]] = {"calibrate": calibrate}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`: the model as a word, the rest as options."""
    command.add_argument("model", type=str, help="run, saved model's folder, or name on the hub")
    command.add_argument("--data", type=str, nargs="+", required=True, metavar="ENTRY", help="images with texts")
    command.add_argument("--out", type=str, required=True, metavar="FOLDER", help="new folder for the calibrated model")
    command.add_function_arguments(VERBS[name], as_group=False, skip={"model", "data", "out", "as_json"})


def render(name: str, result: Any) -> RenderableType:
    """Guides by what they keep of the teacher's attention at each location, on held-out texts."""
    layers = result["selection"]["layers"]
    table = Table(title=f"trips {name}, {result['num_held_out']} held-out texts", title_justify="left")
    table.add_column("guide")
    columns = [f"attention kept, layer {layer}" for layer in layers]
    columns += ["kept by other texts too", *(f"KL, layer {layer}" for layer in layers), "cosine of the output"]
    for column in columns:
        table.add_column(column, justify="right")
    for guide, figures in result["guides"].items():
        divergence = figures["kl"] or [None] * len(layers)
        values = [*figures["teacher_mass"], figures["overlap"], *divergence, figures["output_cosine"]]
        table.add_row(guide, *("-" if value is None else f"{value:.3f}" for value in values))
    for row, values in (("share of patches", result["chance"]), ("teacher's own", result["teachers_own"])):
        table.add_row(row, *(f"{value:.3f}" for value in values))
    bad = f"; {len(result['bad_samples'])} bad samples left out" if result["bad_samples"] else ""
    fitted = f"fitted to {result['num_texts']} texts about {result['num_images']} images in {result['seconds']:.0f} s"
    return Group(table, Text(f"{fitted}{bad}; written to {result['written_to']}"))
