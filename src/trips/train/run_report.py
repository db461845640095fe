"""report.html of a run: what it was, how it went, what came out, read from the files in its folder.

Every part may be absent, as in a run that was interrupted or is of an earlier version; the page then says so.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trips.errors import CheckpointError, ConfigError, TripsError
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.report.charts import number
from trips.report.page import (
    Bars,
    Block,
    Code,
    Note,
    Page,
    Section,
    Table,
    named_values,
    read_json,
    share,
    told,
    write_page,
)
from trips.saved import MODEL_FOLDER, open_saved
from trips.train.monitor import METRICS_FILE
from trips.train.recipe import Recipe
from trips.train.recipe_io import load_known_keys, recipe_values
from trips.train.recipe_origin import command_of, launcher, nearest_recipe
from trips.train.run_curves import Row, clock, cost_curves, lines_of, read_metrics, training_curves
from trips.train.run_examples import find_examples

logger = logging.getLogger("trips")

RECIPE_FILE, RESULTS_FILE, REPORT_FILE = "recipe.yaml", "results.json", "report.html"

# Shares among the results that are drawn as bars, and what they mean.
_SHARES = {
    "accuracy": "of the test data",
    "accuracy_blank_images": "the same without looking: what language alone reaches",
    "majority": "always giving what the training data say most often",
    "chance": "guessing",
    "answer_coverage": "questions with an answer among the candidates: no ranking can be better",
    "consistency": "sentences judged rightly beside all their images",
    "consistency_permutations": "statements judged rightly in all orders of their images",
    "mean_recall": "mean of R@1, R@5 and R@10 in both directions",
}
_APART = ("environment", "recipe", "bad_samples")  # of the results: have sections of their own


def write_run_report(
    run_dir: str | os.PathLike[str],
    model: TripsPreTrainedModel | None = None,
    processor: TripsProcessor | None = None,
    *,
    num_examples: int = 8,
) -> Path:
    """Write report.html into a run's folder, anew where there is one.

    Args:
        run_dir: output folder of `run_recipe`, finished or not.
        model, processor: those of the run where they are at hand; else they are opened from the folder.
        num_examples: test samples to show with what is kept of them, as many right as wrong ones where there are; 0
            leaves the model alone.
    Returns:
        The file.
    Raises:
        CheckpointError: no run's folder, results that are not JSON, a file that cannot be written.
        ConfigError: the recipe there cannot be read, but for unknown keys; a negative number of examples.
    """
    run_dir = Path(run_dir)
    if not (run_dir / RECIPE_FILE).is_file():
        raise CheckpointError("is not the folder of a run", item=run_dir, expected=f"{RECIPE_FILE} in it")
    if num_examples < 0:
        raise ConfigError("too small", item="examples", found=num_examples, expected="0 or more")
    recipe, unknown = load_known_keys(run_dir / RECIPE_FILE)
    results = read_json(run_dir / RESULTS_FILE)
    rows = read_metrics(run_dir / METRICS_FILE)
    examples: list[Block] = [Note("Examples were not asked for.")]
    if num_examples:
        examples = _examples(recipe, run_dir, model, processor, num_examples)
    page = Page(
        title=f"{recipe.task} run {run_dir.resolve().name}",
        purpose=recipe.purpose,
        status=_status(results, rows),
        facts=tuple(_facts(recipe, results, rows)),
        sections=(
            Section("Results", tuple(_outcome(results))),
            Section("Examples", tuple(examples)),
            Section("Training", tuple(training_curves(recipe, rows, ended=results is not None))),
            Section("Throughput and memory", tuple(cost_curves(results, rows))),
            Section("Configuration", tuple(_configuration(recipe, unknown, run_dir))),
            Section("Environment", tuple(_environment(results))),
            Section("To repeat it", tuple(_repeat(recipe, unknown, results, run_dir))),
        ),
    )
    return write_page(page, run_dir / REPORT_FILE)


def keep_report(write: Callable[[], Path]) -> None:
    """Write a page at the end of a run, which no mistake in a page may spoil: it is logged."""
    try:
        path = write()
    except Exception as error:
        logger.warning("no %s was written: %s: %s", REPORT_FILE, type(error).__name__, error)
    else:
        logger.info("report: %s", path)


def _status(results: Mapping[str, Any] | None, rows: Sequence[Row]) -> str:
    continued = [int(row["resumed_from"]) for row in rows if number(row.get("resumed_from")) is not None]
    told_of = f" It was interrupted and went on from step {', '.join(map(str, continued))}." if continued else ""
    if results is None:
        last = f" The last line of its log is of step {rows[-1]['step']}." if rows else ""
        return f"This run has not ended: {RESULTS_FILE} is not there.{last}{told_of}"
    date = _part(results, "environment").get("date")
    return f"The run has ended{f' on {date}' if date else ''}.{told_of}"


def _facts(recipe: Recipe, results: Mapping[str, Any] | None, rows: Sequence[Row]) -> list[tuple[str, str]]:
    results, train = results or {}, lines_of(rows, "train")
    facts = []
    headlines = [(name, value) for name, value, _ in _shares(results) if name.endswith(("accuracy", "mean recall"))]
    facts += [(name, share(value)) for name, value in headlines if not name.startswith("untrained")][:3]
    selection = recipe.model.selection
    rates = ", ".join(f"{rate:g}" for rate in selection.rates)
    facts.append(("selection", f"{selection.guide} guide, keep {rates}" if selection.active else "none: all patches"))
    facts.append(("steps", told(results.get("steps", train[-1]["step"] if train else None))))
    if train and (seconds := clock(train)) is not None:
        facts.append(("from first to last log line", seconds))
    if skipped := results.get("skipped_steps"):
        facts.append(("steps left out (not finite)", told(skipped)))
    if device := _part(results, "environment").get("device"):
        facts.append(("device", str(device)))
    return facts


def _outcome(results: Mapping[str, Any] | None) -> list[Block]:
    if results is None:
        return [Note(f"Results are written when a run ends; {RESULTS_FILE} is not there.")]
    blocks: list[Block] = []
    if bars := _shares(results):
        blocks.append(Bars(tuple(bars)))
    shown = {name: value for name, value in results.items() if name not in _APART}
    blocks.append(Table(tuple(named_values(shown)), title="all figures", folded=len(bars) > 1))
    bad = _part(results, "bad_samples")
    if bad.get("count"):
        named = tuple((str(name), str(reason)) for name, reason in _part(bad, "named").items())
        blocks.append(Table(named, title=f"{bad['count']} bad samples", folded=True))
    return blocks


def _shares(results: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float, str]]:
    """Those of `_SHARES` with what they mean, also in nested figures: "first stage: mean recall"."""
    named = [(name, number(results.get(name)), means) for name, means in _SHARES.items()]
    found = [(f"{prefix}{name.replace('_', ' ')}", value, means) for name, value, means in named if value is not None]
    for name, inner in results.items():
        if isinstance(inner, Mapping) and name not in _APART:
            found += _shares(inner, f"{prefix}{name.replace('_', ' ')}: ")
    return found


def _examples(
    recipe: Recipe, run_dir: Path, model: TripsPreTrainedModel | None, processor: TripsProcessor | None, count: int
) -> list[Block]:
    """Cards, or why there are none: a page without them is better than none."""
    try:
        if model is None or processor is None:
            if not (run_dir / MODEL_FOLDER).is_dir():
                return [Note(f"There are no examples: no {MODEL_FOLDER} in the folder; a run writes it at its end.")]
            saved = open_saved(run_dir)
            model, processor = saved.model, saved.processor
        found, note = find_examples(recipe, run_dir, model, processor, count)
    except TripsError as error:
        return [Note(f"There are no examples: {error}")]
    return [*([Note(note)] if note else []), *found]


def _configuration(recipe: Recipe, unknown: Sequence[str], run_dir: Path) -> list[Block]:
    name, differing = nearest_recipe(recipe)
    blocks: list[Block] = [Note(f"The nearest packaged recipe is {name}.")]
    if unknown:
        blocks.append(Note(f"This version does not know these keys of {RECIPE_FILE}: {', '.join(unknown)}."))
    if differing:
        rows = tuple((key, told(theirs), told(ours)) for key, (theirs, ours) in differing.items())
        blocks.append(Table(rows, ("key", name, "this run"), title="What differs"))
    else:
        blocks.append(Note("Every key has its value."))
    every = tuple((key, told(value)) for key, value in recipe_values(recipe).items())
    blocks.append(Table(every, ("key", "value"), title="Every key of the resolved recipe", folded=True))
    blocks.append(Code(_read(run_dir / RECIPE_FILE), title=RECIPE_FILE, folded=True))
    return blocks


def _environment(results: Mapping[str, Any] | None) -> list[Block]:
    environment = _part(results, "environment")
    if not environment:
        return [Note("Hardware and versions are written when a run ends; there is no record of them.")]
    return [Table(tuple(named_values(environment)))]


def _repeat(recipe: Recipe, unknown: Sequence[str], results: Mapping[str, Any] | None, run_dir: Path) -> list[Block]:
    environment = _part(results, "environment")
    commit, processes = environment.get("commit"), environment.get("processes")
    where = f" The code was that of commit {commit}." if commit else ""
    if unknown:
        return [Note(f"Only the version that made it knows its whole recipe.{where}")]
    blocks: list[Block] = []
    count = processes if isinstance(processes, int) else 1
    out = f"{Path(recipe.run.out)}_again"  # of "runs/a/", too, it is a folder beside it
    fresh = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, out=out))
    if command := command_of(fresh, count):
        blocks.append(Code(command))
    words = [str(run_dir / RECIPE_FILE), f"--run.out={out}"]
    blocks.append(Code(f"{launcher(count)} {shlex.join(words)}", title="or from its own file"))
    blocks.append(Note(f"Both start anew in another folder; data paths count from the working directory.{where}"))
    if count > 1:
        blocks.append(Note(f"It ran as {count} processes, which share each batch; here they are on one machine."))
    return blocks


def _part(values: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What stands under a name in a file; empty where there is nothing of that kind."""
    part = (values or {}).get(name)
    return part if isinstance(part, Mapping) else {}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
