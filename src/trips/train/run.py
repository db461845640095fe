"""From a recipe to a result: build, train, save, measure, and write down what it ran on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trips.data.loading import AnswerList
from trips.data.records import BadSamples
from trips.environment import describe_environment
from trips.errors import CheckpointError, ConfigError, MissingDependencyError, TripsError
from trips.processor import TripsProcessor
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.checkpoint import list_checkpoints
from trips.train.data import VqaTrainingData
from trips.train.loop import train
from trips.train.recipe import Recipe
from trips.train.recipe_io import Overrides, load_recipe, recipe_to_dict, recipe_values, save_recipe
from trips.train.schedule import SelectionSchedule
from trips.train.settings import TrainSettings
from trips.train.vqa import build_data, build_model, build_processor, evaluate_vqa, majority_accuracy, read_records

logger = logging.getLogger("trips")

# Keys that may differ when a run goes on: they do not change the weights that it ends with.
_FREE_KEYS = frozenset(
    ("purpose", "data.test", "data.cache_images", "data.num_workers", "data.max_bad_share", "optim.max_nonfinite",
     "run.out", "run.resume", "run.log_every", "run.save_every", "run.keep_last", "run.eval_batch_size", "run.top_k")
)  # fmt: skip

RECIPE_FILE, RESULTS_FILE, ANSWERS_FILE, MODEL_FOLDER = "recipe.yaml", "results.json", "answers.json", "model"


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Train and measure as a recipe says; everything goes into ``recipe.run.out``.

    Written there: recipe.yaml (every key, enough to repeat the run), checkpoints/, metrics.jsonl, tensorboard/,
    model/ (weights and processor, for ``from_pretrained``), answers.json, results.json.

    Returns:
        What results.json holds: ``environment``, ``recipe``, ``accuracy``, ``accuracy_blank_images`` and ``majority``
        (shares of the test questions), ``num_questions``, ``num_answers``, ``steps``, ``seconds``,
        ``samples_per_second`` (questions; the training steps of this call), ``skipped_steps``, ``bad_samples``.
    Raises:
        TripsError: see `check_same_run`, `read_records`, `build_model` and `train`; the message names file, key or
            sample.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
    except ImportError as error:
        raise MissingDependencyError(
            "is not installed", item="accelerate", hint='pip install "trips-vlm[train]"'
        ) from error
    accelerator = Accelerator(mixed_precision="no")
    main, out = accelerator.is_main_process, Path(recipe.run.out)
    check_same_run(recipe)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    records = read_records(recipe.data.train, bad_samples, "data.train")
    test_records = read_records(recipe.data.test, bad_samples, "data.test")
    answers = AnswerList.from_records(records, recipe.data.min_answer_count)
    processor = build_processor(recipe.model, recipe.data, records)
    set_seed(recipe.run.seed)  # the new weights
    model = build_model(recipe.model, processor)
    if recipe.optim.vision_lr == 0:
        # No gradient is even computed for a tower that does not learn; the guide's still passes through it.
        model.trips.vision.requires_grad_(False)
    dataset, collator = build_data(recipe, records, processor, bad_samples, train=True)
    data = VqaTrainingData(
        dataset,
        collator,
        recipe.optim.batch_size // recipe.optim.accumulate,
        recipe.run.seed,
        num_workers=recipe.data.num_workers,
    )
    settings = train_settings(recipe, len(dataset))
    accelerator.wait_for_everyone()  # all have compared the recipe there before it is written anew
    if main:
        out.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, out / RECIPE_FILE)
        answers.save(out / ANSWERS_FILE)
    report = train(
        model,
        data,
        settings,
        schedule=SelectionSchedule(model.config.selection, settings.steps, **dataclasses.asdict(recipe.schedule)),
        out_dir=out,
        resume=recipe.run.resume,
    )
    results: dict[str, Any] = {}
    if main:
        model.save_pretrained(out / MODEL_FOLDER)
        processor.save_pretrained(out / MODEL_FOLDER)
        scores = _measure(recipe, model, processor, answers, test_records, bad_samples)
        results = {
            "environment": describe_environment(),
            "recipe": recipe_to_dict(recipe),
            **scores,
            "majority": majority_accuracy(records, test_records),
            "num_answers": len(answers),
            "steps": report.steps,
            "seconds": report.seconds,
            "samples_per_second": report.samples_per_second,
            "losses": report.losses,
            "skipped_steps": report.skipped,
            "bad_samples": {"count": len(bad_samples), "named": dict(list(bad_samples.errors.items())[:20])},
        }
        _write_json(out / RESULTS_FILE, results)
        logger.info("%s", bad_samples.summary())
    accelerator.wait_for_everyone()
    return results


def evaluate_run(run_dir: str | os.PathLike[str], overrides: Overrides = ()) -> dict[str, Any]:
    """Measure the model of a finished run again, on other data or with another selection if asked.

    Args:
        run_dir: output folder of `run_recipe`.
        overrides: as in `load_recipe`; ``data.test``, ``model.selection.*`` and ``run.*`` have an effect.
    Returns:
        ``accuracy``, ``accuracy_blank_images``, ``num_questions``, ``selection``, ``bad_samples``.
    Raises:
        CheckpointError: the folder is not that of a finished run. ConfigError, DataError: see `load_recipe`.
    """
    run_dir = Path(run_dir)
    for name in (RECIPE_FILE, ANSWERS_FILE, MODEL_FOLDER):
        if not (run_dir / name).exists():
            raise CheckpointError("is not the folder of a finished run", item=run_dir, expected=f"{name} in it")
    recipe = load_recipe(run_dir / RECIPE_FILE, overrides)
    processor = TripsProcessor.from_pretrained(run_dir / MODEL_FOLDER)
    try:
        model = TripsForQuestionAnswering.from_pretrained(run_dir / MODEL_FOLDER)
    except TripsError:
        raise
    except Exception as error:  # transformers and safetensors raise many types for damaged files
        raise CheckpointError(
            f"model cannot be read ({str(error).splitlines()[0]})", item=run_dir / MODEL_FOLDER
        ) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    bad_samples = BadSamples(recipe.data.max_bad_share)
    records = read_records(recipe.data.test, bad_samples, "data.test")
    answers = AnswerList.load(run_dir / ANSWERS_FILE)
    scores = _measure(recipe, model, processor, answers, records, bad_samples)
    return {
        **scores,
        "selection": recipe_to_dict(recipe)["model"]["selection"],
        "bad_samples": {"count": len(bad_samples), "named": dict(list(bad_samples.errors.items())[:20])},
    }


def check_same_run(recipe: Recipe) -> None:
    """Refuse to go on with the checkpoints of another recipe, whose result would be neither run's.

    Raises:
        ConfigError: ``run.out`` holds checkpoints of a recipe that differs in what the weights depend on.
    """
    out = Path(recipe.run.out)
    if recipe.run.resume != "auto" or not (out / RECIPE_FILE).is_file() or not list_checkpoints(out / "checkpoints"):
        return
    ours, theirs = recipe_values(recipe), recipe_values(load_recipe(out / RECIPE_FILE))
    if changed := [key for key in ours if key not in _FREE_KEYS and ours[key] != theirs[key]]:
        raise ConfigError(
            "holds the checkpoints of another run",
            item=out,
            found=", ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in changed[:3]),
            hint="choose another run.out, or begin anew there with run.resume=never",
        )


def train_settings(recipe: Recipe, num_images: int) -> TrainSettings:
    """Settings of the loop; epochs become steps by the number of training images."""
    optim, run = recipe.optim, recipe.run
    micro_steps = num_images // max(1, optim.batch_size // optim.accumulate)
    steps = optim.steps if optim.steps is not None else round(optim.epochs * micro_steps / optim.accumulate)
    return TrainSettings(
        steps=steps,
        lr=optim.lr,
        vision_lr=optim.vision_lr,
        weight_decay=optim.weight_decay,
        warmup_steps=optim.warmup_steps,
        lr_floor=optim.lr_floor,
        clip_norm=optim.clip_norm,
        accumulate=optim.accumulate,
        precision=run.precision,
        seed=run.seed,
        log_every=run.log_every,
        save_every=run.save_every,
        keep_last=run.keep_last,
        max_nonfinite=optim.max_nonfinite,
    )


def _measure(
    recipe: Recipe,
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    answers: AnswerList,
    records: list,
    bad_samples: BadSamples,
) -> dict[str, Any]:
    model.config.selection = recipe.model.selection
    dataset, collator = build_data(recipe, records, processor, bad_samples, train=False)
    options = {"batch_size": recipe.run.eval_batch_size, "top_k": recipe.run.top_k}
    scores = evaluate_vqa(model, dataset, collator, answers, **options)
    blank = evaluate_vqa(model, dataset, collator, answers, **options, blank_images=True)
    return {
        "accuracy": scores.accuracy,
        "accuracy_blank_images": blank.accuracy,
        "num_questions": scores.num_questions,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
