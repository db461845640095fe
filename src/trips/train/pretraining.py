"""A pre-training run's parts: data and model from a recipe, and its measurement by zero-shot retrieval (section 4.1).

What is measured is measured before the first step too, since the towers of a new model have never seen each other. The
data of every task over pairs is made here: `build_pairs` and `load_pairs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trips.bench.flops import count_pretraining_flops
from trips.data.listed_shards import open_shards, reading, report_problems
from trips.data.pair_batches import PairCollator
from trips.data.pair_records import PairRecord, parse_pair
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.remote import ShardCache, is_remote
from trips.errors import ConfigError
from trips.processor import TripsProcessor
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.train.augmentation import train_transform
from trips.train.pair_data import PairTrainingData
from trips.train.pair_evaluation import evaluate_losses, evaluate_retrieval
from trips.train.recipe import DataSection, Recipe
from trips.train.settings import StepInfo
from trips.train.task import TaskParts, load_trained
from trips.train.towers import build_model, build_processor

Measure = Callable[
    [Recipe, TripsForImageTextRetrieval, TripsProcessor, Sequence[PairRecord], BadSamples], dict[str, Any]
]
"""Figures of a model on test records."""


def build(recipe: Recipe) -> TaskParts:
    """Parts of a new run; errors as `build_pairs`."""
    return build_pairs(recipe, TripsForPreTraining, _measure)


def load(recipe: Recipe, run_dir: Path) -> TaskParts:
    """Parts of a finished run, to be measured again; errors as `load_pairs`."""
    return load_pairs(recipe, run_dir, TripsForPreTraining, _measure)


def build_pairs(recipe: Recipe, model_class: type[TripsForImageTextRetrieval], measure: Measure) -> TaskParts:
    """Parts of a new run over image-text pairs; its batches have masked words where the model class wants them.

    Raises:
        TripsError: see `PairDataset`, `build_processor` and `build_model`; `ConfigError` without training data.
    """
    data, mlm = recipe.data, issubclass(model_class, TripsForPreTraining)
    if not data.train:
        raise ConfigError("no files given", item="data.train", expected="tars, or lists of images with captions")
    bad_samples, cache = BadSamples(data.max_bad_share), shard_cache(data)
    # A count of its own: what is bad there is found again in training, under another name.
    words = _read(data, data.train, cache, BadSamples(data.max_bad_share))
    texts = (text for record in words for text in record.texts)
    processor = build_processor(recipe.model, data, texts)
    weights = data.weights or (1.0,) * len(data.train)
    dataset = PairDataset(
        _corpora(data, data.train, weights),
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
        PairCollator(processor, mlm=mlm),
        recipe.optim.batch_size // recipe.optim.accumulate,
        num_workers=data.num_workers,
    )
    section = recipe.model
    if recipe.schedule.alpha_ramp_epochs:
        steps = round(recipe.schedule.alpha_ramp_epochs * (len(dataset) // recipe.optim.batch_size))
        section = dataclasses.replace(section, pretraining=section.pretraining.replace(alpha_ramp_steps=steps))
    model = build_model(section, processor, model_class)
    test = _read_test(data, cache, bad_samples)
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: measure(recipe, model, processor, test, bad_samples),
        num_samples=len(dataset),
        data=batches,
        facts={"num_samples": dataset.num_samples},
        measure_untrained=bool(test),
        flops_per_sample=lambda info: _training_flops(model, processor, batches.batch_size, info),
    )


def load_pairs(
    recipe: Recipe, run_dir: Path, model_class: type[TripsForImageTextRetrieval], measure: Measure
) -> TaskParts:
    """Parts of a finished run over image-text pairs.

    Raises:
        CheckpointError: see `load_trained`. DataError: see `read_pairs`.
    """
    model, processor = load_trained(model_class, run_dir)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    test = _read_test(recipe.data, shard_cache(recipe.data), bad_samples)
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: measure(recipe, model, processor, test, bad_samples),
    )


def shard_cache(data: DataSection) -> ShardCache:
    """Where fetched shards are kept."""
    return ShardCache(data.cache_dir, max_bytes=int(data.cache_gb * 1e9))


def read_pairs(
    patterns: Sequence[str],
    cache: ShardCache,
    bad_samples: BadSamples,
    clean: bool = False,
    images: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Iterator[PairRecord]:
    """All pairs of tars, lists and datasets in their order, the bad ones counted and left out.

    Images of local files stay there until they are wanted.

    Args:
        patterns, cache, images, columns: see `open_shards`.
        bad_samples: where to count them.
        clean: as in `parse_pair`.
    Raises:
        DataError: a pattern that matches nothing, a shard that cannot be read, too many bad samples.
    """
    for pattern in patterns:
        shards = open_shards(pattern, pattern, cache, images=images, columns=columns)
        report_problems(shards, bad_samples)
        for shard in shards:
            with reading(shard, cache) as stream:
                for sample in range(len(shard)):
                    source = shard.source(sample)
                    with bad_samples.guard(source):
                        members = shard.read(sample, stream, whole=is_remote(shard.location))
                        record = parse_pair(members, source, clean)
                        yield record


def _read(
    data: DataSection, entries: Sequence[str], cache: ShardCache, bad_samples: BadSamples
) -> Iterator[PairRecord]:
    return read_pairs(entries, cache, bad_samples, data.clean_captions, data.images, data.columns)


def _read_test(data: DataSection, cache: ShardCache, bad_samples: BadSamples) -> list[PairRecord]:
    """Test records, one for each image of an entry: beside a copy of itself none could be found."""
    return [record for entry in data.test for record in join_images(_read(data, [entry], cache, bad_samples))]


def join_images(records: Iterable[PairRecord]) -> list[PairRecord]:
    """Records of one corpus: those of one image id become the first of them, with the texts of all."""
    joined: dict[str | int, PairRecord] = {}
    for record in records:
        key = len(joined) if record.image_id is None else record.image_id
        known = joined.get(key)
        joined[key] = record if known is None else dataclasses.replace(known, texts=known.texts + record.texts)
    return list(joined.values())


def _corpora(data: DataSection, entries: Sequence[str], weights: Sequence[float]) -> list[Corpus]:
    return [
        Corpus(entry, entry, weight, data.images, data.columns) for entry, weight in zip(entries, weights, strict=True)
    ]


def _measure(
    recipe: Recipe,
    model: TripsForImageTextRetrieval,
    processor: TripsProcessor,
    test: Sequence[PairRecord],
    bad_samples: BadSamples,
) -> dict[str, Any]:
    model.config.selection = recipe.model.selection
    if not test:
        return {}
    pairs = PairDataset(
        _corpora(recipe.data, recipe.data.test, (1.0,) * len(recipe.data.test)),
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


def _training_flops(
    model: TripsForImageTextRetrieval, processor: TripsProcessor, batch_size: int, info: StepInfo
) -> float:
    """Operations of training on one pair in a step, forward and backward, the teacher's included."""
    side, patch = processor.image_size, model.config.vision_config.patch_size
    count = count_pretraining_flops(
        model.config,
        (side[0] // patch, side[1] // patch),
        processor.max_text_length,  # what every batch is padded to
        info.selection,
        batch_size=batch_size,
        distill=info.distill,
        mlm=isinstance(model, TripsForPreTraining),
    )
    return count.training * 1e9
