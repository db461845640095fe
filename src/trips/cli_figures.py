"""Draw what a trained model keeps: trips explain, trips figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trips.errors import ConfigError
from trips.options import Guide


def explain(
    run_dir: str,
    overrides: Sequence[str] = (),
    *,
    images: list[str] | None = None,
    texts: list[str] | None = None,
    out: str = "kept_patches.png",
    count: int = 6,
    heat: bool = False,
    boxes: str | None = None,
    record: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Draw which patches a model keeps of your photos, or a finished run of its test photos, and what it answers.

    With --images and --texts any model and photos; without, a question answering run and photos of its test data.

    Args:
        run_dir: output folder of "trips train"; with --images also a saved model's folder, or a name on the hub.
        overrides: keys of the run's recipe to replace.
        images: your photos, as many as texts, or one for all texts.
        texts: in quotes; one for all photos, or as many.
        out: picture to write: .png, .svg, .pdf.
        count: photos of the test data, the first question of each.
        heat: also draw the scores of the patches.
        boxes: JSON file with boxes to outline, {"PHOTO": [[left, top, right, bottom], ...]} in pixels.
        record: JSON file for what is behind the picture.
        as_json: print one JSON object for machines.
    """
    from trips.explain import explain_photos, explain_run

    options = {"heat": heat, "boxes": boxes, "record": record}
    if images or texts:
        if not images or not texts:
            raise ConfigError("belong together", item="--images and --texts", found="one of them")
        return explain_photos(run_dir, images, texts, out, overrides, **options)
    return {"written to": str(explain_run(run_dir, out, overrides, count, **options))}


def figure(
    number: int,
    *,
    model: str,
    images: list[str] | None = None,
    texts: list[str] | None = None,
    data: str | None = None,
    count: int = 5,
    guide: Guide | None = None,
    layers: list[int] | None = None,
    keep_rate: list[float] | None = None,
    heat: bool = False,
    boxes: str | None = None,
    out: str | None = None,
    record: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Draw figure 1, 3 or 4 of the paper with your own model and photos.

    1: the question as the guide beside the image's own [CLS], with both answers. 3: what is left of each photo behind
    every selection layer. 4: one photo under different words.

    Args:
        number: of the figure.
        model: output folder of "trips train", a saved model's folder, or a name on the hub.
        images: photos, as many as texts, or one for all texts.
        texts: in quotes; one for all photos, or as many.
        data: take photos and texts from data, an entry as in a recipe.
        count: photos to take from it.
        guide: who chooses; by default as the model was trained.
        layers: vision layers that select, the first is 1; by default the model's own.
        keep_rate: share of the patches kept, one for all layers or one for each.
        heat: also draw the scores of the patches.
        boxes: JSON file with boxes to outline, {"PHOTO": [[left, top, right, bottom], ...]} in pixels.
        out: picture to write: .png, .svg, .pdf; figure_NUMBER.png by default.
        record: JSON file for what is behind the picture.
        as_json: print one JSON object for machines.
    """
    from trips.explain import draw_figure

    return draw_figure(
        number,
        model,
        out or f"figure_{number}.png",
        images=images or (),
        texts=texts or (),
        data=data,
        count=count,
        guide=guide,
        layers=layers,
        keep_rate=keep_rate,
        heat=heat,
        boxes=boxes,
        record=record,
    )


VERBS: dict[str, Callable[..., Any]] = {"explain": explain, "figure": figure}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`; lists as words, not as YAML."""
    saved = "a saved model's folder, or a name on the hub"
    if name == "explain":
        words = f'output folder of "trips train"; with --images also {saved}'
        command.add_argument("run_dir", type=str, metavar="RUN_DIR", help=words)
    else:
        command.add_argument("number", type=int, metavar="NUMBER", help="1, 3 or 4")
        words = f'output folder of "trips train", {saved}'
        command.add_argument("--model", type=str, required=True, metavar="MODEL", help=words)
    words = "photos, as many as texts, or one for all texts"
    command.add_argument("--images", type=str, nargs="+", metavar="IMAGE", help=words)
    words = "each in quotes; one for all photos, or as many"
    command.add_argument("--texts", type=str, nargs="+", metavar="TEXT", help=words)
    if name == "figure":
        words = "take photos and texts from data, an entry as in a recipe"
        command.add_argument("--data", type=str, metavar="ENTRY", help=words)
    default, words = (6, "photos of the test data") if name == "explain" else (5, "photos to take from --data")
    command.add_argument("--count", type=int, default=default, help=words)
    if name == "figure":
        command.add_argument("--guide", type=Guide, help="who chooses; by default as the model was trained")
        words = "vision layers that select, the first is 1; by default the model's own"
        command.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help=words)
        words = "share of the patches kept, one for all layers or one for each"
        command.add_argument("--keep_rate", type=float, nargs="+", metavar="R", help=words)
    command.add_argument("--heat", action="store_true", help="also draw the scores of the patches")
    words = 'JSON file with boxes to outline, {"PHOTO": [[left, top, right, bottom], ...]} in pixels'
    command.add_argument("--boxes", type=str, metavar="FILE", help=words)
    words = "picture to write: .png, .svg, .pdf"
    out = "kept_patches.png" if name == "explain" else None
    command.add_argument("--out", type=str, default=out, metavar="FILE", help=words + ("" if out else "; figure_N.png"))
    words = "JSON file for what is behind the picture"
    command.add_argument("--record", type=str, metavar="FILE", help=words)


def render(name: str, result: dict[str, Any]) -> RenderableType:
    """What a verb has drawn as a table for people; the record is for machines."""
    table = Table("name", "value", title=f"trips {name}", title_justify="left")
    for row in result.get("rows", ()):
        kept = ", ".join(f"{len(one['kept'])} at layer {one['layer']}" for one in row["locations"])
        said = f"; said {row['said'][0]}" if row["said"] else ""
        patches = row["grid"][0] * row["grid"][1]
        table.add_row(Text(f"{row['text']} ({row['guide']})"), Text(f"kept {kept} of {patches} patches{said}"))
    table.add_row("written to", Text(result["written to"]))
    return table
