"""Closed-form counts against torch's own counter on a running model, and against published figures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_shards import jpeg, write_corpus, write_tar
from pretraining_reference import GUIDES, options_of
from tiny import pair_batch, tiny_pretraining_model
from transformers import BertConfig, CLIPVisionConfig, Dinov2Config, ViTConfig

from trips.bench.counter import counted_flops
from trips.bench.flops import PretrainingFlopCount, count_flops, count_pretraining_flops, count_reasoning_flops
from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig, TripsConfig, bert_variant
from trips.model import TripsModel
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.pretraining import TripsForPreTraining
from trips.train.recipe_io import load_recipe
from trips.train.run import run_recipe
from trips.train.settings import StepInfo

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
    SelectionConfig(layers=(1, 4), keep_rate=(1.0, 0.97)),  # 47 of 48 and a fused one: as many as before
    SelectionConfig(layers=(2, 3), keep_rate=1.0),
)


def counted(function, *args, **kwargs) -> float:
    """Operations that torch counts while a function runs."""
    return 1e9 * counted_flops(function, *args, **kwargs)


def wide_model(family: str = "clip", text_width: int = 48) -> TripsModel:
    text = BertConfig(
        hidden_size=text_width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=30,
        pad_token_id=0,
    )
    config = TripsConfig(
        vision_config=VISION[family],
        text_config=text,
        fusion_encoder_config=bert_variant(text, num_hidden_layers=3, is_decoder=True, add_cross_attention=True),
        selection=SelectionConfig(layers=(), width_map="orthogonal"),
    )
    return TripsModel(config).eval()


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s.guide}-{s.score}-{s.inattentive}-{s.keep_rate}")
@torch.no_grad()
def test_closed_form_equals_the_counter(family, selection) -> None:
    model, pixels, ids = wide_model(family), torch.randn(1, 3, 48, 64), torch.randint(1, 30, (1, 7))
    found = counted(model, ids, None, pixels, selection=selection)
    assert count_flops(model.config, (6, 8), 7, selection).total * 1e9 == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s.guide}-{s.score}-{s.inattentive}-{s.keep_rate}")
@torch.no_grad()
def test_texts_of_one_image_share_its_prefix(selection) -> None:
    model, pixels, ids = wide_model(text_width=32), torch.randn(2, 3, 48, 64), torch.randint(1, 30, (6, 7))
    found = counted(model, ids, None, pixels, image_index=torch.tensor([0, 0, 0, 1, 1, 1]), selection=selection)
    count = count_flops(model.config, (6, 8), 7, selection, texts_per_image=3)
    assert 6 * count.total * 1e9 == pytest.approx(found, rel=1e-9)
    if selection.active:
        found = counted(model, ids[:1], None, pixels[:1], selection=selection, observe=True)
        assert count_flops(model.config, (6, 8), 7, selection, observe=True).total * 1e9 == pytest.approx(found)


@pytest.mark.parametrize(
    ("pixels", "base", "subject"),
    [(224, 45.48, 35.87), (256, 57.64, 44.79), (304, 79.56, 60.79), (384, 126.98, 95.44), (448, 176.10, 130.92)],
)
def test_paper_sizes(pixels, base, subject) -> None:
    """ViT-B/16 and BERT-base with 40 text tokens, multiply-adds times two, worked out by hand for the paper's sizes."""
    config, grid = TripsConfig(), (pixels // 16, pixels // 16)
    assert count_flops(config, grid, 40, SelectionConfig(guide="none")).total == pytest.approx(base, abs=0.006)
    assert count_flops(config, grid, 40).total == pytest.approx(subject, abs=0.006)


# --- a step of pre-training: the batch has 3 pairs, 16 patches, 6 text tokens and 4 masked ones

TEACHERS = {
    "soft": {},
    "features": {"alpha": 0.0},
    "no_queue": {"queue_size": 0},
    "none": {"alpha": 0.0, "queue_size": 0},
}


def count_of(model: TripsForPreTraining, distill: bool = False) -> PretrainingFlopCount:
    return count_pretraining_flops(model.config, (4, 4), 6, masked_tokens=4 / 3, batch_size=3, distill=distill)


def patch_embedding(model: TripsForPreTraining) -> int:
    return 2 * 16 * model.config.vision_config.hidden_size * 3 * 8**2


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("guides", GUIDES, ids="-".join)
def test_a_step_of_pretraining_equals_the_counter(guides, teacher) -> None:
    model, batch = tiny_pretraining_model(options_of(*guides, **TEACHERS[teacher])), pair_batch()
    count, output = count_of(model), {}
    found = counted(lambda: output.update(model(**batch)))
    assert 3 * count.forward * 1e9 == pytest.approx(found, rel=1e-9)
    options = model.config.pretraining
    assert (count.teacher > 0) == options.has_teacher
    # What `training` says it leaves out of account: nothing flows to pixels or queue, nor back from drawing negatives.
    unlearnt = patch_embedding(model) + 2 * 2 * (2 * 3 * options.projection_dim)
    if options.queue_size:
        unlearnt += 2 * 2 * (3 + options.queue_size) * options.projection_dim
    backward = counted(output["loss"].backward)
    assert 3 * (count.training * 1e9 - unlearnt) == pytest.approx(found + backward, rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{"guide": "none"}, {"keep_rate": 1.0}, {"guide": "image"}, {"guide": "random"}, {"inattentive": "drop"},
     {"score": "keys"}, {"distill": True}, {"distill": True, "guide": "image"},
     {"text_width": 16, "width_map": "orthogonal"}, {"family": "dinov2"}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_pretraining_counts_follow_the_selection(changes) -> None:
    changes = dict(changes)
    distill, family = changes.pop("distill", False), changes.pop("family", "clip")
    model = tiny_pretraining_model(family=family, **changes)
    found = counted(model, **pair_batch(), distill=distill)
    assert 3 * count_of(model, distill).forward * 1e9 == pytest.approx(found, rel=1e-9)


def test_price_of_the_leak_free_settings() -> None:
    """Vision of the model in a step at 256 px, in units of the unselected tower's, worked out by hand."""
    config, base = TripsConfig(), count_flops(TripsConfig(), (16, 16), 25, SelectionConfig(guide="none")).vision
    for (itc, itm, mlm), price in {
        ("text", "reuse", "full"): 0.76,
        ("none", "reuse", "full"): 1.40,
        ("image", "reuse", "full"): 1.16,
        ("none", "anew", "full"): 2.19,
        ("image", "anew", "full"): 1.95,
        ("none", "anew", "masked"): 2.58,
        ("image", "anew", "masked"): 2.35,
    }.items():
        options = PretrainingConfig(**options_of(itc, itm, mlm))
        count = count_pretraining_flops(config, (16, 16), 25, pretraining=options)
        assert (count.vision_prefix + count.vision_suffix) / base == pytest.approx(price, abs=0.006)


# --- several images

REASONING = (
    ReasoningConfig(),
    ReasoningConfig(3, "stacked"),
    ReasoningConfig(3, "merge", "assignment"),
    ReasoningConfig(1),
)


@pytest.mark.parametrize("reasoning", REASONING, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS[:4], ids=lambda s: f"{s.guide}-{s.score}-{s.inattentive}")
@torch.no_grad()
def test_several_images_equal_the_counter(reasoning, selection) -> None:
    for text_width in (48, 32):
        config = wide_model(text_width=text_width).config
        config.reasoning, n = reasoning, reasoning.num_images
        model = TripsForVisualReasoning(config).eval()
        inputs = torch.randn(2, n, 3, 48, 64), torch.randint(1, 30, (2, 7)), None, torch.tensor([0, 1])
        for distill in (False, True)[: 1 + selection.active]:
            found = counted(model, *inputs, selection=selection, distill=distill)
            count = count_reasoning_flops(config, (6, 8), 7, selection, distill=distill)
            assert 2 * count.total * 1e9 == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s.guide}-{s.score}-{s.inattentive}-{s.keep_rate}")
def test_one_image_costs_a_pair_and_the_classifier(selection) -> None:
    config = TripsConfig(reasoning=ReasoningConfig(1))
    pair, one = (count(config, (16, 16), 25, selection) for count in (count_flops, count_reasoning_flops))
    assert (one.vision, one.text) == (pair.vision, pair.text)
    assert (one.fusion - pair.fusion) * 1e9 == pytest.approx(2 * (768 * 768 + 768 * 2))


# --- what a run tells the loop

Told = Callable[..., dict[str, Any]]


class Stopped(Exception):
    pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    """What `run_recipe` hands to the loop, with model and data by name."""

    def run(recipe: str, train: str, **changes: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def stop(model, data, settings, **kwargs) -> None:
            found.update(kwargs, model=model, data=data)
            raise Stopped

        monkeypatch.setattr("trips.train.run.train", stop)
        paths = {"data.train": [train], "data.test": [train], "run.out": str(tmp_path / "run")}
        with pytest.raises(Stopped):
            run_recipe(load_recipe(recipe, {**paths, **changes}))
        return found

    return run


def a_step(found: dict[str, Any], selection: SelectionConfig, distill: bool) -> tuple[float, float]:
    """Operations of training on the first batch, as the run says and as torch counts."""
    batch = next(found["data"].batches(0, 1))
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    model = found["model"].train()
    measured = counted(lambda: model(**tensors, selection=selection, distill=distill).loss.backward())
    return len(tensors["input_ids"]) * found["flops_per_sample"](StepInfo(1, selection, distill, {})), measured


DISTILL = SelectionConfig(layers=(2, 3), keep_rate=0.5, learning="distill")


@pytest.mark.parametrize("distill", [False, True])
def test_a_pretraining_run_tells_the_loop_its_operations(told: Told, tmp_path: Path, distill: bool) -> None:
    found = told("debug/pretrain_tiny", write_corpus(tmp_path / "pairs", [9]), **{"data.image_size": 128})
    said, measured = a_step(found, DISTILL, distill)
    pixels_learn_nothing = 8 * 2 * 64 * 32 * 3 * 16**2  # a large part of so small a model
    assert said - pixels_learn_nothing == pytest.approx(measured, rel=3e-3)


def test_a_vqa_run_tells_the_loop_its_operations_roughly(told: Told, tmp_path: Path) -> None:
    questions = itertools.count()

    def sample(asked: int) -> dict[str, bytes]:
        made = [
            {"question_id": str(next(questions)), "question": "what is on the left side of it", "answer": "a tree"}
            for _ in range(asked)
        ]
        return {"jpg": jpeg(), "json": json.dumps({"image_id": str(next(questions)), "questions": made}).encode()}

    write_tar(tmp_path / "train.tar", {f"{number}": sample(2 + number % 2) for number in range(8)})
    changes = {"data.image_size": 128, "data.max_text_length": 8, "data.max_questions_per_image": 2}
    found = told("debug/vqa_tiny", str(tmp_path / "train.tar"), **changes)
    for distill in (False, True):
        said, measured = a_step(found, DISTILL, distill)
        assert said == pytest.approx(measured, rel=0.15)


def test_a_frozen_tower_leaves_the_figure_out(told: Told, tmp_path: Path) -> None:
    pattern = write_corpus(tmp_path / "pairs", [9])
    assert told("debug/pretrain_tiny", pattern, **{"optim.vision_lr": 0})["flops_per_sample"] is None
