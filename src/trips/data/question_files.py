"""Questions about images from the files that people have: one entry of a recipe becomes VQA records.

Feeds the VQA experiments (Table 1). Read are tars of `trips.data.records`, VQA 2.0 and Visual Genome as released,
ALBEF's lists, tables and lists of one's own, DAQUAR's text, and datasets of Hugging Face; docs/data_formats.md shows
each. What a file holds is told by its content. Images are looked for, not opened.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from trips.data.annotation_rows import ImageFolders, find_list, split_entry
from trips.data.hf import is_dataset
from trips.data.listings import text_problem
from trips.data.question_layouts import read_file
from trips.data.question_rows import AskedQuestion, QuestionList, check_columns, read_dataset
from trips.data.records import BadSamples, Question, VqaRecord, normalise_answer, read_vqa_shards
from trips.data.remote import expand_patterns, is_remote
from trips.data.shards import INDEX_SUFFIX
from trips.errors import ConfigError, DataError

_LISTS = tuple(f"{name}.{suffix}" for name in ("metadata", "questions") for suffix in ("jsonl", "json", "csv", "tsv"))


def read_questions(
    entry: str | Path,
    images: Sequence[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    bad_samples: BadSamples | None = None,
) -> list[VqaRecord]:
    """Read one entry of a recipe's data.

    What cannot be used (a blank question, an image that is not there, a question id seen before, no answer where
    others have one) is counted in `bad_samples` and left out.

    Args:
        entry: path or pattern of tars or files; a folder with a list called metadata.* or questions.*;
            ``QUESTIONS.json::ANNOTATIONS.json`` of VQA 2.0; or ``hf:NAME``. ``#SPLIT+SPLIT`` behind it chooses by the
            field "split" of a list, or the split of a dataset.
        images: folders that images are looked for in, tried in turn; none takes that of the file, and "images" in it.
        columns: other names of the fields of lists and datasets, {"question": "q", "image": "img"}.
        bad_samples: where to count bad questions, and bad images of tars; None raises at the first.
    Returns:
        One record per image, in the order in which the images come first, with its questions in the order of the file.
        Questions of a set without answers have none. Images embedded in a dataset are held in memory, each once.
    Raises:
        DataError: the file is missing, damaged as a whole or of another task, holds several splits and none is chosen,
            or nothing in it can be used; a bad question, or too many.
        ConfigError: a split or column that is not there, a folder of images that is none.
        MissingDependencyError: see `read_vqa_shards` and `DatasetRows`.
    """
    entry, columns = str(entry), columns or {}
    check_columns(columns)
    if is_dataset(entry):
        local = Path(split_entry(entry.removeprefix("hf:"))[0])
        records = _Records(bad_samples)
        records.add(read_dataset(entry, columns), ImageFolders(images, local if local.is_dir() else Path()), "")
        return records.finish(entry)
    path, splits = split_entry(entry)
    path, _, answers = (path, "", "") if os.path.exists(path) else path.partition("::")
    paths = [Path(path)] if os.path.exists(path) else _expand(path)
    tars = [file for file in paths if file.suffix == ".tar" or (file.is_file() and tarfile.is_tarfile(file))]
    if tars and (len(tars) < len(paths) or splits or answers):
        problem = "tars and other files together" if len(tars) < len(paths) else "tars have no splits or annotations"
        raise ConfigError(problem, item=entry, hint="give each its own entry")
    if tars:
        return list(read_vqa_shards(paths, bad_samples))
    records = _Records(bad_samples)
    for file in paths:
        file = find_list(file, _LISTS)
        questions = read_file(file, Path(answers) if answers else None, splits, columns)
        records.add(questions, ImageFolders(images, file.parent), file.parent)
    return records.finish(entry)


def _expand(pattern: str) -> list[Path]:
    if not pattern.strip():
        raise ConfigError("names no file", item="data", found=pattern)
    if is_remote(pattern):
        raise ConfigError("questions are read from local files", item=pattern, hint="download it first")
    return [Path(place) for place in expand_patterns(pattern, "data") if not place.endswith(INDEX_SUFFIX)]


@dataclass
class _Asked:
    """A question that was checked; `answers` grows where a table has a row for each person."""

    key: str | bytes
    text: str
    answers: list[str]
    fields: dict[str, Any]


@dataclass
class _Image:
    image: bytes | Path = field(repr=False)
    image_id: str
    source: str
    questions: list[str] = field(default_factory=list)


class _Records:
    """Checks questions, finds their images, and joins those about one image."""

    def __init__(self, bad_samples: BadSamples | None) -> None:
        self.bad_samples = bad_samples
        self.images: dict[str | bytes, _Image] = {}  # by path, or by digest of the bytes
        self.asked: dict[str, _Asked] = {}  # by question id
        self.places: dict[str, str] = {}  # of each question id
        self._found: dict[tuple[str, ...] | Path, Path | DataError] = {}

    def add(self, questions: QuestionList, folders: ImageFolders, folder: str | Path) -> None:
        """Take the questions of a file; `folder` makes the ids of those that have none differ from another file's."""
        if self.bad_samples is not None:
            self.bad_samples.saw_number(self.bad_samples.num_seen + questions.size)
        self._found.clear()
        for place, asked in questions.questions:
            try:
                if isinstance(asked, DataError):
                    raise asked
                self._add(asked, questions, folders, folder)
            except DataError as error:
                self._reject(place, error)

    def _add(self, asked: AskedQuestion, questions: QuestionList, folders: ImageFolders, folder: str | Path) -> None:
        if asked.text is None:
            raise DataError("has no question")
        if (problem := text_problem(asked.text)) is not None:
            raise DataError(f"question {problem}", found=asked.text)
        answers = [_answer(answer) for answer in asked.answers]
        if answers and not any(map(_is_learnable, answers)):
            raise DataError("has no answers", found=answers)
        if isinstance(asked.images, bytes):
            image: bytes | Path = asked.images
            key: str | bytes = hashlib.blake2b(asked.images, digest_size=16).digest()
        else:
            image = self._find(asked.images, asked.inside, folders)
            key = str(image)
        question_id = asked.question_id or str(Path(folder, asked.place))
        if (known := self.asked.get(question_id)) is not None:
            if not questions.people or (known.key, known.text) != (key, asked.text):
                raise DataError("question id occurs twice", found=question_id)
            known.answers += answers
            return
        if key not in self.images:
            name = folders.relative(image) if isinstance(image, Path) else asked.image_id or key.hex()
            image_id = asked.image_id or os.path.splitext(name)[0]
            self.images[key] = _Image(image, image_id, f"{questions.name}:{name}")
        self.images[key].questions.append(question_id)
        self.asked[question_id] = _Asked(key, asked.text, answers, asked.fields)
        self.places[question_id] = asked.place

    def finish(self, entry: str) -> list[VqaRecord]:
        """The records; if some questions have answers, those without are bad."""
        if any(asked.answers for asked in self.asked.values()):
            for question_id in [name for name, asked in self.asked.items() if not asked.answers]:
                self._reject(self.places[question_id], DataError("has no answers, though others have"))
                self.images[self.asked.pop(question_id).key].questions.remove(question_id)
        records = []
        for image in self.images.values():
            questions = tuple(_question(name, self.asked[name]) for name in image.questions)
            if questions:
                records.append(VqaRecord(image.image_id, image.image, questions, image.source))
        if not records:
            reasons = list(self.bad_samples.errors.values()) if self.bad_samples is not None else []
            raise DataError("holds no question that can be used", item=entry, found=reasons[-1] if reasons else "none")
        return records

    def _find(self, names: tuple[str, ...] | Path, inside: tuple[str, ...], folders: ImageFolders) -> Path:
        """Path of an image, looked for once."""
        if names not in self._found:
            try:
                if isinstance(names, Path):  # the dataset says where it is
                    self._found[names] = names if names.is_file() else folders.need(str(names), inside)
                else:
                    self._found[names] = folders.need(names, inside)
            except DataError as error:
                self._found[names] = error
        found = self._found[names]
        if isinstance(found, DataError):
            raise found
        return found

    def _reject(self, place: str, error: DataError) -> None:
        named = DataError(error.message, item=place, found=error.found, expected=error.expected, hint=error.hint)
        if self.bad_samples is None:
            raise named from error
        self.bad_samples.record(place, named)


def _answer(answer: object) -> str:
    """A person's answer as text; whole numbers, as JSON and datasets have them, are written out."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    # A blank answer is one that somebody gave: it counts in the official accuracy, and is no answer to learn.
    if not isinstance(answer, str) or (answer.strip() and _problem(answer) is not None):
        raise DataError("answer is not text", found=answer)
    return sys.intern(answer)


# Ten people answer each of half a million questions, most of them the same.
_problem = lru_cache(2**16)(text_problem)
_is_learnable = lru_cache(2**16)(lambda answer: normalise_answer(answer) != "")


def _question(question_id: str, asked: _Asked) -> Question:
    usable = [answer for answer in asked.answers if _is_learnable(answer)]
    question = Question.of(question_id, asked.text, usable, **asked.fields)
    return question if len(usable) == len(asked.answers) else replace(question, given=tuple(asked.answers))
