"""A VQA run's parts: data and model from a recipe, and its measurement by answer ranking.

The measurement follows section 5.1.1 (ALBEF's ranking of a closed answer list) with exact match in the form of
`normalise_answer`; the blank-image run beside it shows what the language alone would reach.
"""

from __future__ import annotations

import dataclasses
import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trips.bench.flops import count_flops
from trips.data.loading import AnswerList, VqaCollator, VqaDataset
from trips.data.records import BadSamples, Question, VqaRecord, normalise_answer, read_vqa_shards
from trips.errors import CheckpointError, ConfigError, DataError
from trips.processor import TripsProcessor
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.data import VqaTrainingData
from trips.train.recipe import Recipe
from trips.train.settings import StepInfo
from trips.train.task import TaskParts, load_trained
from trips.train.towers import build_model, build_processor

ANSWERS_FILE = "answers.json"
_MOST_LOGITS = 2**26


@dataclasses.dataclass(frozen=True)
class VqaScores:
    """Result of `evaluate_vqa`.

    Attributes:
        accuracy: share of questions whose first-ranked answer people gave; an answer that a part of them gave counts
            as that part.
        num_questions: questions asked.
    """

    accuracy: float
    num_questions: int


def build(recipe: Recipe) -> TaskParts:
    """Parts of a new run.

    Raises:
        TripsError: see `read_records`, `build_processor` and `build_model`.
    """
    bad_samples = BadSamples(recipe.data.max_bad_share)
    records = read_records(recipe.data.train, bad_samples, "data.train")
    test_records = read_records(recipe.data.test, bad_samples, "data.test")
    answers = AnswerList.from_records(records, recipe.data.min_answer_count)
    processor = build_processor(recipe.model, recipe.data, _texts(records))
    model = build_model(recipe.model, processor, TripsForQuestionAnswering)
    dataset, collator = build_data(recipe, records, processor, bad_samples, train=True)
    data = VqaTrainingData(
        dataset,
        collator,
        recipe.optim.batch_size // recipe.optim.accumulate,
        recipe.run.seed,
        num_workers=recipe.data.num_workers,
    )
    most = recipe.data.max_questions_per_image
    asked = [len(record.questions) if most is None else min(most, len(record.questions)) for record in records]
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: _measure(recipe, model, processor, answers, test_records, bad_samples),
        num_samples=len(dataset),
        data=data,
        write_files=lambda folder: answers.save(folder / ANSWERS_FILE),
        facts={"majority": majority_accuracy(records, test_records), "num_answers": len(answers)},
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
    records = read_records(recipe.data.test, bad_samples, "data.test")
    return TaskParts(
        model,
        processor,
        bad_samples,
        measure=lambda: _measure(recipe, model, processor, answers, records, bad_samples),
    )


def read_records(patterns: Sequence[str], bad_samples: BadSamples, item: str) -> list[VqaRecord]:
    """Records of all tars that the patterns match, in the order of the names.

    Raises:
        DataError: a pattern that matches nothing; what `read_vqa_shards` raises.
    """
    if not patterns:
        raise ConfigError("no files given", item=item, expected="paths or glob patterns of WebDataset tars")
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError("no file matches", item=item, found=pattern, hint="paths start at the working directory")
        paths += found
    return list(read_vqa_shards(paths, bad_samples))


def build_data(
    recipe: Recipe, records: list[VqaRecord], processor: TripsProcessor, bad_samples: BadSamples, *, train: bool
) -> tuple[VqaDataset, VqaCollator]:
    """Dataset and collator of a recipe's split."""
    dataset = VqaDataset(
        records,
        processor,
        bad_samples,
        max_questions_per_image=recipe.data.max_questions_per_image if train else None,
        seed=recipe.run.seed,
        cache_images=recipe.data.cache_images and train,
    )
    return dataset, VqaCollator(processor)


@torch.no_grad()
def evaluate_vqa(
    model: TripsForQuestionAnswering,
    dataset: VqaDataset,
    collator: VqaCollator,
    answers: AnswerList,
    *,
    batch_size: int = 16,
    top_k: int = 128,
    blank_images: bool = False,
    on_answer: Callable[[str, str], None] | None = None,
) -> VqaScores:
    """Exact-match accuracy of the first-ranked answer over all questions of a dataset.

    Questions of an image that cannot be read count as wrong: leaving them out would flatter the score.

    Args:
        model: put into evaluation mode, and back if it was training.
        dataset: all its questions are asked, whatever its ``max_questions_per_image``.
        collator: joins images into batches.
        answers: the candidates; a true answer that is not among them counts as wrong.
        batch_size: images per batch.
        top_k: see `TripsForQuestionAnswering.rank_answers`.
        blank_images: ask without looking: every pixel is the mean colour.
        on_answer: called with question id and answer, in order.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    everything = VqaDataset(dataset.records, dataset.processor, dataset.bad_samples)
    encoded = collator.processor.encode_answers(list(answers)).to(device)
    truth = {q.question_id: _truth(q) for record in dataset.records for q in record.questions}
    # Logits are questions x candidates x tokens x vocabulary: ranked in parts that stay within a quarter GiB.
    per_question = min(top_k, len(answers)) * encoded["input_ids"].shape[1] * model.config.decoder_config.vocab_size
    rows = max(1, _MOST_LOGITS // per_question)
    score = 0.0
    for start in range(0, len(everything), batch_size):
        batch = collator([everything[i] for i in range(start, min(start + batch_size, len(everything)))])
        if not batch["question_ids"]:
            continue
        inputs = {key: batch[key].to(device) for key in ("pixel_values", "input_ids", "attention_mask", "image_index")}
        if blank_images:
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        states = model(**inputs).question_states
        best_answers = []
        for part, mask in zip(states.split(rows), inputs["attention_mask"].split(rows), strict=True):
            ranked, _ = model.rank_answers(part, mask, encoded["input_ids"], encoded["attention_mask"], top_k)
            best_answers += ranked[:, 0].tolist()
        for question_id, best in zip(batch["question_ids"], best_answers, strict=True):
            score += truth[question_id].get(answers[best], 0.0)
            if on_answer is not None:
                on_answer(question_id, answers[best])
    model.train(was_training)
    return VqaScores(score / len(truth), len(truth))


def majority_accuracy(train: Iterable[VqaRecord], test: Iterable[VqaRecord]) -> float:
    """Accuracy of always giving the answer that the training questions have most often."""
    counts: Counter[str] = Counter()
    for record in train:
        for question in record.questions:
            counts.update(_truth(question))
    best = counts.most_common(1)[0][0]
    shares = [_truth(question).get(best, 0.0) for record in test for question in record.questions]
    return sum(shares) / len(shares)


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


def _measure(
    recipe: Recipe,
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    answers: AnswerList,
    records: list[VqaRecord],
    bad_samples: BadSamples,
) -> dict[str, Any]:
    model.config.selection = recipe.model.selection
    dataset, collator = build_data(recipe, records, processor, bad_samples, train=False)
    options = {"batch_size": recipe.run.eval_batch_size, "top_k": recipe.run.top_k}
    scores = evaluate_vqa(model, dataset, collator, answers, **options)
    blank = evaluate_vqa(model, dataset, collator, answers, **options, blank_images=True)
    return {
        "accuracy": scores.accuracy,
        "accuracy_blank_images": blank.accuracy,
        "num_questions": scores.num_questions,
    }


def _texts(records: Iterable[VqaRecord]) -> Iterator[str]:
    """Questions and canonical answers."""
    for record in records:
        for question in record.questions:
            yield question.text
            yield from map(normalise_answer, question.answers)


def _truth(question: Question) -> dict[str, float]:
    """Share of the people behind each answer in its canonical form."""
    shares: dict[str, float] = {}
    for answer, weight in zip(question.answers, question.weights, strict=True):
        shares[normalise_answer(answer)] = shares.get(normalise_answer(answer), 0.0) + weight
    return shares
