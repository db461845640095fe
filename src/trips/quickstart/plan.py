"""How much of what the quick-start does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trips.config import SelectionConfig
from trips.data.scene_batches import TEST_START
from trips.errors import ConfigError

Scale = Literal["full", "smoke"]
Mixture = tuple[tuple[str, float], ...]

VALIDATION_START = TEST_START + 10_000_000
"""First scene of those that settings are chosen on."""
REPORTED_START = TEST_START + 20_000_000
"""First scene of those that figures are reported on: no setting was ever chosen by them."""

GUIDES = ("none", "text_literal", "text_gate", "text_distill", "image_cls", "random")
"""Rows of the table, in order."""


@dataclass(frozen=True)
class QuickstartPlan:
    """Sizes, steps and learning rates.

    Attributes:
        width: of all towers. vision_layers, text_layers, fusion_layers, decoder_layers: their depths.
        layers: 1-based locations of the selection. keep_rate: per location.
        label_steps: of the first warm-up stage, which teaches the vision tower what is on each patch.
        bind_steps: of the second, which binds words to patches in scenes of few objects, vision tower frozen.
        bind_mixture: its question types with their weights, those alone that are learnt in so few steps.
        bind_repeats: most rounds of half as many steps that follow, nearly all about the types that were missed.
            bind_least: accuracy on full scenes below which a type counts as missed.
        question_steps: of the third, all kinds of questions about full scenes, vision tower frozen.
        question_mixture: types and weights of the third stage and of the fine-tuning; measured is the corpus's own.
        tune_steps: of the fine-tuning of every guide, all weights free.
        keep_rate_warmup: share of them during which the keep rate falls from 1, for all guides alike.
        distill_every: distance of the full-patch steps of text_distill. distill_weight, distill_temperature: see
            `SelectionConfig`.
        num_scenes: per step. num_questions: per scene.
        first_scene: number of the first scene that is measured on; training stays below `TEST_START`.
        test_scenes, test_questions: scenes measured on, and questions about each.
        label_lr, bind_lr, tune_lr: peak learning rates.
        timing_rounds: interleaved rounds of the throughput measurement.
    """

    width: int = 64
    vision_layers: int = 6
    text_layers: int = 2
    fusion_layers: int = 2
    decoder_layers: int = 1
    layers: tuple[int, ...] = (3, 5)
    keep_rate: float = 0.3
    label_steps: int = 500
    bind_steps: int = 1000
    bind_mixture: Mixture = (("object", 0.6), ("background", 0.4))
    bind_repeats: int = 3
    bind_least: float = 0.5
    question_steps: int = 700
    question_mixture: Mixture = (
        ("object", 0.4),
        ("background", 0.3),
        ("relation", 0.1),
        ("existence", 0.1),
        ("counting", 0.1),
    )
    tune_steps: int = 400
    keep_rate_warmup: float = 0.5
    distill_every: int = 2
    distill_weight: float = 1.0
    distill_temperature: float = 0.25
    num_scenes: int = 16
    num_questions: int = 8
    first_scene: int = REPORTED_START
    test_scenes: int = 128
    test_questions: int = 16
    label_lr: float = 4e-3
    bind_lr: float = 2e-3
    tune_lr: float = 1e-3
    timing_rounds: int = 15

    @classmethod
    def of(cls, scale: Scale) -> QuickstartPlan:
        """ "full" for the figures, "smoke" to see in seconds that everything runs; `ConfigError` for others."""
        if scale == "full":
            return cls()
        if scale == "smoke":
            return cls(
                label_steps=3,
                bind_steps=6,
                bind_repeats=1,
                question_steps=2,
                tune_steps=2,
                num_scenes=2,
                test_scenes=8,
                test_questions=8,
                timing_rounds=1,
            )
        raise ConfigError("unknown value", item="scale", found=scale, expected="full | smoke")

    @property
    def curriculum(self) -> tuple[tuple[int, int], ...]:
        """(last step, objects in a scene) of the second warm-up stage: binding is learnt on few objects first."""
        shares = ((0.19, 1), (0.38, 2), (0.56, 3), (0.75, 4), (1.0, 6))
        return tuple((round(self.bind_steps * share), count) for share, count in shares)

    def selection(self, guide: str, keep_rate: float | None = None) -> SelectionConfig:
        """Setting of a row of the table."""
        rate = self.keep_rate if keep_rate is None else keep_rate
        base = SelectionConfig(
            layers=self.layers,
            keep_rate=rate,
            score="raw_states",
            distill_weight=self.distill_weight,
            distill_temperature=self.distill_temperature,
        )
        if guide.startswith("text_"):
            return base.replace(learning=guide.removeprefix("text_"))
        return base.replace(guide={"image_cls": "image"}.get(guide, guide))
