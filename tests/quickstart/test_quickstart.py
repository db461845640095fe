"""The quick-start in its smallest form, and its measurements against slow versions."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest
import torch

from trips.data.scene_batches import TEST_START, SceneBatcher, scene_processor
from trips.data.scenes import QUESTION_TYPES, SceneCorpus
from trips.errors import ConfigError
from trips.metrics import kept_mask
from trips.quickstart import run_quickstart
from trips.quickstart.evaluation import evaluate_guide, other_image_partner
from trips.quickstart.labels import patch_labels
from trips.quickstart.plan import GUIDES, REPORTED_START, VALIDATION_START, QuickstartPlan
from trips.quickstart.report import answerable_gain, answerable_types, findings
from trips.quickstart.stages import build_model, with_mixture
from trips.tasks.vqa import TripsForQuestionAnswering


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    return out, run_quickstart(out, seed=1, scale="smoke")


def test_results_have_the_promised_form(smoke):
    out, results = smoke
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"environment", "seconds", "rows"} <= results.keys()
    assert tuple(row["guide"] for row in results["rows"]) == GUIDES
    for row in results["rows"]:
        assert {"keep_rates", "accuracy", "relevance_recall", "relevance_gain", "flops_g", "throughput"} <= row.keys()
        assert row["accuracy"].keys() <= {"overall", *QUESTION_TYPES}
        assert row["relevance_recall"].keys() == row["relevance_gain"].keys() == {"3", "5"}
        assert row["throughput"] > 0
    assert (out / "kept_patches.png").stat().st_size > 10_000


def test_the_saved_model_is_usable(smoke):
    out, _ = smoke
    model = TripsForQuestionAnswering.from_pretrained(out / "model")
    assert model.config.selection.learning in ("literal", "gate", "distill")


def test_findings_say_where_a_claim_does_not_hold():
    def row(guide, accuracy, speed):
        return {
            "guide": guide,
            "accuracy": {"overall": accuracy, "object": accuracy},
            "relevance_gain": {"5": 0.0},
            "relevance_gain_by_type": {"object": 0.0},
            "flops_g": 1.0,
            "throughput": speed,
        }

    rows = [row("none", 0.9, 1), row("text_literal", 0.5, 2), row("text_gate", 0.7, 2), row("image_cls", 0.6, 2)]
    rows.append(row("random", 0.4, 2))
    lines = findings(rows, QuickstartPlan())
    assert any(line.startswith("DOES NOT HOLD: text_literal ahead of image") and "-10.0" in line for line in lines)
    assert any(line.startswith("holds: text_gate ahead of image") and "+10.0" in line for line in lines)
    assert any(line.startswith("DOES NOT HOLD: within one point") and "-20.0" in line for line in lines)


def test_answerable_gain_is_the_mean_over_questions_of_types_that_can_be_answered():
    full = {"accuracy": {"overall": 0.7, "object": 0.95, "background": 0.99, "existence": 0.55, "counting": 0.36}}
    gains = {"object": 0.6, "background": 0.3, "relation": -0.1, "existence": 0.2, "counting": 0.1}
    assert answerable_types(full) == ["object", "background"]
    corpus, asked = SceneCorpus(seed=5), []
    for number in range(300):
        asked += [gains[q.type] for q in corpus.questions(number, 16) if q.type in ("object", "background")]
    assert answerable_gain({"relevance_gain_by_type": gains}, full) == pytest.approx(np.mean(asked), abs=0.01)
    assert answerable_gain({"relevance_gain_by_type": {}}, full) == 0.0
    assert answerable_gain({"relevance_gain_by_type": gains}, {"accuracy": {"overall": 0.2}}) == 0.0


def test_training_and_both_measured_parts_have_different_scenes():
    plan = QuickstartPlan()
    trained = (plan.bind_steps + plan.question_steps + plan.tune_steps) * plan.num_scenes
    trained = max(trained, 2 * plan.label_steps * plan.num_scenes)
    assert trained < TEST_START <= VALIDATION_START
    assert VALIDATION_START + plan.test_scenes <= REPORTED_START == plan.first_scene


def test_another_mixture_changes_the_questions_and_not_the_scenes():
    corpus = SceneCorpus(seed=3)
    batcher = SceneBatcher(corpus, scene_processor(corpus))
    asked = with_mixture(batcher, (("background", 1.0),)).batch(7, 2, 5)
    assert {question.type for question in asked.questions} == {"background"}
    for scene, same in zip(asked.scenes, batcher.scenes(7, 2), strict=True):
        assert (scene.image == same.image).all()


def test_unknown_scale():
    with pytest.raises(ConfigError, match="scale"):
        QuickstartPlan.of("large")


def test_partner_has_the_same_type_and_another_image():
    rng = np.random.default_rng(0)
    types = [QUESTION_TYPES[i] for i in rng.integers(0, 5, 200)]
    images = sorted(rng.integers(0, 16, 200).tolist())
    partner = other_image_partner(types, images).tolist()
    for row, other in enumerate(partner):
        assert types[row] == types[other] and images[row] != images[other]


@pytest.mark.parametrize("guide", ["text_literal", "text_gate", "image_cls", "none"])
def test_evaluation_equals_one_question_at_a_time(guide):
    corpus = SceneCorpus(seed=2)
    batcher, plan = SceneBatcher(corpus, scene_processor(corpus)), QuickstartPlan()
    torch.manual_seed(0)
    model, selection = build_model(plan, batcher.processor).eval(), plan.selection(guide)
    measured = evaluate_guide(model, batcher, selection, num_scenes=3, num_questions=6, first_scene=VALIDATION_START)
    batch = batcher.batch(VALIDATION_START, 3, 6)
    correct, recalls = [], []
    for row, question in enumerate(batch.questions):
        ids = batch.tensors["input_ids"][row : row + 1, : batch.tensors["attention_mask"][row].sum()]
        pixels = batch.tensors["pixel_values"][batch.tensors["image_index"][row]][None]
        with torch.no_grad():
            output = model(pixels, ids, selection=selection)
            best, _ = model.rank_answers(
                output.question_states, torch.ones_like(ids), batcher.answer_ids, batcher.answer_mask, top_k=99
            )
        correct.append(best[0, 0].item() == batch.answers[row].item())
        if output.selections:
            kept = kept_mask(output.selections[-1].kept, 64)[0]
            relevant = batcher.relevant([question])[0]
            recalls.append((kept & relevant).sum().item() / relevant.sum().item())
    assert measured["accuracy"]["overall"] == pytest.approx(np.mean(correct))
    assert measured["relevance_recall"]["5"] == pytest.approx(np.mean(recalls) if recalls else 1.0, abs=1e-6)
    if not guide.startswith("text"):  # who does not read keeps the same under another text
        assert measured["relevance_gain"]["5"] == 0.0


def test_patch_labels_name_the_band_at_the_centre():
    scene = SceneCorpus(seed=4).scene(0)
    labels = patch_labels(scene, 8)
    names = [region.name for region in scene.regions]
    for patch in range(64):
        y, x = patch // 8 * 8 + 4, patch % 8 * 8 + 4
        inside = [r for r in scene.regions if any(b[0] <= x < b[2] and b[1] <= y < b[3] for b in r.boxes)]
        assert len(inside) == 1 and names[labels["band"][patch]] == inside[0].name
    assert ((labels["shape"] > 0) == (scene.patch_labels(8) > 0)).all()
    assert labels["shape"].max() <= 16 and labels["colour"].max() <= 8


def test_the_page_shows_the_table_and_what_the_saved_model_says(smoke):
    out, results = smoke
    text = (out / "report.html").read_text(encoding="utf-8")
    assert all(f">{guide}</th>" in text for guide in GUIDES) and all(
        html.escape(line) in text for line in results["findings"]
    )
    assert text.count('class="verdict') == 5 and text.count('class="gone"') == 10
    assert set(results["losses"]["fine_tuning"]) == set(GUIDES)
    assert [points[-1][0] for points in results["losses"]["warm_up"].values()] == [3, 6, 3, 2]
