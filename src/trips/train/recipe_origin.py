"""Where a recipe came from: the packaged one that it is nearest to, what differs, and the command that says so."""

from __future__ import annotations

import functools
import json
import shlex
from typing import Any

from trips.errors import ConfigError
from trips.train.recipe import Recipe
from trips.train.recipe_io import list_recipes, load_recipe, recipe_values


def nearest_recipe(recipe: Recipe) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The packaged recipe that a run most likely came from, and every key that differs: its value there and here.

    That of the same purpose, else the one of the same task with the fewest other values.
    """
    ours, found = recipe_values(recipe), []
    for name, packaged in _packaged().items():
        theirs = recipe_values(packaged)
        differing = {key: (theirs[key], ours[key]) for key in ours if theirs[key] != ours[key]}
        found.append((packaged.task != recipe.task, "purpose" in differing, len(differing), name, differing))
    *_, name, differing = min(found, key=lambda row: row[:4])
    return name, differing


@functools.cache
def _packaged() -> dict[str, Recipe]:
    return {name: load_recipe(name) for name in list_recipes()}


def launcher(processes: int = 1) -> str:
    """What starts training in so many processes of one machine, before the name of a recipe."""
    return "trips train" if processes == 1 else f"torchrun --nproc-per-node {processes} -m trips.cli train"


def command_of(recipe: Recipe, processes: int = 1) -> str | None:
    """The command that starts a run of this recipe from the nearest packaged one; None where no line says it all."""
    name, differing = nearest_recipe(recipe)
    words = [f"--{key}={_written(ours)}" for key, (_, ours) in differing.items()]
    try:
        if recipe_values(load_recipe(name, words)) != recipe_values(recipe):
            return None
    except ConfigError:
        return None
    return " \\\n  ".join([f"{launcher(processes)} {name}", *map(shlex.quote, words)])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
