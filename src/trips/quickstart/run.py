"""The quick-start from beginning to end."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from trips.config import SelectionConfig
from trips.data.scene_batches import SceneBatcher, scene_processor
from trips.data.scenes import SceneConfig, SceneCorpus
from trips.environment import describe_environment
from trips.options import Architecture
from trips.quickstart.evaluation import evaluate_guide, flops_of, throughput_of
from trips.quickstart.page import write_quickstart_report
from trips.quickstart.plan import GUIDES, QuickstartPlan, Scale
from trips.quickstart.report import draw_kept_patches, findings
from trips.quickstart.stages import build_model, fine_tune, warm_up
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.run_report import keep_report
from trips.train.settings import TrainReport

logger = logging.getLogger("trips")

Losses = dict[str, list[tuple[int, float]]]
"""(step, loss) of the log lines by stage or guide."""

_TEXT_LENGTH = 10  # tokens of a typical question, for the count of operations


def run_quickstart(out: str | Path = "runs/quickstart", seed: int = 0, scale: Scale = "full") -> dict[str, Any]:
    """Warm up, fine-tune under every guide, evaluate, compare.

    Written are results.json, kept_patches.png, the model of the best text guide, and report.html, a page of it all.

    Args:
        out: folder to write to.
        seed: of weights, scenes and dropout.
        scale: "full" for the figures (minutes), "smoke" to see that everything runs (seconds).
    Returns:
        what results.json holds: ``environment``, ``seconds``, ``rows``, ``findings``, ``losses``.
    Raises:
        ConfigError: unknown scale. MissingDependencyError: accelerate or matplotlib is not installed.
    """
    out, plan, start = Path(out), QuickstartPlan.of(scale), time.perf_counter()
    losses: dict[str, Losses] = {"warm_up": {}, "fine_tuning": {}}
    rows, models, batcher = compare_guides(plan, seed, {guide: plan.selection(guide) for guide in GUIDES}, losses)
    best = max((row for row in rows if row["guide"].startswith("text_")), key=lambda row: row["accuracy"]["overall"])
    model, selection = models[best["guide"]]
    out.mkdir(parents=True, exist_ok=True)
    draw_kept_patches(
        model, batcher, selection, out / "kept_patches.png", f"{best['guide']}, keep rate {plan.keep_rate:g} twice"
    )
    model.save_pretrained(out / "model")
    batcher.processor.save_pretrained(out / "model")
    results = {
        "environment": describe_environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "seed": seed,
        "out": str(out),
        "rows": rows,
        "scale": scale,
        "findings": findings(rows, plan),
        "losses": losses,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    keep_report(lambda: write_quickstart_report(out))
    return results


def compare_guides(
    plan: QuickstartPlan, seed: int, selections: dict[str, SelectionConfig], losses: dict[str, Losses]
) -> tuple[list[dict[str, Any]], dict[str, tuple], SceneBatcher]:
    """Warm up once, then fine-tune and measure one copy per named selection.

    Args:
        plan: sizes and steps. seed: see `run_quickstart`.
        selections: `SelectionConfig` by the name of its row.
        losses: where to note those of the stages, "warm_up" and "fine_tuning".
    Returns:
        the rows of the table, the models with their selections by name, the batcher.
    """
    warm, batcher = warmed_up_model(plan, seed, losses=losses["warm_up"])
    rows, models = [], {}
    for name, selection in selections.items():
        row, model = measured_row(name, warm, batcher, plan, selection, seed, losses=losses["fine_tuning"])
        rows.append(row)
        models[name] = (model, selection)
    speeds = throughput_of(models, batcher, plan.timing_rounds)
    for row in rows:
        row["throughput"] = speeds[row["guide"]]
    return rows, models, batcher


def warmed_up_model(
    plan: QuickstartPlan, seed: int, architecture: Architecture = "dual", *, losses: Losses | None = None
) -> tuple[TripsForQuestionAnswering, SceneBatcher]:
    """The model that every row starts from, and the scenes of the seed; a function of the arguments.

    `losses` is where to note those of the stages.
    """
    set_seed(seed)
    corpus = SceneCorpus(SceneConfig(), seed=seed)
    batcher = SceneBatcher(corpus, scene_processor(corpus))
    model, began = build_model(plan, batcher.processor, architecture), time.perf_counter()
    stages = warm_up(model, batcher, plan, seed)
    if losses is not None:
        names = ["patch labels", *(f"words to patches, round {n}" for n in range(1, len(stages) - 1)), "all questions"]
        losses |= {name: _losses(stage) for name, stage in zip(names, stages, strict=True)}
    logger.info("warm-up took %.0f s", time.perf_counter() - began)
    return model, batcher


def measured_row(
    name: str,
    warm: TripsForQuestionAnswering,
    batcher: SceneBatcher,
    plan: QuickstartPlan,
    selection: SelectionConfig,
    seed: int,
    *,
    losses: Losses | None = None,
) -> tuple[dict[str, Any], TripsForQuestionAnswering]:
    """Fine-tune a copy of the warmed-up model with a selection and measure it: a row of the table, the model.

    The row depends on its arguments alone, not on the rows before it. `losses` is where to note those of the tuning.
    """
    model, report = fine_tune(warm, batcher, plan, selection, seed)
    if losses is not None:
        losses[name] = _losses(report)
    measured = evaluate_guide(
        model, batcher, selection, plan.test_scenes, plan.test_questions, seed, first_scene=plan.first_scene
    )
    logger.info("%s: %.1f %% after %.0f s", name, 100 * measured["accuracy"]["overall"], report.seconds)
    row = {
        "guide": name,
        "keep_rates": list(selection.rates) if selection.active else [1.0] * len(selection.layers),
        **measured,
        "flops_g": flops_of(model, selection, _TEXT_LENGTH, batcher.side),
        "train_seconds": round(report.seconds, 1),
    }
    return row, model


def _losses(report: TrainReport) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in report.history if line["kind"] == "train"]
