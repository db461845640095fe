"""A VQA run's parts: data and model from a recipe (section 5.1.1, appendix B).

How the model is measured stands in `trips.train.vqa_evaluation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from trips.bench.flops import count_flops
from trips.data.loading import AnswerList, VqaCollator, VqaDataset
from trips.data.question_files import read_questions
from trips.data.records import BadSamples, VqaRecord, normalise_answer
from trips.errors import CheckpointError, ConfigError, DataError
from trips.processor import TripsProcessor
from trips.saved import ANSWERS_FILE
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.augmentation import train_transform
from trips.train.data import RecordTrainingData
from trips.train.recipe import DataSection, Recipe
from trips.train.settings import StepInfo
from trips.train.task import TaskParts, load_trained
from trips.train.towers import build_model, build_processor
from trips.train.vqa_evaluation import VqaMeasurement, majority_accuracy


def build(recipe: Recipe) -> TaskParts:
    """Parts of a new run.

    Raises:
        TripsError: see `read_records`, `AnswerList`, `VqaDataset`, `build_processor` and `build_model`.
        DataError: a training question without answers.
    """
    bad_samples = BadSamples(recipe.data.max_bad_share)
    records = read_records(recipe.data, "train", bad_samples)
    test_records = read_records(recipe.data, "test", bad_samples)
    _check_answered(records)
    answers = AnswerList.from_records(records, recipe.data.min_answer_count)
    processor = build_processor(recipe.model, recipe.data, _texts(records))
    model = build_model(recipe.model, processor, TripsForQuestionAnswering)
    dataset, collator = build_data(recipe, records, processor, bad_samples, train=True)
    data = RecordTrainingData(
        dataset,
        collator,
        recipe.optim.batch_size // recipe.optim.accumulate,
        recipe.run.seed,
        num_workers=recipe.data.num_workers,
    )
    most = recipe.data.max_questions_per_image
    measurement = _measurement(recipe, model, processor, answers, test_records, bad_samples)
    majority = majority_accuracy(records, test_records, measurement.metric)
    asked = [len(record.questions) if most is None else min(most, len(record.questions)) for record in records]
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=measurement,
        write_measured=measurement.write,
        num_samples=len(dataset),
        data=data,
        write_files=lambda folder: answers.save(folder / ANSWERS_FILE),
        facts={**({} if majority is None else {"majority": majority}), "num_answers": len(answers)},
        flops_per_sample=lambda info: _training_flops(model, processor, sum(asked) / len(asked), info),
    )


def load(recipe: Recipe, run_dir: Path) -> TaskParts:
    """Parts of a finished run, to be measured again.

    Raises:
        CheckpointError: see `load_trained`. DataError: see `read_records`.
    """
    model, processor = load_trained(TripsForQuestionAnswering, run_dir)
    if not (run_dir / ANSWERS_FILE).exists():
        raise CheckpointError("is not the folder of a finished run", item=run_dir, expected=f"{ANSWERS_FILE} in it")
    answers = AnswerList.load(run_dir / ANSWERS_FILE)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    records = read_records(recipe.data, "test", bad_samples)
    measurement = _measurement(recipe, model, processor, answers, records, bad_samples)
    return TaskParts(model, processor, bad_samples, measure=measurement, write_measured=measurement.write)


def read_records(data: DataSection, split: Literal["train", "test"], bad_samples: BadSamples) -> list[VqaRecord]:
    """Records of all entries of a split, in their order; ``data.loss_weights`` take the place of the files' own.

    Raises:
        ConfigError: no entries, or a weight that is not positive. DataError: see `read_questions`.
    """
    entries = data.train if split == "train" else data.test
    if not entries:
        raise ConfigError("no files given", item=f"data.{split}", expected="tars or annotation files of questions")
    weights = data.loss_weights if split == "train" else None
    if weights is not None and not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError("not all are positive numbers", item="data.loss_weights", found=weights)
    records: list[VqaRecord] = []
    for entry, weight in zip(entries, weights or [None] * len(entries), strict=True):
        found = read_questions(entry, data.images, data.columns, bad_samples)
        records += found if weight is None else (_weigh(record, weight) for record in found)
    return records


def build_data(
    recipe: Recipe, records: list[VqaRecord], processor: TripsProcessor, bad_samples: BadSamples, *, train: bool
) -> tuple[VqaDataset, VqaCollator]:
    """Dataset and collator of a recipe's split; only what is trained on is augmented."""
    dataset = VqaDataset(
        records,
        processor,
        bad_samples,
        max_questions_per_image=recipe.data.max_questions_per_image if train else None,
        seed=recipe.run.seed,
        cache_images=recipe.data.cache_images and train,
        transform=train_transform(recipe.data, processor) if train else None,
    )
    return dataset, VqaCollator(processor)


def _measurement(
    recipe: Recipe,
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    answers: AnswerList,
    records: list[VqaRecord],
    bad_samples: BadSamples,
) -> VqaMeasurement:
    dataset, collator = build_data(recipe, records, processor, bad_samples, train=False)
    return VqaMeasurement(model, dataset, collator, answers, recipe.model.selection, recipe.run)


def _weigh(record: VqaRecord, weight: float) -> VqaRecord:
    questions = tuple(dataclasses.replace(question, loss_weight=weight) for question in record.questions)
    return dataclasses.replace(record, questions=questions)


def _check_answered(records: Iterable[VqaRecord]) -> None:
    for record in records:
        for question in record.questions:
            if not question.answers:
                raise DataError(
                    f"question {question.question_id} has no answers to learn from",
                    item=record.source,
                    hint="the annotations of a test set are not public",
                )


def _training_flops(
    model: TripsForQuestionAnswering, processor: TripsProcessor, questions_per_image: float, info: StepInfo
) -> float:
    """Operations of training on one question, forward and backward, to some percent.

    An image's questions share its prefix. Too much, since every question counts as long as the longest allowed; too
    little, since the decoder is left out, whose answers are a few tokens each.
    """
    side, patch = processor.image_size, model.config.vision_config.patch_size
    count = count_flops(
        model.config,
        (side[0] // patch, side[1] // patch),
        processor.max_text_length,
        info.selection,
        texts_per_image=questions_per_image,
        observe=info.distill,
    )
    return 3e9 * count.total


def _texts(records: Iterable[VqaRecord]) -> Iterator[str]:
    """Questions and canonical answers."""
    for record in records:
        for question in record.questions:
            yield question.text
            yield from map(normalise_answer, question.answers)
