"""Recipes from YAML and overrides, and back: unknown keys and wrong types are named before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from trips.errors import ConfigError
from trips.train.recipe import Recipe

Overrides = Mapping[str, Any] | Sequence[str]


def list_recipes() -> dict[str, str]:
    """Names of the recipes that come with the package, each with its purpose, in alphabetical order."""
    return {name: load_recipe(name).purpose for name in _packaged_names()}


def _packaged_names() -> list[str]:
    folders = [folder for folder in _root().iterdir() if folder.is_dir()]
    files = [(folder.name, file.name) for folder in folders for file in folder.iterdir()]
    return sorted(f"{folder}/{file.removesuffix('.yaml')}" for folder, file in files if file.endswith(".yaml"))


def _root() -> Traversable:
    return resources.files("trips") / "recipes"


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Overrides = ()) -> Recipe:
    """Read a recipe and check every key and value.

    Args:
        name_or_path: name of a packaged recipe, such as "vqa/daquar_small", or path of a YAML file.
        overrides: values that replace the file's: a mapping from dotted keys (``{"optim.lr": 1e-4}``) or nested, or a
            list of strings ``"--optim.lr=1e-4"`` or ``"optim.lr=1e-4"``.
    Raises:
        ConfigError: no such recipe; broken YAML; an unknown key, with the nearest known one; a value of a wrong type.
    """
    origin, values = _read_values(name_or_path)
    flat = _flatten(values, Recipe, origin)
    origins = dict.fromkeys(flat, origin)
    for key, value in _dotted(overrides).items():
        changed = _flatten(_nest({key: value}), Recipe, "override")
        flat |= changed
        origins |= dict.fromkeys(changed, "override")
    return _build(flat, origins)


def load_known_keys(path: str | os.PathLike[str]) -> tuple[Recipe, tuple[str, ...]]:
    """Read the recipe of a run that another version may have made: to look at, not to train by.

    Returns:
        What this version knows of it, and the dotted keys that it does not know.
    Raises:
        ConfigError: as of `load_recipe`, but for unknown keys.
    """
    origin, values = _read_values(path)
    unknown: list[str] = []
    flat = _flatten(_known(values, Recipe, unknown), Recipe, origin)
    return _build(flat, dict.fromkeys(flat, origin)), tuple(unknown)


def _known(values: Mapping[str, Any], kind: type, unknown: list[str], prefix: str = "") -> dict[str, Any]:
    """The keys that a section has; others are noted."""
    hints, known = _hints(kind), {}
    for key, value in values.items():
        if key not in hints:
            unknown.append(f"{prefix}{key}")
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            known[key] = _known(value, hints[key], unknown, f"{prefix}{key}.")
        else:
            known[key] = value
    return known


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write every key of a recipe as YAML that `load_recipe` reads back to an equal one."""
    Path(path).write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values, tuples as lists."""
    return _plain(dataclasses.asdict(recipe))


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Add every key of a recipe to a parser, so that its help explains them."""
    parser.add_class_arguments(Recipe, as_group=False, skip={"purpose", "task"})


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """All dotted keys with their values, tuples as lists."""
    return _flatten(recipe_to_dict(recipe), Recipe, "recipe")


def recipe_keys() -> tuple[str, ...]:
    """All dotted keys."""
    return tuple(recipe_values(Recipe()))


def _read(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """What messages call the recipe, and its text."""
    name = os.fspath(name_or_path)
    known = _packaged_names()
    try:
        if name in known:
            return name, _root().joinpath(*f"{name}.yaml".split("/")).read_text(encoding="utf-8")
        return name, Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else "trips recipes lists them"
        raise ConfigError(
            "no such recipe or file", item=name, expected="a packaged recipe or a YAML file", hint=hint
        ) from error


def _read_values(name_or_path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """What messages call the recipe, and its nested values as YAML has them."""
    origin, text = _read(name_or_path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("is not YAML", item=origin, found=" ".join(str(error).split())) from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError("is not a mapping", item=origin, found=type(values).__name__, expected="sections with keys")
    return origin, values


def _dotted(overrides: Overrides) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    if isinstance(overrides, str):
        raise ConfigError("not a list", item="overrides", found=overrides, expected='["--optim.lr=1e-4", ...]')
    pairs = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals or not key:
            raise ConfigError("not an override", item=text, expected="--section.key=value")
        pairs[key] = value
    return pairs


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        place = nested
        *sections, leaf = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return nested


def _flatten(values: Mapping[str, Any], kind: type, origin: str, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested values, each checked to be one of the dataclass's."""
    hints, flat = _hints(kind), {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError("unknown key", item=f"{origin}: {dotted}", hint=_nearest(dotted, value, prefix, hints))
        if not dataclasses.is_dataclass(hints[key]):
            flat[dotted] = value
        elif isinstance(value, Mapping):
            flat |= _flatten(value, hints[key], origin, f"{dotted}.")
        elif value is not None:  # a section whose every line is commented out reads as null
            raise ConfigError("is a section", item=f"{origin}: {dotted}", found=value, expected=f"{dotted}.KEY")
    return flat


def _nearest(dotted: str, value: Any, prefix: str, hints: Mapping[str, Any]) -> str:
    """The known key most like an unknown one: in its section, by its last part anywhere, or as a whole."""
    if near := difflib.get_close_matches(dotted.removeprefix(prefix), hints, 1, 0.6):
        return f"did you mean {prefix}{near[0]}?"
    if isinstance(value, Mapping) and value:  # an unknown section: what it holds tells more
        dotted = f"{dotted}.{next(iter(value))}"
    known = recipe_keys()
    leaves = {name.rsplit(".", 1)[1]: name for name in known if "." in name}
    if near := difflib.get_close_matches(dotted.rsplit(".", 1)[-1], leaves, 1, 0.8):
        return f"did you mean {leaves[near[0]]}?"
    return f"the nearest known key is {difflib.get_close_matches(dotted, known, 1, 0.0)[0]}"


def _build(flat: Mapping[str, Any], origins: Mapping[str, str]) -> Recipe:
    """Convert values to the types of the sections; `origins` says where each key came from."""
    parsed: dict[str, Any] = {}
    for key, value in flat.items():
        kind = _type_of(key)
        if kind == tuple[str, ...] and isinstance(value, str) and not value.lstrip().startswith("["):
            value = [value]  # one file in place of a list of files
        try:
            if value is None and type(None) not in typing.get_args(kind):
                raise TypeError("the parser lets null pass for any type")
            parsed[key] = _value_parser(kind).parse_object({"value": value})["value"]
        except (ArgumentError, TypeError, ValueError) as error:
            raise ConfigError(
                "wrong value", item=f"{origins[key]}: {key}", found=value, expected=_type_name(kind)
            ) from error
    try:
        return _instance(Recipe, _nest(parsed))
    except ConfigError as error:
        key = str(error.item)
        if key.startswith(("selection.", "pretraining.")):
            key = f"model.{key}"
        raise ConfigError(
            error.message,
            item=f"{origins[key]}: {key}" if key in origins else key,
            found=error.found,
            expected=error.expected,
            hint=error.hint,
        ) from error


@functools.cache
def _value_parser(kind: Any) -> ArgumentParser:
    """A parser of one value: an error of the whole recipe's would not always say which key it is about."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def _type_of(key: str) -> Any:
    """Annotated type of a dotted key."""
    kind: Any = Recipe
    for part in key.split("."):
        kind = _hints(kind)[part]
    return kind


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields, and of nothing else that its class declares."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _type_name(kind: Any) -> str:
    """A type in the words of YAML."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_NAMES[arguments[0]]}s"
    return " or ".join(map(_type_name, arguments)) if arguments else _NAMES[kind]


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


def _instance(kind: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of parsed values, sections first."""
    hints = _hints(kind)
    return kind(**{k: _instance(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
