"""Trackers of accelerate by name: where the numbers of a run go besides metrics.jsonl.

TensorBoard is the default and may be absent; a tracker that was asked for by name may not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trips.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("trips")

PROJECT = "trips"
_missing_board_told = False


def open_trackers(
    names: Sequence[str], out_dir: Path | None, start: int, settings: Mapping[str, Any]
) -> list[GeneralTracker]:
    """Open trackers for one run, on the first process.

    Args:
        names: see `check_trackers`.
        out_dir: run folder; TensorBoard's events go to ``tensorboard/trips`` in it. None opens nothing.
        start: steps already done; TensorBoard drops what an interrupted run wrote behind them.
        settings: of the run, noted by the trackers that keep a configuration.
    Raises:
        ConfigError, MissingDependencyError: see `check_trackers`.
    """
    usable = check_trackers(names)
    if out_dir is None or not usable:
        return []
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    folders = ProjectConfiguration(project_dir=str(out_dir), logging_dir=str(out_dir / "tensorboard"))
    accelerator = Accelerator(mixed_precision="no", log_with=list(usable), project_config=folders)
    accelerator.init_trackers(PROJECT, init_kwargs={"tensorboard": {"purge_step": start + 1}})
    for tracker in accelerator.trackers:
        # TensorBoard would write a run of its own for them, and anew after every resume.
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(dict(settings))
    return accelerator.trackers


def check_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that are there.

    Raises:
        ConfigError: a name that accelerate does not know.
        MissingDependencyError: a tracker's package is not installed. TensorBoard's absence is only logged, once.
    """
    global _missing_board_told
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    missing, usable = set(LoggerType.list()) - set(map(str, get_available_trackers())), []
    for name in dict.fromkeys(names):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                "accelerate has no such tracker", item="trackers", found=name, expected=" | ".join(LOGGER_TYPE_TO_CLASS)
            )
        if name not in missing:
            usable.append(name)
        elif name != "tensorboard":
            raise MissingDependencyError("the package of this tracker is not installed", item=f"trackers: {name}")
        elif not _missing_board_told:
            logger.warning(
                'no TensorBoard events: pip install "trips-vlm[train]" (metrics.jsonl is written all the same)'
            )
            _missing_board_told = True
    return usable
