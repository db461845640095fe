"""From a recipe to a result: build, train, save, measure, and write down what it ran on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trips.data.records import BadSamples
from trips.distributed import alone
from trips.environment import describe_environment
from trips.errors import CheckpointError, ConfigError, MissingDependencyError
from trips.model_card import write_model_card
from trips.prefix_cache import PrefixCache
from trips.saved import MODEL_FOLDER
from trips.train.lock import RunLock
from trips.train.loop import train
from trips.train.parallel import on_main
from trips.train.recipe import Recipe
from trips.train.recipe_io import Overrides, load_recipe, recipe_to_dict, save_recipe
from trips.train.run_checks import check_effect, check_same_run
from trips.train.run_report import RECIPE_FILE, REPORT_FILE, RESULTS_FILE, keep_report, write_run_report
from trips.train.schedule import SelectionSchedule
from trips.train.settings import Precision, TrainSettings, uses_bf16
from trips.train.task import TaskParts, task_module
from trips.train.transfer import start_from
from trips.vision import VisionEncoder

logger = logging.getLogger("trips")


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Train and measure as a recipe says; everything goes into ``recipe.run.out``.

    Written there: recipe.yaml (every key, enough to repeat the run), checkpoints/, metrics.jsonl, tensorboard/,
    model/ (weights, processor and model card, for ``from_pretrained``), what the task adds (answers.json, the list
    that is ranked, and answers_test.json, what the model said, as an evaluation server takes it), results.json, and
    report.html, a page of it all (see `trips.train.run_report`).

    Returns:
        What results.json holds: ``environment``, ``recipe``, the task's figures (for VQA see `VqaMeasurement`, and
        ``majority``, the accuracy of the commonest answer, and ``num_answers``), ``steps``, ``seconds``,
        ``samples_per_second`` (texts; the training steps of this call), ``skipped_steps``, ``bad_samples``. Empty on
        all processes but the first, and after an interruption.
    Raises:
        TripsError: see `check_same_run`, the task's ``build`` and `train`; the message names file, key or sample.
    """
    accelerator = _accelerator()
    lock = RunLock(Path(recipe.run.out))
    on_main(accelerator, lock.acquire)  # before anything there is read or written
    try:
        return _run(recipe, accelerator)
    finally:
        lock.release()


def _accelerator() -> Any:
    """Accelerate's view of the processes, which joins them if there are several."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingDependencyError(
            "is not installed", item="accelerate", hint='pip install "trips-vlm[train]"'
        ) from error
    return Accelerator(mixed_precision="no")


def _run(recipe: Recipe, accelerator: Any) -> dict[str, Any]:
    from accelerate.utils import set_seed

    main, out = accelerator.is_main_process, Path(recipe.run.out)
    check_same_run(recipe)
    set_seed(recipe.run.seed)  # the new weights
    parts = task_module(recipe.task).build(recipe)
    if recipe.model.start_from is not None:
        start_from(parts.model, Path(recipe.model.start_from))
    if recipe.optim.vision_lr == 0:
        # No gradient is even computed for a tower that does not learn; the guide's still passes through it.
        parts.model.trips.vision.requires_grad_(False)
    settings = train_settings(recipe, parts.num_samples)
    untrained = _measure_alone(parts, settings.precision) if main and parts.measure_untrained else {}
    if recipe.run.cache_prefix_gb:  # behind the first measurement: the room is for training images
        keep_prefixes(recipe, parts.model.trips.vision)
    accelerator.wait_for_everyone()  # all have compared the recipe there before it is written anew
    if main:
        save_recipe(recipe, out / f"{RECIPE_FILE}.partial")
        os.replace(out / f"{RECIPE_FILE}.partial", out / RECIPE_FILE)
        for file in (RESULTS_FILE, REPORT_FILE):  # of an earlier run here
            (out / file).unlink(missing_ok=True)
        parts.write_files(out)
    report = train(
        parts.model,
        parts.data,
        settings,
        schedule=SelectionSchedule(
            recipe.model.selection,
            settings.steps,
            recipe.schedule.keep_rate_warmup,
            recipe.schedule.levels,
            recipe.schedule.distill_every,
        ),
        out_dir=out,
        resume=recipe.run.resume,
        locked=True,
        # Counted for a model that learns as a whole: better no figure than one of work that a frozen tower spares.
        flops_per_sample=None if recipe.optim.vision_lr == 0 else parts.flops_per_sample,
    )
    results: dict[str, Any] = {}
    if main and not report.interrupted:
        parts.model.save_pretrained(out / MODEL_FOLDER)
        parts.processor.save_pretrained(out / MODEL_FOLDER)
        results = {
            "environment": describe_environment(),
            "recipe": recipe_to_dict(recipe),
            **_measure_alone(parts, settings.precision),
            **(parts.facts or {}),
            **({"untrained": untrained} if untrained else {}),
            "steps": report.steps,
            "seconds": report.seconds,
            "samples_per_second": report.samples_per_second,
            "losses": report.losses,
            "skipped_steps": report.skipped,
            "bad_samples": _named(parts.bad_samples),
        }
        if report.contrastive_batch is not None:
            results["contrastive_batch"] = report.contrastive_batch
        parts.write_measured(out)
        write_model_card(
            out / MODEL_FOLDER,
            parts.model.config,
            type(parts.model).__name__,
            results=results,
            image_size=parts.processor.image_size,
            text_length=parts.processor.max_text_length,
        )
        _write_json(out / RESULTS_FILE, results)
        logger.info("%s", parts.bad_samples.summary())
    if main:
        examples = 8 if results else 0  # none of a model that is half trained
        keep_report(lambda: write_run_report(out, parts.model, parts.processor, num_examples=examples))
    accelerator.wait_for_everyone()
    return results


def evaluate_run(
    run_dir: str | os.PathLike[str], overrides: Overrides = (), out: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Measure the model of a finished run again, on other data or with another selection if asked.

    Started as several processes (accelerate launch, torchrun), retrieval is shared out among them; the other tasks are
    measured by each.

    Args:
        run_dir: output folder of `run_recipe`.
        overrides: as in `load_recipe`; ``data.test``, ``model.selection.*`` and ``run.*`` have an effect.
        out: folder for the task's files (for VQA answers_test.json); None writes nothing.
    Returns:
        The task's figures, ``selection``, ``bad_samples``; empty on all processes but the first.
    Raises:
        CheckpointError: the folder is not that of a finished run. ConfigError, DataError: see `load_recipe`; a key that
            training has settled; `out` cannot be a folder.
    """
    run_dir = Path(run_dir)
    for file in (RECIPE_FILE, RESULTS_FILE):  # without results the model there may be that of an earlier recipe
        if not (run_dir / file).exists():
            raise CheckpointError("is not the folder of a finished run", item=run_dir, expected=f"{file} in it")
    recipe = load_recipe(run_dir / RECIPE_FILE, overrides)
    check_effect(recipe, load_recipe(run_dir / RECIPE_FILE))
    if out is not None:
        try:
            Path(out).mkdir(parents=True, exist_ok=True)  # now, and not after an hour of measuring
        except OSError as error:
            raise ConfigError(f"no folder can be made there ({error.strerror or error})", item=out) from error
    first = True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # what the launchers of several processes tell each of them
        first = _accelerator().is_main_process
    parts = task_module(recipe.task).load(recipe, run_dir)
    figures = _measure(parts, recipe.run.precision)
    if not first:
        return {}
    if out is not None:
        parts.write_measured(Path(out))
    return {
        **figures,
        "selection": recipe_to_dict(recipe)["model"]["selection"],
        "bad_samples": _named(parts.bad_samples),
    }


def keep_prefixes(recipe: Recipe, vision: VisionEncoder) -> None:
    """Let a frozen tower remember its prefixes.

    Raises:
        ConfigError: the tower learns, images are augmented, or the tower has dropout: then no prefix comes twice.
    """
    changing = {
        "optim.vision_lr": recipe.optim.vision_lr != 0,
        "data.augment": recipe.data.augment != "none",
        "data.flip": recipe.data.flip != "none",
        "model.vision": any(isinstance(module, nn.Dropout) and module.p > 0 for module in vision.modules()),
    }
    if wrong := [key for key, changes in changing.items() if changes]:
        raise ConfigError(
            "keeps what comes again in every epoch",
            item="run.cache_prefix_gb",
            found=wrong[0],
            expected="a frozen tower without dropout, and images that are not augmented",
        )
    vision.prefix_cache = PrefixCache(int(recipe.run.cache_prefix_gb * 1e9))


def train_settings(recipe: Recipe, num_images: int) -> TrainSettings:
    """Settings of the loop; epochs become steps by the number of training images."""
    optim, run = recipe.optim, recipe.run
    micro_steps = num_images // max(1, optim.batch_size // optim.accumulate)
    steps = optim.steps if optim.steps is not None else round(optim.epochs * micro_steps / optim.accumulate)
    return TrainSettings(
        steps=steps,
        lr=optim.lr,
        vision_lr=optim.vision_lr,
        head_lr=optim.head_lr,
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
        parallel=run.parallel,
        gradient_checkpointing=run.gradient_checkpointing,
        compile=run.compile,
        trackers=run.trackers,
    )


def _measure_alone(parts: TaskParts, precision: Precision) -> dict[str, Any]:
    """The first process measures while the others wait: a model that gathers over them would wait for them."""
    with alone():
        return _measure(parts, precision)


def _measure(parts: TaskParts, precision: Precision) -> dict[str, Any]:
    """In the precision of training, which on a GPU is what an evaluation of hours hangs on."""
    device = next(parts.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=uses_bf16(precision, device)):
        return parts.measure()


def _named(bad_samples: BadSamples) -> dict[str, Any]:
    return {"count": len(bad_samples), "named": dict(list(bad_samples.errors.items())[:20])}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
