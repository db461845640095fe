"""Accuracy of the paper's settings on a user's own data: a run of a recipe for each setting and seed.

An accuracy source in the sense of `trips.paper.settings`. The setting decides architecture, locations, keep rate,
guide and what becomes of the rest; data, towers, steps and everything else are the recipe's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trips.config import SelectionConfig
from trips.errors import ConfigError, DataError
from trips.paper.settings import Setting
from trips.train.recipe import ModelSection, Recipe
from trips.train.recipe_io import Overrides, load_recipe, recipe_values
from trips.train.run import run_recipe
from trips.train.towers import tower_shape

_PAPER_SIDE = 384  # pixels that a recipe's image_size stands for
_DECIDED = ("layers", "keep_rate", "guide", "inattentive")  # by the setting, whatever it says
_CHANGED = ("purpose", "model.architecture", *(f"model.selection.{name}" for name in _DECIDED), "run.seed", "run.out",
            "run.resume")  # fmt: skip
_UNITS = {
    "vqa": "accuracy, %",
    "nlvr2": "accuracy, %",
    "retrieval": "mean recall, %",
    "pretrain": "zero-shot mean recall, %",
}


class RecipeAccuracy:
    """Trains and measures a recipe under a setting; see `AccuracySource`.

    Args:
        recipe: name of a packaged recipe or path of a YAML file.
        work: folder for the runs, one per setting and seed. An interrupted run goes on there; the checkpoints of a
            finished one are removed, its model stays.
        overrides: keys of the recipe to replace, such as data.train.
    Raises:
        ConfigError: see `load_recipe`; overrides of what the settings decide; several processes.
        CheckpointError: the configuration of the vision tower cannot be read.
    """

    def __init__(self, recipe: str, work: str | Path, overrides: Overrides = ()) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("a sweep runs in one process", item="WORLD_SIZE", found=os.environ["WORLD_SIZE"])
        plain, self.recipe = recipe_values(load_recipe(recipe)), load_recipe(recipe, overrides)
        for key, value in recipe_values(self.recipe).items():
            if key in _CHANGED and value != plain[key]:
                raise ConfigError("is decided by the table", item=f"override: {key}", found=value)
        self.name, self.unit = recipe, _UNITS[self.recipe.task]
        self.work = Path(work)
        self._num_layers, self._patch = tower_shape(self.recipe.model.vision)

    @property
    def key(self) -> str:
        """What stored figures depend on besides setting and seed: every other key of the recipe."""
        values = {key: value for key, value in recipe_values(self.recipe).items() if key not in _CHANGED}
        return f"{self.name} {hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]}"

    def measure(self, setting: Setting, seed: int) -> dict[str, float]:
        """Train and measure.

        Returns:
            ``accuracy`` in per cent (for pairs of images and texts the mean of the six recalls), ``seconds`` of
            training, and the other figures of the run's results.
        Raises:
            DataError: test data without answers. TripsError: see `recipe_of` and `run_recipe`.
            KeyboardInterrupt: a signal has ended the run, which goes on from there next time.
        """
        recipe = self.recipe_of(setting, seed)
        results = run_recipe(recipe)
        if not results:
            raise KeyboardInterrupt
        figures = {"accuracy": 100 * self._accuracy(results)}
        figures |= {name: float(results[name]) for name in ("seconds", "steps")}
        figures |= {
            name: 100 * results[name]
            for name in ("accuracy_blank_images", "majority", "consistency")
            if isinstance(results.get(name), float)
        }
        shutil.rmtree(Path(recipe.run.out) / "checkpoints", ignore_errors=True)
        return figures

    def recipe_of(self, setting: Setting, seed: int) -> Recipe:
        """The recipe under a setting: locations scaled to its tower, pixels in proportion to the paper's 384.

        Raises:
            ConfigError: two locations would fall on one layer; a single-stream model has no use for the recipe.
        """
        recipe = self.recipe
        chosen, standard = setting.selection_in(self._num_layers), SelectionConfig()
        changes = {
            field.name: getattr(chosen, field.name)
            for field in dataclasses.fields(SelectionConfig)
            if field.name in _DECIDED or getattr(chosen, field.name) != getattr(standard, field.name)
        }
        if not chosen.active:  # locations of a tower of another depth would be refused
            changes["layers"] = ()
        selection = dataclasses.replace(recipe.model.selection, **changes)
        side = recipe.data.image_size * setting.image_size / _PAPER_SIDE * setting.scale
        if setting.image_size != _PAPER_SIDE or setting.scale != 1:
            side = max(1, round(side / self._patch)) * self._patch
        words = re.sub(r"[^a-z0-9.]+", "_", setting.name.lower()).strip("_")
        digest = hashlib.sha256(repr((setting, self.key)).encode()).hexdigest()[:8]
        model = dataclasses.replace(recipe.model, architecture=setting.architecture, selection=selection)
        if setting.architecture == "single":  # it has none of these layers, and refuses another number than the usual
            usual = ModelSection()
            layers = {name: getattr(usual, name) for name in ("num_text_layers", "num_fusion_layers")}
            model = dataclasses.replace(model, **layers)
        return dataclasses.replace(
            recipe,
            model=model,
            data=dataclasses.replace(recipe.data, image_size=round(side)),
            run=dataclasses.replace(
                recipe.run, seed=seed, resume="auto", out=str(self.work / f"{words}-seed{seed}-{digest}")
            ),
        )

    def _accuracy(self, results: dict[str, Any]) -> float:
        """The figure of the task, as a share."""
        try:
            if self.recipe.task == "retrieval":
                guides = results["reranked"]
                return guides["text" if "text" in guides else next(iter(guides))]["mean_recall"]
            return results["mean_recall" if self.recipe.task == "pretrain" else "accuracy"]
        except KeyError as error:
            raise DataError(
                f"without {error.args[0]} there is nothing to compare",
                item="data.test",
                hint="the sweep needs test data whose answers are known",
            ) from error
