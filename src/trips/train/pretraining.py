"""A pre-training run's parts: data and model from a recipe, and its measurement by zero-shot retrieval (section 4.1).

What is measured is measured before the first step too, since the towers of a new model have never seen each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trips.bench.flops import count_pretraining_flops
from trips.data.pair_batches import PairCollator
from trips.data.pair_records import PairRecord, parse_pair
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.remote import ShardCache, expand_patterns, is_remote, locate_samples
from trips.data.shards import Shard
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError
from trips.processor import TripsProcessor
from trips.tasks.pretraining import TripsForPreTraining
from trips.train.pair_data import PairTrainingData
from trips.train.pair_evaluation import evaluate_losses, evaluate_retrieval
from trips.train.recipe import DataSection, Recipe
from trips.train.settings import StepInfo
from trips.train.task import TaskParts, load_trained
from trips.train.towers import build_model, build_processor

_RANDAUGMENT = (2, 7)  # operations per image and their strength: ALBEF's


def build(recipe: Recipe) -> TaskParts:
    """Parts of a new run.

    Raises:
        TripsError: see `PairDataset`, `build_processor` and `build_model`; `ConfigError` without training data.
    """
    data = recipe.data
    if not data.train:
        raise ConfigError("no files given", item="data.train", expected="paths, patterns or URLs of WebDataset tars")
    bad_samples, cache = BadSamples(data.max_bad_share), shard_cache(data)
    records = read_pairs(data.train, cache, bad_samples, data.clean_captions)
    texts = (text for record in records for text in record.texts)
    processor = build_processor(recipe.model, data, texts)
    weights = data.weights or (1.0,) * len(data.train)
    dataset = PairDataset(
        [Corpus(pattern, pattern, weight) for pattern, weight in zip(data.train, weights, strict=True)],
        processor,
        train_transform(data, processor),
        bad_samples,
        seed=recipe.run.seed,
        shuffle_shards=data.shuffle_shards,
        cache=cache,
        clean=data.clean_captions,
    )
    batches = PairTrainingData(
        dataset,
        PairCollator(processor),
        recipe.optim.batch_size // recipe.optim.accumulate,
        num_workers=data.num_workers,
    )
    section = recipe.model
    if recipe.schedule.alpha_ramp_epochs:
        steps = round(recipe.schedule.alpha_ramp_epochs * (len(dataset) // recipe.optim.batch_size))
        section = dataclasses.replace(section, pretraining=section.pretraining.replace(alpha_ramp_steps=steps))
    model = build_model(section, processor, TripsForPreTraining)
    test = list(read_pairs(data.test, cache, bad_samples, data.clean_captions))
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: _measure(recipe, model, processor, test, bad_samples),
        num_samples=len(dataset),
        data=batches,
        facts={"num_samples": dataset.num_samples},
        measure_untrained=bool(test),
        flops_per_sample=lambda info: _training_flops(model, processor, batches.batch_size, info),
    )


def load(recipe: Recipe, run_dir: Path) -> TaskParts:
    """Parts of a finished run, to be measured again.

    Raises:
        CheckpointError: see `load_trained`. DataError: see `read_pairs`.
    """
    model, processor = load_trained(TripsForPreTraining, run_dir)
    data, bad_samples = recipe.data, BadSamples(recipe.data.max_bad_share)
    test = list(read_pairs(data.test, shard_cache(data), bad_samples, data.clean_captions))
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: _measure(recipe, model, processor, test, bad_samples),
    )


def shard_cache(data: DataSection) -> ShardCache:
    """Where fetched shards are kept."""
    return ShardCache(data.cache_dir, max_bytes=int(data.cache_gb * 1e9))


def train_transform(data: DataSection, processor: TripsProcessor) -> TrainTransform | None:
    """Augmentation of a recipe; None resizes by the processor."""
    if data.augment == "none" and data.flip == "none":
        return None
    return TrainTransform(
        processor.image_size,
        scale=(1.0, 1.0) if data.augment == "none" else data.crop_scale,
        randaugment=_RANDAUGMENT if data.augment == "randaugment" else None,
        flip=data.flip,
    )


def read_pairs(
    patterns: Sequence[str], cache: ShardCache, bad_samples: BadSamples, clean: bool = False
) -> Iterator[PairRecord]:
    """All pairs of shards in their order, the bad ones counted and left out; `clean` as in `parse_pair`.

    Raises:
        DataError: a pattern that matches nothing, a shard that cannot be read, too many bad samples.
    """
    for pattern in patterns:
        for location in expand_patterns(pattern, pattern):
            shard = Shard(location, locate_samples(location, cache))
            with cache.open(location, shard.index.size if is_remote(location) else None) as stream:
                for sample in range(len(shard)):
                    source = shard.source(sample)
                    with bad_samples.guard(source):
                        record = parse_pair(shard.read(sample, stream), source, clean)
                        yield record


def _measure(
    recipe: Recipe,
    model: TripsForPreTraining,
    processor: TripsProcessor,
    test: Sequence[PairRecord],
    bad_samples: BadSamples,
) -> dict[str, Any]:
    model.config.selection = recipe.model.selection
    if not test:
        return {}
    corpora = [Corpus(pattern, pattern) for pattern in recipe.data.test]
    pairs = PairDataset(
        corpora,
        processor,
        bad_samples=bad_samples,
        seed=recipe.run.seed,
        cache=shard_cache(recipe.data),
        clean=recipe.data.clean_captions,
    )
    return {
        **evaluate_retrieval(model, test, processor, bad_samples, recipe.run.eval_batch_size),
        "test_losses": evaluate_losses(model, pairs, recipe.run.eval_batch_size),
    }


def _training_flops(model: TripsForPreTraining, processor: TripsProcessor, batch_size: int, info: StepInfo) -> float:
    """Operations of training on one pair in a step, forward and backward, the teacher's included."""
    side, patch = processor.image_size, model.config.vision_config.patch_size
    count = count_pretraining_flops(
        model.config,
        (side[0] // patch, side[1] // patch),
        processor.max_text_length,  # what every batch is padded to
        info.selection,
        batch_size=batch_size,
        distill=info.distill,
    )
    return count.training * 1e9
