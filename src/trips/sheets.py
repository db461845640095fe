"""Sheets of pictures with words: rows of panels on a page as wide as a paper's column of text.

Every place is computed here from measured words, so that nothing overlaps at any number of rows and any shape of photo.
Legend: inches unless said otherwise; type in points (72 to the inch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trips.drawing import Panel, SelectionRow, import_matplotlib, row_panels
from trips.errors import ConfigError

WIDTH = 5.5  # of a page of text in a paper
_GAP, _MARGIN, _TEXT_COLUMN = 0.07, 0.06, 1.2
_SMALL, _TEXT, _TITLE = 7.0, 7.5, 8.5  # points
_LEADING = 1.3  # of a line, in font sizes
_TALLEST = 1.5  # height of a panel in widths; taller photos are made narrower
_MOST_LINES = {_SMALL: 4, _TEXT: 14, _TITLE: 4}
_DPI = 300
_NOTE = "Kept patches are clear; all others are dimmed."
_BAR = 0.7  # of the scale of heat maps


@dataclass(frozen=True)
class Line:
    """One row of a sheet.

    Attributes:
        text: left of the panels; line breaks are kept.
        panels: from left to right.
    """

    text: str
    panels: tuple[Panel, ...]


def draw_selection(rows: Sequence[SelectionRow], grid: tuple[int, int], path: str | Path, title: str = "") -> Path:
    """Write a figure: one row per text, the picture and what is left of it behind every location (Figure 3).

    Args:
        rows: at least one; all with the same locations.
        grid: patches (down, across).
        path: file to write; its suffix decides the format.
        title: above the figure.
    Raises:
        ConfigError: no format of this suffix. MissingDependencyError: matplotlib is not installed.
    """
    lines = [Line(row.text, tuple(row_panels(row, grid))) for row in rows]
    return draw_sheet(lines, path, title=title, heat=any(row.scores for row in rows))


def draw_sheet(
    lines: Sequence[Line], path: str | Path, *, title: str = "", heat: bool = False, note: str = _NOTE
) -> Path:
    """Write rows of panels into one file.

    Args:
        lines: at least one.
        path: file to write, its folder is made; its suffix decides the format (png, svg, pdf and what else matplotlib
            writes).
        title: above. note: below.
        heat: say below what the colours of heat maps mean.
    Raises:
        ConfigError: no format of this suffix. MissingDependencyError: matplotlib is not installed.
    """
    path = check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lay_out(lines, title=title, heat=heat, note=note).savefig(path, dpi=_DPI)
    return path


def check_path(path: str | Path) -> Path:
    """The path of a picture; before anything is computed for it.

    Raises:
        ConfigError: no format of this suffix. MissingDependencyError: matplotlib is not installed.
    """
    import_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    path, known = Path(path), FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise ConfigError("no format of this suffix", item=path, found=path.suffix, expected=".png, .svg or .pdf")
    return path


def lay_out(lines: Sequence[Line], *, title: str = "", heat: bool = False, note: str = _NOTE) -> Any:
    """The sheet as a `matplotlib.figure.Figure`; arguments as in `draw_sheet`."""
    import_matplotlib()
    from matplotlib.figure import Figure

    left = _MARGIN + (_TEXT_COLUMN if any(line.text for line in lines) else 0.0)
    columns = max(len(line.panels) for line in lines)
    wide = (WIDTH - _MARGIN - left - (columns - 1) * _GAP) / columns
    # A title that stands above the column already is not said again.
    above_them = [[panel.title for panel in line.panels] for line in lines]
    rows = [_Row(line, wide, before) for line, before in zip(lines, [[], *above_them])]
    above = _wrapped(title, WIDTH - 2 * _MARGIN, _TITLE)
    below = _wrapped(note, WIDTH - 2 * _MARGIN - (_BAR + 1.6) * heat, _SMALL)
    foot = max(_high(below, _SMALL), _high([""] * heat, _SMALL))
    height = 2 * _MARGIN + _high(above, _TITLE) + foot + sum(row.height + _GAP for row in rows)
    figure = Figure(figsize=(WIDTH, height))
    page = _Page(figure, height)
    page.words(above, WIDTH / 2, _MARGIN, _TITLE, "center")
    top = _MARGIN + _high(above, _TITLE)
    for row in rows:
        page.words(row.words, _MARGIN, top + row.head + max(0.0, (row.body - row.text) / 2), _TEXT)
        for column, (panel, names, size) in enumerate(zip(row.line.panels, row.names, row.sizes, strict=True)):
            x = left + column * (wide + _GAP)
            page.words(names, x + wide / 2, top + row.head - _high(names, _SMALL), _SMALL, "center")
            page.picture(panel.image, x + (wide - size[0]) / 2, top + row.head, *size)
        top += row.height + _GAP
    page.words(below, _MARGIN, top, _SMALL)
    if heat:
        page.scale(top)
    return figure


class _Row:
    """What one line needs: `head` for the panels' titles, `body` for panels and text below it."""

    def __init__(self, line: Line, wide: float, before: Sequence[str]) -> None:
        self.line = line
        titles = [panel.title for panel in line.panels]
        new = [title if before[i : i + 1] != [title] else "" for i, title in enumerate(titles)]
        self.names = [_wrapped(title, wide, _SMALL) for title in new]
        self.sizes = [_fitted(panel.image.shape, wide) for panel in line.panels]
        self.words = _wrapped(line.text, _TEXT_COLUMN - _GAP, _TEXT)
        self.head = max(_high(names, _SMALL) for names in self.names)
        self.text = _high(self.words, _TEXT)
        self.body = max(self.text, *(size[1] for size in self.sizes))
        self.height = self.head + self.body


class _Page:
    """A figure with places counted in inches from the upper left corner."""

    def __init__(self, figure: Any, height: float) -> None:
        self.figure, self.height = figure, height

    def words(self, lines: Sequence[str], x: float, y: float, size: float, align: str = "left") -> None:
        """Lines below a point, or beside it to both sides."""
        for i, line in enumerate(lines):
            place = x / WIDTH, 1 - (y + i * size * _LEADING / 72) / self.height
            # parse_math: a dollar sign in a caption is no formula.
            self.figure.text(*place, line, fontsize=size, ha=align, va="top", parse_math=False)

    def picture(self, image: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        """A picture in a box."""
        box = x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height
        axis = self.figure.add_axes(box)
        axis.imshow(image, interpolation="antialiased", aspect="auto")
        axis.set_axis_off()

    def scale(self, y: float) -> None:
        """What the colours of heat maps mean, at the right."""
        from matplotlib import colormaps

        x, middle = WIDTH - _MARGIN - _BAR - 0.3, _SMALL * _LEADING / 144
        bar = (colormaps["cividis"](np.linspace(0, 1, 64))[None, :, :3] * 255).astype(np.uint8)
        self.picture(bar, x, y + middle - 0.04, _BAR, 0.08)
        self.words(["score (log): low"], x - 0.05, y, _SMALL, "right")
        self.words(["high"], x + _BAR + 0.05, y, _SMALL)


def _fitted(shape: tuple[int, ...], wide: float) -> tuple[float, float]:
    """Width and height of a picture of some shape in a column."""
    aspect = shape[0] / shape[1]
    return (wide, wide * aspect) if aspect <= _TALLEST else (wide * _TALLEST / aspect, wide * _TALLEST)


def _high(lines: Sequence[str], size: float) -> float:
    """Height of some lines and the air below them."""
    return len(lines) * size * _LEADING / 72 + (0.03 if lines else 0.0)


def _wrapped(text: str, width: float, size: float) -> list[str]:
    """Lines no wider than `width`; words that are wider are cut, and more than a few lines end in three dots."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            for piece in _pieces(word, width, size):
                joined = f"{line} {piece}" if line else piece
                if line and _measure(joined, size) > width:
                    lines.append(line)
                    line = piece
                else:
                    line = joined
        lines += [line] if line else []
    most = _MOST_LINES[size]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and _measure(f"{last} ...", size) > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last} ..."]


def _pieces(word: str, width: float, size: float) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and _measure(pieces[-1] + letter, size) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces if _measure(word, size) > width else [word]


@lru_cache(maxsize=4096)
def _measure(text: str, size: float) -> float:
    """Width of a line of text."""
    return _renderer().get_text_width_height_descent(text, _font(size), False)[0] / 720


@lru_cache(maxsize=1)
def _renderer() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(16, 16, 720)  # fine enough that hinting does not matter


@lru_cache(maxsize=8)
def _font(size: float) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(size=size)
