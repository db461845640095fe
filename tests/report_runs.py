"""Small runs of which tests read the pages, and a reader of pages."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trips.train.recipe_io import load_recipe
from trips.train.run import run_recipe

EVIL = "<script>alert('x')</script><img src=http://example.org/x.png onerror=alert(2)>&\"'"


class Tags(HTMLParser):
    """Tags with their attributes, and all text outside of the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def photos(folder: Path, count: int) -> list[str]:
    """Pictures of noise in one of three colours."""
    rng = np.random.default_rng(1)
    for number in range(count):
        pixels = rng.integers(0, 60, (150, 200, 3), np.uint8)
        pixels[..., number % 3] += 180
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def listing(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def trained(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Folder of a finished run on a list of its own."""
    data, out = listing(folder / "list.csv", rows), folder / "out"
    keys = {"data.train": [str(data)], "data.test": [str(data)], "run.out": str(out), "run.trackers": []}
    run_recipe(load_recipe(name, {**keys, "run.log_every": 1, "run.save_every": 0, **changes}))
    return out
