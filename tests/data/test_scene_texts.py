"""Texts of the embedded corpus: answers, captions and labels are true, and boxes are what the words name."""

from __future__ import annotations

import numpy as np
import pytest

from trips.data.scenes import (
    BACKGROUND_COLOURS,
    BANDS,
    COLOURS,
    QUESTION_TYPES,
    SHAPES,
    TEXTURES,
    Scene,
    SceneCorpus,
    SceneText,
    answers_of,
)
from trips.errors import ConfigError

CORPUS = SceneCorpus(seed=3)


def centre(scene: Scene, shape: str) -> tuple[float, float]:
    (box,) = (thing.box for thing in scene.objects if thing.shape == shape)
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def true_relation(scene: Scene, words: list[str]) -> bool:
    """Read a relation sentence word by word and look it up in the centres of the boxes."""
    (relation,) = (word for word in words if word in ("left", "right", "above", "below"))
    a, b = (centre(scene, word) for word in words if word in SHAPES)
    return {"left": a[0] < b[0], "right": a[0] > b[0], "above": a[1] < b[1], "below": a[1] > b[1]}[relation]


def true_answer(scene: Scene, text: str) -> str:
    """The answer from the words and the list of objects, written apart from the generator."""
    words = text.split()
    shapes = [word for word in words if word in SHAPES]
    colours = [word for word in words if word in COLOURS]
    if any(word in BANDS for word in words):
        (region,) = (region for region in scene.regions if region.name in words)
        return region.colour if "colour" in words else region.texture
    if len(shapes) == 2:
        return "yes" if true_relation(scene, words) else "no"
    if shapes and colours:
        return "yes" if any((t.shape, t.colour) == (shapes[0], colours[0]) for t in scene.objects) else "no"
    if shapes:
        return next(thing.colour for thing in scene.objects if thing.shape == shapes[0])
    return str(sum(1 for thing in scene.objects if thing.colour == colours[0]))


def test_answers_are_true_and_boxes_are_what_the_text_names() -> None:
    seen = set()
    for index in range(60):
        scene = CORPUS.scene(index)
        for question in CORPUS.questions(scene, 12):
            seen.add((question.type, question.answer))
            assert question.answer == true_answer(scene, question.text), question.text
            assert question.text == question.text.lower()
            check_boxes(scene, question)
    assert seen == {(kind, answer) for kind in QUESTION_TYPES for answer in answers_of(kind)}


def check_boxes(scene: Scene, text: SceneText) -> None:
    words = text.text.split()
    named = [t.box for t in scene.objects if t.shape in words]
    if text.type == "counting":
        named = [t.box for t in scene.objects if t.colour in words]
    bands = [box for region in scene.regions if region.name in words for box in region.boxes]
    assert sorted(text.boxes) == sorted(named + bands)


def test_captions_are_true() -> None:
    for index in range(40):
        scene = CORPUS.scene(index)
        for caption in (CORPUS.caption(scene, variant) for variant in range(4)):
            assert caption.type == "caption" and caption.answer is None
            check_boxes(scene, caption)
            words = caption.text.split()
            for thing in scene.objects:
                if thing.shape in words:
                    before = words[: words.index(thing.shape)]
                    assert before[-1] == thing.colour and (before[-2] == thing.fill or before[-2] in ("a", "an"))
            (region,) = (region for region in scene.regions if region.name in words)
            assert {w for w in words if w in BACKGROUND_COLOURS} == {region.colour}
            assert {w for w in words if w in TEXTURES} <= {region.texture}
            if any(word in words for word in ("left", "right", "above", "below")):
                assert true_relation(scene, words)
            if "on" in words:
                x, y = centre(scene, [word for word in words if word in SHAPES][-1])
                assert any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in region.boxes)


def true_statement(left: Scene, right: Scene, text: str) -> bool:
    words = text.split()
    sides = [{"left": left, "right": right}[word] for word in words if word in ("left", "right")]
    colour = next(word for word in words if word in COLOURS)
    counts = [sum(thing.colour == colour for thing in side.objects) for side in sides]
    if "more" in words:
        return counts[0] > counts[1]
    if "exactly" in words:
        return counts == [("one", "two", "three").index(words[words.index(colour) - 1]) + 1]
    (shape,) = (word for word in words if word in SHAPES)
    return all(any((t.shape, t.colour) == (shape, colour) for t in scene.objects) for scene in (left, right))


def test_statements_are_true_or_false_as_labelled() -> None:
    kinds = set()
    for index in range(60):
        for statement in (CORPUS.statement(index, variant) for variant in range(3)):
            left, right = statement.left, statement.right
            assert (left.index, right.index) == (2 * index, 2 * index + 1)
            assert np.array_equal(left.image, CORPUS.scene(2 * index).image)
            assert statement.label == true_statement(left, right, statement.text), statement.text
            words = statement.text.split()
            kinds.add("more" if "more" in words else "exactly" if "exactly" in words else "both")
            by_shape = any(word in SHAPES for word in words)
            for name, scene, boxes in (("left", left, statement.boxes_left), ("right", right, statement.boxes_right)):
                spoken = by_shape or name in words
                named = [t.box for t in scene.objects if (t.shape if by_shape else t.colour) in words]
                assert sorted(boxes) == sorted(named if spoken else [])
    assert kinds == {"both", "exactly", "more"}


def test_a_curriculum_has_fewer_objects_in_distinct_colours() -> None:
    for count in range(1, 8):
        scene = CORPUS.scene(7, num_objects=count)
        assert len(scene.objects) == len({t.colour for t in scene.objects}) == len({t.shape for t in scene.objects})
        assert len(scene.objects) == count
        types = {question.type for question in CORPUS.questions(scene, 60)}
        expected = (
            {"object", "background", "existence"} if count == 1 else {"object", "background", "relation", "existence"}
        )
        assert types == expected
        assert all(q.answer == true_answer(scene, q.text) for q in CORPUS.questions(scene, 20))
        assert CORPUS.caption(scene).text
        with pytest.raises(ConfigError, match="counting"):
            CORPUS.questions(scene, 1, types=("counting",))
    for count in range(11, 17):
        scene = CORPUS.scene(7, num_objects=count)
        assert len(scene.objects) == count and CORPUS.questions(scene, 1, types=("counting",))
