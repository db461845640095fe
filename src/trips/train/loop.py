"""The one training loop, on accelerate: any module that returns a ``loss``, any data that is a function of the step.

A run is a pure function of its settings: the data answer for a step, dropout follows the seeded generators, and both
are restored on resume, so that an interrupted run ends with the bits of an uninterrupted one (on a CPU; on a GPU as
far as its kernels are deterministic). Several processes share the model as `trips.train.parallel` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trips.distributed import alone
from trips.errors import DataError, MissingDependencyError
from trips.train.checkpoint import rng_state, save_checkpoint, set_rng_state
from trips.train.lock import RunLock
from trips.train.monitor import LossWindow, Monitor
from trips.train.nonfinite import NonFiniteGuard
from trips.train.optim import build_adamw, build_schedule, learning_rates, parameter_groups
from trips.train.parallel import ParallelModel, clip_gradients, on_main
from trips.train.resume import RunState
from trips.train.schedule import SelectionSchedule
from trips.train.settings import Evaluator, StepInfo, TrainingData, TrainReport, TrainSettings, uses_bf16
from trips.train.signals import Agreement, Interruption
from trips.train.speed import FlopsPerSample, Speedometer
from trips.train.trackers import open_trackers

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
    flops_per_sample: FlopsPerSample | None = None,
    locked: bool = False,
) -> TrainReport:
    """Train a model in place.

    SIGTERM and the first Ctrl-C end the run after the step at hand, with a checkpoint (``TrainReport.interrupted``).

    Args:
        model: ``forward(**tensors)`` returns an object or mapping with a scalar ``loss``; other scalars called
            ``loss_*`` are logged. With a schedule it is also given ``selection`` and ``distill``. Its
            ``start_step(step)``, if it has one, is called before every optimizer step, with 0 before the first; an
            attribute ``contrastive = True`` says that its loss compares the samples of a micro-batch with each other.
            It is moved to accelerate's device and left in training mode; under FSDP a sharded copy is trained, and
            this one is given the result at the end.
        data: see `TrainingData`.
        settings: see `TrainSettings`.
        schedule: selection setting per step; None leaves it to the model.
        out_dir: for checkpoints, metrics.jsonl, nonfinite.jsonl and TensorBoard events; None writes nothing. One run
            at a time.
        resume: "auto" goes on from the newest checkpoint in out_dir if there is one; "never" starts anew and removes
            the checkpoints there; a path goes on from that checkpoint. Checkpoints of DDP, FSDP and one process are
            interchangeable.
        on_step: called after every optimizer step.
        evaluator: called with the bare model in evaluation mode, without gradient, on the first process; does not
            change the course of the training.
        flops_per_sample: floating-point operations of training on one sample, for the share of the device's peak
            (MFU) in the log; see `Speedometer`.
        locked: the caller holds the `RunLock` of out_dir already.
    Raises:
        ConfigError: settings out of range, nothing to train, a model without a loss.
        DataError: the data end early, or too many steps with a non-finite loss; names step and samples.
        CheckpointError: the checkpoint is missing, damaged or of another model, or cannot be written; another run is
            writing to out_dir.
        MissingDependencyError: accelerate or a tracker is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingDependencyError(
            "is not installed", item="accelerate", hint='pip install "trips-vlm[train]"'
        ) from error
    # Precision is autocast's business below: accelerate keeps it in a global that the next run could not change.
    accelerator = Accelerator(mixed_precision="no")
    lock = RunLock(Path(out_dir)) if out_dir is not None and not locked else None
    if lock is not None:
        on_main(accelerator, lock.acquire)
    try:
        run = _Run(model, settings, schedule, out_dir and Path(out_dir), on_step, evaluator, accelerator)
        run.state.take_up(resume, run.folder)
        return run.fit(data, flops_per_sample)
    finally:
        if lock is not None:
            lock.release()


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
        accelerator: Any,
    ) -> None:
        from accelerate.utils import set_seed

        set_seed(settings.seed, device_specific=True)
        self.accelerator, self.out_dir = accelerator, out_dir
        self.settings, self.schedule, self.on_step, self.evaluator = settings, schedule, on_step, evaluator
        self.parallel = ParallelModel(model, settings, accelerator, () if schedule is None else (schedule.base,))
        self.trained = self.parallel.trained
        rates = settings.lr, settings.vision_lr, settings.weight_decay, settings.head_lr
        groups = parameter_groups(self.trained, *rates)
        self.optimizer = build_adamw(groups, (0.9, settings.beta2))
        self.lr_schedule = build_schedule(self.optimizer, settings.steps, settings.warmup_steps, settings.lr_floor)
        self.state = RunState(self.parallel, self.optimizer, self.lr_schedule, settings, accelerator)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.agreement = Agreement(accelerator.device, accelerator.num_processes)
        self.bf16 = uses_bf16(settings.precision, accelerator.device.type)
        self.evaluation: dict[str, float] = {}
        self.contrastive_batch: int | None = None

    @property
    def folder(self) -> Path | None:
        return None if self.out_dir is None else self.out_dir / "checkpoints"

    def fit(self, data: TrainingData, flops_per_sample: FlopsPerSample | None) -> TrainReport:
        """Run the steps that are left."""
        settings, main, start = self.settings, self.accelerator.is_main_process, self.state.step
        guard = NonFiniteGuard(settings.max_nonfinite, self.state.skipped, self.out_dir, start)
        window, losses, interrupted = LossWindow(), {}, False
        # A flag costs nothing to read on a CPU; a GPU would be waited for, so there it is read with the log line.
        check_every = 1 if self.accelerator.device.type == "cpu" else settings.log_every
        micro = data.batches(start * settings.accumulate, (settings.steps - start) * settings.accumulate)
        told = dataclasses.asdict(settings)
        step, trackers = (
            start,
            on_main(self.accelerator, lambda: open_trackers(settings.trackers, self.out_dir, start, told)),
        )
        monitor = Monitor(self.out_dir, settings.steps, start, trackers=trackers or (), enabled=main)
        speed = Speedometer(self.accelerator.device, self.accelerator.num_processes, self.bf16, flops_per_sample)
        with monitor, Interruption() as interruption:
            while step < settings.steps and not interrupted:
                step += 1
                rates = learning_rates(self.optimizer.param_groups)
                info, finite, count, sources = self._step(step, micro, interruption)
                interrupted = self.agreement.stop() and step < settings.steps
                guard.record(step, finite, info.losses, sources)
                window.add(info.losses, finite)
                speed.add(info, count)
                log = step % settings.log_every == 0 or step == settings.steps or interrupted
                if log or step % check_every == 0:
                    guard.check()
                if log:
                    losses = self._over_processes(window.read())
                    monitor.log(step, {**losses, **rates, **speed.lap(), "skipped": guard.skipped})
                monitor.advance(step)
                if self.on_step is not None:
                    self.on_step(info)
                with speed.pause():
                    if self._due(step, settings.eval_every):
                        self._evaluate(step, monitor)
                    if self._due(step, settings.save_every) or interrupted:
                        self._save(step, guard)
            seconds, samples_per_second = speed.seconds, speed.samples_per_second
            if start == settings.steps:
                self._evaluate(step, monitor)
        if interrupted:
            logger.warning("interrupted by a signal after step %d of %d", step, settings.steps)
        self.parallel.finish()
        return TrainReport(
            steps=step,
            resumed_from=start,
            seconds=seconds,
            samples_per_second=samples_per_second,
            losses=losses,
            skipped=guard.skipped,
            evaluation=self.evaluation,
            checkpoint=self.state.checkpoint,
            interrupted=interrupted,
            contrastive_batch=self.contrastive_batch,
            history=tuple(monitor.records),
        )

    def _due(self, step: int, every: int) -> bool:
        return step == self.settings.steps or bool(every and step % every == 0)

    def _step(
        self, step: int, micro: Iterator[dict[str, Any]], interruption: Interruption
    ) -> tuple[StepInfo, Tensor, int, tuple[str, ...]]:
        """One optimizer step: forward and backward over its micro-batches, clip, update unless not finite."""
        settings, device = self.settings, self.accelerator.device
        selection, distill = self.schedule.at(step - 1) if self.schedule is not None else (None, False)
        extra = {} if self.schedule is None else {"selection": selection, "distill": distill}
        if hasattr(self.trained, "start_step"):
            self.trained.start_step(step - 1)
        totals: dict[str, Tensor] = {}
        count, sources = 0, []
        for index in range(settings.accumulate):
            batch = next(micro, None)
            if batch is None:
                raise DataError("the training data end before the run does", item=f"step {step}")
            sources += batch.get("sources") or ()
            tensors = {
                key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)
            }
            count += _num_samples(tensors)
            last = index == settings.accumulate - 1
            with contextlib.nullcontext() if last else self.parallel.no_sync():
                with self._autocast():
                    losses = self.parallel.losses(**tensors, **extra)
                (losses["loss"] / settings.accumulate).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / settings.accumulate
            if self.contrastive_batch is None and getattr(self.trained, "contrastive", False):
                self._tell_contrast(_num_samples(tensors))
        norm = clip_gradients(self.parameters, settings.clip_norm or math.inf)
        finite = self.agreement.exchange(torch.isfinite(norm) & torch.isfinite(totals["loss"]), interruption.requested)
        self._update(finite)
        return StepInfo(step, selection, distill, totals), finite, count, tuple(sources)

    def _tell_contrast(self, samples: int) -> None:
        processes, parts = self.accelerator.num_processes, self.settings.accumulate
        self.contrastive_batch = samples * processes
        logger.info(
            "the contrastive loss compares %d samples: a micro-batch of %d in %d process(es)%s",
            *(samples * processes, samples, processes),
            f"; the {parts} micro-batches of a step do not see each other" if parts > 1 else "",
        )

    def _over_processes(self, losses: dict[str, float]) -> dict[str, float]:
        """Mean of each loss over the processes, whose schedules, and so whose names, agree."""
        if self.accelerator.num_processes == 1:
            return losses
        values = torch.tensor(list(losses.values()), device=self.accelerator.device)
        return dict(zip(losses, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _update(self, finite: Tensor) -> None:
        """Optimizer and schedule step; parameters and moments stay as they are where the step is not finite."""
        if self.optimizer.defaults["fused"]:
            # The flag by which gradient scalers tell a fused optimizer to leave out a step: the device reads it itself.
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.accelerator.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def _evaluate(self, step: int, monitor: Monitor) -> None:
        if self.evaluator is None:
            return
        with self.parallel.whole() as model:
            if self.accelerator.is_main_process:
                state = rng_state()
                model.eval()
                with torch.no_grad(), self._autocast(), alone():
                    self.evaluation = dict(self.evaluator(model))
                model.train()
                set_rng_state(state)
                monitor.log(step, self.evaluation, kind="evaluation")
        self.accelerator.wait_for_everyone()

    def _save(self, step: int, guard: NonFiniteGuard) -> None:
        if self.folder is None:
            return
        guard.check()
        state = self.state.collect(step, guard.skipped)
        path = on_main(self.accelerator, lambda: save_checkpoint(self.folder, state, keep_last=self.settings.keep_last))
        self.state.checkpoint = path or self.state.checkpoint


def _num_samples(tensors: Mapping[str, Tensor]) -> int:
    """Texts in a batch, or rows of its first tensor where there is no text."""
    first = tensors.get("input_ids", next(iter(tensors.values()), None))
    return 0 if first is None else first.shape[0]
