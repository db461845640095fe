"""Files of questions about images: which layout one has, and the layouts of VQA 2.0, Visual Genome and DAQUAR.

Feeds the VQA experiments (Table 1). Rows of lists and tables are the business of `trips.data.question_rows`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trips.data.annotation_kinds import DAQUAR_LINE, describe, wrong_kind
from trips.data.annotation_rows import Row, parse, read_text
from trips.data.question_rows import WANTED, AskedQuestion, QuestionList, each, name_of, people_of, read_rows
from trips.data.records import IMAGE_SUFFIXES
from trips.errors import ConfigError, DataError

logger = logging.getLogger("trips")

_ASKED_WHERE = re.compile(r"\s*in the image\d+\s*\?\s*")


def read_file(path: Path, answers: Path | None, splits: Sequence[str], columns: Mapping[str, str]) -> QuestionList:
    """Questions of a file, whose layout its content tells.

    Args:
        path: the file.
        answers: VQA v2's annotations; None looks for them beside it.
        splits: see `choose_splits`; only lists have some.
        columns: see `read_rows`.
    Raises:
        DataError: damaged as a whole, or of another task; see `choose_splits`.
        ConfigError: splits or annotations for a layout that has none; see `choose_splits` and `read_rows`.
    """
    text = read_text(path)
    first = text.lstrip().split("\n", 1)[0]
    if first[:1] not in ("{", "[") and (layout := describe(first)) is not None:
        if layout != "DAQUAR questions":
            raise wrong_kind(str(path), first, WANTED)
        content: dict[str, Any] | list[Row] = []
    else:
        content = parse(text, path)
        layout = describe(content if isinstance(content, dict) else [row for _, row in content[:10]])
    if splits and layout in ("VQA v2 questions", "Visual Genome questions", "DAQUAR questions"):
        raise ConfigError(f"{layout} have no splits to choose from", item=f"{path}#{'+'.join(splits)}")
    if layout == "VQA v2 questions":
        return _vqa_v2(content, path, answers)
    if answers is not None:
        raise ConfigError("answers in a file of their own", item=path, found=layout, expected="VQA v2 questions")
    if layout == "VQA v2 annotations":
        hint = "name the questions, as QUESTIONS.json or QUESTIONS.json::ANNOTATIONS.json"
        raise DataError(f"looks like {layout}: answers without their questions", item=str(path), hint=hint)
    if layout == "DAQUAR questions":
        return _daquar(text, path)
    if layout == "Visual Genome questions":
        return _visual_genome(content, path)
    if isinstance(content, dict):
        if layout != "questions":
            raise wrong_kind(str(path), content, WANTED, found=sorted(map(str, content))[:8])
        content = [(path.name, content)]
    return read_rows(content, path, splits, columns, people=first[:1] not in ("{", "["))


def _vqa_v2(content: dict[str, Any], path: Path, answers: Path | None) -> QuestionList:
    """Questions and annotations of VQA 2.0, joined by the question's id; a test set has no annotations."""
    subtype = str(content.get("data_subtype") or "")
    notes = _annotations(path, subtype, answers)
    split = subtype.replace("-dev", "")  # test-dev2015 asks about images of test2015
    inside = ("", split, *(f"{name}2017" for name in ("train", "val")))

    def read(place: str, row: dict[str, Any]) -> AskedQuestion:
        number, question_id = name_of(row, "image_id"), name_of(row, "question_id")
        if number is None or question_id is None:
            raise DataError("names no image or question", found=sorted(map(str, row)), expected="image_id, question_id")
        note: dict[str, Any] = {}
        if notes is not None:
            if question_id not in notes:
                raise DataError("has no annotation", found=question_id)
            note = notes[question_id]
            if name_of(note, "image_id") not in (number, None):
                raise DataError("annotation is about another image", found=note["image_id"], expected=number)
        padded = number.zfill(12)
        images = (f"COCO_{split}_{padded}.jpg", f"{padded}.jpg", f"{number}.jpg")
        kinds = {key: note[key] for key in ("question_type", "answer_type") if isinstance(note.get(key), str)}
        given = people_of(note.get("answers", []))
        return AskedQuestion(place, images, number, question_id, row.get("question"), given, inside, kinds)

    rows = [(f"{path.name} questions[{i}]", row) for i, row in enumerate(content["questions"])]
    return QuestionList(path.name, len(rows), each(rows, read))


def _annotations(path: Path, subtype: str, given: Path | None) -> dict[str, dict[str, Any]] | None:
    """VQA v2's annotations by question id; None for a test set, whose answers are kept back."""
    name = re.sub("questions", "annotations", re.sub("OpenEnded_|MultipleChoice_", "", path.name))
    file = given or path.with_name(name)
    if given is None and (name == path.name or not file.is_file()):
        if subtype.startswith(("train", "val")):
            raise DataError(
                "has no annotations beside it",
                item=str(path),
                expected=name if name != path.name else "v2_mscoco_train2014_annotations.json, say",
                hint="name them: QUESTIONS.json::ANNOTATIONS.json",
            )
        logger.info("%s: no annotations beside it; its questions have no answers", path)
        return None
    content = parse(read_text(file), file)
    if not isinstance(content, dict) or describe(content) != "VQA v2 annotations":
        rows = content if isinstance(content, dict) else [row for _, row in content[:10]]
        raise wrong_kind(
            str(file), rows, "VQA v2 annotations", expected='{"annotations": [{"question_id", "answers"}]}'
        )
    notes: dict[str, dict[str, Any]] = {}
    for i, note in enumerate(content["annotations"]):
        question_id = name_of(note, "question_id") if isinstance(note, dict) else None
        if question_id is None or question_id in notes:
            reason = "names no question" if question_id is None else "annotates a question a second time"
            raise DataError(reason, item=f"{file} annotations[{i}]", found=question_id)
        notes[question_id] = note
    return notes


def _visual_genome(content: dict[str, Any] | list[Row], path: Path) -> QuestionList:
    """question_answers.json of Visual Genome: a sentence answers each question, whose full stop is left out."""
    images = content if isinstance(content, list) else [(path.name, content)]
    rows: list[Row] = []
    for place, image in images:
        pairs = image.get("qas") if isinstance(image, dict) else None
        if isinstance(pairs, list):
            shared = {"image_id": image.get("id", image.get("image_id"))}
            rows += [(f"{place} qas[{i}]", {**shared, **p} if isinstance(p, dict) else p) for i, p in enumerate(pairs)]
        else:
            rows.append((place, image if isinstance(image, DataError) else DataError("has no list qas")))

    def read(place: str, row: dict[str, Any]) -> AskedQuestion:
        number, answers = name_of(row, "image_id"), people_of(row.get("answer"))
        if number is None:
            raise DataError("names no image", found=sorted(map(str, row)), expected="image_id")
        plain = [a[:-1] if isinstance(a, str) and a.endswith(".") and a.count(".") == 1 else a for a in answers]
        inside = ("VG_100K", "VG_100K_2", "")
        return AskedQuestion(
            place, (f"{number}.jpg",), number, name_of(row, "qa_id"), row.get("question"), plain, inside
        )

    return QuestionList(path.name, len(rows), each(rows, read))


def _daquar(text: str, path: Path) -> QuestionList:
    """DAQUAR as its authors hand it out: a line asks about "the image12", the next one answers."""
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    questions: list[tuple[str, AskedQuestion | DataError]] = []
    counts: dict[str, int] = {}
    at = 0
    while at < len(lines):
        place, asked = f"{path.name} line {at + 1}", DAQUAR_LINE.fullmatch(lines[at])
        answer = lines[at + 1] if at + 1 < len(lines) else ""
        at += 1
        if asked is None:
            questions.append((place, DataError("asks about no image", found=lines[at - 1], expected='"... image12 ?"')))
        elif DAQUAR_LINE.fullmatch(answer) or not answer:
            questions.append((place, DataError("has no answer in the line below", found=answer)))
            at += not answer  # an empty line is an answer that is missing, a question the next one
        else:
            image = asked[1]
            number = counts[image] = counts.get(image, -1) + 1
            # Which file is meant is no part of the question; elsewhere in it the words stay.
            question = _ASKED_WHERE.sub(" ?", asked[0]).strip()
            names = tuple(f"{image}.{suffix}" for suffix in ("png", *IMAGE_SUFFIXES))
            questions.append((place, AskedQuestion(place, names, image, f"{image}-{number}", question, [answer])))
            at += 1
    return QuestionList(path.name, len(questions), questions)
