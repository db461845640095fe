"""The warm-up of both architectures: what is taught, what rests, what learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trips.data.scene_batches import SceneBatcher, scene_processor
from trips.data.scenes import SceneCorpus
from trips.quickstart.labels import LABEL_CLASSES, PatchLabelData, PatchLabelModel
from trips.quickstart.plan import QuickstartPlan
from trips.quickstart.stages import build_model, warm_up

PLAN = QuickstartPlan.of("smoke")


@pytest.fixture(scope="module")
def batcher():
    corpus = SceneCorpus(seed=3)
    return SceneBatcher(corpus, scene_processor(corpus))


def test_patch_labels_are_read_off_the_tower_of_the_model(batcher):
    """In a dual model: the states that the model itself would hand on, one patch at a time."""
    torch.manual_seed(0)
    vision = build_model(PLAN, batcher.processor).trips.vision.eval()
    taught = PatchLabelModel(vision, PLAN.width, PLAN.vision_layers)
    batch = next(PatchLabelData(batcher, 2, 8).batches(0, 1))
    with torch.no_grad():
        losses = taught(**batch)
        states = vision(batch["pixel_values"]).last_hidden_state[:, 1:]
        total = 0.0
        for name in LABEL_CLASSES:
            each = [
                F.cross_entropy(taught.heads[name](states[image, patch]), batch[name][image, patch])
                for image in range(2)
                for patch in range(64)
            ]
            mean = torch.stack(each).mean()
            assert losses[f"loss_{name}"].item() == pytest.approx(mean.item(), rel=1e-5)
            total += mean.item() * (0.3 if name.startswith("band") else 1)
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("architecture", ["dual", "single"])
def test_layers_above_the_tower_learn_only_behind_the_first_stage(batcher, architecture, monkeypatch):
    from trips.quickstart import stages

    torch.manual_seed(0)
    model = build_model(PLAN, batcher.processor, architecture)
    seen, original = [], stages.train

    def spied(module, *arguments, **options):
        before = {name: value.clone() for name, value in model.named_parameters()}
        report = original(module, *arguments, **options)
        seen.append({name for name, value in model.named_parameters() if not torch.equal(value, before[name])})
        return report

    monkeypatch.setattr(stages, "train", spied)
    warm_up(model, batcher, PLAN, 0)
    layers = model.trips.vision.reader.layers
    assert len(layers) == (8 if architecture == "single" else 6)
    numbers = {id(parameter): number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    of_layer = {name: numbers[id(value)] for name, value in model.named_parameters() if id(value) in numbers}
    first, *others = [{of_layer[name] for name in names if name in of_layer} for names in seen]
    assert first == set(range(6)) and len(others) >= 2
    assert all(learnt == ({6, 7} if architecture == "single" else set()) for learnt in others)
    assert all(any(name.startswith("trips.text") for name in names) for names in seen[1:])
    assert all(value.requires_grad for value in model.parameters())  # the fine-tuning that follows moves all


def test_words_attend_sharply_in_both_architectures(batcher):
    """The upper layers of a single stack begin with queries and keys as wide as those of a fusion encoder."""
    torch.manual_seed(0)
    layers = build_model(PLAN, batcher.processor, "single").trips.vision.reader.layers
    for number, layer in enumerate(layers):
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                sharp = number >= 6 and any(part in name for part in ("q_proj", "k_proj", "query", "key"))
                assert weight.std().item() == pytest.approx(0.25 if sharp else 0.05, rel=0.1), (number, name)
