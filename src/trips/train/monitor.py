"""What a training run tells: a progress bar for people, log lines, metrics.jsonl, trackers.

Values arrive here as plain numbers; `LossWindow` keeps them on the device until then.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("trips")

METRICS_FILE = "metrics.jsonl"


class LossWindow:
    """Mean losses since the last reading, summed on the device: only `read` waits for it.

    A loss that does not occur in every step, such as a distillation term, is averaged over the steps that had it.
    Steps left out for a non-finite loss do not count.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor], finite: Tensor) -> None:
        """Add the scalar losses of a step that counts only where ``finite`` (a scalar bool) is true."""
        for name, value in losses.items():
            value = torch.where(finite, value.detach().float(), 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + finite.long()

    def read(self) -> dict[str, float]:
        """Means by name; empties the window. A loss without one counted step is NaN."""
        means = {}
        for name, total in self._sums.items():
            count = int(self._counts[name])
            means[name] = float(total) / count if count else math.nan
        self._sums, self._counts = {}, {}
        return means


class Monitor:
    """Progress bar, log lines and metric files of one run, as a context manager; ``records`` are the lines so far.

    The first line behind a resume says ``resumed_from``, the step that the run went on from.

    Args:
        out_dir: where metrics.jsonl goes; None writes none.
        total: steps of the whole run.
        start: steps already done; later lines of an interrupted run are dropped from metrics.jsonl.
        trackers: from `open_trackers`; closed at the end.
        enabled: False on all processes but the first.
    """

    def __init__(
        self,
        out_dir: Path | None,
        total: int,
        start: int,
        *,
        trackers: Sequence[GeneralTracker] = (),
        enabled: bool = True,
    ) -> None:
        self.total, self.start, self.enabled, self.trackers = total, start, enabled, trackers
        self.records: list[dict[str, Any]] = []
        self._file = None
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not (enabled and Console(stderr=True).is_terminal),
        )
        self._task = self._bar.add_task("train", total=total, completed=start, note="")
        if out_dir is not None and enabled:
            path = out_dir / METRICS_FILE
            kept = lines_until(path, start)
            self._file = open(path, "w", encoding="utf-8")
            self._file.writelines(kept)

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()
        for tracker in self.trackers:
            tracker.finish()

    def advance(self, step: int) -> None:
        """Move the bar to a number of steps done."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, Any], *, kind: str = "train") -> None:
        """Write one line of numbers everywhere.

        Args:
            step: steps done.
            values: names and plain numbers.
            kind: "train" or "evaluation"; prefix of the names in trackers.
        """
        if not self.enabled:
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        logger.info("%s step %d/%d  %s", kind, step, self.total, text)
        self._bar.update(self._task, note=text)
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **_plain(values)}
        if self.start and not self.records:
            record["resumed_from"] = self.start
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for tracker in self.trackers:
            tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    # NaN is not JSON: a reader in another language would stumble over it.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def lines_until(path: Path, step: int) -> list[str]:
    """Lines of a file of JSON records up to a step, from an earlier part of the run; a half-written last line goes."""
    if step == 0 or not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
