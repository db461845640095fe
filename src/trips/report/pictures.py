"""Photos with what a selection keeps, as SVG: the photo once, in a size that fits a page, and the grid drawn over it.

The look is that of `trips.drawing`: kept patches clear, all others pale, a line between. Dimensions: N patches in a
grid of (down, across).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from trips.explanation import Explanation

_SIDE = 320  # pixels of an inlined photo's longer side
_PIXEL_ART = 128  # photos smaller than this are enlarged without smoothing, and kept without loss


@dataclass(frozen=True)
class Picture:
    """A photo, and what is left of it behind every location.

    Attributes:
        image: the photo; held in the size of the page, since one of a camera is a hundred times as large.
        grid: patches (down, across).
        kept: (N,) bool per location. layers: 1-based, one per location.
    """

    image: Image.Image
    grid: tuple[int, int] = (1, 1)
    kept: tuple[np.ndarray, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if max(self.image.size) > _SIDE:
            small = self.image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            object.__setattr__(self, "image", small)

    @classmethod
    def of(cls, one: Explanation) -> Picture:
        """What an explanation shows."""
        masks = tuple(one.mask(number) for number in range(len(one.locations)))
        return cls(one.image, one.grid, masks, tuple(location.layer for location in one.locations))

    def panels(self, name: str) -> list[tuple[str, Markup]]:
        """The photo and one picture per location, each with its title.

        Args:
            name: of the photo in the page, letters and digits: the later pictures refer to it.
        """
        width, height = self.image.size
        scale = _SIDE / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = Markup(' class="pixels"') if max(width, height) <= _PIXEL_ART else Markup("")
        photo = Markup('<image id="{}" href="{}" width="{}" height="{}"{} preserveAspectRatio="none"/>').format(
            name, data_uri(self.image), *size, pixels
        )
        found = [("input", _svg(size, photo, "the photo"))]
        for layer, mask in zip(self.layers, self.kept, strict=True):
            title = f"layer {layer}: {int(mask.sum())} of {mask.size} kept"
            gone, edge = removed_path(mask, self.grid, size), edge_path(mask, self.grid, size)
            over = Markup('<use href="#{}"/><path class="gone" d="{}"/><path class="edge" d="{}"/>')
            found.append((title, _svg(size, over.format(name, gone, edge), title)))
        return found


@dataclass(frozen=True)
class Example:
    """Something the model was asked, and what came of it.

    Attributes:
        pictures: one, or the images of a statement.
        lines: what was asked, said and true, each with its name.
        verdict: 1 where the model is right, 0 where it is wrong, between for partly; None where nobody knows.
        source: which sample it is.
    """

    pictures: tuple[Picture, ...]
    lines: tuple[tuple[str, str], ...]
    verdict: float | None = None
    source: str = ""

    @property
    def judged(self) -> str:
        """The verdict in words."""
        if self.verdict is None:
            return "not judged"
        return "right" if self.verdict >= 1 else "wrong" if self.verdict <= 0 else f"partly right ({self.verdict:.2f})"

    @property
    def mark(self) -> str:
        """The verdict as a sign and a class of the style sheet."""
        return {"right": "right", "wrong": "wrong"}.get(self.judged, "open")


def data_uri(image: Image.Image) -> str:
    """A photo inside an address: JPEG, or PNG for the smallest."""
    image, buffer = image.convert("RGB"), io.BytesIO()
    if max(image.size) <= _PIXEL_ART:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def removed_path(kept: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> str:
    """Path over the patches that were not kept; neighbours in a row are one rectangle.

    Args:
        kept: (N,) bool. grid: (down, across). size: (width, height) of the drawing.
    """
    mask = kept.reshape(grid)
    parts = []
    for row in range(grid[0]):
        column = 0
        while column < grid[1]:
            end = column
            while end < grid[1] and not mask[row, end]:
                end += 1
            if end > column:
                left, right = _x(column, grid, size), _x(end, grid, size)
                parts.append(f"M{left} {_y(row, grid, size)}H{right}V{_y(row + 1, grid, size)}H{left}Z")
            column = max(end, column + 1)
    return "".join(parts)


def edge_path(kept: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> str:
    """Path along the borders between what is kept and what is not."""
    mask, parts = kept.reshape(grid), []
    for row, column in np.argwhere(mask[1:] != mask[:-1]).tolist():
        y = _y(row + 1, grid, size)
        parts.append(f"M{_x(column, grid, size)} {y}H{_x(column + 1, grid, size)}")
    for row, column in np.argwhere(mask[:, 1:] != mask[:, :-1]).tolist():
        x = _x(column + 1, grid, size)
        parts.append(f"M{x} {_y(row, grid, size)}V{_y(row + 1, grid, size)}")
    return "".join(parts)


def _x(column: int, grid: tuple[int, int], size: Sequence[int]) -> float:
    return round(size[0] * column / grid[1], 1)


def _y(row: int, grid: tuple[int, int], size: Sequence[int]) -> float:
    return round(size[1] * row / grid[0], 1)


def _svg(size: tuple[int, int], inside: Markup, label: str) -> Markup:
    return Markup('<svg class="photo" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        *size, label, inside
    )
