"""Rank, world size, gathering over processes; all of it the identity in a single process.

Used by pre-training (3.3): the queue takes the features of all processes, ITC without a queue and ITM with global
negatives contrast over them.

Dimensions: B rows of one process, W processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from trips.errors import ShapeError

_alone = 0  # how many `alone` this process is in


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where torch.distributed has not been started, and within `alone`."""
    if dist.is_available() and dist.is_initialized() and not _alone:
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what one process of several computes while the others wait, such as an evaluation: nothing is gathered."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all processes in order of rank, without gradient.

    Args:
        tensor: (B, ...), the same shape and dtype in every process: that is not checked, it would cost a message more.
    Returns:
        (W * B, ...), detached.
    Raises:
        ShapeError: a 0-d tensor, which has no rows.
    """
    _expect_rows(tensor)
    tensor, size = tensor.detach(), world()[1]
    return tensor if size == 1 else _gather(tensor, size)


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all processes in order of rank; the gradient of every process comes back to the rows it is for.

    Backward sums over processes and takes the own slice. With a loss that is a mean over the own rows, and gradients
    averaged over processes as DDP and FSDP do, the gradient is that of one process with the whole batch.

    Args:
        tensor: (B, ...), the same shape and dtype in every process.
    Returns:
        (W * B, ...).
    Raises:
        ShapeError: a 0-d tensor, which has no rows.
    """
    _expect_rows(tensor)
    return tensor if world()[1] == 1 else _GatherRows.apply(tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        return _gather(tensor, world()[1])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        parts = list(gradient.contiguous().chunk(world()[1]))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def _gather(tensor: Tensor, size: int) -> Tensor:
    # The forms that take one tensor have changed their names between releases of torch; lists of views have not.
    gathered = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather(list(gathered.chunk(size)), tensor.contiguous())
    return gathered


def _expect_rows(tensor: Tensor) -> None:
    if tensor.ndim == 0:
        raise ShapeError("only rows can be gathered", item="tensor", found=tuple(tensor.shape), expected="(B, ...)")
