"""Recipes: packaged ones are sound, mistakes are named, what is saved reads back equal."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.train.recipe import Recipe
from trips.train.recipe_io import list_recipes, load_recipe, recipe_keys, recipe_to_dict, save_recipe


def test_every_packaged_recipe_parses_and_reads_back(tmp_path: Path) -> None:
    names = list_recipes()
    root = Path(__file__).resolve().parents[2] / "src" / "trips" / "recipes"
    assert list(names) == sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    assert {"vqa/daquar_small", "debug/vqa_tiny"} <= set(names)
    outs = set()
    for name, purpose in names.items():
        recipe = load_recipe(name)
        assert "/paper" not in name or recipe.optim.clip_norm is None  # neither paper nor ALBEF clips
        assert purpose and purpose == recipe.purpose and "\n" not in purpose
        save_recipe(recipe, tmp_path / "recipe.yaml")
        assert load_recipe(tmp_path / "recipe.yaml") == recipe
        outs.add(recipe.run.out)
    assert len(outs) == len(names)  # no two write over each other


def test_values_of_the_file_and_overrides() -> None:
    recipe = load_recipe("vqa/daquar_small")
    assert recipe.model.selection == SelectionConfig(layers=(5, 10), keep_rate=0.7)
    assert (recipe.optim.lr, recipe.optim.vision_lr) == (2e-4, 2e-5)
    strings = load_recipe(
        "vqa/daquar_small",
        ["--optim.lr=1e-3", "model.selection.layers=[2, 4]", "--model.selection.keep-rate=[0.5,0.6]",
         "--optim.steps=7", "--data.train=a.tar", "--data.cache_images=false", "--optim.clip_norm=null"],
    )  # fmt: skip
    typed = load_recipe(
        "vqa/daquar_small",
        {"optim.lr": 1e-3, "model": {"selection": {"layers": (2, 4), "keep_rate": [0.5, 0.6]}}, "optim.steps": 7,
         "data.train": ["a.tar"], "data.cache_images": False, "optim.clip_norm": None},
    )  # fmt: skip
    assert strings == typed
    assert typed.model.selection.rates == (0.5, 0.6) and typed.data.train == ("a.tar",)
    assert typed.data.cache_images is False and typed.optim.clip_norm is None


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--optim.lrr=1"], ["optim.lrr", "unknown key", "optim.lr?"]),
        (["--optm.lr=1"], ["optm", "did you mean optim?"]),
        (["--optim.keep_rate=.5"], ["optim.keep_rate", "did you mean model.selection.keep_rate?"]),
        (["--selection.keep_rates=.5"], ["did you mean model.selection.keep_rate?"]),
        (["--zzz=.5"], ["zzz", "the nearest known key is"]),
        (["--optim.lr=fast"], ["optim.lr", "'fast'", "expected number"]),
        (["--optim.batch_size=1.5"], ["optim.batch_size", "'1.5'", "whole number"]),
        ({"optim.lr": None}, ["optim.lr", "expected number"]),
        ({"optim.steps": True}, ["optim.steps", "whole number or null"]),
        (["--run.precision=fp8"], ["run.precision", "'fp8'", "auto | fp32 | bf16"]),
        (["--data.cache_images=maybe"], ["data.cache_images", "true or false"]),
        (["--model.selection.layers=5"], ["model.selection.layers", "a list of whole numbers"]),
        (["--model.selection.keep_rate=1.5"], ["override: model.selection.keep_rate", "1.5", "0 < r <= 1"]),
        (["--model.selection.guide=txt"], ["model.selection.guide", "text | image | random | similarity | none"]),
        (["--optim=1"], ["optim", "is a section", "optim.KEY"]),
        (["--optim.lr"], ["--optim.lr", "--section.key=value"]),
        ("--optim.lr=1", ["overrides", "not a list"]),
        (["--optim.lr=-1"], ["optim.lr", "out of range", "at least 0"]),
        (["--optim.lr=.nan"], ["optim.lr"]),
        (["--data.max_bad_share=2"], ["data.max_bad_share", "0 to 1"]),
        (["--optim.accumulate=3"], ["optim.batch_size", "n x 3"]),
    ],
)
def test_mistakes_name_key_value_and_way_out(overrides: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug/vqa_tiny", overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  learning_rate: 1", ["bad.yaml: optim.learning_rate", "unknown key"]),
        ("optim: {lr: [1]}", ["bad.yaml: optim.lr", "[1]", "number"]),
        ("model: {selection: {keep_rate: 0}}", ["bad.yaml: model.selection.keep_rate", "not a keep rate"]),
        ("optim: [", ["bad.yaml", "is not YAML"]),
        ("- 1", ["bad.yaml", "is not a mapping"]),
        ("task: chess", ["bad.yaml: task", "'chess'", "vqa"]),
        ("1: 2", ["bad.yaml: 1", "unknown key"]),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    for part in parts:
        assert part in str(caught.value)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean vqa/daquar_small\?"):
        load_recipe("vqa/daquar_smal")
    for other in (tmp_path, tmp_path / "none.yaml", "../recipes/vqa/daquar_small", "a\0b"):
        with pytest.raises(ConfigError, match="no such recipe"):
            load_recipe(other)


def test_empty_file_and_empty_section_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    for text in ("", "optim:\n"):
        path.write_text(text)
        assert load_recipe(path) == Recipe()


def test_every_key_is_explained() -> None:
    def check(kind: type, prefix: str) -> list[str]:
        names = []
        hints = typing.get_type_hints(kind)
        for name in (field.name for field in dataclasses.fields(kind)):
            hint = hints[name]
            assert f"    {name}: " in kind.__doc__, f"{prefix}{name} has no line in the docstring of {kind.__name__}"
            names += check(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{name}"]
        return names

    assert check(Recipe, "") == list(recipe_keys())


@given(
    lr=st.floats(0, 1),
    steps=st.none() | st.integers(0, 10**6),
    rate=st.floats(0.01, 1) | st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    out=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    train=st.lists(st.sampled_from(["a.tar", "[b].tar", "null", "1e-3", "c d*.tar"]), max_size=3),
)
def test_saved_recipes_read_back_equal(tmp_path_factory, lr, steps, rate, out, train) -> None:
    recipe = load_recipe(
        "debug/vqa_tiny",
        {"optim.lr": lr, "optim.steps": steps, "model.selection.keep_rate": rate, "run.out": out, "data.train": train},
    )
    assert (recipe.optim.lr, recipe.optim.steps, recipe.run.out, recipe.data.train) == (lr, steps, out, tuple(train))
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    assert recipe_to_dict(recipe)["optim"]["lr"] == lr


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.head_lr", 1e-3), ("data.weights", [1.0]), ("data.flip", "swap"), ("model.pretraining.alpha", 0.1),
     ("data.shuffle_shards", 2), ("data.cache_dir", "cache"), ("data.cache_gb", 1.0)],
)  # fmt: skip
def test_keys_of_pre_training_are_refused_elsewhere(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key.removesuffix('.alpha')}.*task vqa has no use"):
        load_recipe("debug/vqa_tiny", {key: value, "data.train": ["a.tar"]})
    load_recipe("debug/pretrain_tiny", {key: value, "data.train": ["a.tar"]})


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.num_text_layers", 2), ("model.num_fusion_layers", 2), ("optim.vision_lr", 0), ("run.cache_prefix_gb", 1.0),
     ("model.selection.guide", "image"), ("model.selection.learning", "distill")],
)  # fmt: skip
def test_what_a_single_stream_model_lacks_is_refused(key: str, value: object) -> None:
    assert load_recipe("debug/vqa_single_tiny").model.architecture == "single"
    with pytest.raises(ConfigError, match=f"{key.removeprefix('model.')}.*single-stream|single-stream.*{key}"):
        load_recipe("debug/vqa_single_tiny", {key: value})
    load_recipe("debug/vqa_tiny", {key: value})


@pytest.mark.parametrize(("key", "value"), [("data.cache_images", True), ("model.num_decoder_layers", 2)])
def test_keys_of_other_tasks_are_refused_in_retrieval(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*task retrieval has no use"):
        load_recipe("debug/retrieval_tiny", {key: value})
    load_recipe("debug/vqa_tiny", {key: value})
