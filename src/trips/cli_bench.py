"""Count, time and compare: trips flops, trips speed, trips advise, trips table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import RenderableType

VERBS: dict[str, Callable[..., Any]] = {}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`, which are those of its function."""
    command.add_function_arguments(VERBS[name], as_group=False, as_positional=True, skip={"as_json"})


def render(name: str, result: Any) -> RenderableType:
    """What a verb has found as a table for people."""
    raise NotImplementedError(name)
