"""A visual reasoning run's parts: statements and model from a recipe, and its measurement (section 5.1.2).

The blank-image run beside accuracy and consistency shows what the sentences alone give away. With the objective
"assignment", ALBEF's step between pre-training and this task, the data are pairs of image and caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.statement_batches import AssignmentCollator, StatementCollator, StatementDataset
from trips.data.statements import ReasoningRecord, read_statements
from trips.errors import ConfigError, DataError
from trips.processor import TripsProcessor
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.train.augmentation import train_transform
from trips.train.data import RecordTrainingData
from trips.train.pair_data import PairTrainingData
from trips.train.pretraining import read_pairs, shard_cache
from trips.train.reasoning_evaluation import (
    ReasoningMeasurement,
    evaluate_assignment,
    majority_accuracy,
    training_flops,
)
from trips.train.recipe import Recipe
from trips.train.task import TaskParts, load_trained
from trips.train.towers import build_model, build_processor


def build(recipe: Recipe) -> TaskParts:
    """Parts of a new run.

    Raises:
        TripsError: see `read_records`, `PairDataset`, `build_processor` and `build_model`.
    """
    if recipe.model.reasoning.objective == "assignment":
        return _build_assignment(recipe)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    records = read_records(recipe, "train", bad_samples)
    test_records = read_records(recipe, "test", bad_samples)
    processor = build_processor(recipe.model, recipe.data, (record.sentence for record in records))
    model = build_model(recipe.model, processor, TripsForVisualReasoning)
    dataset = StatementDataset(
        records,
        processor,
        bad_samples,
        transform=train_transform(recipe.data, processor),
        shuffle_images=recipe.data.shuffle_images,
        seed=recipe.run.seed,
        cache_images=recipe.data.cache_images,
    )
    data = RecordTrainingData(
        dataset,
        StatementCollator(processor, dataset.num_images),
        recipe.optim.batch_size // recipe.optim.accumulate,
        recipe.run.seed,
        num_workers=recipe.data.num_workers,
    )
    measurement = _measurement(recipe, model, processor, test_records, bad_samples)
    majority = majority_accuracy(records, test_records)
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=measurement,
        write_measured=measurement.write,
        num_samples=len(dataset),
        data=data,
        facts={**({} if majority is None else {"majority": majority}), "num_samples": len(dataset)},
        flops_per_sample=lambda info: training_flops(model, processor, info),
    )


def load(recipe: Recipe, run_dir: Path) -> TaskParts:
    """Parts of a finished run, to be measured again.

    Raises:
        CheckpointError: see `load_trained`. DataError: see `read_records`.
    """
    model, processor = load_trained(TripsForVisualReasoning, run_dir)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    if recipe.model.reasoning.objective == "assignment":
        return TaskParts(
            model, processor, bad_samples, measure=lambda: _measure_assignment(recipe, model, processor, bad_samples)
        )
    records = read_records(recipe, "test", bad_samples)
    measurement = _measurement(recipe, model, processor, records, bad_samples)
    return TaskParts(model, processor, bad_samples, measure=measurement, write_measured=measurement.write)


def read_records(recipe: Recipe, split: Literal["train", "test"], bad_samples: BadSamples) -> list[ReasoningRecord]:
    """Statements of all entries of ``data.train`` or ``data.test``.

    One with another number of images than the model has is a bad sample, in training also one without a label.

    Raises:
        ConfigError: no entries; no statement has the model's number of images.
        DataError: see `read_statements`.
    """
    entries, expected = getattr(recipe.data, split), recipe.model.reasoning.num_images
    if not entries:
        raise ConfigError("no files given", item=f"data.{split}", expected="statements: tars, lists or folders")
    records = [
        record
        for entry in entries
        for record in read_statements(entry, recipe.data.images, recipe.data.columns, bad_samples)
    ]
    if all(record.num_images != expected for record in records):
        raise ConfigError(
            "is not the number of images in the data",
            item="model.reasoning.num_images",
            found=expected,
            expected=f"{records[0].num_images}, as in {records[0].source}",
        )
    usable, seen = [], set()
    for record in records:
        with bad_samples.guard(record.source):
            if record.num_images != expected:
                raise DataError("has another number of images", item=record.source, found=record.num_images)
            if record.label is None and split == "train":
                raise DataError("has no label", item=record.source, expected="true or false")
            if record.identifier in seen:
                raise DataError("identifier occurs twice", item=record.source, found=record.identifier)
            seen.add(record.identifier)
            usable.append(record)
    if not usable:
        raise DataError("no statement can be used", item=f"data.{split}", found=records[0].source)
    return usable


def _measurement(
    recipe: Recipe,
    model: TripsForVisualReasoning,
    processor: TripsProcessor,
    records: Sequence[ReasoningRecord],
    bad_samples: BadSamples,
) -> ReasoningMeasurement:
    model.config.selection = recipe.model.selection
    return ReasoningMeasurement(model, StatementDataset(records, processor, bad_samples), recipe.run.eval_batch_size)


def _build_assignment(recipe: Recipe) -> TaskParts:
    bad_samples = BadSamples(recipe.data.max_bad_share)
    if not recipe.data.train:
        raise ConfigError("no files given", item="data.train", expected="tars, or lists of images with captions")
    data, cache = recipe.data, shard_cache(recipe.data)
    records = read_pairs(data.train, cache, bad_samples, clean=True, images=data.images, columns=data.columns)
    processor = build_processor(recipe.model, data, (text for record in records for text in record.texts))
    model = build_model(recipe.model, processor, TripsForVisualReasoning)
    dataset = _pairs(recipe, "train", processor, bad_samples)
    batches = _AssignmentData(
        dataset,
        AssignmentCollator(processor, recipe.model.reasoning.num_images),
        recipe.optim.batch_size // recipe.optim.accumulate,
        num_workers=data.num_workers,
    )
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: _measure_assignment(recipe, model, processor, bad_samples),
        num_samples=len(dataset),
        data=batches,
        facts={"num_samples": dataset.num_samples},
        flops_per_sample=lambda info: training_flops(model, processor, info),
    )


def _pairs(
    recipe: Recipe, split: Literal["train", "test"], processor: TripsProcessor, bad_samples: BadSamples
) -> PairDataset:
    """Images with captions in ALBEF's form, lower case and without punctuation."""
    data = recipe.data
    return PairDataset(
        [Corpus(entry, entry, 1.0, data.images, data.columns) for entry in getattr(data, split)],
        processor,
        train_transform(data, processor) if split == "train" else None,
        bad_samples,
        seed=recipe.run.seed,
        shuffle_shards=data.shuffle_shards,
        cache=shard_cache(data),
        clean=True,
    )


class _AssignmentData(PairTrainingData):
    """Batches without the ids of images and captions, which the model has no use for."""

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        for batch in super().batches(start_step, num_steps):
            yield {key: value for key, value in batch.items() if key not in ("image_ids", "caption_ids")}


def _measure_assignment(
    recipe: Recipe, model: TripsForVisualReasoning, processor: TripsProcessor, bad_samples: BadSamples
) -> dict[str, Any]:
    model.config.selection = recipe.model.selection
    if not recipe.data.test:
        return {}
    num_images = recipe.model.reasoning.num_images
    pairs = _pairs(recipe, "test", processor, bad_samples)
    collator = AssignmentCollator(processor, num_images)
    accuracy = evaluate_assignment(model, pairs, collator, recipe.run.eval_batch_size)
    return {"accuracy": accuracy, "chance": 1 / (num_images + 1)}
