"""Training stages of the quick-start.

The warm-up stands in for the pre-trained weights that real models start from: the vision tower learns what is on each
patch (as CLIP or DINOv2 would know), then words are bound to patches in scenes of few objects, then all questions are
asked about full scenes, with all patches. Every guide fine-tunes a copy of the same warmed-up model.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, ViTConfig

from trips.config import SelectionConfig, TripsConfig, bert_variant
from trips.data.scene_batches import SceneBatcher, SceneVqaData
from trips.data.scenes import BACKGROUND_COLOURS, BANDS, COLOURS, SHAPES, TEXTURES, Scene, SceneCorpus
from trips.options import Architecture
from trips.processor import TripsProcessor
from trips.quickstart.evaluation import evaluate_guide
from trips.quickstart.plan import VALIDATION_START, Mixture, QuickstartPlan
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.loop import train as _train
from trips.train.schedule import SelectionSchedule
from trips.train.settings import TrainReport, TrainSettings
from trips.vision import VisionEncoder

LABEL_CLASSES = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "band": len(BANDS),
    "band_colour": len(BACKGROUND_COLOURS),
    "band_texture": len(TEXTURES),
}
_BAND_WEIGHT = 0.3  # of the labels of the background beside those of the objects, which are harder
logger = logging.getLogger("trips")

_BETA2 = 0.98  # short runs: the usual 0.999 remembers the first, wild gradients for most of them


def build_model(
    plan: QuickstartPlan, processor: TripsProcessor, architecture: Architecture = "dual"
) -> TripsForQuestionAnswering:
    """A small model with random weights; a "single" one has as many layers as the plan's vision and fusion together.

    Initial weights of text encoder and decoder are wider than BERT's 0.02, which belongs to width 768: at width 64 it
    makes attention so flat that words never bind to patches in the steps at hand.
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
        initializer_range=0.25,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    crossed = bert_variant(text, is_decoder=True, add_cross_attention=True)
    return TripsForQuestionAnswering(
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


class PatchLabelModel(nn.Module):
    """A vision tower with one linear head per kind of patch label.

    Args:
        vision: trained in place.
        width: of the tower.
    """

    def __init__(self, vision: VisionEncoder, width: int) -> None:
        super().__init__()
        self.vision = vision
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in LABEL_CLASSES.items()})

    def forward(self, pixel_values: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """(I, 3, S, S) and labels (I, N) by name -> weighted sum of the cross-entropies."""
        states = self.vision(pixel_values, selection=self.vision.selection.replace(guide="none"))
        patches = states.last_hidden_state[:, 1:].flatten(0, 1)
        losses = {name: F.cross_entropy(head(patches), labels[name].flatten()) for name, head in self.heads.items()}
        weighted = [_BAND_WEIGHT * loss if name.startswith("band") else loss for name, loss in losses.items()]
        return {"loss": torch.stack(weighted).sum()} | {f"loss_{name}": loss.detach() for name, loss in losses.items()}


def patch_labels(scene: Scene, patch_size: int) -> dict[str, np.ndarray]:
    """What is on each patch, (N,) per name: shape and colour (0 for none), and the background band at its centre."""
    things = scene.patch_labels(patch_size)
    on_object = things > 0
    labels = {
        "shape": np.where(on_object, (things - 1) // len(COLOURS) + 1, 0),
        "colour": np.where(on_object, (things - 1) % len(COLOURS) + 1, 0),
    }
    grid = scene.image.shape[0] // patch_size
    centres = (np.arange(grid) * patch_size + patch_size // 2).astype(int)
    band = np.zeros((grid, grid), dtype=np.int64)
    for number, region in enumerate(scene.regions):
        for x0, y0, x1, y1 in region.boxes:
            inside = ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))[None]
            band[inside] = number
    band = band.reshape(-1)
    labels["band"] = band
    colours = [list(BACKGROUND_COLOURS).index(region.colour) for region in scene.regions]
    textures = [TEXTURES.index(region.texture) for region in scene.regions]
    labels["band_colour"], labels["band_texture"] = np.array(colours)[band], np.array(textures)[band]
    return labels


def train(*arguments: Any, **options: Any) -> TrainReport:
    """`trips.train.loop.train`; a stage that a signal ended early is no result, so the signal goes on upwards.

    Raises:
        KeyboardInterrupt: a signal has ended the stage.
    """
    report = _train(*arguments, **options)
    if report.interrupted:
        raise KeyboardInterrupt
    return report


@dataclass(frozen=True)
class PatchLabelData:
    """Training data of the first warm-up stage; see `trips.train.settings.TrainingData`."""

    batcher: SceneBatcher
    num_scenes: int
    patch_size: int

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        """Pixels and labels of fresh scenes, a function of the step."""
        for step in range(start_step, start_step + num_steps):
            scenes = self.batcher.scenes(step * self.num_scenes, self.num_scenes)
            rows = [patch_labels(scene, self.patch_size) for scene in scenes]
            labels = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in LABEL_CLASSES}
            yield {"pixel_values": self.batcher.pixels(scenes), **labels}


def with_mixture(batcher: SceneBatcher, mixture: Mixture) -> SceneBatcher:
    """The same scenes with other shares of the question types."""
    corpus = batcher.corpus
    mixed = SceneCorpus(dataclasses.replace(corpus.config, mixture=mixture), corpus.seed)
    return SceneBatcher(mixed, batcher.processor, batcher.side)


def warm_up(
    model: TripsForQuestionAnswering, batcher: SceneBatcher, plan: QuickstartPlan, seed: int
) -> list[TrainReport]:
    """The three warm-up stages, in place. In TRIPS-S the tower is the joint stack, which goes on learning."""
    common = {"seed": seed, "log_every": 100, "beta2": _BETA2}
    labels = PatchLabelModel(model.trips.vision, plan.width)
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
    model.trips.vision.requires_grad_(model.config.architecture == "single")
    reports += bind(model, batcher, plan, common)
    full = with_mixture(batcher, plan.question_mixture)
    questions = SceneVqaData(full, plan.num_scenes, plan.num_questions, offset=plan.bind_steps)
    settings = TrainSettings(steps=plan.question_steps, lr_floor=0.4, **warm_up_rates(plan), **common)
    reports.append(train(model, questions, settings))
    model.trips.vision.requires_grad_(True)
    return reports


def warm_up_rates(plan: QuickstartPlan) -> dict[str, float]:
    """Of the stages behind the first: a joint stack, which goes on learning there, at a quarter of the others' rate.

    At their whole rate it learnt less: of the questions about backgrounds 22 % after 300 steps of binding and 64 %
    after 1,000, not 59 % and 70 %.
    """
    return {"lr": plan.bind_lr, "vision_lr": plan.bind_lr / 4}


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
        settings = TrainSettings(
            steps=steps, warmup_steps=min(50, steps), lr_floor=1.0, **warm_up_rates(plan), **common
        )
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
        log_every=100,
        beta2=_BETA2,
    )
    full = with_mixture(batcher, plan.question_mixture)
    data = SceneVqaData(full, plan.num_scenes, plan.num_questions, offset=plan.bind_steps + plan.question_steps)
    schedule = SelectionSchedule(selection, plan.tune_steps, plan.keep_rate_warmup, distill_every=plan.distill_every)
    return model, train(model, data, settings, schedule=schedule)
