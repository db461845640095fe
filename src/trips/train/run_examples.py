"""A handful of test samples with what the model said and what was kept of them, for a run's report.

What was said to questions and statements is read from the files of the last measurement; captions are found anew
among some. Nothing here is a figure: `trips.train.vqa_evaluation` and its neighbours measure.

Dimensions: I images, B texts, P projection width.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from trips.config import SelectionConfig
from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples, Question, VqaRecord
from trips.data.statements import ReasoningRecord
from trips.distributed import alone
from trips.errors import CheckpointError, ConfigError, DataError
from trips.explanation import check_explainable, explain_texts
from trips.images import ImageSource, load_image
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.report.pictures import Example, Picture
from trips.train.pretraining import join_images, read_pairs, shard_cache
from trips.train.reasoning import read_records as read_statements
from trips.train.reasoning_evaluation import VERDICTS_FILE
from trips.train.recipe import Recipe
from trips.train.vqa import read_records as read_questions
from trips.train.vqa_evaluation import ANSWERED_FILE, choose_metric, score_answers

_POOL = 64  # images whose captions are told apart
_READ = 8 * _POOL  # records of a corpus that are read for it: images have several, which may stand apart
ItemT = TypeVar("ItemT")


def find_examples(
    recipe: Recipe, run_dir: Path, model: TripsPreTrainedModel, processor: TripsProcessor, count: int
) -> tuple[list[Example], str]:
    """Test samples of a finished run, half of them right ones if there are as many.

    Args:
        recipe: of the run; ``data.test`` says where the samples are.
        run_dir: with the files of its measurement.
        model: as it is now, with the recipe's selection; left in the mode that it was in.
        processor: that of the model.
        count: samples at most.
    Returns:
        The examples, and what is to be known beside them.
    Raises:
        ConfigError, DataError: the test data cannot be read. CheckpointError: no file of what was said.
    """
    selection, was_training = recipe.model.selection, model.training
    model.eval()
    try:
        with alone(), torch.no_grad():  # the first process writes; others wait
            note = _kept_note(selection)
            show = _Show(model, processor, selection, explained=not note, bad=BadSamples(1.0))
            if recipe.task == "vqa":
                found = _questions(recipe, run_dir, show, count)
            elif recipe.task == "nlvr2" and recipe.model.reasoning.objective == "truth":
                found = _statements(recipe, run_dir, show, count)
            elif recipe.task == "nlvr2":
                raise ConfigError("has no single samples to show", item="objective assignment")
            else:
                found, pool = _captions(recipe, show, count)
                note = f"The caption of the nearest contrastive feature among those of {pool} test images. {note}"
    finally:
        model.train(was_training)
    if not found:
        raise DataError("no sample can be shown", item="data.test", found=show.bad.summary())
    return found, note.strip()


def choose(items: Sequence[ItemT], verdict: Callable[[ItemT], float | None], count: int) -> list[ItemT]:
    """Some of the items, evenly over their order: right ones, then wrong ones, then those that nobody judged.

    Args:
        verdict: see `Example`; what is partly right counts as right from one half on.
        count: at most; half of them right if there are as many.
    """
    judged = [(item, verdict(item)) for item in items]  # once each: there may be hundreds of thousands
    right = [item for item, value in judged if value is not None and value >= 0.5]
    wrong = [item for item, value in judged if value is not None and value < 0.5]
    unknown = [item for item, value in judged if value is None]
    half = max(count - len(wrong), (count + 1) // 2)
    found = _spread(right, min(half, count))
    found += _spread(wrong, count - len(found))
    return found + _spread(unknown, count - len(found))


def _spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


class _Show:
    """Makes pictures of photos, with what a text keeps of them where the run selects."""

    def __init__(
        self,
        model: TripsPreTrainedModel,
        processor: TripsProcessor,
        selection: SelectionConfig,
        *,
        explained: bool,
        bad: BadSamples,
    ) -> None:
        self.model, self.processor, self.selection = model, processor, selection
        self.explained, self.bad = explained, bad

    def picture(self, image: ImageSource, text: str, name: str) -> Picture:
        """Raises `DataError` where the photo cannot be read, or the text is blank."""
        if not self.explained:
            return Picture(load_image(image, name=name))
        return Picture.of(explain_texts(self.model, self.processor, image, [text], self.selection, name=name)[0])

    def example(self, images: Sequence[ImageSource], text: str, source: str, **fields: Any) -> Iterator[Example]:
        """One example, or none of a photo that cannot be read."""
        with self.bad.guard(source):
            yield Example(tuple(self.picture(image, text, source) for image in images), source=source, **fields)


def _kept_note(selection: SelectionConfig) -> str:
    try:
        check_explainable(selection)
    except ConfigError:
        return "This run keeps every patch: there is no selection to show."
    return ""


def _questions(recipe: Recipe, run_dir: Path, show: _Show, count: int) -> list[Example]:
    """Of section 5.1.1: questions with the answer that was given; one of each image."""
    records = read_questions(recipe.data, "test", show.bad)
    said = _answers(run_dir / ANSWERED_FILE)
    metric = choose_metric(records, recipe.run.metric)

    def judged(question: Question) -> float | None:
        return score_answers([question], said, metric).accuracy

    asked: list[tuple[VqaRecord, Question]] = []
    for number, record in enumerate(records):
        if answered := [question for question in record.questions if said.get(question.question_id)]:
            asked.append((record, answered[number % len(answered)]))
    found: list[Example] = []
    for record, question in choose(asked, lambda pair: judged(pair[1]), count):
        true = ", or ".join(question.answers) or "not known"
        lines = (("question", question.text), ("said", said[question.question_id]), ("true", true))
        found += show.example([record.image], question.text, record.source, lines=lines, verdict=judged(question))
    return found


def _answers(path: Path) -> dict[str, str]:
    """Answers by question id, as `write_answers` writes them."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {str(row["question_id"]): str(row["answer"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__})", item=path) from error


def _statements(recipe: Recipe, run_dir: Path, show: _Show, count: int) -> list[Example]:
    """Of section 5.1.2: statements with their verdict."""
    records = read_statements(recipe, "test", show.bad)
    path = run_dir / VERDICTS_FILE
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        said: dict[str, str] = dict(rows)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__})", item=path) from error

    def judged(record: ReasoningRecord) -> float | None:
        return None if record.label is None else float(said[record.identifier] == str(record.label).lower())

    judged_ones = [record for record in records if said.get(record.identifier)]
    found: list[Example] = []
    for record in choose(judged_ones, judged, count):
        true = "not known" if record.label is None else str(record.label).lower()
        lines = (("statement", record.sentence), ("said", said[record.identifier]), ("true", true))
        with show.bad.guard(record.source):
            images = _images_of(record)
            found += show.example(images, record.sentence, record.source, lines=lines, verdict=judged(record))
    return found


def _images_of(record: ReasoningRecord) -> list[Image.Image]:
    if record.boxes is None:
        return [load_image(image, name=record.source) for image in record.images]
    picture = load_image(record.images[0], name=record.source)
    return [picture.crop(box) for box in record.boxes]


def _captions(recipe: Recipe, show: _Show, count: int) -> tuple[list[Example], int]:
    """Of section 5.1.3: the nearest of the captions of some images, by contrastive features."""
    data, model = recipe.data, show.model
    records = _first_images(recipe, show.bad)
    pixels, kept = [], []
    for record in records:
        with show.bad.guard(record.source):
            pixels.append(show.processor.resize(record.image, name=record.source))
            kept.append(record)
    if not kept:
        raise DataError("no image can be read", item="data.test", found=f"{len(records)} of {data.test}")
    texts = [(owner, text) for owner, record in enumerate(kept) for text in record.texts]
    device, size = model.device, recipe.run.eval_batch_size
    images = torch.cat(
        [
            model.encode_image(show.processor.normalise(pixels[start : start + size]).to(device, model.dtype))
            for start in range(0, len(pixels), size)
        ]
    )
    features = []
    for start in range(0, len(texts), 4 * size):
        batch = show.processor(text=[text for _, text in texts[start : start + 4 * size]]).to(device)
        features.append(model.encode_texts(batch["input_ids"], batch["attention_mask"]))
    nearest = (images @ torch.cat(features).T).argmax(dim=1).tolist()  # (I, P) with (B, P)
    found: list[Example] = []
    for row in choose(range(len(kept)), lambda row: float(texts[nearest[row]][0] == row), count):
        record, (owner, text) = kept[row], texts[nearest[row]]
        lines = (("caption found", text), ("its own", record.texts[0]))
        fields = {"lines": lines, "verdict": float(owner == row)}
        # What its own caption keeps of it: the one found may be about something else altogether.
        found += show.example([record.image], record.texts[0], record.source, **fields)
    return found, len(kept)


def _first_images(recipe: Recipe, bad: BadSamples) -> list[PairRecord]:
    """Some images of the test data with their captions; an image id means one image within an entry only."""
    data, cache = recipe.data, shard_cache(recipe.data)
    if not data.test:
        raise ConfigError("no files given", item="data.test")
    found: list[PairRecord] = []
    for entry in data.test:
        if len(found) < _POOL:
            pairs = read_pairs([entry], cache, bad, data.clean_captions, data.images, data.columns)
            found += join_images(islice(pairs, _READ))
    return found[:_POOL]
