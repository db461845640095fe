"""What a run saves and how it takes it up again: parameters, optimizer, schedule, random states, step.

States are whole whatever shares the model, so that a run in one process, by DDP or by FSDP can go on from any of the
others' checkpoints.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trips.errors import CheckpointError
from trips.train.checkpoint import (
    clear_checkpoints,
    load_model_state,
    load_optimizer_state,
    newest_checkpoint,
    read_checkpoint,
    rng_state,
    set_rng_state,
)
from trips.train.parallel import ParallelModel, on_main
from trips.train.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("trips")

# Settings that do not change the parameters a run ends with.
_HARMLESS = frozenset(
    ("log_every", "save_every", "keep_last", "eval_every", "max_nonfinite", "trackers")
    + ("parallel", "gradient_checkpointing", "compile")
)


@dataclasses.dataclass
class RunState:
    """The parts of a run that outlive it.

    Attributes:
        parallel, optimizer, lr_schedule, settings, accelerator: of the run.
        step: steps done when it was taken up, 0 for a fresh run.
        skipped: steps left out by then.
        checkpoint: the file it was taken up from.
    """

    parallel: ParallelModel
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    settings: TrainSettings
    accelerator: Accelerator
    step: int = 0
    skipped: int = 0
    checkpoint: Path | None = None

    def take_up(self, resume: str | Path, folder: Path | None) -> None:
        """Load the checkpoint that the argument ``resume`` of `train` asks for, if there is one.

        Raises:
            CheckpointError: missing, damaged, of another model, or beyond the end of the run; or the processes do not
                see the same one.
        """
        found: tuple[Path, dict[str, Any]] | None = None
        if resume == "never":
            if folder is not None:
                on_main(self.accelerator, lambda: clear_checkpoints(folder))
        elif resume != "auto":
            found = Path(resume), read_checkpoint(Path(resume))
        elif folder is not None:
            found = newest_checkpoint(folder)
            self._expect_one(found[1]["step"] if found else 0, folder)
        if found is not None:
            self._load(*found)

    def _expect_one(self, step: int, folder: Path) -> None:
        """Refuse to go on from different steps, as nodes would that do not share the folder."""
        from accelerate.utils import gather_object

        steps = gather_object([step])
        if len(set(steps)) > 1:
            raise CheckpointError(
                "is not the same for all processes",
                item=folder,
                found="newest steps " + ", ".join(map(str, steps)),
                hint="all nodes must share the output folder",
            )

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        load_model_state(self.parallel.trained, state["model"], path)
        if state["step"] > self.settings.steps:
            raise CheckpointError(
                "lies beyond the end of this run", item=path, found=state["step"], expected=f"<= {self.settings.steps}"
            )
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.lr_schedule.load_state_dict(state["schedule"])
        own, there = dataclasses.asdict(self.settings), state["settings"]
        if len(state["rng"]) == self.accelerator.num_processes:
            set_rng_state(state["rng"][self.accelerator.process_index])
        else:
            logger.warning("%s is of a run with %d processes: not the same bits", path, len(state["rng"]))
        if changed := sorted(key for key in own if key not in _HARMLESS and own[key] != there.get(key)):
            told = ", ".join(f"{key} {there.get(key)} -> {own[key]}" for key in changed)
            logger.warning("%s is of a run with other settings, which go on from here: %s", path, told)
        self.step, self.skipped, self.checkpoint = state["step"], state["skipped"], path
        logger.info("resumed from %s", path)

    def collect(self, step: int, skipped: int) -> dict[str, Any]:
        """Content of a checkpoint; all processes call it, the first has all of it."""
        from accelerate.utils import gather_object

        return {
            "step": step,
            "model": self.parallel.state(),
            "optimizer": self.parallel.optimizer_state(self.optimizer),
            "schedule": self.lr_schedule.state_dict(),
            "rng": gather_object([rng_state()]),
            "skipped": skipped,
            "settings": dataclasses.asdict(self.settings),
        }
