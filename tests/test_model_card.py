"""Model cards: huggingface_hub must read them, runs must fill them, pushing must take them along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from distributed.pretraining_runs import KEYS, write_shards
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny import tiny_config, tiny_pretraining_model, tiny_vqa_model

import trips
from trips import model_card as cards
from trips.bench.flops import count_flops
from trips.config import SelectionConfig, token_counts
from trips.model_card import CARD_FILE, write_model_card

RESULTS = {
    "environment": {"device": "a processor", "torch": "2.13.0", "commit": None},
    "recipe": {"task": "vqa", "data": {"train": ["/home/me/train.tar"], "test": ["/home/me/test.tar"]}},
    "accuracy": 0.625,
    "accuracy_blank_images": 0.25,
    "generated": {"accuracy": 0.5},
    "untrained": {"accuracy": 0.125},
    "metric": "exact",
    "steps": 7,
}


def test_saving_leaves_a_card_that_the_hub_can_read(tmp_path: Path) -> None:
    model = tiny_vqa_model()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.library_name == "trips" and card.data.pipeline_tag == "visual-question-answering"
    assert "trips" in card.data.tags and card.data.license is None and not card.data.eval_results
    assert metadata_load(tmp_path / CARD_FILE)["library_name"] == "trips"
    before = count_flops(model.config, (4, 4), 40, SelectionConfig(guide="none")).total
    after = count_flops(model.config, (4, 4), 40).total
    assert f"| {before:.4g} |" in card.text and f"| {after:.4g} |" in card.text
    assert f"Ratio {before / after:.3f}" in card.text
    tokens = token_counts(16, 4, model.config.selection)[-1][1]
    assert f"17 image tokens become {tokens}." in card.text
    assert "0.5 at layer 2, 0.5 at layer 3" in card.text and "clip_vision_model, 4 layers, width 32" in card.text


@pytest.mark.parametrize(
    "model_class", ["TripsModel", "TripsForVisualReasoning", "TripsForImageTextRetrieval", "TripsForPreTraining"]
)
@pytest.mark.parametrize("changes", [{}, {"guide": "none"}, {"architecture": "single"}, {"layers": (9,)}])
def test_every_class_and_setting_has_a_card(tmp_path: Path, model_class: str, changes: dict[str, Any]) -> None:
    beyond = changes.get("layers")
    config = tiny_config(**({} if beyond else changes))
    if beyond:  # after the checks of the constructor
        config.selection = SelectionConfig(layers=beyond, keep_rate=0.5)
    assert write_model_card(tmp_path, config, model_class)
    text = ModelCard.load(tmp_path / CARD_FILE).text
    assert f"# {model_class}" in text and "## Licence" in text
    assert ("No patches are removed" in text) == ("guide" in changes)
    assert ("Not counted" in text) == ("layers" in changes), "a configuration that cannot be run can be saved"
    assert ("Ratio 1.000" in text) == ("guide" in changes)


def test_the_code_of_a_card_names_what_exists(tmp_path: Path) -> None:
    for name in ("TripsModel", *cards._USES):
        write_model_card(tmp_path / ".", tiny_config(), name)
        text = (tmp_path / CARD_FILE).read_text()
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert hasattr(trips, name)
        if name in cards._USES:
            assert hasattr(trips.TripsPipeline, code.split("model.")[1].split("(")[0])
        (tmp_path / CARD_FILE).unlink()


def test_results_become_metrics_without_folders_of_this_machine(tmp_path: Path) -> None:
    config = tiny_config()
    assert write_model_card(tmp_path, config, "TripsForQuestionAnswering")
    assert write_model_card(tmp_path, config, "TripsForQuestionAnswering", results=RESULTS), "over a generated card"
    assert not write_model_card(tmp_path, config, "TripsForQuestionAnswering"), "nothing measured is lost"
    card = ModelCard.load(tmp_path / CARD_FILE)
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 0.625, "generated accuracy": 0.5}
    assert {(result.dataset_name, result.metric_type) for result in card.data.eval_results} == {
        ("test.tar", "accuracy")
    }
    _, again = model_index_to_eval_results(metadata_load(tmp_path / CARD_FILE)["model-index"])
    assert [result.metric_value for result in again] == [0.625, 0.5]
    assert "/home/me" not in str(card) and "| accuracy | 0.6250 |" in card.text and "| steps | 7 |" in card.text
    assert "trips train recipe.yaml" in card.text and "torch 2.13.0" in card.text and "commit" not in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {"task": "vqa", "data": {"train": ["train.tar"], "test": ["test.tar"]}}


def test_recalls_are_metrics_too() -> None:
    figures = {"text_recall": {"1": 0.5, "5": 0.75}, "mean_recall": 0.6, "num_images": 4, "by": {"first": "x"}}
    card = cards.model_card(tiny_config(), "TripsForImageTextRetrieval", results={"recipe": {}, **figures})
    found = [(result.metric_name, result.metric_value, result.metric_type) for result in card.data.eval_results]
    assert found == [
        ("text_recall 1", 0.5, "recall"),
        ("text_recall 5", 0.75, "recall"),
        ("mean_recall", 0.6, "recall"),
    ]


def test_a_card_of_a_person_stays(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text("mine")
    tiny_vqa_model().save_pretrained(tmp_path)
    assert not write_model_card(tmp_path, tiny_config(), "TripsForQuestionAnswering", results=RESULTS)
    assert (tmp_path / CARD_FILE).read_text() == "mine"


def test_other_processes_write_no_card(tmp_path: Path) -> None:
    tiny_vqa_model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / CARD_FILE).exists()


class Hub:
    """Stands for the hub: what is asked of it, and the files that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, has_card: bool = False) -> None:
        self.asked: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        hub = self

        class Api:
            def create_repo(self, repo_id: str, **options: Any) -> huggingface_hub.RepoUrl:
                hub.asked = options
                return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

            def file_exists(self, repo_id: str, filename: str, **options: Any) -> bool:
                return has_card and filename == CARD_FILE

            def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str] | None, **options: Any) -> str:
                hub.asked |= options
                paths = [path for path in Path(folder_path).iterdir() if path.name not in (ignore_patterns or [])]
                hub.files = {path.name: path.read_bytes() for path in paths}
                return "https://huggingface.co/me/mine/commit/1"

        monkeypatch.setattr(cards, "HfApi", Api)


def test_pushing_takes_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = Hub(monkeypatch), tiny_vqa_model()
    assert model.push_to_hub("mine", private=True, commit_message="first").endswith("commit/1")
    assert {"config.json", "model.safetensors", CARD_FILE} <= set(hub.files)
    assert ModelCard(hub.files[CARD_FILE].decode()).data.library_name == "trips"
    assert hub.asked["private"] and hub.asked["repo_id"] == "me/mine" and hub.asked["commit_message"] == "first"

    # what a run has measured travels with the model that is loaded from its folder
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, model.config, "TripsForQuestionAnswering", results=RESULTS)
    trips.TripsForQuestionAnswering.from_pretrained(tmp_path).push_to_hub("mine")
    assert hub.files[CARD_FILE] == (tmp_path / CARD_FILE).read_bytes()


def test_a_card_on_the_hub_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, has_card=True)
    tiny_pretraining_model().push_to_hub("mine")
    assert "model.safetensors" in hub.files and CARD_FILE not in hub.files


def test_saving_can_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    tiny_vqa_model().save_pretrained(tmp_path / "mine", push_to_hub=True, private=False)
    assert hub.asked["repo_id"] == "me/mine" and CARD_FILE in hub.files
    assert (tmp_path / "mine" / CARD_FILE).is_file()


def test_a_run_leaves_a_card_with_its_figures(tmp_path: Path) -> None:
    from trips.train.recipe_io import load_recipe
    from trips.train.run import run_recipe

    keys = {**KEYS, **write_shards(tmp_path), "optim.steps": 1, "run.out": str(tmp_path / "run")}
    results = run_recipe(load_recipe("debug/pretrain_tiny", keys))
    card = ModelCard.load(tmp_path / "run" / "model" / CARD_FILE)
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["mean_recall"] == pytest.approx(results["mean_recall"], abs=1e-6)
    assert found["text_recall 1"] == pytest.approx(results["text_recall"][1], abs=1e-6)
    assert str(tmp_path) not in str(card)
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["task"] == "pretrain" and recipe["optim"]["steps"] == 1
    assert f"at {recipe['data']['image_size']} x {recipe['data']['image_size']} pixels" in card.text
