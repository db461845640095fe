"""Curves as SVG that stands in the page itself: legible in light and dark, told apart by dashes as well as colour.

Colours are classes of the page's style sheet, which knows the reader's scheme. No text enters unescaped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

Point = tuple[float, float | None]  # None: nothing was measured there, the curve has a gap

MOST_SERIES = 6
"""Line styles that can be told apart."""

_GREATEST, _TINY = 3.5e38, 1e-45  # of float32
_MOST_CHARACTERS = 100  # of a name, which every point repeats
_MOST_POINTS = 200  # of a curve: more cannot be seen at this width, and would be most of the page
_WIDTH, _HEIGHT = 400, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 8, 36


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: in the legend.
        points: (x, y), x rising.
        steps: drawn as a staircase: y holds until the next point.
    """

    name: str
    points: tuple[Point, ...]
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture of curves over one axis.

    Attributes:
        title: above it.
        series: at most `MOST_SERIES`, each with a measured point; others are left out. What is no number that float32
            can hold, such as an infinite loss, counts as not measured.
        x_name: of the horizontal axis.
        includes: values that the vertical axis shows whatever was measured.
        marks: x of vertical lines, each with what happened there.
    """

    title: str
    series: tuple[Series, ...]
    x_name: str = "step"
    includes: tuple[float, ...] = ()
    marks: tuple[tuple[float, str], ...] = ()

    @functools.cached_property
    def drawn(self) -> tuple[Series, ...]:
        """The curves with something to draw."""
        finite = [
            dataclasses.replace(
                one, name=one.name[:_MOST_CHARACTERS], points=tuple((x, number(y)) for x, y in one.points)
            )
            for one in self.series
        ]
        return tuple([one for one in finite if _known(one)][:MOST_SERIES])

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Name and last value of each curve."""
        return [(one.name, short(_known(one)[-1][1])) for one in self.drawn]

    def svg(self) -> Markup:
        """The picture; empty where nothing was measured."""
        if not self.drawn:
            return Markup("")
        x_axis = _Axis.of([x for one in self.drawn for x, _ in one.points], _LEFT, _WIDTH - _RIGHT)
        values = [y for one in self.drawn for _, y in _known(one)]
        y_axis = _Axis.of([*values, *self.includes], _HEIGHT - _BOTTOM, _TOP)
        x_name = self.x_name[:_MOST_CHARACTERS]
        parts = [_grid(x_axis, y_axis, x_name)]
        for x, what in self.marks:
            parts.append(
                Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"><title>{3}</title></line>').format(
                    x_axis.place(x), _TOP, _HEIGHT - _BOTTOM, what[:_MOST_CHARACTERS]
                )
            )
        parts += [_curve(one, number, x_axis, y_axis, x_name) for number, one in enumerate(self.drawn)]
        label = f"{self.title[:_MOST_CHARACTERS]}: " + "; ".join(_told(one, x_name) for one in self.drawn)
        return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            _WIDTH, _HEIGHT, label, Markup("").join(parts)
        )


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on pixels from `start` to `end`, with round numbers as ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    decimals: int

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        size = max(abs(low), abs(high))
        if high - low <= max(1e-9 * size, _TINY):  # so near each other that ticks would fall together
            room = size / 2 if size > _TINY else 1.0
            low, high = (0.0, 2 * high) if low > _TINY else (low - room, high + room)
        step = _round_step((high - low) / 5)
        if start > end:  # the vertical axis ends at ticks; along a run, room behind the last step would be a lie
            low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        decimals = next((n for n in range(9) if round(step, n) == round(step, 12)), 9)
        return cls(low, high, start, end, tuple(number * step for number in range(first, last + 1)), decimals)

    def place(self, value: float) -> float:
        """Pixel of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def named(self, tick: float) -> str:
        """A tick in as many decimals as tell it from the next."""
        plain = 1 <= self.decimals <= 6 and max(abs(self.low), abs(self.high)) >= 2e-3
        return f"{tick:.{self.decimals}f}" if plain else short(tick)


def number(value: object) -> float | None:
    """What can be drawn: None for anything but a finite number of float32's range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= _GREATEST else None  # False for NaN, too


def short(value: float) -> str:
    """A number in four significant digits at most: 3, 0.0625, 2e-5, 18 400."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{float(f'{value:.4g}'):g}"


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[tuple[float, float | None, float, float]]:
    """At most so many points, each the mean of some neighbours beside their least and greatest value.

    Returns:
        (x, mean, least, greatest); the x of the last neighbour. Without a measured one the mean is None.
    """
    size = math.ceil(len(points) / most)
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [y for _, y in part if y is not None]
        spread = (fmean(known), min(known), max(known)) if known else (None, math.nan, math.nan)
        found.append((part[-1][0], *spread))
    return found


def _round_step(raw: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _known(one: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in one.points if y is not None]


def _told(one: Series, x_name: str) -> str:
    (first, start), (last, end) = _known(one)[0], _known(one)[-1]
    return f"{one.name} {short(start)} at {x_name} {short(first)}, {short(end)} at {short(last)}"


def _grid(x_axis: _Axis, y_axis: _Axis, x_name: str) -> Markup:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="y" x="{}" y="{}">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y, y, _LEFT - 7, y + 4, y_axis.named(tick))
        )
    for tick in x_axis.ticks:
        place = x_axis.place(tick), _HEIGHT - _BOTTOM + 15, x_axis.named(tick)
        parts.append(Markup('<text class="x" x="{}" y="{}">{}</text>').format(*place))
    name = (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 3, x_name
    return Markup("").join([*parts, Markup('<text class="x" x="{}" y="{}">{}</text>').format(*name)])


def _curve(one: Series, number: int, x_axis: _Axis, y_axis: _Axis, x_name: str) -> Markup:
    rows = [(x, y, y, y) for x, y in one.points] if one.steps else thinned(one.points)
    radius = 2 if len(rows) > 1 else 4
    path, dots, pen_down, before = [], [], False, 0.0
    for x, mean, least, greatest in rows:
        if mean is None:
            pen_down = False
            continue
        place = x_axis.place(x), y_axis.place(mean)
        if one.steps and pen_down:
            path.append(f"L{place[0]} {before}")
        path.append(f"{'L' if pen_down else 'M'}{place[0]} {place[1]}")
        pen_down, before = True, place[1]
        words = f"{one.name}, {x_name} {short(x)}: {short(mean)}"
        if least != greatest:
            words += f" ({short(least)} to {short(greatest)})"
        dots.append(Markup('<circle cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(*place, radius, words))
    shown = Markup("" if one.steps else ' class="dots"' if len(dots) <= 40 else ' class="dots faint"')
    return Markup('<g class="s{}">{}<path d="{}"/><g{}>{}</g></g>').format(
        number,
        _band(rows, x_axis, y_axis),
        " ".join(path),
        shown,
        Markup("") if one.steps else Markup("").join(dots),
    )


def _band(rows: Sequence[tuple[float, float | None, float, float]], x_axis: _Axis, y_axis: _Axis) -> Markup:
    """From the least to the greatest of what each point stands for."""
    known = [(x, least, greatest) for x, mean, least, greatest in rows if mean is not None]
    if all(least == greatest for _, least, greatest in known):
        return Markup("")
    edge = [(x, greatest) for x, _, greatest in known] + [(x, least) for x, least, _ in reversed(known)]
    places = " ".join(f"{x_axis.place(x)},{y_axis.place(y)}" for x, y in edge)
    return Markup('<polygon class="band" points="{}"/>').format(places)
