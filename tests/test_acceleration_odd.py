"""Accelerated models in odd hands: threads, adapters, offloading, shared, compiled and replaced towers."""

from __future__ import annotations

import sys
from threading import Thread

import pytest
import torch
from tiny_hosts import call_of, host, sentences, tower_of, vision_output
from torch import Tensor, nn
from transformers import PreTrainedModel

import trips
from trips.acceleration import guided_by
from trips.errors import ConfigError, ShapeError

LAYERS = (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vqa", "clip", "vit"])
def test_threads_do_not_hear_the_texts_of_others(kind: str) -> None:
    model = trips.accelerate(host(kind), LAYERS, 0.5)
    calls = [call_of(kind, count=count, seed=count) for count in (1, 2, 3)]
    wanted = []
    for call in calls:
        wanted.append((vision_output(model(**call)), trips.explain_last(model)[0].kept))
    same: list[bool] = []

    def work(call: dict[str, Tensor], states: Tensor, kept: Tensor) -> None:
        with torch.no_grad():
            for _ in range(25):
                got = vision_output(model(**call))
                same.append(torch.equal(got, states) and torch.equal(trips.explain_last(model)[0].kept, kept))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [Thread(target=work, args=(call, *want)) for call, want in zip(calls, wanted, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(same) == 75 and all(same)  # a thread that failed leaves none behind


class Adapted(nn.Module):
    """As adapters wrap a layer: the weight of the old one is still to be seen, and no longer the whole truth."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.more = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + self.more(states)


def qkv_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.vision_model.encoder.layers]


@torch.no_grad()
@pytest.mark.parametrize("guide", ["text", "image"])
def test_an_adapter_is_part_of_the_fused_projection(guide: str) -> None:
    """The same as a model whose weights have taken the adapter in."""
    model, merged, inputs = host("vqa"), host("vqa"), call_of("vqa")
    merged.load_state_dict(model.state_dict())
    for mine, theirs in zip(qkv_layers(model), qkv_layers(merged), strict=True):
        mine.qkv = Adapted(mine.qkv)
        mine.qkv.more.weight.normal_(generator=torch.Generator().manual_seed(1))
        theirs.qkv.weight += mine.qkv.more.weight
    for each in (model, merged):
        trips.accelerate(each, LAYERS, 0.5, guide)
        each(**inputs)
    mine, theirs = (trips.explain_last(each)[0].scores for each in (model, merged))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_offloaded_projections_and_texts() -> None:
    model, inputs = host("vqa"), call_of("vqa")
    trips.accelerate(model, LAYERS, 0.5)
    want = vision_output(model(**inputs))
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))
    assert model.device.type == "meta"
    torch.testing.assert_close(vision_output(model(**inputs)), want)


@torch.no_grad()
def test_a_tower_of_two_models_is_accelerated_once() -> None:
    first, second = host("vqa"), host("matching")
    second.vision_model = first.vision_model
    trips.accelerate(first, LAYERS, 0.5)
    with pytest.raises(ConfigError, match="BlipForImageTextRetrieval: accelerated already"):
        trips.accelerate(second, LAYERS, 0.5)
    trips.restore(first)
    trips.accelerate(second, LAYERS, 0.5)
    assert vision_output(second(**call_of("matching"))).shape[1] == 7


@torch.no_grad()
@pytest.mark.parametrize("guide", ["text", "image"])
def test_a_replaced_tower_does_not_go_unnoticed(guide: str) -> None:
    model = trips.accelerate(host("vqa"), LAYERS, 0.5, guide)
    model.vision_model = host("vqa").vision_model
    with pytest.raises(ConfigError, match="not passed through the vision tower"):
        model(**call_of("vqa"))
    trips.accelerate(trips.restore(model), LAYERS, 0.5, guide)
    assert vision_output(model(**call_of("vqa"))).shape[1] == 7


def test_what_is_compiled_or_wrapped_is_refused() -> None:
    model = host("vqa")
    model.vision_model.encoder.compile(backend="eager")
    with pytest.raises(ConfigError, match="compiled or wrapped already"):
        trips.accelerate(model, LAYERS, 0.5)
    model = host("vqa")
    model.vision_model = torch.compile(model.vision_model, backend="eager")
    with pytest.raises(ConfigError, match="OptimizedModule"):
        trips.accelerate(model, LAYERS, 0.5)
    assert "trips_selection" not in model.config.__dict__
    with pytest.raises(ConfigError, match="the one inside"):
        trips.explain_last(torch.compile(trips.accelerate(host("vqa"), LAYERS, 0.5)))


@torch.no_grad()
def test_a_call_that_fails_over_its_text_has_no_record() -> None:
    model, inputs = trips.accelerate(host("vqa"), LAYERS, 0.5), call_of("vqa")
    model(**inputs)
    assert trips.explain_last(model)
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"] + 10**6})
    with pytest.raises(ConfigError, match="no call has been recorded"):
        trips.explain_last(model)
    with pytest.raises(ConfigError, match="brings no text"):
        tower_of(model)(inputs["pixel_values"])
    with pytest.raises(ConfigError, match="brings no text"):  # past the tower's own hooks
        model.vision_model.encoder(model.vision_model.embeddings(inputs["pixel_values"]))


@torch.no_grad()
def test_texts_that_are_none_are_refused_on_entering() -> None:
    model = trips.accelerate(host("clip"), LAYERS, 0.5)
    for text, error, words in (
        ({**sentences(), "mask": 1}, ConfigError, "mask: not of a text"),
        ({"input_ids": [[1, 2]]}, ShapeError, r"input_ids.*\(B, L\)"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, ShapeError, r"input_ids.*\(B, L\)"),
    ):
        with pytest.raises(error, match=words), guided_by(model, **text):
            pass
    inputs = call_of("clip")
    kept = []
    with guided_by(model, **sentences(seed=1)):
        model(**inputs)
        with guided_by(model, **sentences(seed=7)):
            model(**inputs)
            kept.append(trips.explain_last(model)[0].scores)
        model(**inputs)
        kept.append(trips.explain_last(model)[0].scores)
    assert not torch.equal(*kept)


def test_stored_settings_that_do_not_go_with_what_is_asked() -> None:
    model = trips.accelerate(host("vqa"), LAYERS, 0.5, fallback="image")
    stored = model.config.trips_selection
    trips.restore(model)
    model.config.trips_selection = stored
    trips.accelerate(model, guide="image")  # needs nothing to fall back on
    assert model.config.trips_selection["fallback"] == "none"
    trips.restore(model)
    assert trips.accelerate(model).config.trips_selection == stored
    for wrong in ("text", [2, 3], 5):
        model = host("vit")
        model.config.trips_selection = wrong
        with pytest.raises(ConfigError, match="trips_selection: must be a mapping"):
            trips.accelerate(model)
