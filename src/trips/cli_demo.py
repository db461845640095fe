"""Try a trained model in the browser (trips demo)."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import RenderableType
from rich.text import Text

logger = logging.getLogger("trips")


def demo(
    *,
    model: str | None = None,
    index: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    train: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Show a trained model as a page in the browser: which patches it keeps for which words, and what that saves.

    Runs until it is interrupted (Ctrl-C). Nothing is sent anywhere: the page works without a network.

    Args:
        model: output folder of "trips train", a saved model's folder, or a name on the hub; by default that of
            "trips quickstart", or the one that made the index.
        index: folder that "trips index" has indexed, or the folder of its index: adds a tab to search it.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: by default the first that is free from 7860.
        train: train the quick-start's model first where there is none yet (minutes).
        as_json: print one JSON object for machines.
    """
    from trips.demo.models import open_shown
    from trips.demo.page import import_gradio
    from trips.demo.server import served

    import_gradio()  # before the work
    shown = open_shown(model, index, train=train)
    with served(shown, host, port) as url:
        with contextlib.suppress(KeyboardInterrupt):
            logger.info("the page is at %s (Ctrl-C ends it)", url)
            wait()
    return {"url": url, "model": shown.name}


def wait() -> None:
    """Until the process is interrupted, or told to end, which would leave the visitors' files behind."""
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        ended.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


VERBS: dict[str, Callable[..., Any]] = {"demo": demo}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of `demo`: options all of them."""
    command.add_function_arguments(demo, as_group=False, skip={"train", "as_json"})
    words = "train the quick-start's model first where there is none yet (minutes)"
    command.add_argument("--train", action="store_true", help=words)


def render(name: str, result: dict[str, Any]) -> RenderableType:
    """What is left to say when the page has ended."""
    return Text(f"{result['url']} is closed")
