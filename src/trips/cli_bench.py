"""Count, time and compare: trips flops, trips speed, trips advise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import RenderableType

from trips.errors import ConfigError
from trips.options import Architecture, FlopTask, Guide


def flops(
    *,
    model: str | None = None,
    image_size: list[int] | None = None,
    text_length: int | None = None,
    layers: list[int] | None = None,
    keep_rate: list[float] | None = None,
    guide: Guide | None = None,
    architecture: Architecture | None = None,
    task: FlopTask = "pair",
    candidates: int | None = None,
    answer_length: float = 3,
    tokens: bool = False,
    as_json: bool = False,
) -> Any:
    """Count the operations of a model without and with selection, in closed form.

    Every matrix product counts, attention products included, a multiply-add as two operations. The paper counts
    otherwise; its figure stands in a column of its own where it has one.

    Args:
        model: output folder of "trips train", a saved model's folder, or a name on the hub; the paper's sizes if none.
        image_size: pixels of a side, one or more; by default the model's own, or 384.
        text_length: text tokens; by default the most that the model takes, or 40.
        layers: vision layers that select, the first is 1; by default the model's own.
        keep_rate: share of the tokens kept, one for all layers or one for each.
        guide: who chooses them.
        architecture: of the paper's sizes; that of a saved model is its own.
        task: what is counted.
        candidates: answers to rank, for the task vqa.
        answer_length: tokens of an answer with its start and end, for the task vqa.
        tokens: also show the image tokens in every layer.
        as_json: print one JSON object for machines.
    """
    from trips.bench.flops_report import flop_report
    from trips.config import TripsConfig

    sizes, length, known = image_size or [384], 40, candidates
    if model is None:
        config = TripsConfig(architecture=architecture or "dual")
    else:
        from trips.saved import open_settings

        saved = open_settings(model)
        config, processor = saved.config, saved.processor
        sizes, length = image_size or [processor.image_size], processor.max_text_length
        if architecture not in (None, config.architecture):
            raise ConfigError("the saved model has its own", item="architecture", found=architecture)
        if candidates is None and saved.answers is not None:
            known = len(saved.answers)
    chosen: dict[str, Any] = {"layers": layers, "guide": guide}
    if keep_rate is not None:
        chosen["keep_rate"] = keep_rate[0] if len(keep_rate) == 1 else keep_rate
    selection = config.selection.replace(**{name: value for name, value in chosen.items() if value is not None})
    options = {"task": task, "answer_length": answer_length, **({} if known is None else {"candidates": known})}
    report = flop_report(config, sizes, length if text_length is None else text_length, selection, **options)
    return report if as_json else report.table(tokens)


VERBS: dict[str, Callable[..., Any]] = {"flops": flops}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of the one verb here, flops."""
    _add_flops_arguments(command)


def render(name: str, result: Any) -> RenderableType:
    """What flops has found, which is a table for people already."""
    return result


def _add_flops_arguments(command: ArgumentParser) -> None:
    words = "output folder of \"trips train\", a saved model's folder, or a name on the hub; the paper's sizes if none"
    command.add_argument("--model", type=str, metavar="MODEL", help=words)
    words = "pixels of a side; by default the model's own, or 384"
    command.add_argument("--image_size", type=int, nargs="+", metavar="PX", help=words)
    words = "text tokens; by default the most that the model takes, or 40"
    command.add_argument("--text_length", type=int, metavar="L", help=words)
    words = "vision layers that select, the first is 1; by default the model's own"
    command.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help=words)
    words = "share of the tokens kept, one for all layers or one for each"
    command.add_argument("--keep_rate", type=float, nargs="+", metavar="R", help=words)
    command.add_argument("--guide", type=Guide, help="who chooses them")
    words = "of the paper's sizes; that of a saved model is its own"
    command.add_argument("--architecture", type=Architecture, help=words)
    command.add_argument("--task", type=FlopTask, default="pair", help="what is counted")
    command.add_argument("--candidates", type=int, metavar="C", help="answers to rank, for the task vqa")
    words = "tokens of an answer with its start and end, for the task vqa"
    command.add_argument("--answer_length", type=float, default=3, metavar="T", help=words)
    command.add_argument("--tokens", action="store_true", help="also show the image tokens in every layer")
