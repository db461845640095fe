"""Training stages of the quick-start.

The warm-up stands in for the pre-trained weights that real models start from: the vision tower learns what is on each
patch (as CLIP or DINOv2 would know), then words are bound to patches in scenes of few objects, then all questions are
asked about full scenes, with all patches. Every guide fine-tunes a copy of the same warmed-up model.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

from torch import nn
from transformers import BertConfig, ViTConfig

from trips.config import SelectionConfig, TripsConfig, bert_variant
from trips.data.scene_batches import SceneBatcher, SceneVqaData
from trips.data.scenes import SceneCorpus
from trips.options import Architecture
from trips.processor import TripsProcessor
from trips.quickstart.evaluation import evaluate_guide
from trips.quickstart.labels import PatchLabelData, PatchLabelModel
from trips.quickstart.plan import VALIDATION_START, Mixture, QuickstartPlan
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.towers import find_module
from trips.train.loop import train as _train
from trips.train.schedule import SelectionSchedule
from trips.train.settings import TrainReport, TrainSettings

logger = logging.getLogger("trips")

_SHARP = 0.25  # initial spread of what makes words attend; see `build_model`
_BETA2 = 0.98  # short runs: the usual 0.999 remembers the first, wild gradients for most of them


def build_model(
    plan: QuickstartPlan, processor: TripsProcessor, architecture: Architecture = "dual"
) -> TripsForQuestionAnswering:
    """A small model with random weights; a "single" one has as many layers as the plan's vision and fusion together.

    Initial weights of text encoder and decoder are wider than BERT's 0.02, which belongs to width 768: at width 64 it
    makes attention so flat that words never bind to patches in the steps at hand. In a single stack the queries and
    keys of the layers that a dual model would have as fusion encoder are so too: without it 10 % of the questions about
    objects are answered rightly after 600 steps of binding, with it 92 % after 1,000.
    """
    tokenizer = processor.tokenizer
    vision = ViTConfig(
        hidden_size=plan.width,
        intermediate_size=2 * plan.width,
        num_hidden_layers=plan.vision_layers + (plan.fusion_layers if architecture == "single" else 0),
        num_attention_heads=4,
        image_size=processor.image_size[0],
        patch_size=processor.patch_size,
        initializer_range=0.05,
    )
    text = BertConfig(
        hidden_size=plan.width,
        intermediate_size=2 * plan.width,
        num_hidden_layers=plan.text_layers,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_SHARP,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    crossed = bert_variant(text, is_decoder=True, add_cross_attention=True)
    model = TripsForQuestionAnswering(
        TripsConfig(
            vision_config=vision,
            text_config=text,
            fusion_encoder_config=bert_variant(crossed, num_hidden_layers=plan.fusion_layers),
            decoder_config=bert_variant(crossed, num_hidden_layers=plan.decoder_layers),
            selection=plan.selection("none"),
            initializer_range=0.02,
            architecture=architecture,
        )
    )
    if architecture == "single":
        reader = model.trips.vision.reader
        for layer in reader.layers[plan.vision_layers :]:
            for names in (reader.family.query, reader.family.key):
                nn.init.normal_(find_module(layer, names).weight, std=_SHARP)
    return model


def train(*arguments: Any, **options: Any) -> TrainReport:
    """`trips.train.loop.train`; a stage that a signal ended early is no result, so the signal goes on upwards.

    Raises:
        KeyboardInterrupt: a signal has ended the stage.
    """
    report = _train(*arguments, **options)
    if report.interrupted:
        raise KeyboardInterrupt
    return report


def with_mixture(batcher: SceneBatcher, mixture: Mixture) -> SceneBatcher:
    """The same scenes with other shares of the question types."""
    corpus = batcher.corpus
    mixed = SceneCorpus(dataclasses.replace(corpus.config, mixture=mixture), corpus.seed)
    return SceneBatcher(mixed, batcher.processor, batcher.side)


def warm_up(
    model: TripsForQuestionAnswering, batcher: SceneBatcher, plan: QuickstartPlan, seed: int
) -> list[TrainReport]:
    """The three warm-up stages, in place.

    A single stack is taught what is on each patch in as many layers as a dual model's vision tower has, and these rest
    in the other stages as that tower does; the layers above go on to learn.
    """
    common = {"seed": seed, "log_every": 100, "beta2": _BETA2}
    vision = model.trips.vision
    labels = PatchLabelModel(vision, plan.width, plan.vision_layers)
    settings = TrainSettings(
        steps=plan.label_steps,
        lr=plan.label_lr,
        vision_lr=plan.label_lr,
        warmup_steps=min(30, plan.label_steps),
        lr_floor=0.02,
        **common,
    )
    data = PatchLabelData(batcher, 2 * plan.num_scenes, model.config.vision_config.patch_size)
    reports = [train(labels, data, settings)]
    vision.requires_grad_(False)
    vision.reader.layers[plan.vision_layers :].requires_grad_(True)  # none in a dual model
    common |= warm_up_rates(plan, model.config.architecture)
    reports += bind(model, batcher, plan, common)
    full = with_mixture(batcher, plan.question_mixture)
    questions = SceneVqaData(full, plan.num_scenes, plan.num_questions, offset=plan.bind_steps)
    settings = TrainSettings(steps=plan.question_steps, lr_floor=0.4, **common)
    reports.append(train(model, questions, settings))
    vision.requires_grad_(True)
    return reports


def warm_up_rates(plan: QuickstartPlan, architecture: Architecture) -> dict[str, float]:
    """Of the stages behind the first; a single stack, through which all gradients pass, takes half of them."""
    rate = plan.bind_lr / (2 if architecture == "single" else 1)
    return {"lr": rate, "vision_lr": rate}


def bind(
    model: TripsForQuestionAnswering, batcher: SceneBatcher, plan: QuickstartPlan, common: dict[str, Any]
) -> list[TrainReport]:
    """The second warm-up stage, in place: words are bound to patches, with more of a kind that was missed.

    Whether a kind of question is learnt in these steps hangs on the first weights, and even on the number of threads
    that sum up, and one that was missed is not found later among all the others. So each kind is looked at, on scenes
    that nothing is reported on, and a missed one is asked about nearly alone for a while.
    """
    reports, start = [], 0
    mixture, steps, curriculum = plan.bind_mixture, plan.bind_steps, plan.curriculum
    for attempt in range(1 + plan.bind_repeats):
        asked = with_mixture(batcher, mixture)
        questions = SceneVqaData(asked, plan.num_scenes, plan.num_questions, curriculum, offset=start)
        settings = TrainSettings(steps=steps, warmup_steps=min(50, steps), lr_floor=1.0, **common)
        reports.append(train(model, questions, settings))
        looked_at = with_mixture(batcher, plan.bind_mixture)
        found = evaluate_guide(model, looked_at, plan.selection("none"), 32, 16, first_scene=VALIDATION_START)[
            "accuracy"
        ]
        kinds = [kind for kind, _ in plan.bind_mixture]
        told = ", ".join(f"{kind} {100 * found.get(kind, 0):.0f} %" for kind in kinds)
        logger.info("words bound to patches, round %d: %s", attempt + 1, told)
        missed = [kind for kind in kinds if found.get(kind, 1) < plan.bind_least]
        if not missed:
            break
        mixture = tuple((kind, 0.8 if kind in missed else 0.2) for kind in kinds)
        start += steps
        steps = max(1, plan.bind_steps // 2)
        curriculum = tuple((round(steps * share), count) for share, count in ((0.5, 3), (1.0, 6)))
    return reports


def fine_tune(
    warm: TripsForQuestionAnswering,
    batcher: SceneBatcher,
    plan: QuickstartPlan,
    selection: SelectionConfig,
    seed: int,
) -> tuple[TripsForQuestionAnswering, TrainReport]:
    """A copy of the warmed-up model, fine-tuned with a selection; all copies see the same questions."""
    model = copy.deepcopy(warm)
    model.config.selection = model.trips.vision.selection = selection
    settings = TrainSettings(
        steps=plan.tune_steps,
        lr=plan.tune_lr,
        vision_lr=plan.tune_lr,
        warmup_steps=min(50, plan.tune_steps),
        seed=seed,
        log_every=50,
        beta2=_BETA2,
    )
    full = with_mixture(batcher, plan.question_mixture)
    data = SceneVqaData(full, plan.num_scenes, plan.num_questions, offset=plan.bind_steps + plan.question_steps)
    schedule = SelectionSchedule(selection, plan.tune_steps, plan.keep_rate_warmup, distill_every=plan.distill_every)
    return model, train(model, data, settings, schedule=schedule)
