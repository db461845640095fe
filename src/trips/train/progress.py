"""How far a long measurement is, and how long it will take: a bar for people, log lines where nobody watches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("trips")

LOG_EVERY = 30.0  # seconds between log lines


@contextmanager
def progress_of(name: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Tell on stderr how much of something is done.

    Args:
        name: of what is counted, such as "pairs".
        total: how many there are.
        enabled: False tells nothing.
    Returns:
        A function that takes how many have been done since its last call.
    """
    console, begun, done = Console(stderr=True), time.monotonic(), 0
    told, shown = begun, enabled and console.is_terminal
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(name, total=total)

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            bar.update(task, completed=done)
            now = time.monotonic()
            if enabled and not shown and now - told >= LOG_EVERY:
                told, left = now, (now - begun) * (total - done) / done
                logger.info("%s %d/%d, about %.0f s left", name, done, total, left)

        yield advance
