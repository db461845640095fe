"""Measuring a VQA model: by ranking a closed list of answers or by free writing, and what an evaluation server takes.

Section 5.1.1 ranks a list, as ALBEF does, and reports the official accuracy. Data with one answer per question, which
that accuracy cannot judge, are measured by exact match in the form of `normalise_answer`. The blank-image run beside it
shows what the language alone would reach.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from trips.config import SelectionConfig
from trips.data.loading import AnswerList, VqaCollator, VqaDataset, answer_shares
from trips.data.records import Question, VqaRecord, normalise_answer
from trips.errors import ConfigError, DataError
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.recipe import RunSection
from trips.vqa_accuracy import VqaScore, vqa_accuracy

logger = logging.getLogger("trips")

Metric = Literal["exact", "official"]
Way = Literal["rank", "generate"]

ANSWERED_FILE, GENERATED_FILE = "answers_test.json", "answers_test_generated.json"
_PEOPLE = 4  # the fewest with whom an answer can be wholly right officially: it needs three others
_WHOLE_NUMBER = re.compile("0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class VqaScores:
    """Result of `evaluate_vqa`.

    Attributes:
        answers: what the model said, by question id; without questions of images that cannot be read.
        num_questions: questions asked.
        score: accuracies of the questions whose answers people gave, as a whole and by type.
    """

    answers: dict[str, str] = field(repr=False)
    num_questions: int
    score: VqaScore

    @property
    def accuracy(self) -> float | None:
        """Mean over the questions whose answers are known, 0 to 1; None if no answer is."""
        return self.score.accuracy


class VqaMeasurement:
    """Figures of a model on a run's test data, and its answers as files.

    Args:
        model: as it is whenever it is measured.
        dataset: the test data.
        collator: joins images into batches.
        candidates: the answers to rank.
        selection: what the model is measured with, whatever training has set last.
        run: ``answer``, ``metric``, ``top_k`` and ``eval_batch_size`` have an effect.
    Raises:
        ConfigError: see `choose_metric`. DataError: two questions of one id.
    """

    def __init__(
        self,
        model: TripsForQuestionAnswering,
        dataset: VqaDataset,
        collator: VqaCollator,
        candidates: AnswerList,
        selection: SelectionConfig,
        run: RunSection,
    ) -> None:
        self.model, self.dataset, self.collator = model, dataset, collator
        self.candidates, self.selection, self.run = candidates, selection, run
        self.metric = choose_metric(dataset.records, run.metric)
        questions_by_id(dataset.records)  # now, and not after the training
        self._answers: dict[str, dict[str, str]] = {}

    def __call__(self) -> dict[str, Any]:
        """Measure.

        Returns:
            ``num_questions``, and where answers are known ``metric``, ``accuracy``, ``accuracy_blank_images``, the
            accuracies by type where the data tell types apart, and for ranking ``answer_coverage``, the share of
            questions with an answer among the candidates. Under ``generated`` the same of free writing, where both
            ways are measured.
        """
        self.model.config.selection = self.selection
        if self.run.answer != "both":
            return self._measure(self.run.answer, ANSWERED_FILE)
        return {**self._measure("rank", ANSWERED_FILE), "generated": self._measure("generate", GENERATED_FILE)}

    def write(self, folder: Path) -> None:
        """Write the answers of the last measurement, with "" for an image that could not be read."""
        ids = [question.question_id for record in self.dataset.records for question in record.questions]
        for name, answers in self._answers.items():
            write_answers(folder / name, {question_id: answers.get(question_id, "") for question_id in ids})

    def _measure(self, way: Way, file: str) -> dict[str, Any]:
        options = {"way": way, "metric": self.metric, "batch_size": self.run.eval_batch_size, "top_k": self.run.top_k}
        asked = evaluate_vqa(self.model, self.dataset, self.collator, self.candidates, **options)
        self._answers[file] = asked.answers
        if asked.accuracy is None:
            return {"num_questions": asked.num_questions}
        blank = evaluate_vqa(self.model, self.dataset, self.collator, self.candidates, **options, blank_images=True)
        figures = {
            "accuracy": asked.accuracy,
            "accuracy_blank_images": blank.accuracy,
            "metric": self.metric,
            "num_questions": asked.num_questions,
        }
        if asked.score.num_questions < asked.num_questions:
            figures["num_scored"] = asked.score.num_questions
        if way == "rank":
            figures["answer_coverage"] = self.candidates.coverage(self.dataset.records)
        if asked.score.by_answer_type:
            figures["accuracy_by_answer_type"] = asked.score.by_answer_type
        if asked.score.by_question_type:
            figures["accuracy_by_question_type"] = asked.score.by_question_type
        report = asked.score.report()
        types = ", ".join(f"{name} {value:.2f}" for name, value in report["perAnswerType"].items())
        logger.info("%s accuracy (%s): %.2f %%%s", self.metric, way, report["overall"], f" ({types})" if types else "")
        return figures


@torch.no_grad()
def evaluate_vqa(
    model: TripsForQuestionAnswering,
    dataset: VqaDataset,
    collator: VqaCollator,
    candidates: AnswerList,
    *,
    way: Way = "rank",
    metric: Metric = "exact",
    batch_size: int = 16,
    top_k: int = 128,
    num_beams: int = 1,
    blank_images: bool = False,
) -> VqaScores:
    """Ask all questions of a dataset and judge the answers.

    An image's questions share its prefix. Questions of an image that cannot be read count as wrong: leaving them out
    would flatter the score.

    Args:
        model: put into evaluation mode, and back if it was training.
        dataset: all its questions are asked, whatever its ``max_questions_per_image``, on images as they are.
        collator: joins images into batches.
        candidates: the answers to rank; a true answer that is not among them counts as wrong. Free writing takes the
            spelling of those whose word pieces it wrote.
        way: "rank" takes the likeliest candidate, "generate" writes freely.
        metric: "exact": the share of the people who gave the answer; "official": see `vqa_accuracy`.
        batch_size: images per batch.
        top_k: see `TripsForQuestionAnswering.rank_answers`.
        num_beams: of free writing; 1 is greedy.
        blank_images: ask without looking: every pixel is the mean colour.
    Raises:
        ConfigError: no such way or metric. DataError: two questions of one id.
    """
    for name, value, known in (("way", way, ("rank", "generate")), ("metric", metric, ("exact", "official"))):
        if value not in known:
            raise ConfigError("unknown", item=name, found=value, expected=" | ".join(known))
    questions = questions_by_id(dataset.records)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    everything = VqaDataset(dataset.records, dataset.processor, dataset.bad_samples)
    encoded = collator.processor.encode_answers(list(candidates)).to(device)
    spelling = dict(zip(_decode(collator, encoded["input_ids"])[::-1], list(candidates)[::-1], strict=True))
    answers: dict[str, str] = {}
    for start in range(0, len(everything), batch_size):
        batch = collator([everything[i] for i in range(start, min(start + batch_size, len(everything)))])
        if not batch["question_ids"]:
            continue
        inputs = {key: batch[key].to(device) for key in ("pixel_values", "input_ids", "attention_mask", "image_index")}
        if blank_images:
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        if way == "rank":
            states = model(**inputs).question_states
            ranked, _ = model.rank_answers(
                states, inputs["attention_mask"], encoded["input_ids"], encoded["attention_mask"], top_k
            )
            said = [candidates[best] for best in ranked[:, 0].tolist()]
        else:
            longest = max(10, encoded["input_ids"].shape[1])
            written = model.generate(**inputs, max_new_tokens=longest, num_beams=num_beams)
            said = [spelling.get(text, text) for text in _decode(collator, written)]
        answers |= zip(batch["question_ids"], said, strict=True)
    model.train(was_training)
    return VqaScores(answers, len(questions), score_answers(questions.values(), answers, metric))


def questions_by_id(records: Iterable[VqaRecord]) -> dict[str, Question]:
    """Questions of records, in their order.

    Raises:
        DataError: two have one id, under which there is room for one answer; a reader sees that of its own file only.
    """
    questions: dict[str, Question] = {}
    for record in records:
        for question in record.questions:
            if question.question_id in questions:
                raise DataError(
                    "question id occurs twice in what is to be measured",
                    item=record.source,
                    found=question.question_id,
                    hint="measure the entries of data.test one by one, or give their questions ids of their own",
                )
            questions[question.question_id] = question
    return questions


def score_answers(questions: Iterable[Question], answers: Mapping[str, str], metric: Metric) -> VqaScore:
    """Judge answers by question id; a question without one is wrong, a question nobody answered is left out."""
    score = VqaScore()
    for question in questions:
        if question.answers:
            answer = answers.get(question.question_id)
            accuracy = 0.0 if answer is None else _accuracy(answer, question, metric)
            score.add(accuracy, answer_type=question.answer_type, question_type=question.question_type)
    return score


def choose_metric(records: Iterable[VqaRecord], metric: Literal["auto", "exact", "official"]) -> Metric:
    """The metric of a recipe's ``run.metric``: "auto" is official where each question has the answers of four or more.

    Raises:
        ConfigError: the official one where a question has the answer of one person, which it could only call wrong.
    """
    answered = [question for record in records for question in record.questions if question.answers]
    if metric == "official" and (alone := [question for question in answered if len(question.given) < 2]):
        raise ConfigError(
            f"compares the answers of several people, which question {alone[0].question_id} does not have",
            item="run.metric",
            found=metric,
            expected="exact",
        )
    if metric != "auto":
        return metric
    return "official" if answered and all(len(question.given) >= _PEOPLE for question in answered) else "exact"


def majority_accuracy(train: Iterable[VqaRecord], test: Iterable[VqaRecord], metric: Metric = "exact") -> float | None:
    """Accuracy of always giving the answer that the training questions have most often; None if no answer is known."""
    counts: Counter[str] = Counter()
    for record in train:
        for question in record.questions:
            counts.update(answer_shares(question))
    best = counts.most_common(1)[0][0]
    questions = [question for record in test for question in record.questions]
    return score_answers(questions, {question.question_id: best for question in questions}, metric).accuracy


def write_answers(path: Path, answers: Mapping[str, str]) -> None:
    """Write answers as the evaluation server of VQA 2.0 reads them: a list of ``question_id`` and ``answer``.

    Ids that are whole numbers are written as such.
    """
    entries = [
        {"question_id": int(name) if _WHOLE_NUMBER.fullmatch(name) else name, "answer": answer}
        for name, answer in answers.items()
    ]
    path.write_text(json.dumps(entries, ensure_ascii=False) + "\n", encoding="utf-8")


def _decode(collator: VqaCollator, answer_ids: torch.Tensor) -> list[str]:
    return [normalise_answer(text) for text in collator.processor.decode_answers(answer_ids)]


def _accuracy(answer: str, question: Question, metric: Metric) -> float:
    if metric == "official":
        return vqa_accuracy(answer, question.given)
    return answer_shares(question).get(normalise_answer(answer), 0.0)
