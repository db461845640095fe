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
from trips.quickstart.plan import GUIDES, QuickstartPlan, Scale
from trips.quickstart.report import draw_kept_patches, findings
from trips.quickstart.stages import build_model, fine_tune, warm_up
from trips.tasks.vqa import TripsForQuestionAnswering

logger = logging.getLogger("trips")

_TEXT_LENGTH = 10  # tokens of a typical question, for the count of operations


def run_quickstart(out: str | Path = "runs/quickstart", seed: int = 0, scale: Scale = "full") -> dict[str, Any]:
    """Warm up, fine-tune under every guide, evaluate, compare; writes results.json, kept_patches.png and the model.

    Args:
        out: folder to write to.
        seed: of weights, scenes and dropout.
        scale: "full" for the figures (minutes), "smoke" to see that everything runs (seconds).
    Returns:
        what results.json holds: ``environment``, ``seconds``, ``rows``, ``findings``.
    Raises:
        ConfigError: unknown scale. MissingDependencyError: accelerate or matplotlib is not installed.
    """
    out, plan, start = Path(out), QuickstartPlan.of(scale), time.perf_counter()
    rows, models, batcher = compare_guides(plan, seed, {guide: plan.selection(guide) for guide in GUIDES})
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
        "findings": findings(rows, plan),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def compare_guides(
    plan: QuickstartPlan, seed: int, selections: dict[str, SelectionConfig]
) -> tuple[list[dict[str, Any]], dict[str, tuple], SceneBatcher]:
    """Warm up once, then fine-tune and measure one copy per named selection.

    Args:
        plan: sizes and steps. seed: see `run_quickstart`.
        selections: `SelectionConfig` by the name of its row.
    Returns:
        the rows of the table, the models with their selections by name, the batcher.
    """
    warm, batcher = warmed_up_model(plan, seed)
    rows, models = [], {}
    for name, selection in selections.items():
        row, model = measured_row(name, warm, batcher, plan, selection, seed)
        rows.append(row)
        models[name] = (model, selection)
    speeds = throughput_of(models, batcher, plan.timing_rounds)
    for row in rows:
        row["throughput"] = speeds[row["guide"]]
    return rows, models, batcher


def warmed_up_model(
    plan: QuickstartPlan, seed: int, architecture: Architecture = "dual"
) -> tuple[TripsForQuestionAnswering, SceneBatcher]:
    """The model that every row starts from, and the scenes of the seed; a function of the arguments."""
    set_seed(seed)
    corpus = SceneCorpus(SceneConfig(), seed=seed)
    batcher = SceneBatcher(corpus, scene_processor(corpus))
    model, began = build_model(plan, batcher.processor, architecture), time.perf_counter()
    warm_up(model, batcher, plan, seed)
    logger.info("warm-up took %.0f s", time.perf_counter() - began)
    return model, batcher


def measured_row(
    name: str,
    warm: TripsForQuestionAnswering,
    batcher: SceneBatcher,
    plan: QuickstartPlan,
    selection: SelectionConfig,
    seed: int,
) -> tuple[dict[str, Any], TripsForQuestionAnswering]:
    """Fine-tune a copy of the warmed-up model with a selection and measure it: a row of the table, the model.

    The row depends on its arguments alone, not on the rows before it.
    """
    model, report = fine_tune(warm, batcher, plan, selection, seed)
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
