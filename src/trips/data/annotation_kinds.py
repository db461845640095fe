"""Which known kind of annotation something looks like: how a reader says that it was given another task's file.

Not part of the paper; every experiment's reader (Tables 1 and 2) asks here when a file does not hold what it reads.
"""

from __future__ import annotations

import re
from typing import Any

from trips.errors import DataError

FLICKR_LINE = re.compile(r"[^\t]+#\d+\t.*", re.DOTALL)
DAQUAR_LINE = re.compile(r"[^\t]*\b(image\d+)\b[^\t]*\?\s*", re.DOTALL)

# The recipe's task that reads a kind; what has none here is of no use for any.
_TASKS = {
    "VQA v2 questions": "vqa",
    "Visual Genome questions": "vqa",
    "DAQUAR questions": "vqa",
    "questions": "vqa",
    "Karpathy's captions": "retrieval",
    "COCO captions": "retrieval",
    "Flickr's captions": "retrieval",
    "captions": "retrieval",
    "NLVR2 statements": "nlvr2",
    "NLVR statements": "nlvr2",
    "statements about images": "nlvr2",
}


def describe(content: object) -> str | None:
    """Name of the known kind that something looks like.

    Args:
        content: parsed JSON; or the first rows of a list or table, as dictionaries; or the first line of a text.
    Returns:
        such as "Karpathy's captions", "VQA v2 questions" or "NLVR2 statements"; None for what is unknown.
    """
    if isinstance(content, str):
        if FLICKR_LINE.fullmatch(content):
            return "Flickr's captions"
        return "DAQUAR questions" if DAQUAR_LINE.fullmatch(content) else None
    if isinstance(content, dict):
        return _of_object(content) or _of_row(content)
    return _of_row(_first(content))


def wrong_kind(item: object, content: object, wanted: str, **fields: Any) -> DataError:
    """The error for content that is not of the wanted kind; says what it looks like, and which task reads that.

    Args:
        item: the file. content: as in `describe`. wanted: such as "questions about images".
        fields: `found`, `expected` and `hint` of the error; a hint gives way to the name of the task.
    """
    kind = describe(content)
    if kind is None:
        return DataError(f"holds no {wanted}", item=item, **fields)
    if kind in _TASKS:
        fields["hint"] = f"task: {_TASKS[kind]} reads it"
    return DataError(f"looks like {kind}, not {wanted}", item=item, **fields)


def _first(rows: object) -> dict[Any, Any]:
    """First object of a list: a row before it may be broken."""
    rows = rows[:10] if isinstance(rows, list) else []
    return next((row for row in rows if isinstance(row, dict)), {})


def _of_object(content: dict[Any, Any]) -> str | None:
    questions, notes, images = (_first(content.get(key)) for key in ("questions", "annotations", "images"))
    if {"question", "image_id"} <= questions.keys() and "image" not in questions:
        return "VQA v2 questions"
    if "question_id" in notes and notes.keys() & {"answers", "multiple_choice_answer"}:
        return "VQA v2 annotations"
    if "sentences" in images:
        return "Karpathy's captions"
    if "caption" in notes:
        return "COCO captions"
    if "keypoints" in notes:
        return "COCO keypoints"
    if notes.keys() & {"bbox", "segmentation", "category_id"}:
        return "COCO instances"
    if "file_name" in images and "annotations" not in content:
        return "COCO's list of images"
    return "the index of a tar" if content.get("format") == "trips-tar-index" else None


def _of_row(row: dict[Any, Any]) -> str | None:
    keys = {str(key).strip().lower() for key in row}
    if "qas" in keys:
        return "Visual Genome questions"
    for name in ("regions", "objects", "relationships", "attributes"):
        if {name, "image_id"} <= keys or {name, "id"} <= keys:
            return f"Visual Genome {name}"
    if "sentence" in keys and "identifier" in keys:
        return (
            "NLVR statements" if keys & {"evals", "structured_rep", "directory"} - {"left_url"} else "NLVR2 statements"
        )
    if "sentence" in keys and keys & {"label", "images", "image1"}:
        return "statements about images"
    if "question" in keys:
        return "questions"
    if keys == {"question_id", "answer"}:
        return "VQA results"
    if keys & {"caption", "captions", "sentences"}:
        return "captions"
    pictured = keys & {"image", "file_name", "filename", "image_path", "path"}
    return "captions" if pictured and keys & {"text", "title"} else None
