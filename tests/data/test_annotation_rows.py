"""trips.data.annotation_rows and annotation_kinds: rows survive every form, and files are told apart."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trips.data.annotation_kinds import describe
from trips.data.annotation_rows import list_rows, parse


def table(rows: list[dict], delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def test_describe_names_known_kinds() -> None:
    assert describe({"questions": [{"question": "a", "image_id": 1, "question_id": 1}]}) == "VQA v2 questions"
    assert describe([{"id": 1, "qas": []}]) == "Visual Genome questions"
    assert describe([3, {"question": "a", "image": "b"}]) == "questions"
    assert describe([{"sentence": "a", "label": "true", "images": ["a", "b"]}]) == "statements about images"
    assert describe([{"sentence": "a", "image1": "a.png", "image2": "b.png"}]) == "statements about images"
    assert describe([{"sentence": "a", "identifier": "1-0", "evals": {}, "directory": "2"}]) == "NLVR statements"
    assert describe([{"sentence": "a", "identifier": "test1-0-1-0"}]) == "NLVR2 statements"
    assert describe([{"image": "a", "text": "b"}]) == "captions"
    assert describe("what is in the image3 ?") == "DAQUAR questions"
    for unknown in ({}, [], None, 3, "", "words", [[1]], {"images": 3, "annotations": {}}, [{"image": "a"}]):
        assert describe(unknown) is None


def test_official_first_lines_are_told_apart(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "official"
    kinds = {path.name: describe([row for _, row in list_rows(path)][:3]) for path in folder.glob("*.jsonl")}
    assert kinds == {
        "nlvr1_dev.jsonl": "NLVR statements",
        "nlvr2_dev.jsonl": "NLVR2 statements",
        "nlvr2_test1.jsonl": "NLVR2 statements",
    }


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.fixed_dictionaries({"a": TEXT, "b": TEXT}), min_size=1, max_size=5))
def test_rows_survive_every_form(listed: list[dict[str, str]]) -> None:
    for text in (
        json.dumps(listed),
        "\n".join(json.dumps(row, ensure_ascii=False) for row in listed + [{}]),
        table(listed, ","),
        table(listed, "\t"),
    ):
        parsed = [row for _, row in parse(text, Path("x"))]
        assert [row for row in parsed if row] == listed
