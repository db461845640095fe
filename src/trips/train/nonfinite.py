"""Steps whose loss or gradient was not finite: counted, named, written down, and at some point too many.

All processes see the same flags (`trips.train.signals.Agreement`), so they take every decision here alike.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trips.errors import DataError
from trips.train.monitor import lines_until

logger = logging.getLogger("trips")

NONFINITE_FILE = "nonfinite.jsonl"


class NonFiniteGuard:
    """Counts the steps that were left out, names their samples, stops past a limit.

    Flags stay on the device until `check`, so that a GPU is not waited for at every step.

    Args:
        limit: skipped steps tolerated in the whole run.
        skipped: steps skipped before a resume.
        out_dir: where nonfinite.jsonl goes, written by the first process; None writes none.
        start: steps already done; lines of later ones, of an interrupted run, are dropped.
    """

    def __init__(self, limit: int, skipped: int = 0, out_dir: Path | None = None, start: int = 0) -> None:
        from accelerate import PartialState

        self.limit, self.skipped = limit, skipped
        self._path = out_dir / NONFINITE_FILE if out_dir is not None and PartialState().is_main_process else None
        self._pending: list[tuple[int, Tensor, dict[str, Tensor], tuple[str, ...]]] = []
        if self._path is not None and self._path.is_file():
            kept = lines_until(self._path, start)
            if kept:
                self._path.write_text("".join(kept), encoding="utf-8")
            else:
                self._path.unlink()

    def record(self, step: int, finite: Tensor, losses: Mapping[str, Tensor], sources: tuple[str, ...]) -> None:
        """Note a step (1 for the first): its flag (the same in all processes), losses, and samples of this process."""
        self._pending.append((step, finite, dict(losses), sources))

    def check(self) -> None:
        """Read the flags noted since the last call; all processes call it at the same steps.

        Raises:
            DataError: more steps than the limit were skipped; names the step and its samples.
        """
        if not self._pending:
            return
        flags = torch.stack([finite for _, finite, _, _ in self._pending]).tolist()
        bad = [entry for entry, finite in zip(self._pending, flags) if not finite]
        self._pending = []
        for step, _, losses, sources in bad:
            self.skipped += 1
            parts = _from_all({"losses": {k: float(v) for k, v in losses.items()}, "sources": list(sources)})
            if self._path is not None:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.writelines(_line(step, rank, part) for rank, part in enumerate(parts))
            named = _named(parts)
            if self.skipped > self.limit:
                raise DataError(
                    "loss or gradient is not finite",
                    item=f"step {step}",
                    found=f"samples {named}" if named else None,
                    hint=f"{self.skipped} steps were skipped for it, {self.limit} are tolerated; look at these samples "
                    "or lower the learning rate",
                )
            logger.warning(
                "step %d: loss or gradient is not finite, step skipped; samples: %s", step, named or "unnamed"
            )


def _from_all(part: dict[str, Any]) -> list[dict[str, Any]]:
    from accelerate.utils import gather_object

    return gather_object([part])


def _line(step: int, rank: int, part: dict[str, Any]) -> str:
    # NaN and infinity are not JSON, and which of them it was is what one wants to know.
    losses = {name: value if math.isfinite(value) else str(value) for name, value in part["losses"].items()}
    return json.dumps({"step": step, "process": rank, "losses": losses, "sources": part["sources"]}) + "\n"


def _named(parts: list[dict[str, Any]]) -> str:
    """The samples to look at: those of the processes whose own loss was not finite, if it was a loss."""
    suspects = [part for part in parts if not all(map(math.isfinite, part["losses"].values()))] or parts
    sources = [source for part in suspects for source in part["sources"]]
    return ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
