"""Acceleration of models of transformers: the original at keep rate 1 and after restoring, settings, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import images
from tiny_hosts import KINDS, TEXT_KINDS, call_of, host, sentences, tensors_of, tower_of, vision_output
from torch import nn
from transformers import BertConfig, BertModel, BlipForQuestionAnswering, PreTrainedModel

import trips
from trips.acceleration import guided_by
from trips.acceleration.hosts import host_of
from trips.config import SelectionConfig, token_counts
from trips.errors import ConfigError, ShapeError, UnsupportedModelError

LAYERS = (2, 3)
COMBINATIONS = [
    (kind, guide, score)
    for kind in KINDS
    for guide in host_of(host(kind)).guides
    for score in host_of(host(kind)).scores(guide)
]


def attributes_of(model: PreTrainedModel) -> dict[str, Any]:
    """What hangs on the modules and configurations of a model, apart from the modules and tensors themselves."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            hooks = isinstance(value, dict) and "hooks" in key
            found[f"{name}.{key}"] = len(value) if hooks else type(value).__name__
        if hasattr(module, "config"):
            found[f"{name} config"] = repr(sorted(module.config.__dict__))
    return found


@torch.no_grad()
@pytest.mark.parametrize(("kind", "guide", "score"), COMBINATIONS)
def test_keep_rate_one_and_restoring_give_the_original_bitwise(kind: str, guide: str, score: str) -> None:
    model, inputs = host(kind), call_of(kind)
    before, keys, attributes = tensors_of(model(**inputs)), list(model.state_dict()), attributes_of(model)
    weights = copy.deepcopy(model.state_dict())
    assert trips.accelerate(model, LAYERS, 1.0, guide, score=score) is model
    assert all(map(torch.equal, before, tensors_of(model(**inputs))))
    everything = torch.arange(16).expand(2, -1)
    assert all(torch.equal(record.kept, everything) for record in trips.explain_last(model))
    assert trips.restore(model) is model
    trips.accelerate(model, LAYERS, 0.5, guide, score=score)
    assert vision_output(model(**inputs)).shape[1] == 5 + 1 + (kind != "siglip")  # 16 -> 8 + 1 -> 5 + 1
    assert list(model.state_dict()) == keys
    trips.restore(model)
    assert all(map(torch.equal, before, tensors_of(model(**inputs))))
    assert attributes_of(model) == attributes
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inattentive", ["fuse", "renormalise", "drop"])
@pytest.mark.parametrize(("layers", "keep_rate"), [((1,), 0.7), ((2, 4), (0.3, 0.7)), ((4,), 0.1), ((1, 2, 3, 4), 0.7)])
def test_token_counts_are_those_of_the_configuration(
    kind: str, inattentive: str, layers: tuple[int, ...], keep_rate: float | tuple[float, ...]
) -> None:
    """Each layer sees, already in its attention, what `token_counts` gives for the FFN."""
    model = trips.accelerate(host(kind), layers, keep_rate, inattentive=inattentive)
    lengths = []
    for layer in model._trips_acceleration.parts.layers:
        layer.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model(**call_of(kind))
    setting = SelectionConfig(layers=layers, keep_rate=keep_rate, inattentive=inattentive)
    lead = kind != "siglip"
    assert lengths == [after - 1 + lead for _, after in token_counts(16, 4, setting)]
    assert tuple(record.layer for record in trips.explain_last(model)) == layers


@torch.no_grad()
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_another_text_keeps_other_patches_of_the_same_image(kind: str) -> None:
    model = trips.accelerate(host(kind), (2,), 0.3, "text")
    inputs = call_of(kind)
    model(**inputs)
    first = trips.explain_last(model)[0]
    kept = [first.kept]
    for seed in (11, 12, 13):
        model(**{**inputs, **sentences(seed=seed)})
        kept.append(trips.explain_last(model)[0].kept)
    assert any(not torch.equal(kept[0], other) for other in kept[1:])
    model(**inputs)
    assert torch.equal(trips.explain_last(model)[0].kept, first.kept)
    assert first.layer == 2 and first.scores.sum(dim=1).allclose(torch.ones(2))


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("vqa", {"layers": (5, 10)}, ("selection.layers", "5", "1 to 4")),
        ("vqa", {"layers": (3, 2)}, ("selection.layers", "rise")),
        ("vqa", {"layers": ()}, ("selection.layers", "nothing")),
        ("vqa", {"layers": (2,), "keep_rate": 0.0}, ("selection.keep_rate",)),
        ("vqa", {"layers": (2,), "keep_rate": 0.99}, ("layer 2", "16 patches", "removes none")),
        ("vqa", {"layers": (2,), "score": "shared"}, ("score", "shared", "states | keys")),
        ("vqa", {"layers": (2,), "guide": "words"}, ("guide", "words", "text | image")),
        ("vqa", {"layers": (2,), "fallback": "text"}, ("fallback", "none | image")),
        ("vqa", {"layers": (2,), "guide": "image", "fallback": "image"}, ("fallback",)),
        ("vqa", {"layers": (2,), "inattentive": "burn"}, ("inattentive", "burn")),
        ("siglip", {"layers": (2,), "guide": "image"}, ("guide", "SiglipModel", "keys_mean")),
        ("clip", {"layers": (2,), "score": "states"}, ("score", "CLIPModel", "shared")),
        ("vit", {"layers": (2,), "guide": "text"}, ("guide", "ViTModel", "image")),
    ],
)
def test_what_cannot_act_is_refused_and_leaves_the_model_alone(
    kind: str, arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    model = host(kind)
    attributes = attributes_of(model)
    with pytest.raises(ConfigError) as caught:
        trips.accelerate(model, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert attributes_of(model) == attributes


def test_wrong_moments_and_models_are_refused() -> None:
    model = host("vqa")
    for function in (trips.restore, trips.explain_last):
        with pytest.raises(ConfigError, match="not accelerated"):
            function(model)
    trips.accelerate(model, LAYERS, 0.5)
    with pytest.raises(ConfigError, match="accelerated already"):
        trips.accelerate(model, LAYERS, 0.5)
    with pytest.raises(ConfigError, match="no call has been recorded"):
        trips.explain_last(model)
    trips.restore(model)
    with pytest.raises(ConfigError, match="not accelerated"):
        trips.restore(model)
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(UnsupportedModelError, match="BertModel.*BlipForQuestionAnswering"):
        trips.accelerate(bert)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        trips.accelerate(nn.Linear(2, 2))


def test_a_width_that_the_query_cannot_take_is_refused() -> None:
    config = host("vqa").config
    config.text_config.hidden_size, config.text_config.intermediate_size = 16, 32
    model = BlipForQuestionAnswering(config)
    with pytest.raises(ConfigError, match="text width 16 unlike vision width 32"):
        trips.accelerate(model, LAYERS, 0.5)
    trips.accelerate(model, LAYERS, 0.5, "image")


@torch.no_grad()
def test_an_image_too_small_for_the_rate_is_an_error_of_the_call() -> None:
    model = trips.accelerate(host("dinov2"), LAYERS, 0.7)
    assert model(images(1, 24, 24)).last_hidden_state.shape[1] == 1 + 7
    with pytest.raises(ConfigError, match="layer 2: too few patches.*1 patches x 0.7"):
        model(images(1, 8, 8))
    with pytest.raises(ConfigError, match="no call has been recorded"):
        trips.explain_last(model)
    assert model(images(1, 24, 24)).last_hidden_state.shape[1] == 1 + 7


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip", "vqa"])
def test_a_call_without_text_is_an_error_or_falls_back(kind: str) -> None:
    free = host_of(host(kind)).free_guides[0]
    pixels = images(2)
    model = trips.accelerate(host(kind), LAYERS, 0.5)
    with pytest.raises(ConfigError, match=f'brings no text.*guided_by.*fallback="{free}"'):
        tower_of(model)(pixels)
    with guided_by(model, **sentences()):
        guided = tower_of(model)(pixels).last_hidden_state
    assert guided.shape[1] == 6 + (kind != "siglip")
    with pytest.raises(ConfigError, match="brings no text"):
        tower_of(model)(pixels)
    trips.restore(model)
    trips.accelerate(model, LAYERS, 0.5, fallback=free)
    fallen = tower_of(model)(pixels).last_hidden_state
    trips.restore(model)
    trips.accelerate(model, LAYERS, 0.5, free)
    assert torch.equal(fallen, tower_of(model)(pixels).last_hidden_state)
    with pytest.raises(ConfigError, match="does not listen"), guided_by(model, **sentences()):
        pass


@torch.no_grad()
def test_scores_of_all_images_against_other_numbers_of_texts_are_refused() -> None:
    model = trips.accelerate(host("clip"), LAYERS, 0.5)
    inputs = {"pixel_values": images(2), **sentences(3)}
    with pytest.raises(ShapeError, match="3 texts, 2 images"):
        model(**inputs)
    trips.restore(model)
    trips.accelerate(model, LAYERS, 0.5, "image")
    assert model(**inputs).logits_per_image.shape == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_setting_is_stored_with_the_model_and_taken_up_again(kind: str, tmp_path: Path) -> None:
    model, inputs = host(kind), call_of(kind)
    plain = tensors_of(model(**inputs))
    trips.accelerate(model, LAYERS, (0.5, 0.75), "keys_mean", inattentive="renormalise")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(map(torch.equal, plain, tensors_of(loaded(**inputs))))
    trips.accelerate(loaded)
    assert loaded.config.trips_selection == model.config.trips_selection
    assert torch.equal(vision_output(loaded(**inputs)), vision_output(model(**inputs)))
    trips.restore(loaded)
    assert "trips_selection" in loaded.config.__dict__  # as it was loaded
    trips.accelerate(loaded, guide="random")
    assert loaded.config.trips_selection["score"] == "noise"


@torch.no_grad()
def test_a_stored_setting_that_is_damaged_is_named() -> None:
    model = host("vit")
    model.config.trips_selection = {"layers": [2], "depth": 3}
    with pytest.raises(ConfigError, match="trips_selection.depth: unknown key"):
        trips.accelerate(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vqa", "siglip", "vit"])
def test_a_copy_is_accelerated_by_itself(kind: str) -> None:
    model, inputs = trips.accelerate(host(kind), LAYERS, 0.5), call_of(kind)
    before = vision_output(model(**inputs))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        trips.explain_last(model)[0].kept.fill_(0)
        assert torch.equal(vision_output(twin(**inputs)), before)
        assert trips.explain_last(twin)[0].kept.sum() > 0  # its own record
        trips.restore(twin)
        assert vision_output(twin(**inputs)).shape[1] >= 16
    assert torch.equal(vision_output(model(**inputs)), before)
