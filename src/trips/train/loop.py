"""The one training loop, on accelerate: any module that returns a ``loss``, any data that is a function of the step.

A run is a pure function of its settings: the data answer for a step, dropout follows the seeded generators, and both
are restored on resume, so that an interrupted run ends with the bits of an uninterrupted one (on a CPU; on a GPU as
far as its kernels are deterministic).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trips.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from trips.train.checkpoint import (
    clear_checkpoints,
    load_model_state,
    newest_checkpoint,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from trips.train.monitor import LossWindow, Monitor, NonFiniteGuard
from trips.train.optim import build_adamw, build_schedule, learning_rates, parameter_groups
from trips.train.schedule import SelectionSchedule
from trips.train.settings import Evaluator, StepInfo, TrainingData, TrainReport, TrainSettings

logger = logging.getLogger("trips")


def train(
    model: nn.Module,
    data: TrainingData,
    settings: TrainSettings,
    *,
    schedule: SelectionSchedule | None = None,
    out_dir: str | Path | None = None,
    resume: Literal["auto", "never"] | str | Path = "auto",
    on_step: Callable[[StepInfo], None] | None = None,
    evaluator: Evaluator | None = None,
) -> TrainReport:
    """Train a model in place.

    Args:
        model: ``forward(**tensors)`` returns an object or mapping with a scalar ``loss``; other scalars called
            ``loss_*`` are logged. With a schedule it is also given ``selection`` and ``distill``. It is moved to
            accelerate's device and left in training mode.
        data: see `TrainingData`.
        settings: see `TrainSettings`.
        schedule: selection setting per step; None leaves it to the model.
        out_dir: for checkpoints, metrics.jsonl and TensorBoard events; None writes nothing.
        resume: "auto" goes on from the newest checkpoint in out_dir if there is one; "never" starts anew and removes
            the checkpoints there; a path goes on from that checkpoint.
        on_step: called after every optimizer step.
        evaluator: called with the bare model in evaluation mode, without gradient, on the first process; does not
            change the course of the training.
    Raises:
        ConfigError: settings out of range, nothing to train, a model without a loss.
        DataError: the data end early, or too many steps with a non-finite loss; names step and samples.
        CheckpointError: the checkpoint is missing, damaged or of another model, or cannot be written.
        MissingDependencyError: accelerate is not installed.
    """
    run = _Run(model, settings, schedule, Path(out_dir) if out_dir is not None else None, on_step, evaluator)
    run.resume(resume)
    return run.fit(data)


class _Run:
    """State of one call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        schedule: SelectionSchedule | None,
        out_dir: Path | None,
        on_step: Callable[[StepInfo], None] | None,
        evaluator: Evaluator | None,
    ) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
            from accelerate.utils import set_seed
        except ImportError as error:
            raise MissingDependencyError(
                "is not installed", item="accelerate", hint='pip install "trips-vlm[train]"'
            ) from error
        # Precision is autocast's business below: accelerate keeps it in a global that the next run could not change.
        # Pre-trained towers have parameters without a use here (mask tokens), which DDP must be told to look for.
        self.accelerator = Accelerator(
            mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
        )
        set_seed(settings.seed, device_specific=True)
        self.settings, self.schedule, self.on_step, self.evaluator = settings, schedule, on_step, evaluator
        self.out_dir = out_dir
        self.bare = model.to(self.accelerator.device).train()
        groups = parameter_groups(model, settings.lr, settings.vision_lr, settings.weight_decay)
        self.base_optimizer = build_adamw(groups, (0.9, settings.beta2))
        self.lr_schedule = build_schedule(self.base_optimizer, settings.steps, settings.warmup_steps, settings.lr_floor)
        self.model, self.optimizer = self.accelerator.prepare(model, self.base_optimizer)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.start, self.skipped = 0, 0
        self.checkpoint: Path | None = None
        self.evaluation: dict[str, float] = {}

    @property
    def folder(self) -> Path | None:
        return None if self.out_dir is None else self.out_dir / "checkpoints"

    def resume(self, resume: str | Path) -> None:
        """Take up the checkpoint that the argument of `train` asks for."""
        found: tuple[Path, dict[str, Any]] | None = None
        if resume == "never":
            if self.folder is not None and self.accelerator.is_main_process:
                clear_checkpoints(self.folder)
            self.accelerator.wait_for_everyone()
        elif resume != "auto":
            found = Path(resume), read_checkpoint(Path(resume))
        elif self.folder is not None:
            found = newest_checkpoint(self.folder)
        if found is None:
            return
        path, state = found
        load_model_state(self.bare, state["model"], path)
        if state["step"] > self.settings.steps:
            raise CheckpointError(
                "lies beyond the end of this run", item=path, found=state["step"], expected=f"<= {self.settings.steps}"
            )
        self.base_optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["schedule"])
        rank, own = self.accelerator.process_index, dataclasses.asdict(self.settings)
        if len(state["rng"]) == self.accelerator.num_processes:
            set_rng_state(state["rng"][rank])
        else:
            logger.warning("%s is of a run with %d processes: not the same bits", path, len(state["rng"]))
        if changed := sorted(k for k in own if k not in _HARMLESS and own[k] != state["settings"].get(k)):
            told = ", ".join(f"{key} {state['settings'].get(key)} -> {own[key]}" for key in changed)
            logger.warning("%s is of a run with other settings, which go on from here: %s", path, told)
        self.start, self.skipped, self.checkpoint = state["step"], state["skipped"], path
        logger.info("resumed from %s", path)

    def fit(self, data: TrainingData) -> TrainReport:
        """Run the steps that are left."""
        settings, main = self.settings, self.accelerator.is_main_process
        if self.out_dir is not None:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        guard = NonFiniteGuard(settings.max_nonfinite, self.skipped)
        window, losses = LossWindow(), {}
        # A flag costs nothing to read on a CPU; a GPU would be waited for, so there it is read with the log line.
        check_every = 1 if self.accelerator.device.type == "cpu" else settings.log_every
        micro = data.batches(self.start * settings.accumulate, (settings.steps - self.start) * settings.accumulate)
        samples, logged, seconds = 0, 0, 0.0
        clock = lap = time.perf_counter()
        with Monitor(self.out_dir, settings.steps, self.start, enabled=main) as monitor:
            for step in range(self.start + 1, settings.steps + 1):
                rates = learning_rates(self.base_optimizer.param_groups)
                info, finite, count, sources = self._step(step, micro)
                guard.record(step, finite, sources)
                window.add(info.losses, finite)
                samples += count
                log = step % settings.log_every == 0 or step == settings.steps
                if log or step % check_every == 0:
                    guard.check()
                if log:
                    losses = self._over_processes(window.read())
                    now = time.perf_counter()
                    speed = (samples - logged) * self.accelerator.num_processes / max(now - lap, 1e-9)
                    monitor.log(step, {**losses, **rates, "samples_per_second": speed, "skipped": guard.skipped})
                    logged, lap = samples, now
                monitor.advance(step)
                if self.on_step is not None:
                    self.on_step(info)
                seconds += time.perf_counter() - clock
                paused = time.perf_counter()
                self._evaluate(step, monitor)
                self.skipped = guard.skipped
                self._save(step, guard)
                clock = time.perf_counter()
                lap += clock - paused
            if self.start == settings.steps:
                self._evaluate(settings.steps, monitor)
        total = samples * self.accelerator.num_processes
        return TrainReport(
            steps=settings.steps,
            resumed_from=self.start,
            seconds=seconds,
            samples_per_second=total / seconds if seconds else 0.0,
            losses=losses,
            skipped=guard.skipped,
            evaluation=self.evaluation,
            checkpoint=self.checkpoint,
        )

    def _step(self, step: int, micro: Iterator[dict[str, Any]]) -> tuple[StepInfo, Tensor, int, tuple[str, ...]]:
        """One optimizer step: forward and backward over its micro-batches, clip, update unless not finite."""
        settings, accelerator = self.settings, self.accelerator
        selection, distill = self.schedule.at(step - 1) if self.schedule is not None else (None, False)
        extra = {} if self.schedule is None else {"selection": selection, "distill": distill}
        totals: dict[str, Tensor] = {}
        count, sources = 0, []
        for index in range(settings.accumulate):
            batch = next(micro, None)
            if batch is None:
                raise DataError("the training data end before the run does", item=f"step {step}")
            sources += batch.get("sources") or ()
            tensors = {
                key: value.to(accelerator.device, non_blocking=True)
                for key, value in batch.items()
                if isinstance(value, Tensor)
            }
            count += _num_samples(tensors)
            last = index == settings.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                with self._autocast():
                    losses = _losses(self.model(**tensors, **extra), self.bare)
                accelerator.backward(losses["loss"] / settings.accumulate)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / settings.accumulate
        norm = accelerator.clip_grad_norm_(self.parameters, settings.clip_norm or math.inf)
        finite = torch.isfinite(norm) & torch.isfinite(totals["loss"])
        self._update(finite)
        return StepInfo(step, selection, distill, totals), finite, count, tuple(sources)

    def _over_processes(self, losses: dict[str, float]) -> dict[str, float]:
        """Mean of each loss over the processes, whose schedules, and so whose names, agree."""
        if self.accelerator.num_processes == 1:
            return losses
        values = torch.tensor(list(losses.values()), device=self.accelerator.device)
        return dict(zip(losses, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _update(self, finite: Tensor) -> None:
        """Optimizer and schedule step; parameters and moments stay as they are where the step is not finite."""
        if self.base_optimizer.defaults["fused"]:
            # The flag by which gradient scalers tell a fused optimizer to leave out a step: the device reads it itself.
            self.base_optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.accelerator.device.type
        bf16 = self.settings.precision == "bf16" or (
            self.settings.precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()
        )
        return torch.autocast(device, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _evaluate(self, step: int, monitor: Monitor) -> None:
        every = self.settings.eval_every
        if self.evaluator is None or not (step == self.settings.steps or (every and step % every == 0)):
            return
        if self.accelerator.is_main_process:
            state = rng_state()
            self.bare.eval()
            with torch.no_grad(), self._autocast():
                self.evaluation = dict(self.evaluator(self.bare))
            self.bare.train()
            set_rng_state(state)
            monitor.log(step, self.evaluation, kind="evaluation")
        self.accelerator.wait_for_everyone()

    def _save(self, step: int, guard: NonFiniteGuard) -> None:
        every = self.settings.save_every
        if self.folder is None or not (step == self.settings.steps or (every and step % every == 0)):
            return
        from accelerate.utils import gather_object

        guard.check()
        states = gather_object([rng_state()])
        if self.accelerator.is_main_process:
            self.checkpoint = save_checkpoint(
                self.folder,
                {
                    "step": step,
                    "model": self.bare.state_dict(),
                    "optimizer": self.base_optimizer.state_dict(),
                    "schedule": self.lr_schedule.state_dict(),
                    "rng": states,
                    "skipped": guard.skipped,
                    "settings": dataclasses.asdict(self.settings),
                },
                keep_last=self.settings.keep_last,
            )
        self.accelerator.wait_for_everyone()


# Settings that do not change the parameters a run ends with.
_HARMLESS = frozenset(("log_every", "save_every", "keep_last", "eval_every", "max_nonfinite"))


def _losses(output: Any, model: nn.Module) -> dict[str, Tensor]:
    """``loss`` and the other ``loss_*`` scalars of an output."""
    fields = output if isinstance(output, Mapping) else vars(output)
    losses = {
        name: value
        for name, value in fields.items()
        if (name == "loss" or name.startswith("loss_")) and isinstance(value, Tensor) and value.ndim == 0
    }
    if "loss" not in losses:
        raise ConfigError("its forward returned no scalar loss", item=type(model).__name__, found=sorted(fields))
    return losses


def _num_samples(tensors: Mapping[str, Tensor]) -> int:
    """Texts in a batch, or rows of its first tensor where there is no text."""
    first = tensors.get("input_ids", next(iter(tensors.values()), None))
    return 0 if first is None else first.shape[0]
