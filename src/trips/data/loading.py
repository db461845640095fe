"""From VQA records to batches: several questions share one image, so that its vision prefix is computed once.

Feeds the VQA experiments (Table 1). The texts stay strings until the collator pads them to the longest of the batch.

Legend: I images, B questions, A answers of a batch (B >= I, A >= B), H, W pixels, L, La tokens of the longest text.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trips.data.records import BadSamples, Question, VqaRecord, normalise_answer
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError
from trips.images import load_image
from trips.processor import TripsProcessor


@dataclass(frozen=True)
class VqaItem:
    """One image with the questions drawn for this epoch, before collation.

    Attributes:
        pixel_values: (3, H, W) float32, or None if the sample is bad.
        questions: drawn questions.
        source: name of the sample.
        error: why the sample is bad, else None.
    """

    pixel_values: Tensor | None
    questions: tuple[Question, ...]
    source: str
    error: str | None = None


class VqaDataset(Dataset):
    """VQA records as a torch dataset: one item is one image with its questions.

    Args:
        records: the samples.
        processor: turns images into pixels.
        bad_samples: where to count samples whose image or text cannot be used; None raises at the first.
        max_questions_per_image: most questions of one image per epoch, drawn anew each epoch; None takes all.
        seed: of that draw; the same seed, epoch and index give the same questions in any process.
        cache_images: keep resized images in memory as uint8 (H * W * 3 bytes each), so that each is decoded once. Each
            worker process of a data loader would keep its own copy.
        transform: augmentation, drawn anew each epoch; None resizes.
    Raises:
        DataError: no records; or, while reading, see `bad_samples`.
        ConfigError: `max_questions_per_image` below 1; a transform that flips, since answers may speak of sides, or
            together with `cache_images`, which would freeze what it draws.
    """

    def __init__(
        self,
        records: Iterable[VqaRecord],
        processor: TripsProcessor,
        bad_samples: BadSamples | None = None,
        max_questions_per_image: int | None = None,
        seed: int = 0,
        cache_images: bool = False,
        transform: TrainTransform | None = None,
    ) -> None:
        self.records = list(records)
        if not self.records:
            raise DataError("no records", item="VqaDataset", hint="did the reader skip every sample?")
        if max_questions_per_image is not None and max_questions_per_image < 1:
            raise ConfigError("must be positive", item="max_questions_per_image", found=max_questions_per_image)
        if transform is not None and transform.flip != "none":
            raise ConfigError("would turn left into right in the answers", item="flip", found=transform.flip)
        if transform is not None and cache_images:
            raise ConfigError(
                "keeps images that augmentation changes every epoch",
                item="cache_images",
                found=cache_images,
                hint='set it to false, or data.augment to "none"',
            )
        self.processor, self.bad_samples, self.transform = processor, bad_samples, transform
        self.max_questions_per_image, self.seed, self.cache_images = max_questions_per_image, seed, cache_images
        self.epoch = 0
        self._cache: dict[int, np.ndarray] = {}
        self._checked: set[int] = set()
        self._errors: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of questions and crops; call it before the loader's iterator is made."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> VqaItem:
        record, array = self.records[index], None
        if index not in self._errors:
            try:
                array = self._read(index)
            except DataError as error:
                if self.bad_samples is None:
                    raise
                self._errors[index] = str(error)
                self.bad_samples.record(record.source, error)
        if array is None:
            return VqaItem(None, (), record.source, self._errors[index])
        return VqaItem(self.processor.normalise([array])[0], self._draw(index), record.source)

    def _read(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8; the first time also proof that every text of the record can be encoded."""
        if index in self._cache:
            return self._cache[index]
        record = self.records[index]
        if self.transform is None:
            array = self.processor.resize(record.image, name=record.source)
        else:
            array = self._augment(record, np.random.default_rng((self.seed, self.epoch, index)))
        if index not in self._checked:
            try:
                self.processor(text=[question.text for question in record.questions])
                if answers := [normalise_answer(a) for q in record.questions for a in q.answers]:
                    self.processor.encode_answers(answers)
            except DataError as error:
                raise DataError(f"question or answer cannot be used: {error}", item=record.source) from error
            self._checked.add(index)
            if self.bad_samples is not None:
                self.bad_samples.saw(record.source)
        if self.cache_images:
            self._cache[index] = array
        return array

    def _augment(self, record: VqaRecord, rng: np.random.Generator) -> np.ndarray:
        if not self.processor.jpeg_draft:
            return self.transform(load_image(record.image, name=record.source), rng, "")[0]
        image = record.image
        try:
            data = image if isinstance(image, bytes) else image.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", item=record.source) from error
        return self.transform.decode(data, rng, "", name=record.source)[0]

    def _draw(self, index: int) -> tuple[Question, ...]:
        questions, most = self.records[index].questions, self.max_questions_per_image
        if most is None or len(questions) <= most:
            return questions
        rng = random.Random(f"{self.seed}-{self.epoch}-{index}")
        return tuple(questions[i] for i in sorted(rng.sample(range(len(questions)), most)))


class VqaCollator:
    """Joins items into one batch of tensors; answers are written in the form of `normalise_answer`.

    Args:
        processor: encodes and pads the texts.
        pad_to_multiple_of: pad L up to a multiple, for few shapes and the GPU's sake; None pads to the longest, as
            answers always are: a decoder would read what is added.
    """

    def __init__(self, processor: TripsProcessor, pad_to_multiple_of: int | None = 8) -> None:
        self.processor, self.pad_to_multiple_of = processor, pad_to_multiple_of

    def __call__(self, items: Sequence[VqaItem]) -> dict[str, Any]:
        """Collate items.

        Returns:
            `pixel_values` (I, 3, H, W) float32; `image_index` (B,) long, the image of each question; `input_ids`,
            `attention_mask` (B, L) long; `answer_ids`, `answer_mask` (A, La) long; `answer_tokens` (M,) long, the
            places of (A, La - 1), row-major, behind which a token of an answer stands; `answer_index` (A,) long, the
            question of each answer; `answer_weights` (A,) float32, which sum to the question's `loss_weight`. Beside
            them the lists `question_ids` (B), `sources` (I), and `skipped`, a (source, reason) for each bad sample of
            the batch. If every sample is bad, I = B = A = 0 and L = La = 0; questions without answers alone have A = 0.
        """
        pixels = [item.pixel_values for item in items if item.pixel_values is not None]
        good = [item for item in items if item.pixel_values is not None]
        questions = [(i, question) for i, item in enumerate(good) for question in item.questions]
        answers = [
            (b, text, weight * question.loss_weight)
            for b, (_, question) in enumerate(questions)
            for text, weight in answer_shares(question).items()
        ]
        batch: dict[str, Any] = {
            "pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, *self.processor.image_size),
            "image_index": torch.tensor([i for i, _ in questions], dtype=torch.long),
            "answer_index": torch.tensor([b for b, _, _ in answers], dtype=torch.long),
            "answer_weights": torch.tensor([weight for _, _, weight in answers], dtype=torch.float32),
            "question_ids": [question.question_id for _, question in questions],
            "sources": [item.source for item in good],
            "skipped": [(item.source, item.error) for item in items if item.pixel_values is None],
        }
        empty = torch.zeros(0, 0, dtype=torch.long)
        texts = answer_texts = {"input_ids": empty, "attention_mask": empty}
        if questions:
            asked = [question.text for _, question in questions]
            texts = self.processor(text=asked, pad_to_multiple_of=self.pad_to_multiple_of)
        if answers:
            answer_texts = self.processor.encode_answers([text for _, text, _ in answers])
        batch |= {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
        batch |= {"answer_ids": answer_texts["input_ids"], "answer_mask": answer_texts["attention_mask"]}
        # Which places predict a token of an answer: known here without asking a device.
        batch["answer_tokens"] = batch["answer_mask"][:, 1:].flatten().nonzero().squeeze(1)
        return batch


def answer_shares(question: Question) -> dict[str, float]:
    """Share of the people behind each answer in the form of `normalise_answer`, which joins spellings."""
    merged: dict[str, float] = {}
    for answer, weight in zip(question.answers, question.weights, strict=True):
        text = normalise_answer(answer)
        merged[text] = merged.get(text, 0.0) + weight
    return merged


class AnswerList(Sequence[str]):
    """The answers that a model may choose from when it ranks candidates; others cannot be reached.

    Args:
        answers: texts, stored in the form of `normalise_answer`, in this order.
    Raises:
        DataError: empty, or an answer that is blank or occurs twice; names its position.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._answers: list[str] = []
        self._index: dict[str, int] = {}
        for i, answer in enumerate(answers):
            text = normalise_answer(answer) if isinstance(answer, str) else ""
            if not text or text in self._index:
                reason = "occurs twice" if text else "is not text"
                raise DataError(reason, item=f"answers[{i}]", found=answer)
            self._index[text] = i
            self._answers.append(text)
        if not self._answers:
            raise DataError("no answers", item="AnswerList")

    @classmethod
    def from_records(cls, records: Iterable[VqaRecord], min_count: int = 1) -> AnswerList:
        """Collect the answers of training records that at least `min_count` questions have, most frequent first.

        Raises:
            DataError: no answer occurs so often.
        """
        counts = Counter(
            text for record in records for question in record.questions for text in answer_shares(question)
        )
        most = max(counts.values(), default=0)
        if most < min_count:
            raise DataError(
                "no answer occurs so often", item="min_answer_count", found=min_count, expected=f"at most {most}"
            )
        return cls(sorted((a for a, n in counts.items() if n >= min_count), key=lambda a: (-counts[a], a)))

    def __len__(self) -> int:
        return len(self._answers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._answers[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __contains__(self, answer: object) -> bool:
        return isinstance(answer, str) and normalise_answer(answer) in self._index

    def find(self, answer: str) -> int | None:
        """Position of an answer in any spelling, or None if it is not in the list."""
        return self._index.get(normalise_answer(answer))

    def coverage(self, records: Iterable[VqaRecord]) -> float:
        """Share of the answered questions with an answer in the list: the others cannot be got right by ranking."""
        answered = (question for record in records for question in record.questions if question.answers)
        reachable = [any(answer in self for answer in question.answers) for question in answered]
        return sum(reachable) / len(reachable) if reachable else 0.0

    def save(self, path: str | Path) -> None:
        """Write the list as JSON: {"answers": [...]}."""
        Path(path).write_text(json.dumps({"answers": self._answers}, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> AnswerList:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or does not hold a valid list; names it.
        """
        try:
            answers = json.loads(Path(path).read_text(encoding="utf-8"))["answers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"answer list cannot be read: {error}", item=str(path)) from error
        if not isinstance(answers, list):
            raise DataError("answers are not a list", item=str(path), found=type(answers).__name__)
        try:
            return cls(answers)
        except DataError as error:
            raise DataError(str(error), item=str(path)) from error
