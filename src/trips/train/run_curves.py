"""Curves of a run from its log: losses, learning rates, keep rates, throughput, memory.

An interrupted run that went on has one log, so its curves are one; where it went on is marked.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trips.report.charts import MOST_SERIES, Chart, Series, number
from trips.report.page import Block, Note, Table, told
from trips.train.monitor import METRICS_FILE, lines_until
from trips.train.recipe import Recipe
from trips.train.schedule import SelectionSchedule

Row = Mapping[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """Lines of metrics.jsonl in the order of their steps; a half-written one is left out."""
    rows = [json.loads(line) for line in lines_until(path, sys.maxsize)]
    return sorted((row for row in rows if number(row["step"]) is not None), key=lambda row: row["step"])


def lines_of(rows: Sequence[Row], kind: str) -> list[Row]:
    """The lines of a log that are of one kind, "train" or what `Monitor` writes beside it."""
    return [row for row in rows if row.get("kind") == kind]


def _series(rows: Sequence[Row], name: str) -> Series:
    return Series(name, tuple((row["step"], number(row.get(name))) for row in rows if name in row))


def _named(rows: Sequence[Row], choose: Callable[[str], bool]) -> list[str]:
    """Names in the log lines that are wanted, in the order of their first."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if choose(name)]


def clock(rows: Sequence[Row]) -> str | None:
    """Time from the first line to the last, for people; None without two of them."""
    times = [time for row in rows if (time := number(row.get("time"))) is not None]
    if len(times) < 2:
        return None
    seconds = round(max(times) - min(times))
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def training_curves(recipe: Recipe, rows: Sequence[Row], *, ended: bool = True) -> list[Block]:
    """Losses, learning rates, keep rates and evaluations, or a word where there are none.

    Args:
        ended: whether the log is whole, so that its last step is the run's.
    """
    train = lines_of(rows, "train")
    if not train:
        return [Note(f"There are no curves: {METRICS_FILE} is not there, or has no line of training.")]
    marks = tuple(
        (row["resumed_from"], f"interrupted; went on from step {row['resumed_from']}")
        for row in train
        if number(row.get("resumed_from")) is not None
    )
    losses = _named(train, lambda name: name.startswith("loss"))
    if len(losses) == 2 and _series(train, losses[0]).points == _series(train, losses[1]).points:
        losses = losses[:1]  # a task with one loss logs it twice, as the whole and as its part
    charts = [Chart(name.replace("loss_", "loss: "), (_series(train, name),), marks=marks) for name in losses]
    rates = _named(train, lambda name: name == "lr" or name.endswith("_lr"))
    charts.append(
        Chart(
            "learning rate", tuple(_series(train, name) for name in rates[:MOST_SERIES]), includes=(0.0,), marks=marks
        )
    )
    # How long a run in epochs was to be, and with it the schedule, only its end tells.
    scheduled = ended or recipe.optim.steps is not None or not recipe.schedule.keep_rate_warmup
    if scheduled:
        charts.append(_keep_rates(recipe, int(train[-1]["step"])))
    evaluations = lines_of(rows, "evaluation")
    measured = _named(evaluations, lambda name: name not in ("kind", "step", "time", "resumed_from"))
    charts += [Chart(f"evaluation: {name}", (_series(evaluations, name),), marks=marks) for name in measured]
    charts = [chart for chart in charts if chart.drawn]
    lines: list[Block] = [*charts]
    if not scheduled:
        lines.append(Note("Keep rates are not drawn: how many steps the run was to have is not in its log."))
    if marks:
        lines.append(Note("A dotted upright line is where the run was interrupted and went on."))
    return lines


def _keep_rates(recipe: Recipe, last: int) -> Chart:
    """What the recipe's schedule asked for, a function of the step alone; layers with the same rates share a curve."""
    steps = recipe.optim.steps or last  # of a run in epochs the log knows the number
    schedule = SelectionSchedule(
        recipe.model.selection,
        max(steps, last),
        recipe.schedule.keep_rate_warmup,
        recipe.schedule.levels,
        recipe.schedule.distill_every,
    )
    layers = recipe.model.selection.layers if recipe.model.selection.active else ()
    gaps, warmup = schedule.levels - 1, schedule.warmup_steps
    rises = (math.ceil(level * warmup / gaps) for level in range(1, gaps + 1))  # the first step of each level
    turns = sorted({0, last, *(step for step in rises if 0 < step < last)})
    rates = [(step, schedule.at(max(0, min(step, last - 1)))[0].rates) for step in turns]
    curves: dict[tuple[tuple[float, float | None], ...], list[int]] = {}
    for place, layer in enumerate(layers):
        curves.setdefault(tuple((step, float(rate[place])) for step, rate in rates), []).append(layer)
    series = (
        Series(f"layer{'s' if len(same) > 1 else ''} {', '.join(map(str, same))}", points, steps=True)
        for points, same in curves.items()
    )
    return Chart("keep rate", tuple(series), includes=(0.0, 1.0))


def cost_curves(results: Mapping[str, Any] | None, rows: Sequence[Row]) -> list[Block]:
    """Throughput and memory: samples a second, share of the peak, MiB, and what the results say of the whole run."""
    train, blocks = lines_of(rows, "train"), []
    titles = {
        "samples_per_second": "samples per second",
        "mfu": "share of the device's peak (MFU)",
        "peak_memory_mib": "peak memory so far, MiB",
    }
    for name, title in titles.items():
        chart = Chart(title, (_series(train, name),), includes=(0.0,))
        if chart.drawn:
            blocks.append(chart)
    facts = []
    for name, words in (("samples_per_second", "samples per second, whole last call"), ("seconds", "its seconds")):
        if results is not None and (value := number(results.get(name))) is not None:
            facts.append((words, told(value)))
    if facts:
        blocks.append(Table(tuple(facts)))
    return blocks or [Note("Neither the log nor the results have figures of speed and memory.")]
