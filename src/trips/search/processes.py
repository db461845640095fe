"""Several processes that share an indexing run, as torchrun or accelerate start them; alone, all of it is the identity.

Messages are Python objects over gloo, whatever the processes compute on: they tell who does what, not features.

Dimensions: W processes.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from trips.distributed import world
from trips.errors import TripsError

Result = TypeVar("Result")
_TIMEOUT = datetime.timedelta(days=7)  # the first process to end waits for the last


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: 0 is the first. size: W. group: for messages, None alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def first(self, function: Callable[[], Result]) -> Result:
        """Call it in the first process; all return what it returns, and raise the `TripsError` that it raises."""
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = function()
            except TripsError as error:
                told[1] = error
        dist.broadcast_object_list(told, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def gather(self, value: Result) -> list[Result]:
        """What every process has, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def part(self, items: Sequence[Result]) -> Sequence[Result]:
        """This process's share of a list, neighbours together."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of the run; joins those that a launcher has started, unless the caller has joined them."""
    starts = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if starts:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        rank, size = world()
        yield Processes(rank, size, dist.new_group(backend="gloo", timeout=_TIMEOUT) if size > 1 else None)
    finally:
        if starts:
            dist.destroy_process_group()
