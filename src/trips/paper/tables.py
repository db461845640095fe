"""Tables 3 to 7 of the paper beside what this library counts and measures; tables 1 and 2 beside a user's own runs.

Operations stand twice: in the paper's convention, for the locations that reproduce the printed figure, and exactly, for
the locations as printed. Accuracies come from any `AccuracySource`, times from this machine: both are measured under
`trips.paper.cells`, so that a sweep can be interrupted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import CLIPVisionConfig

from trips.bench.convention import paper_convention_g
from trips.bench.flops import count_flops
from trips.config import TripsConfig
from trips.environment import describe_environment
from trips.errors import ConfigError
from trips.paper.cells import CellStore, Figures, Swept, sweep
from trips.paper.published import TEXT_LENGTH, PublishedRow, baseline_of, published_table
from trips.paper.remarks import REMARKS, UNEXPLAINED
from trips.paper.saved_runs import SavedRun, figures_of_runs
from trips.paper.settings import AccuracySource, Setting

if TYPE_CHECKING:
    from torch import nn

    from trips.paper.speed import SpeedSource

TOLERANCE = 0.02
"""Largest difference, in units of 1e9, at which a count reproduces a printed figure."""
_PATCH = 16  # pixels of the paper's tower
SPEED_FIGURES = ("throughput", "throughput_ratio", "latency_ms", "latency_ratio")


@dataclass(frozen=True)
class TableRow:
    """A row: the paper's figures and ours.

    Attributes:
        name: as in `PublishedRow`; of a run on other data, the model and the run's folder.
        setting: what it stands for, None for models of others and in tables 1 and 2.
        paper: printed figures by key, and ``throughput_ratio``, the printed throughput over that of the baseline.
        ours: ``convention_g``, ``convention_layers`` (that `convention_g` is for), ``convention_fits``, ``exact_g``,
            ``exact_speedup`` (exact operations of the baseline over the row's); where measured, ``throughput`` (pairs
            per second at the largest batch), ``latency_ms`` (of the smallest batch) with their ratios to the
            baseline, above 1 where faster; ``accuracy`` (mean over the seeds), ``accuracy_sd`` (None for one seed),
            ``accuracy_by_seed``. In tables 1 and 2 the keys of the paper, or ``own_data.`` and a key.
        unexplained: why no count reproduces the printed operations; None where one does.
    """

    name: str
    setting: Setting | None = None
    paper: dict[str, float | None] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    unexplained: str | None = None


@dataclass(frozen=True)
class TableResult:
    """A table of the paper beside ours.

    Attributes:
        number, title: of the table.
        rows: in the order of the paper.
        remarks: what the paper's rows do not agree on, and what ours need.
        accuracy: what ours is called and its unit; None where none was asked for.
        speed: how ours was timed; None where it was not.
        failures: cells that failed, with their error.
        environment: hardware, versions, commit and date of this process.
        measured_on: hardware, versions and commit of every cell that was measured: one, unless a sweep has gone on
            elsewhere.
    """

    number: int
    title: str
    rows: tuple[TableRow, ...]
    remarks: tuple[str, ...]
    accuracy: str | None = None
    speed: str | None = None
    failures: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    measured_on: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every cell that was asked for has been measured."""
        return not self.failures


def paper_table(number: int, runs: Sequence[str] = ()) -> TableResult:
    """A table with all that can be had without measuring.

    Args:
        number: 1 to 7.
        runs: folders of finished runs whose figures fill tables 1 and 2.
    Raises:
        ConfigError: no such table; runs for another than tables 1 and 2; see `figures_of_runs` for what runs raise.
    """
    table = published_table(number)
    if number > 2 and runs:
        raise ConfigError("finished runs fill tables 1 and 2 alone", item="runs", found=f"table {number}")
    rows = [_counted(number, row, baseline_of(table, row)) for row in table.rows]
    if runs:
        rows = _with_runs(rows, figures_of_runs(number, runs))
    return TableResult(number, table.title, tuple(rows), REMARKS[number], environment=describe_environment())


def with_accuracy(
    result: TableResult, source: AccuracySource, store: CellStore, seeds: Sequence[int] = (0,)
) -> TableResult:
    """A table with accuracies of a source, as far as they are not stored already.

    Args:
        result: of tables 4 to 7.
        source: trains and measures. store: its finished cells. seeds: each trains every row anew.
    Raises:
        ConfigError: a table that has no accuracies to be reproduced, or no seeds.
    """
    check_accuracy(result.number, seeds)
    swept = sweep(source.measure, store, _settings(result), seeds, "accuracy")
    return _joined(result, swept, _summary, accuracy=f"{source.name}: {source.unit}")


def check_accuracy(number: int, seeds: Sequence[int]) -> None:
    """Raise `ConfigError` for a table that has no accuracies to be reproduced, or no seeds."""
    if number < 4:
        raise ConfigError("only tables 4 to 7 compare settings by accuracy", item="accuracy", found=number)
    if not seeds:
        raise ConfigError("needs at least one", item="seeds", found=list(seeds))


def with_speed(result: TableResult, source: SpeedSource, store: CellStore) -> TableResult:
    """A table with throughput and latency on this machine, as far as they are not stored already.

    Raises:
        ConfigError: tables 1 and 2, which have no settings to be timed.
    """
    if result.number < 3:
        raise ConfigError("only tables 3 to 7 have settings to be timed", item="speed", found=result.number)
    swept = sweep(source.measure, store, _settings(result), (0,), "throughput_ratio")
    return _joined(result, swept, _times, speed=source.name)


def speed_source(number: int, batch_sizes: Sequence[int] = (1, 4), rounds: int = 3) -> SpeedSource:
    """What times the rows of one of tables 3 to 7 on the paper's model with random weights; see `SpeedSource`.

    Raises:
        ConfigError: no such table; see `SpeedSource`.
    """
    from trips.paper.speed import SpeedSource

    table = published_table(number)
    baselines = {row.setting: baseline_of(table, row).setting for row in table.rows if row.setting is not None}
    return SpeedSource(baselines.__getitem__, _random_model, batch_sizes, rounds)


def exact_g(setting: Setting, text_length: int = TEXT_LENGTH) -> float:
    """Exact operations of a pair through the paper's model under a setting, in units of 1e9 (see `count_flops`)."""
    side = round(setting.image_size * setting.scale) // _PATCH
    return count_flops(paper_config(setting), (side, side), text_length, setting.selection).total


def paper_config(setting: Setting) -> TripsConfig:
    """The paper's model: ViT-B/16 and BERT-base cut into 6 + 6 layers, or one stack of 12 for TRIPS-S."""
    return TripsConfig(
        vision_config=CLIPVisionConfig(patch_size=_PATCH, image_size=setting.image_size),
        architecture=setting.architecture,
    )


def _random_model(setting: Setting) -> nn.Module:
    from trips.single_stream import build_encoder  # only what times a model needs one

    return build_encoder(paper_config(setting))


def _counted(number: int, row: PublishedRow, baseline: PublishedRow) -> TableRow:
    setting = row.setting
    if setting is None:
        return TableRow(row.name, None, dict(row.figures))
    exact, printed = exact_g(setting), row.figures["flops_g"]
    ours: dict[str, Any] = {"exact_g": exact, "exact_speedup": exact_g(baseline.setting) / exact}
    if setting.architecture == "dual":  # there is no convention for the other: none fits
        selection = setting.selection
        layers = selection.layers if selection.active else ()
        layers = layers if row.convention_locations is None else row.convention_locations
        rate = selection.rates[0] if selection.active else 1.0
        counted = paper_convention_g(setting.image_size, layers, rate, fuse=selection.inattentive != "drop")
        ours |= {"convention_g": counted, "convention_layers": list(layers)}
        ours["convention_fits"] = abs(counted - printed) <= TOLERANCE
    ratio = {"throughput_ratio": row.figures["throughput"] / baseline.figures["throughput"]}
    return TableRow(
        setting.name, setting, {**row.figures, **ratio}, ours, None if row.explained else UNEXPLAINED[number, row.name]
    )


def _with_runs(rows: Sequence[TableRow], runs: Sequence[SavedRun]) -> list[TableRow]:
    """Ours in the rows of their models, and below them what was measured on other data."""
    known = {row.name: dict(row.ours) for row in rows}
    others: list[TableRow] = []
    for run in runs:
        if run.on_paper_data and run.model in known:
            if twice := known[run.model].keys() & run.figures:
                raise ConfigError(f"{run.model} has {min(twice)} already, from another run", item=run.folder)
            known[run.model] |= run.figures
        else:
            prefix = "" if run.on_paper_data else "own_data."
            others.append(
                TableRow(f"{run.model}, {run.folder}", ours={f"{prefix}{key}": v for key, v in run.figures.items()})
            )
    return [TableRow(row.name, row.setting, row.paper, known[row.name]) for row in rows] + others


def _settings(result: TableResult) -> list[Setting]:
    return [row.setting for row in result.rows if row.setting is not None]


def _summary(rows: dict[int, Figures]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample) of the seeds."""
    values = {str(seed): rows[seed]["accuracy"] for seed in sorted(rows)}
    spread = statistics.stdev(values.values()) if len(values) > 1 else None
    return {"accuracy": statistics.fmean(values.values()), "accuracy_sd": spread, "accuracy_by_seed": values}


def _times(rows: dict[int, Figures]) -> dict[str, float]:
    return {name: rows[0][name] for name in SPEED_FIGURES}


def _joined(
    result: TableResult, swept: Swept, summary: Callable[[dict[int, Figures]], dict[str, Any]], **changes: Any
) -> TableResult:
    """The table with what a sweep found, one row's seeds summed up by `summary`."""
    rows = []
    for row in result.rows:
        figures = swept.figures.get(row.name) if row.setting else None
        ours = row.ours | (summary(figures) if figures else {})
        rows.append(TableRow(row.name, row.setting, row.paper, ours, row.unexplained))
    kept = {name: getattr(result, name) for name in ("number", "title", "remarks", "environment", "accuracy", "speed")}
    kept["measured_on"] = tuple(dict.fromkeys((*result.measured_on, *swept.environments)))
    return TableResult(**{**kept, **changes}, rows=tuple(rows), failures={**result.failures, **swept.failures})
