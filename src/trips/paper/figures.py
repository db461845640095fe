"""Figures 1, 3 and 4 of the paper for any model and photo: what a selection keeps, and under which text.

Each takes a trained model and gives a `PaperFigure`, which can be saved as a picture and read as a record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trips.config import SelectionConfig
from trips.drawing import (
    Box,
    Panel,
    SelectionRow,
    enlarged,
    faded,
    heat_map,
    kept_picture,
    outlined,
    row_panels,
    selection_row,
)
from trips.errors import ConfigError
from trips.explanation import Explanation, check_explainable
from trips.images import ImageSource
from trips.sheets import Line, draw_selection, draw_sheet

if TYPE_CHECKING:
    from trips.pipeline import TripsPipeline

__all__ = [
    "PaperFigure",
    "Photo",
    "SelectionRow",
    "draw_selection",
    "faded",
    "figure_1",
    "figure_3",
    "figure_4",
    "pair_up",
    "selection_row",
]

_COLUMNS = 5  # most panels of a row of figure 4


@dataclass(frozen=True)
class Photo:
    """One photo and a text about it.

    Attributes:
        image: what `trips.images.load_image` reads.
        text: caption, question, word or phrase.
        name: how records and messages call the photo; its path if not given.
        truth: the right answer, where it is known.
        boxes: to outline, in pixels.
    """

    image: ImageSource = field(repr=False)
    text: str
    name: str | None = None
    truth: str | None = None
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class PaperFigure:
    """A figure, before it is drawn.

    Attributes:
        number: of the paper.
        lines: what is drawn.
        explanations: what the model kept, in the order of the panels.
        title: above. heat: whether there are maps of scores.
    """

    number: int
    lines: tuple[Line, ...] = field(repr=False)
    explanations: tuple[Explanation, ...]
    title: str
    heat: bool = False

    def save(self, path: str | Path) -> Path:
        """Draw it, as wide as a page of text (5.5 inches); .png, .svg or .pdf.

        Raises:
            ConfigError: no format of this suffix. MissingDependencyError: matplotlib is not installed.
        """
        fates = " or ".join(sorted({one.fate for one in self.explanations}))
        note = f"Kept patches are clear; {fates} ones are dimmed."
        return draw_sheet(self.lines, path, title=self.title, heat=self.heat, note=note)

    def record(self) -> dict[str, Any]:
        """What is behind the picture, as JSON can hold it; see `Explanation.record`."""
        return {"figure": self.number, "title": self.title, "rows": [one.record() for one in self.explanations]}


def pair_up(images: Sequence[ImageSource], texts: Sequence[str]) -> list[Photo]:
    """One text for each photo, one text for all, or one photo for all texts.

    Raises:
        ConfigError: none, or numbers that do not fit.
    """
    if not images or not texts or (len(images) != len(texts) and 1 not in (len(images), len(texts))):
        raise ConfigError(
            "photos and texts do not pair up",
            item="images",
            found=f"{len(images)} photos, {len(texts)} texts",
            expected="as many texts as photos, or one of either",
        )
    count = max(len(images), len(texts))
    images, texts = list(images) * (count // len(images)), list(texts) * (count // len(texts))
    return [Photo(image, text) for image, text in zip(images, texts, strict=True)]


def figure_1(
    model: TripsPipeline, photos: Sequence[Photo], *, selection: SelectionConfig | None = None, heat: bool = False
) -> PaperFigure:
    """Guided by the question beside guided by the image's own [CLS], with both answers (Figure 1).

    Both are the same weights: the guide is exchanged when the model is asked, as in the paper.

    Args:
        model: one that answers.
        photos: with questions.
        selection: in place of the model's own; its guide is exchanged.
        heat: with maps of the scores of the last location.
    Raises:
        ConfigError: a model that does not answer, a selection that keeps every patch. DataError: an image that cannot
            be read, a blank question.
    """
    selection = selection or model.model.config.selection
    check_explainable(selection.replace(guide="text"))
    lines, found = [], []
    for photo in photos:
        panels: list[Panel] = []
        for guide, words in (("text", "question"), ("image", "image [CLS]")):
            own = selection.replace(guide=guide)
            one = _with_answer(model, photo, own)
            panels += _last_panels(one, photo, f'{words}: "{one.said[0]}"', heat, first=not panels)
            found.append(one)
        lines.append(Line(_asked(photo), tuple(panels)))
    return PaperFigure(1, tuple(lines), tuple(found), _two_guides(selection), heat)


def figure_3(
    model: TripsPipeline, photos: Sequence[Photo], *, selection: SelectionConfig | None = None, heat: bool = False
) -> PaperFigure:
    """One row for each photo and its text: the photo, and what is left behind every location (Figure 3).

    Args:
        model: of any task; one that answers also says its answers.
        photos: with captions or questions.
        selection: in place of the model's own.
        heat: with maps of the scores.
    Raises:
        ConfigError: a selection that keeps every patch. DataError: an image that cannot be read, a blank text.
    """
    selection = selection or model.model.config.selection
    lines, found = [], []
    for photo in photos:
        one, words = _explained(model, photo, selection), _asked(photo)
        if "ask" in model.verbs:
            one = _with_answer(model, photo, selection)
            words = f"{photo.text}\nsaid: {one.said[0]}" + (f"\ntrue: {photo.truth}" if photo.truth else "")
        row = one.row(heat=heat, boxes=photo.boxes)
        lines.append(Line(words, tuple(row_panels(row, one.grid))))
        found.append(one)
    return PaperFigure(3, tuple(lines), tuple(found), f"{_guide(selection)} at {_setting(selection)}", heat)


def figure_4(
    model: TripsPipeline, photos: Sequence[Photo], *, selection: SelectionConfig | None = None, heat: bool = False
) -> PaperFigure:
    """What is left of one photo behind the last location under different words or phrases (Figure 4).

    Args:
        model: of any task.
        photos: the same photo with each of the texts.
        selection: in place of the model's own.
        heat: with maps of the scores of the last location.
    Raises:
        ConfigError: as `figure_3`; several photos. DataError: as `figure_3`.
    """
    selection = selection or model.model.config.selection
    if len({id(photo.image) if not isinstance(photo.image, str) else photo.image for photo in photos}) != 1:
        raise ConfigError("shows one photo", item="figure 4", found=f"{len(photos)} photos", expected="one, many texts")
    first = photos[0]
    found = [
        _named(one, first) for one in model.explain(first.image, [photo.text for photo in photos], selection=selection)
    ]
    drawn = [_last_panels(one, first, one.text, heat, first=True) for one in found]
    blank = Panel(np.full_like(drawn[0][0].image, 255))  # of the photo's shape, so that the row is no higher than it
    kept, maps = [drawn[0][0], *(panels[-1] for panels in drawn)], [blank, *(panels[1] for panels in drawn)]
    columns = -(-len(kept) // -(-len(kept) // _COLUMNS))  # as few rows as can be, of about one length
    lines = []
    for i in range(0, len(kept), columns):
        lines.append(Line("", tuple(kept[i : i + columns])))
        if heat:
            lines.append(Line("", tuple(maps[i : i + columns])))
    title = f"One photo under different texts, {_setting(selection, selection.layers[-1:])}"
    return PaperFigure(4, tuple(lines), tuple(found), title, heat)


FIGURES = {1: figure_1, 3: figure_3, 4: figure_4}


def _last_panels(one: Explanation, photo: Photo, title: str, heat: bool, first: bool = False) -> list[Panel]:
    """What is left behind the last location, behind its scores if asked for and the photo where it comes first."""
    picture, boxes = enlarged(np.asarray(one.image), photo.boxes)
    panels = [Panel(outlined(picture, boxes), "input")] if first else []
    if heat:
        scores = heat_map(picture, one.locations[-1].scores, one.grid)
        panels.append(Panel(outlined(scores, boxes), f"scores at layer {one.locations[-1].layer}"))
    return [*panels, Panel(kept_picture(picture, one.mask(), one.grid, boxes), title)]


def _with_answer(model: TripsPipeline, photo: Photo, selection: SelectionConfig) -> Explanation:
    answers = model.ask(photo.image, photo.text, top_k=3, selection=selection)
    said = tuple(answer.text for answer in answers)
    return dataclasses.replace(_explained(model, photo, selection), said=said)


def _explained(model: TripsPipeline, photo: Photo, selection: SelectionConfig) -> Explanation:
    return _named(model.explain(photo.image, photo.text, selection=selection), photo)


def _named(one: Explanation, photo: Photo) -> Explanation:
    return one if photo.name is None else dataclasses.replace(one, name=photo.name)


def _asked(photo: Photo) -> str:
    return photo.text + (f"\ntrue: {photo.truth}" if photo.truth else "")


def _two_guides(selection: SelectionConfig) -> str:
    return f"Guided by the question, or by the image's own [CLS]; {_setting(selection)}"


def _guide(selection: SelectionConfig) -> str:
    guides = {"text": "Patches that the text keeps", "image": "Patches that the image's own [CLS] keeps"}
    guides |= {"random": "Patches kept by chance", "similarity": "Patches left by merging"}
    return guides[selection.guide]


def _setting(selection: SelectionConfig, layers: Sequence[int] = ()) -> str:
    """Such as "layers 5, 10, keep rate 0.7"."""
    rates = sorted(set(selection.rates), reverse=True)
    names = ", ".join(map(str, layers or selection.layers))
    plural = "s" if len(layers or selection.layers) > 1 else ""
    return f"layer{plural} {names}, keep rate {', '.join(f'{rate:g}' for rate in rates)}"
