"""Token counts and operations of the methods, against the running model and its counter."""

from __future__ import annotations

import pytest
import torch
from tiny import images, randomise, texts, tiny_config

from trips.bench.counter import counted_flops
from trips.bench.methods import (
    DOWNSCALE,
    METHODS,
    NO_SELECTION,
    downscaling,
    mean_tokens,
    methods_for,
)
from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.model import TripsModel

BASE = SelectionConfig(layers=(2, 3), keep_rate=(0.7, 0.5))
SIZE, PATCH, LENGTH = 48, 8, 6


@pytest.fixture(scope="module")
def model() -> TripsModel:
    return randomise(TripsModel(tiny_config()))


@pytest.mark.parametrize("inattentive", ["fuse", "drop"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_tokens_are_those_of_the_running_model(name: str, inattentive: str, model: TripsModel) -> None:
    base, ids = BASE.replace(inattentive=inattentive), texts(1, LENGTH)[0]
    method = METHODS[name]
    pixels = method.pixels(images(1, SIZE, SIZE), PATCH)
    output = model(ids, None, pixels, selection=method.selection(base))
    found = method.tokens(model.config, SIZE, base)
    assert [place.layer for place in found] == ([] if name == "none" else [2, 3])
    assert [place.entered for place in found] == [record.candidates.shape[1] for record in output.selections]
    assert [place.kept for place in found] == [record.kept.shape[1] for record in output.selections]
    left = found[-1].left if found else 36
    assert output.image_states.shape[1] == 1 + left
    for place, following in zip(found, found[1:]):
        assert place.left == following.entered


@pytest.mark.parametrize("name", [*METHODS, DOWNSCALE])
@torch.no_grad()
def test_operations_are_those_of_the_running_model(name: str, model: TripsModel) -> None:
    (method,) = methods_for([name], model.config, SIZE, BASE)
    pixels = method.pixels(images(1, SIZE, SIZE), PATCH)
    assert model.vision.grid_of(pixels) == method.grid(SIZE, PATCH)
    found = counted_flops(model, texts(1, LENGTH)[0], None, pixels, selection=method.selection(BASE))
    assert method.count(model.config, SIZE, LENGTH, BASE).total == pytest.approx(found, rel=1e-6)


def test_downscaling_leaves_as_many_tokens_as_the_average_layer_sees(model: TripsModel) -> None:
    # 36 patches; layer 2 attends to 36 and keeps 26 + 1, layer 3 attends to 27 and keeps 14 + 1
    mean = (36 + 36 + 36 + 27 + 27 + 15 + 15 + 15) / 8
    assert mean_tokens(model.config, 6, BASE) == pytest.approx(mean)
    (method,) = methods_for([DOWNSCALE], model.config, SIZE, BASE)
    assert method.grid(SIZE, PATCH) == (5, 5) and method.selection(BASE).guide == "none"  # 25 is nearest to 25.9
    assert mean_tokens(model.config, 6, BASE.replace(guide="none")) == 36
    assert NO_SELECTION.grid(SIZE, PATCH) == (6, 6)


def test_every_side_can_be_had_by_downscaling() -> None:
    for size, patch in ((384, 16), (456, 16), (224, 14), (40, 8)):
        for side in range(1, size // patch + 1):
            method = downscaling(side, size, patch)
            assert method.grid(size, patch) == (side, side)


def test_unknown_methods_are_named(model: TripsModel) -> None:
    with pytest.raises(ConfigError, match="methods.*'luck'.*downscale"):
        methods_for(["text", "luck"], model.config, SIZE, BASE)
