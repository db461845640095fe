"""Questions, captions and statements about generated scenes, balanced by construction.

One mechanism makes every type fair. `candidates` sorts all that may be asked about a scene by its answer; a question is
drawn by choosing the answer uniformly, then uniformly one of its facts, then a wording that knows neither. So who sees
the picture but not the words is right with probability 1 / (number of answers), exactly, scene by scene. Who sees the
words but not the picture gains nothing either, since the shapes, colours and sides of `scene_drawing` are exchangeable
and since "yes" and "no" facts mention the same words equally often (a "no" borrows its colour or number from another
thing of the same scene).

`boxes` of a text are the pixels (x0, y0, x1, y1) that it speaks of: what must be looked at to answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trips.data.scene_drawing import QUESTION_TYPES, Box, Region, Scene, SceneObject
from trips.data.scene_looks import BACKGROUND_COLOURS, COLOURS, TEXTURES
from trips.errors import ConfigError

_ANSWERS: dict[str, tuple[str, ...]] = {
    "object": tuple(COLOURS),
    "background": (*BACKGROUND_COLOURS, *TEXTURES),
    "relation": ("yes", "no"),
    "existence": ("yes", "no"),
    "counting": ("1", "2", "3"),
}
ANSWERS: tuple[str, ...] = tuple(dict.fromkeys(answer for answers in _ANSWERS.values() for answer in answers))

_NUMBERS = ("zero", "one", "two", "three")
_WORDINGS: dict[str, tuple[str, ...]] = {
    "object": (
        "what colour is the {} ?",
        "which colour does the {} have ?",
        "tell me the colour of the {} .",
        "the {} is of what colour ?",
    ),
    "colour": ("what colour is the {} ?", "which colour does the {} have ?", "tell me the colour of the {} ."),
    "texture": ("what texture is the {} ?", "which pattern does the {} have ?", "tell me the texture of the {} ."),
    "relation": ("is the {} {} the {} ?", "does the {} lie {} the {} ?", "can you see the {} {} the {} ?"),
    "existence": ("is there {} ?", "does the picture show {} ?", "can you see {} ?"),
    "counting": ("how many {} shapes ?", "how many shapes are {} ?", "count the {} shapes ."),
    "both": ("both pictures have {}", "{} is in both pictures", "the left and the right picture show {}"),
    "exactly": ("the {} picture shows exactly {}", "exactly {1} can be seen in the {0} picture"),
    "more": ("the {} picture has more {} shapes than the {} picture", "more {1} shapes are on the {0} than on the {2}"),
}


@dataclass(frozen=True)
class SceneText:
    """A question or caption: its type, lower-case text, answer (None for captions) and the pixel boxes it speaks of."""

    type: str
    text: str
    answer: str | None
    boxes: tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class SceneStatement:
    """A sentence about two pictures, whether it is true, and the pixel boxes it speaks of in each picture."""

    left: Scene
    right: Scene
    text: str
    label: bool
    boxes_left: tuple[Box, ...]
    boxes_right: tuple[Box, ...]


@dataclass(frozen=True)
class Fact:
    """Something that can be asked: key of its wordings, words for their gaps, and boxes per picture (one or two)."""

    wording: str
    words: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


def answers_of(type: str) -> tuple[str, ...]:
    """All answers of a question type, in a fixed order; ConfigError for an unknown type."""
    check_type(type)
    return _ANSWERS[type]


def check_type(type: str) -> None:
    """Raise ConfigError unless this is one of QUESTION_TYPES."""
    if type not in QUESTION_TYPES:
        raise ConfigError("unknown question type", item="type", found=type, expected=f"one of {QUESTION_TYPES}")


def _a(*words: str) -> str:
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _boxes(things: Sequence[SceneObject]) -> tuple[Box, ...]:
    return tuple(thing.box for thing in things)


def _of_colour(scene: Scene, colour: str) -> list[SceneObject]:
    return [thing for thing in scene.objects if thing.colour == colour]


def _holds(relation: str, a: SceneObject, b: SceneObject) -> bool | None:
    """Whether a stands in this relation to b by their centres; None if less than one patch apart on that axis."""
    axis = 0 if relation in ("left of", "right of") else 1
    # All footprints have one size, so corners differ as centres do, and a footprint is one patch high.
    apart = b.box[axis] - a.box[axis]
    if abs(apart) < a.box[3] - a.box[1]:
        return None
    return (apart > 0) == (relation in ("left of", "above"))


def _object(scene: Scene) -> dict[str, list[Fact]]:
    facts: dict[str, list[Fact]] = {}
    for thing in scene.objects:
        facts.setdefault(thing.colour, []).append(Fact("object", (thing.shape,), ((thing.box,),)))
    return facts


def _background(scene: Scene) -> dict[str, list[Fact]]:
    facts: dict[str, list[Fact]] = {}
    for region in scene.regions:
        facts.setdefault(region.colour, []).append(Fact("colour", (region.name,), (region.boxes,)))
        facts.setdefault(region.texture, []).append(Fact("texture", (region.name,), (region.boxes,)))
    return facts


def _relation(scene: Scene) -> dict[str, list[Fact]]:
    facts: dict[str, list[Fact]] = {"yes": [], "no": []}
    for relation in ("left of", "right of", "above", "below"):
        for a in scene.objects:
            for b in scene.objects:
                true = _holds(relation, a, b)
                if true is not None:
                    words = (a.shape, relation, b.shape)
                    facts["yes" if true else "no"].append(Fact("relation", words, ((a.box, b.box),)))
    return facts


def _existence(scene: Scene) -> dict[str, list[Fact]]:
    facts: dict[str, list[Fact]] = {"yes": [], "no": []}
    present = [thing.colour for thing in scene.objects]
    # Easy scenes (see `draw_scene`) may name a colour that is nowhere.
    wrong = present if len(present) >= len(COLOURS) else list(COLOURS)
    for thing in scene.objects:
        for other in wrong:
            if thing.colour != other:
                # Over all such ordered pairs, each shape and each colour is named equally often with "yes" and "no".
                for answer, colour in (("yes", thing.colour), ("no", other)):
                    facts[answer].append(Fact("existence", (_a(colour, thing.shape),), ((thing.box,),)))
    return facts


def _counting(scene: Scene) -> dict[str, list[Fact]]:
    facts: dict[str, list[Fact]] = {answer: [] for answer in _ANSWERS["counting"]}
    for colour, count in Counter(thing.colour for thing in scene.objects).items():
        facts[str(count)].append(Fact("counting", (colour,), (_boxes(_of_colour(scene, colour)),)))
    return facts


_CANDIDATES: dict[str, Callable[[Scene], dict[str, list[Fact]]]] = {
    "object": _object,
    "background": _background,
    "relation": _relation,
    "existence": _existence,
    "counting": _counting,
}


def candidates(scene: Scene, type: str) -> dict[str, list[Fact]]:
    """All that a type may ask about a scene, by answer: the whole distribution of its questions.

    Args:
        scene: any scene.
        type: one of QUESTION_TYPES.
    Returns:
        answer -> facts; answers are drawn uniformly, then facts uniformly. Empty where the scene cannot support the
        type: fewer than two objects (relation), or a count among 1, 2, 3 that no colour has (counting).
    Raises:
        ConfigError: unknown type.
    """
    check_type(type)
    facts = _CANDIDATES[type](scene)
    return facts if all(facts.values()) else {}


def supported_types(scene: Scene) -> tuple[str, ...]:
    """The question types whose `candidates` are non-empty for this scene, without listing them."""
    counts = Counter(thing.colour for thing in scene.objects)
    needs = {"relation": len(scene.objects) >= 2}
    needs["counting"] = {str(count) for count in counts.values()} == set(_ANSWERS["counting"])
    return tuple(kind for kind in QUESTION_TYPES if needs.get(kind, True))


def statement_candidates(left: Scene, right: Scene) -> list[dict[bool, list[Fact]]]:
    """All that may be stated about two scenes: facts by truth, one entry for each kind; kinds are drawn uniformly.

    Kinds: both pictures have a certain thing; one picture has exactly so many of a colour; one has more of a colour
    than the other. A kind that the pair cannot support with both truths is left out.
    """
    both: dict[bool, list[Fact]] = {True: [], False: []}
    in_right = {thing.shape: thing for thing in right.objects}
    for a in left.objects:
        b = in_right.get(a.shape)
        if b is not None:
            # Same shape on both sides: only the colours tell the truth, and a false one is right about one picture.
            for colour in dict.fromkeys((a.colour, b.colour)):
                boxes = ((a.box,), (b.box,))
                both[a.colour == b.colour].append(Fact("both", (_a(colour, a.shape),), boxes))

    counts = [Counter(thing.colour for thing in scene.objects) for scene in (left, right)]
    exactly: dict[bool, list[Fact]] = {True: [], False: []}
    for side, (scene, count) in enumerate(zip((left, right), counts, strict=True)):
        for colour in count:
            own = _boxes(_of_colour(scene, colour))
            boxes = ((), own) if side else (own, ())
            for other in count:
                if count[colour] != count[other]:
                    # As for existence: numbers and colours are named equally often in true and false statements.
                    for true, number in ((True, count[colour]), (False, count[other])):
                        what = f"{_NUMBERS[number]} {colour} shape{'s' if number > 1 else ''}"
                        exactly[true].append(Fact("exactly", (("left", "right")[side], what), boxes))

    more: dict[bool, list[Fact]] = {True: [], False: []}
    for colour in COLOURS:
        if counts[0][colour] != counts[1][colour]:
            boxes = (_boxes(_of_colour(left, colour)), _boxes(_of_colour(right, colour)))
            for one, other in (("left", "right"), ("right", "left")):
                true = (counts[0][colour] > counts[1][colour]) == (one == "left")
                more[true].append(Fact("more", (one, colour, other), boxes))
    return [kind for kind in (both, exactly, more) if all(kind.values())]


def _pick(items: Sequence, rng: np.random.Generator):
    return items[int(rng.random() * len(items))]


def _draw(facts: dict, rng: np.random.Generator) -> tuple:
    """(answer, fact, text): answer uniform, then fact uniform, then wording uniform."""
    answer = _pick(list(facts), rng)
    fact = _pick(facts[answer], rng)
    return answer, fact, _pick(_WORDINGS[fact.wording], rng).format(*fact.words)


def draw_question(facts: dict[str, list[Fact]], type: str, rng: np.random.Generator) -> SceneText:
    """One question of the type out of its (non-empty) `candidates`."""
    answer, fact, text = _draw(facts, rng)
    return SceneText(type, text, answer, fact.boxes[0])


def draw_statement(left: Scene, right: Scene, rng: np.random.Generator) -> SceneStatement:
    """One statement about two scenes; ConfigError where the pair supports no kind (too few objects)."""
    kinds = statement_candidates(left, right)
    if not kinds:
        raise ConfigError(
            "these two scenes allow no balanced statement",
            item=f"scenes {left.index}, {right.index}",
            hint="use more objects",
        )
    label, fact, text = _draw(_pick(kinds, rng), rng)
    return SceneStatement(left, right, text, label, *fact.boxes)


def _under(scene: Scene, thing: SceneObject) -> Region:
    """The band that holds the centre of an object."""
    x, y = (thing.box[0] + thing.box[2]) // 2, (thing.box[1] + thing.box[3]) // 2
    tiles = ((region, box) for region in scene.regions for box in region.boxes)
    return next(region for region, (x0, y0, x1, y1) in tiles if x0 <= x < x1 and y0 <= y < y1)


def draw_caption(scene: Scene, rng: np.random.Generator) -> SceneText:
    """One caption of two or three things: an object on a band, two objects in relation, or two objects and a band."""
    order = rng.permutation(len(scene.objects))[:2].tolist()
    a, b = scene.objects[order[0]], scene.objects[order[-1]]
    kind = int(rng.integers(3)) if a is not b else 0
    if kind == 0:
        band = _under(scene, a)
        text = f"{_a(a.fill, a.colour, a.shape)} on the {band.colour} {band.texture} {band.name}"
        return SceneText("caption", text, None, (a.box, *band.boxes))
    if kind == 1:
        band = _under(scene, b)
        # Two footprints never overlap, so at least one relation of each pair is clear.
        relation = _pick([r for r in ("left of", "right of", "above", "below") if _holds(r, a, b)], rng)
        text = f"{_a(a.colour, a.shape)} {relation} {_a(b.colour, b.shape)} on the {band.colour} {band.name}"
    else:
        band = _pick(scene.regions, rng)
        text = (
            f"{_a(a.fill, a.colour, a.shape)} and {_a(b.fill, b.colour, b.shape)} . "
            f"the {band.name} is {band.colour} and {band.texture} ."
        )
    return SceneText("caption", text, None, (a.box, b.box, *band.boxes))
