"""Position tables of a vision tower brought to another grid of patches.

Dimensions: p tokens before the patches ([CLS]), N = rows x columns patches, D width.
"""

from __future__ import annotations

from math import isqrt, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from trips.errors import ShapeError


def resize_positions(table: Tensor, grid_from: tuple[int, int], grid_to: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of a position table; the entries before the patches are kept (ALBEF's way).

    Args:
        table: (p + N, D) or (1, p + N, D); p is what `grid_from` leaves over.
        grid_from: patches (down, across) that the table was learnt on.
        grid_to: patches (down, across) wanted; either may be a rectangle.
    Returns:
        (p + M, D) or (1, p + M, D) in the dtype of the table, M = patches of `grid_to`; the table itself where the
        grids are the same.
    Raises:
        ShapeError: the table has fewer rows than the grid has patches, or a grid has no patch.
    """
    if min(*grid_from, *grid_to) < 1:
        raise ShapeError("a grid without patches", item="resize_positions", found=(grid_from, grid_to))
    before = table.shape[-2] - prod(grid_from) if table.ndim in (2, 3) else -1
    if before < 0 or (table.ndim == 3 and table.shape[0] != 1):
        raise ShapeError(
            "the position table does not fit its grid",
            item="resize_positions",
            found=tuple(table.shape),
            expected=f"at least {prod(grid_from)} rows for {grid_from[0]} x {grid_from[1]} patches",
        )
    if tuple(grid_from) == tuple(grid_to):
        return table
    rows = table.reshape(-1, table.shape[-1])
    image = rows[before:].float().unflatten(0, tuple(grid_from)).permute(2, 0, 1)[None]  # (1, D, down, across)
    image = F.interpolate(image, size=tuple(grid_to), mode="bicubic", align_corners=False)
    patches = image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)
    resized = torch.cat([rows[:before], patches])
    return resized[None] if table.ndim == 3 else resized


def square_grid(num_rows: int, num_before: int) -> tuple[int, int] | None:
    """(n, n) if that many rows are `num_before` tokens and a square of patches, else None."""
    side = isqrt(max(num_rows - num_before, 0))
    return (side, side) if side > 0 and side * side == num_rows - num_before else None
