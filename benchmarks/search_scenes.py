"""What matching anew is worth in a search when the matching head has learnt something: on the generated scenes.

    python benchmarks/search_scenes.py --warm DIR/seed_0_xxxxxxxx --out benchmarks/results/search_scenes.json

`DIR` is the work folder of `benchmarks/ablation.py`, whose warmed-up model has bound words to patches. Its encoders
learn contrast and matching on captions of fresh scenes, with the text as guide; then as many held-out scenes as a small
photo collection has are indexed as PNG files, and captions ask for the scene that they were written for. A scene holds
one object, since matching is not learnt on full scenes in so few steps. Scenes are easier than photos, and captions of
others may fit by chance: the figures compare ways of ranking, nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from PIL import Image
from search import SHORTLIST, found

from trips import TripsPipeline
from trips.config import TripsConfig
from trips.data.scene_batches import TEST_START, SceneBatcher, scene_processor
from trips.data.scenes import SceneConfig, SceneCorpus
from trips.environment import describe_environment
from trips.options import PretrainingConfig
from trips.quickstart.plan import QuickstartPlan
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.train.loop import train
from trips.train.schedule import SelectionSchedule
from trips.train.settings import TrainSettings


@dataclass(frozen=True)
class ScenePairs:
    """A caption of each scene; see `trips.train.settings.TrainingData`."""

    batcher: SceneBatcher
    num_scenes: int
    num_objects: int

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        for step in range(start_step, start_step + num_steps):
            scenes = self.batcher.scenes(step * self.num_scenes, self.num_scenes, self.num_objects)
            texts = [self.batcher.corpus.caption(scene).text for scene in scenes]
            numbers = torch.arange(self.num_scenes) + step * self.num_scenes
            yield {
                "pixel_values": self.batcher.pixels(scenes),
                **self.batcher.processor(text=texts),
                "image_ids": numbers,
                "caption_ids": numbers,
            }


def trained(options: argparse.Namespace, batcher: SceneBatcher) -> TripsForImageTextRetrieval:
    """The warmed-up encoders with heads of contrast and matching, trained."""
    plan = QuickstartPlan()
    config = TripsConfig.from_pretrained(options.warm)
    config.pretraining = PretrainingConfig(projection_dim=plan.width, queue_size=0, alpha=0.0, itc_guide="none")
    config.selection = selection = plan.selection("text_distill", options.keep_rate)
    set_seed(options.seed)
    model = TripsForImageTextRetrieval.from_pretrained(options.warm, config=config)
    settings = TrainSettings(
        steps=options.steps, lr=1e-3, vision_lr=3e-4, warmup_steps=50, seed=options.seed, log_every=50, beta2=0.98
    )
    schedule = SelectionSchedule(selection, options.steps, plan.keep_rate_warmup, distill_every=plan.distill_every)
    train(model, ScenePairs(batcher, options.batch, options.objects), settings, schedule=schedule)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--objects", type=int, default=1, help="of a scene")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--scenes", type=int, default=920)
    parser.add_argument("--captions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    corpus = SceneCorpus(SceneConfig(), seed=options.seed)
    batcher = SceneBatcher(corpus, scene_processor(corpus))
    begun = time.perf_counter()
    pipeline = TripsPipeline(trained(options, batcher), batcher.processor)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "settings": {**vars(options), "warm": options.warm.name, "out": None},
        "training_seconds": round(time.perf_counter() - begun, 1),
        "chance_r10": round(10 / options.scenes, 4),
    }
    with tempfile.TemporaryDirectory() as name:
        scenes = batcher.scenes(TEST_START, options.scenes, options.objects)
        for number, scene in enumerate(scenes):
            Image.fromarray(scene.image).save(Path(name, f"{number}.png"))
        index = pipeline.index(name)
        captions = [corpus.caption(scene).text for scene in scenes[: options.captions]]
        ways = {"features": (0, "both"), "match": (SHORTLIST, "match"), "match and features": (SHORTLIST, "both")}
        for way, (rerank, rank_by) in ways.items():
            ranks, seconds = [], []
            for number, text in enumerate(captions):
                ask = partial(index.search, text, 10, rerank, rank_by)
                begun = time.perf_counter()
                hits = [Path(hit.path).stem for hit in ask()]
                seconds.append(time.perf_counter() - begun)
                ranks.append(hits.index(str(number)) if str(number) in hits else len(hits))
            result[way] = found(ranks, seconds)
            print(way, result[way], flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
