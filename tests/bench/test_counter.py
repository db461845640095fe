"""The counter itself, and full-size models on the meta device against the closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import pair_batch, tiny_pretraining_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, CLIPVisionConfig, Dinov2Config, ViTConfig

from trips.bench.counter import counted_flops
from trips.bench.flops import count_flops, count_pretraining_flops, count_reasoning_flops, exact_ratio
from trips.bench.retrieval_flops import count_feature_flops, count_reranking_flops
from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig, TripsConfig
from trips.errors import ConfigError
from trips.model import TripsModel
from trips.single_stream import TripsSingleStreamModel
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.retrieval import TripsForImageTextRetrieval

NONE = SelectionConfig(guide="none")


def test_a_product_by_hand() -> None:
    assert counted_flops(torch.matmul, torch.randn(3, 5), torch.randn(5, 7)) == 2 * 3 * 5 * 7 / 1e9
    convolution = nn.Conv2d(3, 4, 2, stride=2)
    assert counted_flops(convolution, torch.randn(1, 3, 6, 8)) == 2 * (3 * 4) * 4 * (3 * 2 * 2) / 1e9
    with pytest.raises(ConfigError, match="function"):
        counted_flops(torch.randn(3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_alike_fused_or_not(device: str) -> None:
    query, key, value = (torch.randn(2, 4, length, 8, device=device, requires_grad=True) for length in (5, 9, 9))

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT * 8**-0.5, dim=-1) @ value

    products = 2 * 4 * 2 * 5 * 9 * 8  # rows, heads, products, and what each takes
    for attention in (F.scaled_dot_product_attention, eager):
        assert counted_flops(attention, query, key, value) == 2 * products / 1e9
        backward = counted_flops(lambda one: one(query, key, value).sum().backward(), attention)
        assert backward == 3 * 2 * products / 1e9


def on_meta(config: TripsConfig, model_class: type[nn.Module] = TripsModel) -> nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return model_class(config).eval()


def pixels(size: int, *rows: int) -> Tensor:
    return torch.empty(*(rows or (1,)), 3, size, size, device="meta")


def ids(length: int, rows: int = 1) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


PAIRS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "albef_c": (384, 40, {"guide": "none"}),
    "main": (384, 40, {}),
    "main_224": (224, 40, {}),
    "main_456_without_the_last_pixels": (456, 10, {}),
    "early": (384, 40, {"layers": (2,), "keep_rate": 0.5}),
    "three": (384, 40, {"layers": (2, 6, 10)}),
    "last_layer": (384, 25, {"layers": (6, 12), "keep_rate": (0.7, 0.5)}),
    "keys": (256, 40, {"score": "keys"}),
    "per_head": (256, 40, {"score": "keys", "heads": "per_head"}),
    "raw": (256, 40, {"score": "raw_states", "query_norm": "none"}),
    "drop": (384, 40, {"inattentive": "drop"}),
    "renormalise": (384, 40, {"inattentive": "renormalise"}),
    "random": (384, 40, {"guide": "random"}),
    "image": (384, 40, {"guide": "image"}),
    "gate": (224, 40, {"learning": "gate"}),
    "nothing_removed": (384, 40, {"keep_rate": 1.0}),
    "merging": (384, 40, {"guide": "similarity"}),
    "merging_in_rounds": (224, 40, {"guide": "similarity", "layers": (1, 12), "keep_rate": (0.13, 0.9)}),
}
SINGLE = ("albef_c", "main", "early", "last_layer", "drop", "random", "nothing_removed", "merging", "merging_in_rounds")


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_a_pair_of_the_size_of_the_paper(name: str) -> None:
    size, length, fields = PAIRS[name]
    selection = SelectionConfig(**fields)
    model = on_meta(TripsConfig())
    found = counted_flops(model, ids(length), None, pixels(size), selection=selection)
    grid = (size // 16, size // 16)
    assert count_flops(model.config, grid, length, selection).total == pytest.approx(found, rel=1e-9)


@torch.no_grad()
def test_the_ratio_is_that_of_two_counts() -> None:
    model, early = on_meta(TripsConfig()), SelectionConfig(layers=(2,), keep_rate=0.5)
    none, own, other = (counted_flops(model, ids(40), None, pixels(224), selection=one) for one in (NONE, None, early))
    assert exact_ratio(model.config, (14, 14), 40) == pytest.approx(none / own, rel=1e-9)
    assert exact_ratio(model.config, (14, 14), 40, early) == pytest.approx(none / other, rel=1e-9)
    assert exact_ratio(model.config, (14, 14), 40, early, SelectionConfig()) == pytest.approx(own / other, rel=1e-9)


@pytest.mark.parametrize("name", SINGLE)
@torch.no_grad()
def test_a_pair_through_the_single_stream(name: str) -> None:
    size, length, fields = PAIRS[name]
    selection = SelectionConfig(**fields)
    model = on_meta(TripsConfig(architecture="single"), TripsSingleStreamModel)
    found = counted_flops(model, ids(length), None, pixels(size), selection=selection)
    count = count_flops(model.config, (size // 16, size // 16), length, selection)
    assert count.total == pytest.approx(found, rel=1e-9) and count.text == 0


@torch.no_grad()
def test_texts_share_little_of_an_image_in_the_single_stream() -> None:
    model = on_meta(TripsConfig(architecture="single"), TripsSingleStreamModel)
    index = torch.tensor([0, 0, 0, 1, 1, 1], device="meta")
    found = counted_flops(model, ids(40, 6), None, pixels(224, 2), image_index=index)
    count = count_flops(model.config, (14, 14), 40, texts_per_image=3)
    assert 6 * count.total == pytest.approx(found, rel=1e-9)
    with pytest.raises(ConfigError, match="observe"):
        count_flops(model.config, (14, 14), 40, observe=True)
    with pytest.raises(ConfigError, match="guide"):
        count_flops(model.config, (14, 14), 40, SelectionConfig(guide="image"))


def test_merging_has_nothing_to_observe() -> None:
    with pytest.raises(ConfigError, match="observe"):
        count_flops(TripsConfig(), (14, 14), 40, SelectionConfig(guide="similarity"), observe=True)


BERT = {"hidden_size": 768, "num_hidden_layers": 6}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
TOWERS: dict[str, dict[str, Any]] = {
    "dinov2_base": {"vision_config": Dinov2Config(patch_size=14), "text_config": BertConfig(**BERT)},
    "vit_small": {
        "vision_config": ViTConfig(**SMALL),
        "text_config": BertConfig(**{**SMALL, "num_hidden_layers": 3}),
    },
    "clip_large": {
        "vision_config": CLIPVisionConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14
        ),
        "text_config": BertConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=6),
    },
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_other_towers_and_widths(name: str) -> None:
    config = TripsConfig(**TOWERS[name])
    model, patch = on_meta(config), config.vision_config.patch_size
    for selection in (SelectionConfig(), SelectionConfig(guide="similarity", keep_rate=0.4)):
        found = counted_flops(model, ids(20), None, pixels(16 * patch), selection=selection)
        assert count_flops(config, (16, 16), 20, selection).total == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(("architecture", "fusion"), [("dual", "merge"), ("dual", "stacked"), ("single", "merge")])
@torch.no_grad()
def test_a_sentence_and_its_images(architecture: str, fusion: str) -> None:
    config = TripsConfig(reasoning=ReasoningConfig(2, fusion), architecture=architecture)
    model = on_meta(config, TripsForVisualReasoning)
    for selection in (SelectionConfig(), NONE):
        found = counted_flops(model, pixels(384, 1, 2), ids(30), selection=selection)
        count = count_reasoning_flops(model.config, (24, 24), 30, selection)
        assert count.total == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(
    ("architecture", "itc_guide"),
    [("dual", "image"), ("dual", "none"), ("dual", "text"), ("single", "image"), ("single", "none")],
)
@torch.no_grad()
def test_both_stages_of_retrieval(architecture: str, itc_guide: str) -> None:
    options = PretrainingConfig(itc_guide=itc_guide, queue_size=0, alpha=0.0)
    model = on_meta(TripsConfig(pretraining=options, architecture=architecture), TripsForImageTextRetrieval)
    mask = torch.ones_like(ids(30))
    for selection in (SelectionConfig(), NONE, SelectionConfig(keep_rate=1.0), SelectionConfig(guide="similarity")):
        count = count_feature_flops(model.config, (24, 24), 30, selection)
        image = counted_flops(model.encode_image, pixels(384), selection=selection)
        assert count.image == pytest.approx(image, rel=1e-9)
    assert count.text == pytest.approx(counted_flops(model.encode_texts, ids(30), mask), rel=1e-9)
    first, count = torch.zeros(1, dtype=torch.long, device="meta"), count_reranking_flops(model.config, (24, 24), 30)
    prefix, states = model.trips.encode_prefix(pixels(384)), model.trips.encode_text(ids(30), mask)
    pair = counted_flops(model.match, prefix, first, text_states=states)
    assert count.pair == pytest.approx(pair, rel=1e-9)
    assert count.image == pytest.approx(counted_flops(model.trips.encode_prefix, pixels(384)), rel=1e-9)
    assert count.text == pytest.approx(counted_flops(model.trips.encode_text, ids(30), mask), rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"queue_size": 0}, {"alpha": 0.0, "queue_size": 0}], ids=str)
@pytest.mark.parametrize("guide", ["text", "none", "random", "similarity"])
def test_a_step_of_pretraining_in_the_single_stream(guide: str, options: dict[str, Any]) -> None:
    """Three pairs, two of one image; see the tests of `count_pretraining_flops` for the dual stream."""
    for itc_guide in ("image", "none"):
        model = tiny_pretraining_model({"itc_guide": itc_guide, **options}, architecture="single", guide=guide)
        count = count_pretraining_flops(model.config, (4, 4), 6, masked_tokens=4 / 3, batch_size=3)
        found = counted_flops(model, **pair_batch())
        assert 3 * count.forward == pytest.approx(found, rel=1e-9)
        assert (count.teacher > 0) == model.config.pretraining.has_teacher
    with pytest.raises(ConfigError, match="observe"):
        count_pretraining_flops(model.config, (4, 4), 6, distill=True)
