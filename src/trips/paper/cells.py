"""A sweep over settings and seeds that runs unattended: every finished cell is stored at once, a rerun goes on.

A cell is what one setting measured under one seed. It is a file of its own, written beside its place and then moved
there, so that an interruption leaves whole files only. A cell that failed is stored with its error, does not stop the
others, and is tried again next time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips.environment import describe_environment
from trips.errors import ConfigError, DataError, TripsError
from trips.paper.settings import Setting

logger = logging.getLogger("trips")

Figures = dict[str, float]
_TOLD = ("device", "threads", "torch", "transformers", "trips-vlm", "commit")  # of an environment, in one line


@dataclass(frozen=True)
class Swept:
    """What a sweep has.

    Attributes:
        figures: by name of the setting and seed. failures: one line for each cell that failed.
        environments: on what the figures were measured, each once.
    """

    figures: dict[str, dict[int, Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    environments: list[str] = field(default_factory=list)

    def of(self, setting: Setting, key: str) -> dict[int, float]:
        """One figure of a setting by seed; without the cells that failed or do not have it."""
        rows = self.figures.get(setting.name, {})
        return {seed: figures[key] for seed, figures in rows.items() if key in figures}


class CellStore:
    """Cells as JSON files of one folder, for one source of figures.

    Args:
        folder: made if it does not exist.
        source: everything that figures depend on besides setting and seed; another source never finds these cells.
    Raises:
        ConfigError: no folder can be made there.
    """

    def __init__(self, folder: str | Path, source: str) -> None:
        self.folder, self.source = Path(folder), source
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"no folder can be made there ({error.strerror or error})", item=folder) from error

    def path(self, setting: Setting, seed: int) -> Path:
        """Where a cell stands: its name is for people, the digest behind it covers setting, seed and source."""
        told = json.dumps([_plain(setting), seed, self.source], sort_keys=True)
        words = re.sub(r"[^a-z0-9.]+", "_", setting.name.lower()).strip("_")
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        return self.folder / f"{words}-seed{seed}-{digest}.json"

    def read(self, setting: Setting, seed: int) -> Figures | None:
        """Figures of a finished cell; None if there is none, it failed, or its file is damaged."""
        path = self.path(setting, seed)
        if not path.is_file():
            return None
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            if cell["state"] != "done":
                return None
            return {str(name): float(value) for name, value in cell["figures"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s: is no cell of a sweep (%s); it is measured anew", path, error)
            return None

    def environment(self, setting: Setting, seed: int) -> str:
        """On what a finished cell was measured, in words; "unknown" if it does not say."""
        try:
            told = json.loads(self.path(setting, seed).read_text(encoding="utf-8"))["environment"]
            return ", ".join(f"{name} {told[name]}" for name in _TOLD if told.get(name) is not None)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return "unknown"

    def write(self, setting: Setting, seed: int, seconds: float, **state: Any) -> None:
        """Store a cell in place of what stands there.

        Raises:
            DataError: it cannot be written.
        """
        path = self.path(setting, seed)
        cell = {"setting": _plain(setting), "seed": seed, "source": self.source, **state}
        cell |= {"seconds": round(seconds, 1), "environment": describe_environment()}
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(cell, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise DataError(f"cannot be written ({error.strerror or error})", item=path) from error


def sweep(
    measure: Callable[[Setting, int], Figures],
    store: CellStore,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    needed: str,
) -> Swept:
    """Measure every setting under every seed, seed by seed, but for the cells that are stored.

    Args:
        measure: figures of a cell; what it raises, but for an interruption, is stored as the cell's failure.
        store: finished cells.
        settings: of different names.
        seeds: all settings run under the first before the second begins, so that an early end has whole columns.
        needed: the figure without which a cell is not finished.
    Raises:
        DataError: a cell cannot be written.
    """
    found = Swept()
    for seed in dict.fromkeys(seeds):
        for setting in settings:
            figures = store.read(setting, seed)
            if figures is None:
                figures = _measured(measure, store, setting, seed, needed, found.failures)
            if figures is not None:
                found.figures.setdefault(setting.name, {})[seed] = figures
                if (told := store.environment(setting, seed)) not in found.environments:
                    found.environments.append(told)
    return found


def _measured(
    measure: Callable[[Setting, int], Figures],
    store: CellStore,
    setting: Setting,
    seed: int,
    needed: str,
    failures: dict[str, str],
) -> Figures | None:
    start, name = time.perf_counter(), f"{setting.name}, seed {seed}"
    try:
        figures = {key: float(value) for key, value in measure(setting, seed).items()}
        if not math.isfinite(figures.get(needed, math.nan)):
            raise DataError("was not measured", item=needed, found=figures.get(needed))
    except Exception as error:  # whatever it is, the other cells go on
        text = " ".join(str(error).split())
        if not isinstance(error, TripsError):
            text = f"{type(error).__name__}: {text}"
        logger.warning("%s failed: %s", name, text)
        logger.debug("where it failed", exc_info=error)
        failures[name] = text
        store.write(setting, seed, time.perf_counter() - start, state="failed", error=text)
        return None
    figures = {key: value for key, value in figures.items() if math.isfinite(value)}
    seconds = time.perf_counter() - start
    store.write(setting, seed, seconds, state="done", figures=figures)
    logger.info("%s: %s %.4g after %.0f s", name, needed, figures[needed], seconds)
    return figures


def _plain(setting: Setting) -> dict[str, Any]:
    """What a setting is apart from its name, as JSON has it."""
    values = dataclasses.asdict(setting)
    del values["name"]
    return values
