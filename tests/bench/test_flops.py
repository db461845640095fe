"""Closed-form counts against torch's own counter on a running model, and against published figures."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, CLIPVisionConfig, Dinov2Config, ViTConfig

from trips.bench.flops import count_flops
from trips.config import SelectionConfig, TripsConfig, bert_variant
from trips.model import TripsModel

SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "image_size": 48}
VISION = {
    "clip": CLIPVisionConfig(intermediate_size=96, **SIZES),
    "vit": ViTConfig(intermediate_size=96, **SIZES),
    "dinov2": Dinov2Config(mlp_ratio=2, **SIZES),
    "dinov2_gated": Dinov2Config(mlp_ratio=2, use_swiglu_ffn=True, **SIZES),
}
SELECTIONS = (
    SelectionConfig(guide="none"),
    SelectionConfig(layers=(2, 4), keep_rate=0.5),
    SelectionConfig(layers=(1, 3), keep_rate=(0.7, 0.3), score="keys"),
    SelectionConfig(layers=(2,), keep_rate=0.7, inattentive="drop", guide="image"),
    SelectionConfig(layers=(3, 4), keep_rate=0.5, guide="random"),
)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s.guide}-{s.score}-{s.inattentive}")
def test_closed_form_equals_the_counter(family, selection):
    text = BertConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=30, pad_token_id=0
    )
    config = TripsConfig(
        vision_config=VISION[family],
        text_config=text,
        fusion_encoder_config=bert_variant(text, num_hidden_layers=3, is_decoder=True, add_cross_attention=True),
        selection=SelectionConfig(layers=()),
    )
    model = TripsModel(config).eval()
    pixels, ids = torch.randn(1, 3, 48, 64), torch.randint(1, 30, (1, 7))
    # The counter knows matrix products, not fused attention on a CPU: let attention decompose into them here.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, None, pixels, selection=selection)
    assert count_flops(config, (6, 8), 7, selection).total * 1e9 == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    ("pixels", "base", "subject"),
    [(224, 45.48, 35.87), (256, 57.64, 44.79), (304, 79.56, 60.79), (384, 126.98, 95.44), (448, 176.10, 130.92)],
)
def test_paper_sizes(pixels, base, subject):
    """ViT-B/16 and BERT-base with 40 text tokens, multiply-adds times two, worked out by hand for the paper's sizes."""
    config, grid = TripsConfig(), (pixels // 16, pixels // 16)
    assert count_flops(config, grid, 40, SelectionConfig(guide="none")).total == pytest.approx(base, abs=0.006)
    assert count_flops(config, grid, 40).total == pytest.approx(subject, abs=0.006)
