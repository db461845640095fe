"""Pictures of what a selection keeps (Figures 3 and 4 of the paper, for any model and picture).

Dimensions: N patches in a grid of (down, across).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from trips.errors import MissingDependencyError, ShapeError
from trips.metrics import kept_mask
from trips.selection import Selection


@dataclass(frozen=True)
class SelectionRow:
    """One row of the figure.

    Attributes:
        text: the caption or question, and what else the row should say.
        image: (H, W, 3) uint8.
        kept: per location, (N,) bool.
        layers: 1-based, one per location.
    """

    text: str
    image: np.ndarray
    kept: tuple[np.ndarray, ...]
    layers: tuple[int, ...]


def selection_row(
    text: str, image: np.ndarray, selections: Sequence[Selection], row: int, num_patches: int
) -> SelectionRow:
    """Take one sample out of a batch of selection records."""
    masks: list[Tensor] = [kept_mask(record.kept[row : row + 1].cpu(), num_patches)[0] for record in selections]
    return SelectionRow(text, image, tuple(mask.numpy() for mask in masks), tuple(r.layer for r in selections))


def faded(image: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The picture with the patches that were not kept nearly white.

    Args:
        image: (H, W, 3) uint8; sides need not be multiples of the grid.
        kept: (N,) bool, row-major.
        grid: patches (down, across).
    Raises:
        ShapeError: N is not that of the grid.
    """
    if kept.shape != (grid[0] * grid[1],):
        raise ShapeError("not one value per patch", item="kept", found=kept.shape, expected=grid)
    rows = np.arange(image.shape[0]) * grid[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * grid[1] // image.shape[1]
    mask = kept.reshape(grid)[rows[:, None], columns[None]]
    return np.where(mask[..., None], image, (235 + 0.08 * image.astype(np.float32)).clip(0, 255)).astype(np.uint8)


def draw_selection(rows: Sequence[SelectionRow], grid: tuple[int, int], path: str | Path, title: str = "") -> Path:
    """Write a figure: one row per text, the picture and what is left of it behind every location.

    Args:
        rows: at least one; all with the same locations.
        grid: patches (down, across).
        path: file to write; its suffix decides the format.
        title: above the figure.
    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "is not installed", item="matplotlib", hint='pip install "trips-vlm[figures]"'
        ) from error
    columns = 1 + len(rows[0].kept)
    aspect = rows[0].image.shape[0] / rows[0].image.shape[1]
    figure = Figure(figsize=(2.4 * columns + 2.2, 2.4 * aspect * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        pictures = [row.image, *(faded(row.image, kept, grid) for kept in row.kept)]
        names = ["picture", *(f"kept after layer {n}: {k.sum()}" for n, k in zip(row.layers, row.kept, strict=True))]
        for axis, picture, name in zip(line, pictures, names, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(name, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(row.text, rotation=0, ha="right", va="center", fontsize=9, wrap=True)
    if title:
        figure.suptitle(title, fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
