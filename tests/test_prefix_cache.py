"""Prefixes that are kept: the same numbers as without, each image computed once, within the memory given."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from trips.config import SelectionConfig
from trips.model import TripsModel
from trips.prefix_cache import PrefixCache


def double(images: torch.Tensor) -> torch.Tensor:
    double.rows.append(len(images))
    return images.flatten(1)[:, None, :4] * 2


@pytest.fixture(autouse=True)
def counted() -> None:
    double.rows = []


def test_each_image_is_computed_once_and_rows_stay_in_place() -> None:
    images, cache = torch.randn(4, 3, 4, 4), PrefixCache(10**6)
    order = torch.tensor([2, 0, 2, 1])
    assert torch.equal(cache.states(images[order], 2, double), double(images[order]))
    assert torch.equal(cache.states(images, 2, double), double(images))
    assert double.rows == [3, 4, 1, 4] and len(cache) == 4  # those of the cache, and those compared with


def test_location_size_type_and_precision_part_what_is_kept() -> None:
    cache, image = PrefixCache(10**6), torch.zeros(1, 3, 4, 4)
    cache.states(image, 2, double)
    cache.states(image, None, double)
    cache.states(torch.zeros(1, 3, 2, 8), 2, double)
    cache.states(image.half(), 2, double)
    with torch.autocast("cpu", torch.bfloat16):
        cache.states(image, 2, double)
        cache.states(image, 2, double)
    assert len(cache) == 5 == len(double.rows)


def test_memory_is_bounded_and_what_does_not_fit_is_computed_again() -> None:
    images, size = torch.randn(5, 3, 4, 4), 4 * 4  # four floats a row
    cache = PrefixCache(2 * size + 3)
    for _ in range(3):
        assert torch.equal(cache.states(images, 1, double), images.flatten(1)[:, None, :4] * 2)
    assert (len(cache), cache.num_bytes) == (2, 2 * size) and double.rows == [5, 3, 3]


@pytest.mark.parametrize("guide", ["none", "text"])
def test_model_gives_the_same_bits(guide: str) -> None:
    model = TripsModel(tiny_config()).eval()
    selection = SelectionConfig(layers=(2,), keep_rate=0.5, guide=guide)
    side = model.config.vision_config.image_size
    images, ids = torch.randn(3, 3, side, side), torch.randint(5, 20, (3, 6))
    plain = model(ids, pixel_values=images, selection=selection)
    model.vision.requires_grad_(False)
    model.vision.prefix_cache = PrefixCache(10**9)
    for _ in range(2):
        kept = model(ids, pixel_values=images, selection=selection)
        assert torch.equal(kept.last_hidden_state, plain.last_hidden_state)
        assert torch.equal(kept.image_positions, plain.image_positions)
    assert len(model.vision.prefix_cache) == 3
    kept.last_hidden_state.sum().backward()
    assert model.text.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    states = model.vision(images, output_hidden_states=True, selection=SelectionConfig(guide="none")).hidden_states
    assert len(states) == model.config.vision_config.num_hidden_layers + 1  # asked for, they are computed
