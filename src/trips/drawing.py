"""What a selection keeps, drawn on the photo: kept patches clear, all others dimmed (the look of Figures 1, 3 and 4).

The photo is drawn as it is, not squeezed to the model's square: a patch covers the share of the photo that its place in
the grid says. Legend: H, W pixels of the photo; N patches in a grid of (down, across).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from trips.errors import MissingDependencyError, ShapeError
from trips.metrics import kept_mask
from trips.selection import Selection

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the photo

# Of Okabe and Ito's palette, whose colours people with any colour vision tell apart.
_OUTLINE, _BOX = (0, 114, 178), (213, 94, 0)
_SIDE = 800  # pixels of a drawn photo's longer side: 600 to the inch where it is smallest
_PIXEL_ART = 128  # photos smaller than this are enlarged without smoothing


@dataclass(frozen=True)
class SelectionRow:
    """One row of a figure.

    Attributes:
        text: the caption or question, and what else the row should say.
        image: (H, W, 3) uint8.
        kept: per location, (N,) bool.
        layers: 1-based, one per location.
        scores: per location, (N,) a_cls, NaN for patches that were gone before; drawn as heat maps where given.
        boxes: outlined on the photo.
    """

    text: str
    image: np.ndarray
    kept: tuple[np.ndarray, ...]
    layers: tuple[int, ...]
    scores: tuple[np.ndarray, ...] = ()
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet.

    Attributes:
        image: (H, W, 3) uint8.
        title: above it.
    """

    image: np.ndarray
    title: str = ""


def selection_row(
    text: str, image: np.ndarray, selections: Sequence[Selection], row: int, num_patches: int
) -> SelectionRow:
    """Take one sample out of a batch of selection records."""
    masks = [kept_mask(record.kept[row : row + 1].cpu(), num_patches)[0].numpy() for record in selections]
    return SelectionRow(text, image, tuple(masks), tuple(record.layer for record in selections))


def patch_values(values: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The value of the patch that the centre of each pixel lies in: (N,) -> (H, W).

    Args:
        values: row-major.
        grid: patches (down, across).
        size: (H, W); need not be multiples of the grid.
    Raises:
        ShapeError: N is not that of the grid.
    """
    if values.shape != (grid[0] * grid[1],):
        raise ShapeError("not one value per patch", item="values", found=values.shape, expected=grid)
    rows, columns = ((2 * np.arange(side) + 1) * count // (2 * side) for side, count in zip(size, grid, strict=True))
    return values.reshape(grid)[rows[:, None], columns[None]]


def faded(image: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The picture with the patches that were not kept in light grey.

    Args:
        image: (H, W, 3) uint8; sides need not be multiples of the grid.
        kept: (N,) bool, row-major.
        grid: patches (down, across).
    Raises:
        ShapeError: N is not that of the grid.
    """
    return np.where(patch_values(kept, grid, image.shape[:2])[..., None], image, _light_grey(image))


def heat_map(image: np.ndarray, scores: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The picture in grey under its scores, dark blue for the lowest and yellow for the highest.

    Colours follow the logarithm of a_cls, which is the product of the guide's query with the patch.

    Args:
        image: (H, W, 3) uint8.
        scores: (N,) a_cls, 0 to 1; NaN for patches that were gone before, which stay grey.
        grid: patches (down, across).
    Raises:
        ShapeError: N is not that of the grid. MissingDependencyError: matplotlib is not installed.
    """
    import_matplotlib()
    from matplotlib import colormaps

    logs = np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float64).tiny))  # NaN stays NaN
    known = logs[~np.isnan(logs)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    values = patch_values((logs - low) / ((high - low) or 1.0), grid, image.shape[:2])
    grey = _light_grey(image)
    colours = colormaps["cividis"](np.nan_to_num(values))[..., :3] * 255
    shade = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    blended = (0.3 * shade + 0.7 * colours).round().astype(np.uint8)
    return np.where(np.isnan(values)[..., None], grey, blended)


def row_panels(row: SelectionRow, grid: tuple[int, int]) -> list[Panel]:
    """The photo, and behind every location what is kept, its scores before it where the row has some."""
    photo, boxes = enlarged(row.image, row.boxes)
    panels = [Panel(outlined(photo, boxes), "input")]
    for i, (layer, kept) in enumerate(zip(row.layers, row.kept, strict=True)):
        if row.scores:
            heat = outlined(heat_map(photo, row.scores[i], grid), boxes)
            panels.append(Panel(heat, f"scores at layer {layer}"))
        panels.append(Panel(kept_picture(photo, kept, grid, boxes), f"layer {layer}: {kept.sum()} of {kept.size} kept"))
    return panels


def kept_picture(photo: np.ndarray, kept: np.ndarray, grid: tuple[int, int], boxes: Sequence[Box] = ()) -> np.ndarray:
    """`faded` with a line between what is kept and what is not, which white walls need."""
    picture = Image.fromarray(faded(photo, kept, grid))
    edges, mask = ImageDraw.Draw(picture), patch_values(kept, grid, photo.shape[:2])
    down, right = np.nonzero(mask[1:] != mask[:-1]), np.nonzero(mask[:, 1:] != mask[:, :-1])
    half = max(1, max(photo.shape[:2]) // 400)
    for y, x in zip(*down):
        edges.rectangle((x, y + 1 - half, x, y + half), fill=_OUTLINE)
    for y, x in zip(*right):
        edges.rectangle((x + 1 - half, y, x + half, y), fill=_OUTLINE)
    return outlined(np.asarray(picture), boxes)


def outlined(picture: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """With its boxes drawn; what lies outside the picture is cut off."""
    if not boxes:
        return picture
    image = Image.fromarray(picture)
    for left, top, right, bottom in boxes:
        wide = max(2, max(picture.shape[:2]) // 130)
        ImageDraw.Draw(image).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), None, _BOX, wide)
    return np.asarray(image)


def enlarged(image: np.ndarray, boxes: Sequence[Box] = (), *, side: int = _SIDE) -> tuple[np.ndarray, tuple[Box, ...]]:
    """The photo and its boxes in the size that is drawn: fine enough for straight edges, small enough for a file.

    Args:
        image: (H, W, 3) uint8. boxes: in its pixels.
        side: pixels of the longer side as drawn.
    """
    height, width = image.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    smooth = Image.Resampling.NEAREST if max(height, width) <= _PIXEL_ART else Image.Resampling.BICUBIC
    photo = np.asarray(Image.fromarray(image).resize(size, smooth))
    scale = np.array([size[0] / width, size[1] / height] * 2)
    return photo, tuple(tuple((np.array(box) * scale).tolist()) for box in boxes)


def import_matplotlib() -> None:
    """Raise `MissingDependencyError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "is not installed", item="matplotlib", hint='pip install "trips-vlm[figures]"'
        ) from error


def _light_grey(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 from 171 to 248: still to be seen, but no longer to be mistaken for the photo."""
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return np.broadcast_to((0.3 * grey + 0.7 * 245).round().astype(np.uint8), image.shape)
