"""What goes into a training run and what comes out: settings, the data protocol, step notes, the report.

No tensors are made here; `trips.train.loop` does the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from trips.config import SelectionConfig
from trips.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
ParallelMode = Literal["auto", "ddp", "fsdp"]
Evaluator = Callable[[nn.Module], Mapping[str, float]]


def uses_bf16(precision: Precision, device: str) -> bool:
    """Whether a forward pass on a kind of device ("cuda", "cpu") runs under bf16 autocast."""
    return precision == "bf16" or (precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())


class TrainingData(Protocol):
    """Batches as a pure function of the step: exact resumption is starting at another one."""

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        """Batches of steps ``start_step`` to ``start_step + num_steps - 1``, this process's share of each.

        Tensors in a batch go to the model's forward by name. ``sources``, if present, is a list of strings that name
        the samples in messages. With accumulation every micro-batch counts as a step here.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps of the whole run.
        lr: peak learning rate of everything but vision.
        vision_lr: peak learning rate of the vision tower.
        head_lr: peak learning rate of the heads that the model names; None takes lr.
        weight_decay: decoupled weight decay.
        beta2: decay of AdamW's second moment.
        warmup_steps: steps until the peak.
        lr_floor: share of the peak at the start of the warm-up and at the end of the run.
        clip_norm: largest global gradient norm; None does not clip.
        accumulate: micro-batches per optimizer step.
        precision: "bf16" runs the forward under autocast; "auto" is bf16 on GPUs that have it, else fp32.
        seed: of dropout and everything else random in the model.
        log_every: steps between log lines.
        save_every: steps between checkpoints; one is written at the end in any case. 0: only at the end.
        keep_last: checkpoints kept.
        eval_every: steps between evaluations; one is made at the end in any case. 0: only at the end.
        max_nonfinite: steps with a non-finite loss or gradient that are skipped before the run stops.
        parallel: how several processes share the work. "ddp" keeps the model whole in each; "fsdp" shards parameters,
            gradients and moments (FSDP2); "auto" is fsdp under ``accelerate launch --use_fsdp``, else ddp. Without an
            effect in a single process.
        gradient_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.
        compile: put the model's forward through torch.compile.
        trackers: besides metrics.jsonl, any of accelerate's trackers by name ("tensorboard", "wandb", "mlflow", ...).
    Raises:
        ConfigError: a value outside its range.
    """

    steps: int
    lr: float = 1e-4
    vision_lr: float = 1e-5
    head_lr: float | None = None
    weight_decay: float = 0.02
    beta2: float = 0.999
    warmup_steps: int = 0
    lr_floor: float = 0.1
    clip_norm: float | None = 1.0
    accumulate: int = 1
    precision: Precision = "auto"
    seed: int = 0
    log_every: int = 50
    save_every: int = 0
    keep_last: int = 2
    eval_every: int = 0
    max_nonfinite: int = 10
    parallel: ParallelMode = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        leasts = {"steps": 0, "warmup_steps": 0, "accumulate": 1, "log_every": 1, "save_every": 0, "keep_last": 1}
        leasts |= {"eval_every": 0, "max_nonfinite": 0, "seed": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ConfigError("too small", item=name, found=getattr(self, name), expected=f"at least {least}")
        if not 0 <= self.lr_floor <= 1:
            raise ConfigError("not a share", item="lr_floor", found=self.lr_floor, expected="0 to 1")
        if not 0 <= self.beta2 < 1:
            raise ConfigError("not a decay", item="beta2", found=self.beta2, expected="0 <= beta2 < 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError("must be positive", item="clip_norm", found=self.clip_norm)
        for name, known in (("precision", get_args(Precision)), ("parallel", get_args(ParallelMode))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError("unknown value", item=name, found=value, expected=" | ".join(known))


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What `train` tells its ``on_step`` callback.

    Attributes:
        step: optimizer steps done, 1 after the first.
        selection: setting of the step, None without a schedule.
        distill: whether it was a full-patch distillation step.
        losses: detached scalars on the device; reading one waits for it.
    """

    step: int
    selection: SelectionConfig | None
    distill: bool
    losses: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """What `train` returns.

    Attributes:
        steps: optimizer steps done in the whole run.
        resumed_from: step that this call started at, 0 for a fresh run.
        seconds: wall time of the training steps of this call; evaluation and checkpoints are not in it.
        samples_per_second: samples through the model in those seconds, over all processes; 0 if no step was left.
        losses: means over the last log window.
        skipped: steps left out for a non-finite loss or gradient, in the whole run.
        evaluation: last result of the evaluator, empty without one.
        checkpoint: the last one written or read, None without an output folder.
        interrupted: a signal ended the run after `steps`, before the last; the same call goes on from there.
        contrastive_batch: samples that a contrastive loss compares with each other: a micro-batch over all processes,
            whatever the accumulation. None for a model without ``contrastive = True``.
        history: the log lines of this call, as metrics.jsonl has them; empty on all processes but the first.
    """

    steps: int
    resumed_from: int
    seconds: float
    samples_per_second: float
    losses: dict[str, float]
    skipped: int
    evaluation: dict[str, float]
    checkpoint: Path | None
    interrupted: bool = False
    contrastive_batch: int | None = None
    history: tuple[dict[str, Any], ...] = ()
