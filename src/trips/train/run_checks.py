"""Whether a recipe fits what its folder holds already: the run that it goes on with, the model that it measures."""

from __future__ import annotations

from pathlib import Path

from trips.errors import ConfigError
from trips.train.checkpoint import list_checkpoints
from trips.train.recipe import Recipe
from trips.train.recipe_io import load_recipe, recipe_values
from trips.train.run_report import RECIPE_FILE

# Keys that may differ when a run goes on: they do not change the weights that it ends with.
_FREE_KEYS = frozenset(
    ("purpose", "data.test", "data.cache_images", "data.num_workers", "data.max_bad_share", "optim.max_nonfinite",
     "data.cache_dir", "data.cache_gb", "run.out", "run.resume", "run.parallel", "run.trackers",
     "run.gradient_checkpointing", "run.log_every", "run.save_every", "run.keep_last", "run.eval_batch_size",
     "run.top_k", "run.answer", "run.metric", "run.shortlist", "run.rerank_guide", "run.memory_gb",
     "run.cache_prefix_gb")
)  # fmt: skip

# Keys that shaped a trained model, but for those behind: a measurement would ignore another value.
_SETTLED = (
    "model.", "optim.", "schedule.", "data.train", "data.image_size", "data.max_text_length", "data.augment",
    "data.crop_scale", "data.flip", "data.weights", "data.loss_weights", "data.shuffle_images",
    "data.max_questions_per_image", "data.min_answer_count", "data.jpeg_draft",
)  # fmt: skip
_MEASURED = ("model.selection.", "model.reasoning.num_images")


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


def check_effect(recipe: Recipe, trained: Recipe) -> None:
    """Refuse to measure with a key that the finished model would not follow: the figures would pass for its effect.

    Args:
        recipe: what a measurement was asked for with. trained: what the model was trained with.
    Raises:
        ConfigError: they differ in a key that only training reads.
    """
    ours, theirs = recipe_values(recipe), recipe_values(trained)
    for key in ours:
        if ours[key] != theirs[key] and key.startswith(_SETTLED) and not key.startswith(_MEASURED):
            raise ConfigError(
                "has no effect on a trained model",
                item=f"override: {key}",
                found=ours[key],
                expected=f"{theirs[key]}, as it was trained",
                hint="a measurement reads data.test, model.selection and run",
            )
