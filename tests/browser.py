"""A real browser for the tests of pages: a Chromium of the machine without a window, driven by playwright.

Tests that need it carry the marker ``browser`` and take the fixture ``browser`` of conftest.py; both skip, with the
reason, where there is none. Nothing is downloaded: ``apt-get install chromium`` and ``pip install playwright``.
"""

from __future__ import annotations

import enum
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_INLINE = ("file:", "data:", "blob:", "about:")


class Absent(enum.Enum):
    """What a test of a page cannot do without; the value is the reason that pytest shows."""

    CHROMIUM = "needs Chromium (apt-get install chromium, or its path in TRIPS_CHROMIUM)"
    PLAYWRIGHT = "needs playwright (pip install playwright; its own browsers are not needed)"


def find_chromium() -> Path | None:
    """The program: the path in TRIPS_CHROMIUM, or the first on the search path; None where there is none."""
    chosen = os.environ.get("TRIPS_CHROMIUM")
    found = chosen if chosen is not None else next(filter(None, map(shutil.which, _PROGRAMS)), None)
    return Path(found) if found and os.access(found, os.X_OK) else None


def absent() -> Absent | None:
    """What is missing for a browser; None where one can be started."""
    if importlib.util.find_spec("playwright") is None:
        return Absent.PLAYWRIGHT
    return Absent.CHROMIUM if find_chromium() is None else None


@dataclass
class Visit:
    """A page that stands open, and what it did since.

    Attributes:
        page: of playwright: ``locator``, ``click``, ``evaluate``, ``wait_for_function`` and so on.
        requests: every address that was asked for, as Chromium's own network log and playwright saw it.
        errors: messages of scripts that failed and of the console's errors.
        dialogs: texts of the windows that a script opened (``alert``); each is closed at once.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def outside(self, *allowed: str) -> list[str]:
        """Requests for anything but the page's own files and inlined data, or what starts as one of `allowed`."""
        return [address for address in self.requests if not address.startswith((*_INLINE, *allowed))]

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """Save a picture (.png) of the page, from top to bottom or as far as the window shows it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path), full_page=whole)
        return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser; its process ends with the block.

    One at a time in a thread: playwright's loop runs as long as the block does, so keep it to a module of tests.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(find_chromium()), args=["--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(
    browser: Browser,
    address: str | Path,
    *,
    width: int = 1200,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    offline: bool = False,
    wait_until: Literal["load", "domcontentloaded", "networkidle"] = "load",
) -> Iterator[Visit]:
    """Open an address, or a file, in a fresh profile, and record what it asks for from the first request on.

    Args:
        browser: from `chromium`.
        address: URL, or path of a file.
        width, height: of the window in CSS pixels.
        scheme: the reader's colour scheme.
        offline: whether every request to a network fails.
        wait_until: when the page counts as open.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=offline)
    try:
        page = context.new_page()
        seen = Visit(page)

        def note(url: str) -> None:
            if url not in seen.requests:
                seen.requests.append(url)

        def close(dialog: Any) -> None:
            seen.dialogs.append(dialog.message)
            dialog.dismiss()

        # Chromium's own log has sockets, too; playwright's has frames of other sites.
        log = context.new_cdp_session(page)
        log.on("Network.requestWillBeSent", lambda event: note(event["request"]["url"]))
        log.on("Network.webSocketCreated", lambda event: note(event["url"]))
        log.send("Network.enable")
        context.on("request", lambda request: note(request.url))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
        page.on("dialog", close)
        page.goto(Path(address).resolve().as_uri() if isinstance(address, Path) else address, wait_until=wait_until)
        yield seen
    finally:
        context.close()
