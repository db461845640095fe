"""Settings of the paper as runs of a recipe: what the setting decides, what the recipe keeps, what a run tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trips import recipe_accuracy
from trips.config import SelectionConfig
from trips.errors import CheckpointError, ConfigError, DataError
from trips.paper.cells import CellStore
from trips.paper.published import published_table
from trips.paper.settings import Setting
from trips.paper.tables import paper_table, with_accuracy
from trips.recipe_accuracy import RecipeAccuracy
from trips.train.recipe import Recipe
from trips.train.towers import tower_shape

TINY = "debug/vqa_tiny"  # 4 layers, 64 px in patches of 16


def test_what_the_setting_decides(tmp_path):
    source = RecipeAccuracy(TINY, tmp_path, ["--model.selection.score=raw_states", "--optim.steps=7"])
    recipe = source.recipe_of(Setting("[5, 10] x 0.5", SelectionConfig(keep_rate=0.5, inattentive="drop")), 3)
    chosen = recipe.model.selection
    assert (chosen.layers, chosen.keep_rate, chosen.guide, chosen.inattentive) == ((2, 4), 0.5, "text", "drop")
    assert (chosen.score, recipe.optim.steps, recipe.run.seed, recipe.data.image_size) == ("raw_states", 7, 3, 64)
    none = source.recipe_of(Setting("no selection", SelectionConfig(guide="none")), 3)
    assert not none.model.selection.active and none.run.out != recipe.run.out
    taught = source.recipe_of(Setting("x", SelectionConfig(learning="gate", score="keys")), 0).model.selection
    assert (taught.learning, taught.score) == ("gate", "keys"), "what differs from the standard is the setting's"
    single = source.recipe_of(published_table(6).settings[0], 0).model
    assert (single.architecture, single.num_text_layers, single.num_decoder_layers) == ("single", 6, 2)


@pytest.mark.parametrize(("side", "scale", "pixels"), [(384, 1.0, 64), (224, 1.0, 32), (456, 1.0, 80), (384, 0.5, 32)])
def test_pixels_are_in_proportion(side, scale, pixels, tmp_path):
    setting = Setting("x", SelectionConfig(), side, scale)
    assert RecipeAccuracy(TINY, tmp_path).recipe_of(setting, 0).data.image_size == pixels


def test_runs_of_different_cells_have_folders_of_their_own(tmp_path):
    source, other = RecipeAccuracy(TINY, tmp_path), RecipeAccuracy(TINY, tmp_path, ["--optim.steps=7"])
    settings = [setting for number in (4, 5, 6, 7) for setting in published_table(number).settings]
    folders = {
        one.recipe_of(setting, seed).run.out for one in (source, other) for setting in settings for seed in (0, 1)
    }
    assert len(folders) == 4 * len(set(settings))
    assert source.key != other.key
    assert source.key == RecipeAccuracy(TINY, tmp_path / "elsewhere").key


def test_what_cannot_be_swept(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model.selection.keep_rate.*decided by the table"):
        RecipeAccuracy(TINY, tmp_path, ["--model.selection.keep_rate=0.3"])
    with pytest.raises(ConfigError, match="no such recipe"):
        RecipeAccuracy("vqa/none", tmp_path)
    with pytest.raises(CheckpointError, match="no configuration of a vision tower"):
        (tmp_path / "tower").mkdir()
        RecipeAccuracy(TINY, tmp_path, [f"--model.vision={tmp_path / 'tower'}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        RecipeAccuracy(TINY, tmp_path)


def test_shape_of_a_tower(tmp_path):
    assert tower_shape("tiny") == (4, 16)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "dinov2", "num_hidden_layers": 7, "patch_size": 14})
    )
    assert tower_shape(str(tmp_path)) == (7, 14)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": {"num_hidden_layers": 5, "patch_size": 32}})
    )
    assert tower_shape(str(tmp_path)) == (5, 32)


def test_what_is_read_from_a_run(tmp_path, monkeypatch):
    results: dict[str, Any] = {"accuracy": 0.25, "majority": 0.125, "metric": "exact", "seconds": 2.0, "steps": 20}

    def run_recipe(recipe: Recipe) -> dict[str, Any]:
        (Path(recipe.run.out) / "checkpoints").mkdir(parents=True)
        (Path(recipe.run.out) / "model").mkdir()
        return results

    monkeypatch.setattr(recipe_accuracy, "run_recipe", run_recipe)
    source, setting = RecipeAccuracy(TINY, tmp_path), Setting("x", SelectionConfig())
    assert source.measure(setting, 0) == {"accuracy": 25.0, "majority": 12.5, "seconds": 2.0, "steps": 20.0}
    assert [path.name for path in Path(source.recipe_of(setting, 0).run.out).iterdir()] == ["model"]
    del results["accuracy"]
    with pytest.raises(DataError, match=r"without accuracy.*answers are known"):
        source.measure(setting, 1)
    results.clear()
    with pytest.raises(KeyboardInterrupt):
        source.measure(setting, 2)
    results |= {"reranked": {"image": {"mean_recall": 0.1}, "text": {"mean_recall": 0.5}}, "seconds": 1.0, "steps": 1}
    source = RecipeAccuracy("debug/retrieval_tiny", tmp_path)
    assert source.measure(setting, 0)["accuracy"] == 50.0 and source.unit == "mean recall, %"


def test_a_table_over_a_recipe_names_the_cells_that_do_not_fit(tmp_path, monkeypatch):
    standard = Setting.selection_in

    def selection_in(setting: Setting, num_layers: int) -> SelectionConfig:
        if setting.selection.layers == (2, 4):
            raise ConfigError("no room", item="selection.layers")
        return standard(setting, num_layers)

    monkeypatch.setattr(
        recipe_accuracy, "run_recipe", lambda recipe: {"accuracy": 0.5, "seconds": 1.0, "steps": recipe.run.seed}
    )
    source = RecipeAccuracy(TINY, tmp_path / "runs")
    with pytest.raises(ConfigError, match="two locations fall on one layer"):
        source.recipe_of(Setting("x", SelectionConfig(layers=(1, 2))), 0)
    monkeypatch.setattr(Setting, "selection_in", selection_in)
    result = with_accuracy(paper_table(4), source, CellStore(tmp_path / "cells", source.key))
    assert list(result.failures) == ["[2, 4] x 0.5, seed 0", "[2, 4] x 0.7, seed 0"]
    assert "no room" in result.failures["[2, 4] x 0.7, seed 0"]
    assert not result.ok and result.rows[0].ours["accuracy"] == 50.0
