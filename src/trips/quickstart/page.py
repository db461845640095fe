"""report.html of a quick-start: the table with what it means, losses, and a test scene under several questions."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trips.data.scene_batches import SceneBatcher, scene_processor
from trips.data.scenes import ANSWERS, QUESTION_TYPES, SceneConfig, SceneCorpus
from trips.errors import CheckpointError, TripsError
from trips.explanation import explain_texts
from trips.quickstart.plan import QuickstartPlan
from trips.quickstart.report import pictured
from trips.report.charts import MOST_SERIES, Chart, Series
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
from trips.report.pictures import Example, Picture
from trips.saved import MODEL_FOLDER, open_saved
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.run_report import REPORT_FILE, RESULTS_FILE


def write_quickstart_report(out: str | os.PathLike[str]) -> Path:
    """Write report.html beside the results of a quick-start, anew where there is one.

    Args:
        out: folder that `run_quickstart` wrote to.
    Raises:
        CheckpointError: not such a folder, results that are not JSON or not of a quick-start, a file that cannot be
            written.
    """
    out = Path(out)
    results = read_json(out / RESULTS_FILE)
    if not _has_rows(results):
        raise CheckpointError("is not the folder of a quick-start", item=out, expected=f"its {RESULTS_FILE}")
    try:
        page = _page(out, results)
    except TripsError:  # some are ValueErrors
        raise
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "is not what a quick-start writes", item=out / RESULTS_FILE, found=f"{type(error).__name__}: {error}"
        ) from error
    return write_page(page, out / REPORT_FILE)


def _page(out: Path, results: Mapping[str, Any]) -> Page:
    return Page(
        title=f"quick-start {out.resolve().name}",
        purpose="a small model on generated scenes: every guide fine-tunes a copy of one warmed-up model",
        status=f"Written on {(results.get('environment') or {}).get('date', 'an unknown day')}.",
        facts=(
            ("best text guide", _best(results["rows"])["guide"]),
            ("its accuracy", share(_best(results["rows"])["accuracy"]["overall"])),
            ("seconds", told(results.get("seconds"))),
            ("device", str((results.get("environment") or {}).get("device", "-"))),
        ),
        sections=(
            Section("Results", tuple(_outcome(results))),
            Section("Examples", tuple(_examples(out, int(results.get("seed", 0))))),
            Section("Training", tuple(_curves(results.get("losses")))),
            Section("Configuration", tuple(_plan(results))),
            Section("Environment", (Table(tuple(named_values(results.get("environment") or {}))),)),
            Section("To repeat it", (Code(_command(results)),)),
        ),
    )


def is_quickstart(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds the results of a quick-start; raises `CheckpointError` for results that are not JSON."""
    return _has_rows(read_json(Path(folder) / RESULTS_FILE))


def _has_rows(results: Mapping[str, Any] | None) -> bool:
    return bool(results) and {"rows", "findings"} <= set(results)


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max((row for row in rows if row["guide"].startswith("text_")), key=lambda row: row["accuracy"]["overall"])


def _outcome(results: Mapping[str, Any]) -> list[Block]:
    rows = results["rows"]
    bars = tuple(
        (row["guide"], row["accuracy"]["overall"], f"keeps {' x '.join(told(rate) for rate in row['keep_rates'])}")
        for row in rows
    )
    last = list(rows[0]["relevance_recall"])[-1]
    head = ("guide", *QUESTION_TYPES, "recall", "gain", "GFLOPs", "pairs/s")
    table = tuple(
        (
            row["guide"],
            *(share(row["accuracy"][kind]) if kind in row["accuracy"] else "-" for kind in QUESTION_TYPES),
            *(told(row[name][last]) for name in ("relevance_recall", "relevance_gain")),
            told(row["flops_g"]),
            told(row["throughput"]),
        )
        for row in rows
    )
    recall = f"Recall: relevant patches kept behind layer {last}; gain: beyond what another scene's question keeps."
    return [Bars(bars), Table(table, head, title="Accuracy by type of question"), Note(recall),
            *map(Note, results["findings"])]  # fmt: skip


def _examples(out: Path, seed: int) -> list[Block]:
    """The scene of `pictured` with what the saved model says; its scenes follow from the seed alone."""
    if not (out / MODEL_FOLDER).is_dir():
        return [Note(f"There are no examples: no {MODEL_FOLDER} in the folder.")]
    try:
        saved = open_saved(out)
        corpus = SceneCorpus(SceneConfig(), seed=seed)
        return [*_shown(saved.model, SceneBatcher(corpus, scene_processor(corpus)))]
    except TripsError as error:
        return [Note(f"There are no examples: {error}")]


@torch.no_grad()
def _shown(model: TripsForQuestionAnswering, batcher: SceneBatcher) -> list[Example]:
    scene, questions = pictured(batcher.corpus)
    texts = [question.text for question in questions]
    explained = explain_texts(model, batcher.processor, scene.image, texts, name="scene")
    encoded = batcher.processor(text=texts).to(model.device)
    inputs = {**encoded, "image_index": torch.zeros_like(encoded["input_ids"][:, 0])}
    output = model(pixel_values=batcher.pixels([scene]).to(model.device), **inputs)
    candidates = batcher.processor.encode_answers(list(ANSWERS)).to(model.device)
    ranked, _ = model.rank_answers(
        output.question_states, inputs["attention_mask"], candidates["input_ids"], candidates["attention_mask"], 8
    )
    return [
        Example(
            (Picture.of(one),),
            (("question", question.text), ("said", ANSWERS[best]), ("true", question.answer)),
            float(ANSWERS[best] == question.answer),
            question.type,
        )
        for one, question, best in zip(explained, questions, ranked[:, 0].tolist(), strict=True)
    ]


def _curves(losses: Mapping[str, Any] | None) -> list[Block]:
    """One chart of each warm-up stage, one of all guides."""
    if not losses:
        return [Note("There are no curves: results of this version of the quick-start have no losses.")]
    charts = [
        Chart(f"loss: {stage}", (Series("loss", tuple(map(tuple, points))),))
        for stage, points in losses.get("warm_up", {}).items()
    ]
    guides = losses.get("fine_tuning", {})
    series = tuple(Series(guide, tuple(map(tuple, points))) for guide, points in guides.items())
    charts.append(Chart("loss: fine-tuning", series[:MOST_SERIES]))
    return [chart for chart in charts if chart.drawn]


def _plan(results: Mapping[str, Any]) -> list[Block]:
    scale = results.get("scale")
    if scale is None:
        return [Note("The results do not say their scale.")]
    plan = QuickstartPlan.of(scale)
    rows = tuple((name, told(getattr(plan, name))) for name in plan.__dataclass_fields__)
    return [Table((("scale", scale), ("seed", told(results.get("seed"))))), Table(rows, title="Plan", folded=True)]


def _command(results: Mapping[str, Any]) -> str:
    words = [f"--seed={results.get('seed', 0)}", f"--scale={results.get('scale', 'full')}", "--out=runs/again"]
    return " ".join(["trips quickstart", *map(shlex.quote, words)])
