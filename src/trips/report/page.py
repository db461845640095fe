"""The parts of a page and the page itself: one HTML file that needs nothing beside it.

Its own policy forbids scripts and every request, should a text that came from data ever pass for markup.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from trips.errors import CheckpointError
from trips.report.charts import Chart, short
from trips.report.pictures import Example

MOST_BYTES = 3_000_000
"""A page's size at most: examples go, the last ones first, until it fits."""
_MOST_CHARACTERS = 600  # of one text
_MOST_ROWS = 400


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; the first column names the row.

    Attributes:
        head: names of the columns; empty for a table of names and values.
        rows: of as many texts.
        title: above it; where it is folded, what to click on.
        folded: shown on demand.
    """

    rows: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Bars:
    """Shares side by side.

    Attributes:
        rows: name, share from 0 to 1, what it means.
    """

    rows: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class Code:
    """Text to copy.

    Attributes:
        text: as it is. title, folded: as of `Table`.
    """

    text: str
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence, such as why something is not shown."""

    text: str


Block = Table | Bars | Code | Note | Chart | Example


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the run. purpose: one line. status: how it ended.
        facts: what to see first, name and value.
        sections: in their order.
    """

    title: str
    purpose: str
    status: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def render(page: Page) -> str:
    """The page as HTML, smaller than `MOST_BYTES`."""
    while (size := len((text := _render(page)).encode(errors="replace"))) > MOST_BYTES:
        shown = sum(isinstance(block, Example) for section in page.sections for block in section.blocks)
        if not shown:
            raise CheckpointError("is too large for a page", item=clip(page.title), expected=f"{MOST_BYTES} bytes")
        page = _with_examples(page, min(shown - 1, int(shown * MOST_BYTES / size)))
    return text


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page; one that was there is replaced as a whole, also where several are written at once.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    partial, text = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial"), render(page)
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")  # lone surrogates, from broken names
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot be written ({error.strerror or error})", item=path) from error
    return path


def read_json(path: Path) -> Any:
    """Content of a JSON file of a run, None where there is none.

    Raises:
        CheckpointError: it is no JSON object, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read ({error})", item=path) from error
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", item=path, found=type(content).__name__)
    return content


def named_values(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of nested figures, each in one row: "text_recall / 5", "0.25"."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += named_values(value, f"{prefix}{name} / ")
        else:
            rows.append((f"{prefix}{name}", told(value)))
    return rows


def told(value: Any) -> str:
    """A value for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return short(value) if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(told, value)) or "none"
    return str(value)


def share(value: float) -> str:
    """A share in per cent: 0.1234 -> "12.3 %"."""
    return f"{100 * value:.1f} %"


def clip(text: object, most: int = _MOST_CHARACTERS) -> str:
    """A text without the end that nobody would read."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more characters)"


@functools.cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clip": clip, "share": share}
    return environment


def _render(page: Page) -> str:
    template = (resources.files("trips.report") / "page.html").read_text(encoding="utf-8")
    sections, photos = [], 0
    for section in page.sections:
        blocks = []
        for block in section.blocks:
            panels = []
            if isinstance(block, Example):
                for picture in block.pictures:
                    panels += picture.panels(f"photo{photos}")
                    photos += 1
            blocks.append({"kind": type(block).__name__, "part": block, "panels": panels})
        sections.append({"title": section.title, "blocks": _grouped(blocks)})
    return _environment().from_string(template).render(page=page, sections=sections, most_rows=_MOST_ROWS)


def _grouped(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of one kind together, since charts and examples stand side by side."""
    groups: list[dict[str, Any]] = []
    for block in blocks:
        if not groups or groups[-1]["kind"] != block["kind"]:
            groups.append({"kind": block["kind"], "blocks": []})
        groups[-1]["blocks"].append(block)
    return groups


def _with_examples(page: Page, count: int) -> Page:
    """The first examples alone, and a word about the others."""
    sections, left = [], count
    for section in page.sections:
        blocks: list[Block] = []
        for block in section.blocks:
            left -= isinstance(block, Example)
            if left >= 0 or not isinstance(block, Example):
                blocks.append(block)
        if len(blocks) < len(section.blocks):
            blocks.append(Note("Not all examples fit into the page."))
        sections.append(dataclasses.replace(section, blocks=tuple(blocks)))
    return dataclasses.replace(page, sections=tuple(sections))
