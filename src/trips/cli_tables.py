"""Set the paper's tables beside one's own figures: trips table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import RenderableType

from trips.errors import ConfigError, MissingDependencyError

logger = logging.getLogger("trips")


def table(
    number: int,
    overrides: Sequence[str] = (),
    *,
    accuracy: str | None = None,
    seeds: list[int] | None = None,
    speed: bool = False,
    batch_sizes: list[int] | None = None,
    rounds: int = 3,
    runs: list[str] | None = None,
    out: str | None = None,
    as_json: bool = False,
) -> Any:
    """Show a table of the paper, 1 to 7, beside what is counted here and, if asked for, measured here.

    Operations of tables 3 to 7 are counted at once. --accuracy and --speed measure every row; what is finished is
    stored, so that the same command goes on after an interruption and tries again what has failed. What an earlier
    command has measured into the same folder, and this one does not, stays in the table. Any key of the recipe that
    --accuracy names can be replaced: --data.train=... --optim.steps=100.

    Args:
        number: of the table.
        overrides: keys of the recipe to replace.
        accuracy: data to train and measure every row of tables 4 to 7 on: "scenes" for generated ones, or a recipe.
        seeds: each trains every row anew; 0 if none is given.
        speed: also time every row of tables 3 to 7 on this machine, beside the row without selection.
        batch_sizes: pairs at once for --speed: latency is that of the smallest, throughput that of the largest; 1 and 4
            if none are given.
        rounds: calls of each side that are timed.
        runs: output folders of "trips train" whose results fill tables 1 and 2.
        out: folder for table.md, rows.json, plots and what is measured; runs/table_NUMBER if something is measured.
        as_json: print one JSON object for machines.
    """
    from trips.paper.cells import CellStore
    from trips.paper.on_record import with_record
    from trips.paper.table_text import write_table
    from trips.paper.tables import check_accuracy, paper_table, speed_source, with_accuracy, with_speed

    if overrides and (accuracy is None or accuracy == "scenes"):
        raise ConfigError("replaces a key of a recipe, and none is named", item=overrides[0], hint="--accuracy=RECIPE")
    result = paper_table(number, runs or ())
    folder = Path(out if out is not None else f"runs/table_{number}")
    trained = None
    if accuracy is not None:  # its mistakes show before anything is timed
        seeds = [0] if seeds is None else seeds
        check_accuracy(number, seeds)
        trained, key = _accuracy_source(accuracy, folder, overrides)
    if speed:
        source = speed_source(number, batch_sizes or (1, 4), rounds)
        result = with_speed(result, source, CellStore(folder / "cells", source.key))
    if trained is not None:
        result = with_accuracy(result, trained, CellStore(folder / "cells", key), seeds)
    if out is not None or speed or accuracy is not None:
        result = with_record(result, folder)
        write_table(result, folder)
        _draw(result, folder)
        logger.info("written to %s", folder)
    return result


VERBS: dict[str, Callable[..., Any]] = {"table": table}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`; lists as words, not as YAML."""
    command.add_argument("number", type=int, metavar="NUMBER", help="of the table, 1 to 7")
    words = 'data to train and measure every row of tables 4 to 7 on: "scenes" for generated ones, or a recipe'
    command.add_argument("--accuracy", type=str, metavar="RECIPE", help=words)
    words = "each trains every row anew; 0 if none is given"
    command.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=words)
    words = "also time every row of tables 3 to 7 on this machine, beside the row without selection"
    command.add_argument("--speed", action="store_true", help=words)
    words = "pairs at once: latency is that of the smallest, throughput that of the largest; 1 and 4 if none are given"
    command.add_argument("--batch_sizes", type=int, nargs="+", metavar="B", help=words)
    command.add_argument("--rounds", type=int, default=3, help="calls of each side that are timed")
    words = 'output folders of "trips train" whose results fill tables 1 and 2'
    command.add_argument("--runs", type=str, nargs="+", metavar="RUN_DIR", help=words)
    words = "folder for table.md, rows.json, plots and cells; runs/table_NUMBER if something is measured"
    command.add_argument("--out", type=str, metavar="DIR", help=words)


def render(name: str, result: Any) -> RenderableType:
    """What a verb has found as a table for people."""
    from trips.paper.table_text import rich_table

    return rich_table(result)


def _accuracy_source(name: str, folder: Path, overrides: Sequence[str]) -> tuple[Any, str]:
    """The source of accuracies by its name, and what its stored figures depend on."""
    if name == "scenes":
        from trips.quickstart.sweep import SceneAccuracy

        source = SceneAccuracy(folder / "scenes")
        return source, f"scenes {source.plan!r}"
    from trips.recipe_accuracy import RecipeAccuracy

    trained = RecipeAccuracy(name, folder / "runs", overrides)
    return trained, trained.key


def _draw(result: Any, folder: Path) -> None:
    from trips.paper.plots import draw_table

    try:
        draw_table(result, folder)
    except MissingDependencyError as error:  # the figures are written: a missing picture does not undo them
        logger.warning("no plots: %s", error)
