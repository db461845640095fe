"""Accuracy of many settings on the embedded corpus: the quick-start's fine-tuning for each, from one warm-up per seed.

An accuracy source in the sense of `trips.paper.settings`. The tower has the depth of the quick-start's, so locations
are scaled to it; 384 pixels of a setting stand for the corpus's own picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from pathlib import Path

from trips.config import SelectionConfig
from trips.data.scene_batches import SceneBatcher, scene_processor
from trips.data.scenes import SceneConfig, SceneCorpus
from trips.options import Architecture
from trips.paper.settings import Setting
from trips.quickstart.plan import QuickstartPlan
from trips.quickstart.run import measured_row, warmed_up_model
from trips.tasks.vqa import TripsForQuestionAnswering

logger = logging.getLogger("trips")

_PAPER_SIDE = 384  # pixels in tables 4, 6 and 7


class SceneAccuracy:
    """Fine-tunes and measures the quick-start's model under a setting; see `AccuracySource`.

    Args:
        work: folder for the warmed-up models, one per seed, made when first needed.
        plan: sizes and steps; those of the quick-start.
    """

    name = "scenes"
    unit = "accuracy, %"

    def __init__(self, work: str | Path, plan: QuickstartPlan | None = None) -> None:
        self.work, self.plan = Path(work), plan or QuickstartPlan()
        self._warm: dict[str, tuple[TripsForQuestionAnswering, SceneBatcher]] = {}

    def measure(self, setting: Setting, seed: int) -> dict[str, float]:
        """Fine-tune a copy of the seed's model, and ask it about scenes that nothing was ever chosen on.

        Returns:
            ``accuracy`` overall and ``accuracy_KIND`` in per cent, ``recall``, ``gain`` and ``gain_object`` at the last
            location where patches are chosen, ``flops_g``, ``seconds`` of training.
        Raises:
            ConfigError: locations that do not fit into the tower.
        """
        warm, batcher = self.warmed_up(seed, setting.architecture)
        batcher = SceneBatcher(batcher.corpus, batcher.processor, self.side(setting))
        selection = self.selection(setting)
        row, _ = measured_row(setting.name, warm, batcher, self.plan, selection, seed)
        figures = {"accuracy": 100 * row["accuracy"]["overall"], "seconds": row["train_seconds"]}
        figures |= {f"accuracy_{kind}": 100 * value for kind, value in row["accuracy"].items() if kind != "overall"}
        if row["relevance_gain_by_type"]:
            last = str(selection.layers[-1])
            figures |= {"recall": row["relevance_recall"][last], "gain": row["relevance_gain"][last]}
            figures["gain_object"] = row["relevance_gain_by_type"].get("object", 0.0)
        return figures | {"flops_g": row["flops_g"]}

    def selection(self, setting: Setting) -> SelectionConfig:
        """The setting's selection in the plan's tower, with the plan's score form and distillation."""
        base, depth = self.plan.selection("none"), self.plan.vision_layers
        if setting.architecture == "single":
            depth += self.plan.fusion_layers  # as `build_model` has it
        return dataclasses.replace(
            setting.selection_in(depth),
            score=base.score,
            distill_weight=base.distill_weight,
            distill_temperature=base.distill_temperature,
        )

    def side(self, setting: Setting) -> int:
        """Pixels of a side that the setting stands for in the corpus, the nearest multiple of the patch size."""
        config = SceneConfig()
        patches = config.image_size / config.patch_size * setting.image_size / _PAPER_SIDE * setting.scale
        return max(1, round(patches)) * config.patch_size

    def warmed_up(
        self, seed: int, architecture: Architecture = "dual"
    ) -> tuple[TripsForQuestionAnswering, SceneBatcher]:
        """The model that all settings of a seed start from, read from `work` or made there, with its batcher."""
        key = f"seed_{seed}" if architecture == "dual" else f"{architecture}_seed_{seed}"
        if key not in self._warm:
            folder = self.work / f"{key}_{hashlib.sha256(repr(self.plan).encode()).hexdigest()[:8]}"
            if folder.is_dir():
                corpus = SceneCorpus(SceneConfig(), seed=seed)
                batcher = SceneBatcher(corpus, scene_processor(corpus))
                self._warm[key] = TripsForQuestionAnswering.from_pretrained(folder), batcher
            else:
                model, batcher = warmed_up_model(self.plan, seed, architecture)
                partial = folder.with_suffix(".partial")  # an interruption leaves whole folders only
                shutil.rmtree(partial, ignore_errors=True)
                model.save_pretrained(partial)
                os.replace(partial, folder)
                self._warm[key] = model, batcher
        return self._warm[key]
