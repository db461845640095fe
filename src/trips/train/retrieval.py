"""A retrieval run's parts: data and model from a recipe, and its measurement in two stages (section 5.1.3, Table 8).

What is measured is measured before the first step too: how the pre-trained model retrieves without fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples
from trips.processor import TripsProcessor
from trips.tasks.reranking import rerank_selection
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.train.pretraining import build_pairs, load_pairs
from trips.train.recipe import Recipe
from trips.train.reranking import evaluate_two_stage
from trips.train.task import TaskParts


def build(recipe: Recipe) -> TaskParts:
    """Parts of a new run; errors as `build_pairs`."""
    return build_pairs(recipe, TripsForImageTextRetrieval, _measure)


def load(recipe: Recipe, run_dir: Path) -> TaskParts:
    """Parts of a finished run, to be measured again; errors as `load_pairs`."""
    return load_pairs(recipe, run_dir, TripsForImageTextRetrieval, _measure)


def _measure(
    recipe: Recipe,
    model: TripsForImageTextRetrieval,
    processor: TripsProcessor,
    test: Sequence[PairRecord],
    bad_samples: BadSamples,
) -> dict[str, Any]:
    model.config.selection = recipe.model.selection
    if not test:
        return {}
    run, guides = recipe.run, (recipe.run.rerank_guide,)
    if run.rerank_guide == "both":
        single, selection = recipe.model.architecture == "single", recipe.model.selection
        same = single or rerank_selection(selection, "text") == rerank_selection(selection, "image")
        guides = ("text",) if same else ("text", "image")  # as in the baseline, where nothing selects
    return evaluate_two_stage(
        model,
        test,
        processor,
        bad_samples,
        shortlist=run.shortlist,
        guides=guides,
        batch_size=run.eval_batch_size,
        memory_gb=run.memory_gb,
    )
