"""Questions about images in one form, whatever the layout, and those of lists and tables with a field for each thing.

Feeds the VQA experiments (Table 1). No image is looked for here, and no text checked: `trips.data.question_files` does
both for all layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips.data.annotation_kinds import wrong_kind
from trips.data.annotation_rows import Row, choose_splits
from trips.data.hf import DatasetRows, picture
from trips.data.records import IMAGE_SUFFIXES
from trips.errors import ConfigError, DataError

WANTED = "questions about images"
_FIELDS = {
    "image": ("image", "file_name", "filename", "image_path", "path", "img"),
    "image_id": ("image_id", "img_id"),
    "question_id": ("question_id", "qid"),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "split": ("split",),
    "dataset": ("dataset",),
}
_ALBEF_VG_WEIGHT = 0.5  # of Visual Genome's questions in ALBEF's files, as its training weighs them


@dataclass
class AskedQuestion:
    """One question as a file has it, not checked yet.

    Attributes:
        place: the row, as messages call it.
        images: names that its image may have, relative to a folder of images; or where it is; or its encoded bytes.
        inside: folders, relative to one of images, that hold the image.
        image_id: name of the image in its data set; None takes the name of its file.
        question_id: None makes one of the row.
        text: of the question.
        answers: of the people who were asked.
        fields: of `Question`: question_type, answer_type, loss_weight.
    """

    place: str
    images: tuple[str, ...] | Path | bytes = field(repr=False)
    image_id: str | None
    question_id: str | None
    text: object
    answers: Sequence[object]
    inside: tuple[str, ...] = ("",)
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionList:
    """All questions of a file.

    Attributes:
        name: of the file, without its folder.
        size: number of questions.
        questions: each with the name of its row; a DataError stands for one that has no form.
        people: rows that repeat a question, its id and its image are the answers of several people.
    """

    name: str
    size: int
    questions: Iterable[tuple[str, AskedQuestion | DataError]]
    people: bool = False


def read_rows(
    content: Sequence[Row], path: Path, splits: Sequence[str], columns: Mapping[str, str], people: bool
) -> QuestionList:
    """Questions of a list or table: rows with a question, an image or its id, and one answer or a list of them.

    Args:
        content: the rows.
        path: where they came from.
        splits: see `choose_splits`.
        columns: field of a question to its name in the list, where it is not the usual one.
        people: see `QuestionList`.
    Raises:
        DataError: no field of questions; see `choose_splits`. ConfigError: see `choose_splits`, `check_columns`.
    """
    rows = [row for _, row in content[:10]]
    names = _names({key: None for _, row in content if isinstance(row, dict) for key in row}, columns)
    if not names["question"]:
        first = next((row for row in rows if isinstance(row, dict)), None)
        found = sorted(map(str, first))[:8] if first else type(rows[0]).__name__ if rows else "no rows"
        expected = "fields question, image and answer"
        raise wrong_kind(str(path), rows, WANTED, found=found, expected=expected, hint="other names: data.columns")
    if names["split"]:
        content = choose_splits(content, splits, names["split"][0], path)
    elif splits:
        raise ConfigError("has no field split", item=f"{path}#{'+'.join(splits)}")
    return QuestionList(path.name, len(content), each(content, lambda p, r: _of_row(p, r, names)), people)


def read_dataset(entry: str, columns: Mapping[str, str]) -> QuestionList:
    """Questions of a dataset of Hugging Face; its split is chosen in the entry.

    Raises:
        DataError: see `DatasetRows`; no field of questions. ConfigError: see `DatasetRows` and `columns`.
    """
    rows = DatasetRows(entry)
    names = _names(dict.fromkeys(rows.columns), columns)
    if not names["question"]:
        raise wrong_kind(
            entry, [dict.fromkeys(rows.columns)], WANTED, found=rows.columns, hint="other names: data.columns"
        )

    def read(place: str, row: dict[str, Any]) -> AskedQuestion:
        for name in names["image"][:1]:
            row[name] = picture(row[name])
        return _of_row(place, row, names)

    return QuestionList(rows.name, len(rows), each(rows, read), people=True)


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse columns that name no field of a question.

    Raises:
        ConfigError: names the field.
    """
    for name in columns:
        if name not in (*_FIELDS, "answer"):
            raise ConfigError("is no field of a question", item=f"data.columns.{name}", expected=", ".join(_FIELDS))


def each(
    rows: Iterable[Row], read: Callable[[str, dict[str, Any]], AskedQuestion]
) -> Iterator[tuple[str, AskedQuestion | DataError]]:
    """Apply `read` to every row that is an object."""
    for place, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError("is no object", found=type(row).__name__)
            yield place, read(place, row)
        except DataError as error:
            yield place, error


def _names(keys: Mapping[str, None], columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Names in a list, best first, of each field of a question.

    Args:
        keys: names that occur in the list; their case does not count, unless `columns` names them.
        columns: field to name, as the user says.
    Raises:
        ConfigError: no such field; a name that does not occur.
    """
    lower = {str(key).strip().lower(): key for key in reversed(list(keys))}
    names = {field: tuple(lower[name] for name in known if name in lower) for field, known in _FIELDS.items()}
    for field_name, name in columns.items():
        target = "answers" if field_name == "answer" else field_name
        if name in keys:
            names[target] = (name,)
        elif not names[target]:  # a list of the usual names may stand beside one of others
            raise ConfigError("is not in the list", item=f"data.columns.{field_name}", found=name, expected=list(keys))
    return names


def _of_row(place: str, row: dict[str, Any], names: dict[str, tuple[str, ...]]) -> AskedQuestion:
    """A question from a row of a list with the names that `_names` found."""

    def value(name: str) -> Any:
        return next((row[key] for key in names[name] if row.get(key) not in (None, "")), None)

    image, image_id = value("image"), name_of({"image_id": value("image_id")}, "image_id")
    if image is None and image_id is not None:
        image = (image_id, *(f"{image_id}.{suffix}" for suffix in IMAGE_SUFFIXES))
    elif isinstance(image, str):
        image = (image,)
    elif image is None or not isinstance(image, (bytes, Path)):
        raise DataError("names no image", found=image or sorted(map(str, row))[:8], expected="a path in a field image")
    kinds: dict[str, Any] = {key: str(value(key)) for key in ("question_type", "answer_type") if value(key) is not None}
    if value("dataset") == "vg":
        kinds["loss_weight"] = _ALBEF_VG_WEIGHT
    question_id = name_of({"question_id": value("question_id")}, "question_id")
    return AskedQuestion(
        place, image, image_id, question_id, value("question"), people_of(value("answers")), fields=kinds
    )


def people_of(answers: object) -> list[object]:
    """Answers of all people: one answer, a list, or VQA v2's objects with "answer" in them; nothing is no answer."""
    if isinstance(answers, dict):
        answers = answers.get("answer")
    if answers is None or answers == "":
        return []
    given = answers if isinstance(answers, list) else [answers]
    return [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]


def name_of(row: Mapping[str, Any], key: str) -> str | None:
    """Text or whole number that names something, as text."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise DataError(f"{key} is no text or whole number", found=value)
    return str(value)
