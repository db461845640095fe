"""The loop against a hand-written one; exact resume; crashes, damage and non-finite losses."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trips.config import SelectionConfig
from trips.errors import CheckpointError, ConfigError, DataError
from trips.train.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from trips.train.loop import train
from trips.train.optim import build_adamw, parameter_groups, warmup_cosine
from trips.train.schedule import SelectionSchedule
from trips.train.settings import StepInfo, TrainSettings

SETTINGS = TrainSettings(
    steps=6, lr=1e-2, vision_lr=1e-3, weight_decay=0.1, warmup_steps=2, precision="fp32", log_every=2, seed=3
)


class Toy(nn.Module):
    """A regression with dropout, a vision part and a buffer that the forward changes."""

    def __init__(self, dropout: float = 0.5, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.vision = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        out = self.head(self.dropout(torch.relu(self.norm(self.vision(x)))))[:, 0]
        loss = (out - y).square().mean()
        return SimpleNamespace(loss=loss, loss_twice=2 * loss.detach(), selections=())


class Data:
    """Batches from a generator seeded by the step; steps in ``poison`` hold a NaN."""

    def __init__(self, poison: tuple[int, ...] = (), rows: int = 6) -> None:
        self.poison, self.rows = poison, rows

    def batch(self, step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(self.rows, 4, generator=generator)
        y = torch.full((self.rows,), torch.nan) if step in self.poison else x.sum(1)
        return {"x": x, "y": y, "sources": [f"shard.tar:{step}-{i}" for i in range(self.rows)]}

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        return (self.batch(step) for step in range(start_step, start_step + num_steps))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_loop_by_hand(accumulate: int) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate, clip_norm=0.5)
    model, other = Toy(dropout=0.0), Toy(dropout=0.0)
    report = train(model, Data(), settings)
    optimizer = build_adamw(parameter_groups(other, settings.lr, settings.vision_lr, settings.weight_decay))
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(settings.steps):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * warmup_cosine(step, settings.steps, settings.warmup_steps, settings.lr_floor)
        micro = [Data().batch(step * accumulate + i) for i in range(accumulate)]
        loss = sum(other(batch["x"], batch["y"]).loss for batch in micro) / accumulate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, value in state(model).items():
        torch.testing.assert_close(value, state(other)[name], msg=name)
    assert report.losses["loss"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-4)
    assert report.losses["loss_twice"] == pytest.approx(2 * report.losses["loss"], rel=1e-5)
    assert (report.steps, report.resumed_from, report.skipped, report.checkpoint) == (6, 0, 0, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitwise equality is promised on a CPU")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bitwise(tmp_path: Path, accumulate: int) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate)
    straight = Toy()
    train(straight, Data(), settings)

    class Interrupted(Exception):
        pass

    def stop(info: StepInfo) -> None:
        if info.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(Toy(), Data(), dataclasses.replace(settings, save_every=3), out_dir=tmp_path, on_step=stop)
    torch.rand(7)  # the generator of the new process is elsewhere
    resumed = Toy()
    nn.init.zeros_(resumed.head.weight)
    report = train(resumed, Data(), settings, out_dir=tmp_path)
    assert report.resumed_from == 3
    assert same(state(straight), state(resumed))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert not same(state(straight), state(Toy()))


def test_dropout_is_on_and_seeded() -> None:
    ends = []
    for seed in (0, 0, 1):
        model = Toy()
        train(model, Data(), dataclasses.replace(SETTINGS, seed=seed))
        ends.append(state(model))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_finished_run_does_nothing_but_evaluate(tmp_path: Path) -> None:
    model = Toy()
    first = train(model, Data(), SETTINGS, out_dir=tmp_path)
    again = Toy()
    report = train(again, Data(), SETTINGS, out_dir=tmp_path, evaluator=lambda m: {"bias": m.head.bias.item()})
    assert same(state(model), state(again)) and report.checkpoint == first.checkpoint
    assert report.resumed_from == 6 and report.evaluation == {"bias": model.head.bias.item()}
    assert report.samples_per_second == 0
    anew = train(Toy(), Data(), dataclasses.replace(SETTINGS, steps=4), out_dir=tmp_path, resume="never")
    assert anew.resumed_from == 0 and [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-00000004.pt"
    ]
    with pytest.raises(CheckpointError, match="beyond the end"):
        train(Toy(), Data(), dataclasses.replace(SETTINGS, steps=2), out_dir=tmp_path)


def test_evaluation_does_not_change_the_run() -> None:
    plain, evaluated, calls = Toy(), Toy(), []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        calls.append(float(torch.rand(())))
        return {"accuracy": 0.5}

    train(plain, Data(), SETTINGS)
    report = train(evaluated, Data(), dataclasses.replace(SETTINGS, eval_every=4), evaluator=evaluate)
    assert same(state(plain), state(evaluated)) and len(calls) == 2 and report.evaluation == {"accuracy": 0.5}


def test_schedule_reaches_the_model() -> None:
    seen = []

    class Selecting(Toy):
        def forward(self, x: Tensor, y: Tensor, *, selection: SelectionConfig, distill: bool) -> SimpleNamespace:
            seen.append((selection.keep_rate, distill))
            output = super().forward(x, y)
            if distill:
                output.loss_distill = torch.tensor(0.25)
            return output

    schedule = SelectionSchedule(SelectionConfig(learning="distill", keep_rate=0.5), 6, keep_rate_warmup=0.5, levels=2)
    report = train(Selecting(), Data(), SETTINGS, schedule=schedule)
    assert seen == [(1.0, True)] * 3 + [(0.5, False), (0.5, True), (0.5, False)]
    # Present in one of the two steps of the last window, and a mean over that one.
    assert report.losses["loss_distill"] == 0.25


def test_a_non_finite_step_changes_nothing_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    ends = []

    def note(info: StepInfo) -> None:
        ends.append([p.detach().clone() for p in model.parameters()])

    model = Toy()
    report = train(model, Data(poison=(2,)), SETTINGS, on_step=note)
    assert report.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(ends[1], ends[2]))
    assert not all(torch.equal(a, b) for a, b in zip(ends[2], ends[3]))
    assert all(p.isfinite().all() for p in model.parameters())
    assert "step 3" in caplog.text and "shard.tar:2-0" in caplog.text and "and 3 more" in caplog.text


def test_too_many_non_finite_steps_stop_the_run() -> None:
    settings = dataclasses.replace(SETTINGS, max_nonfinite=1)
    with pytest.raises(DataError, match=r"step 5: .*shard\.tar:4-0.*1 are tolerated"):
        train(Toy(), Data(poison=(1, 4)), settings)


def test_samples_of_a_non_finite_step_are_written_down(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=2, save_every=3)

    def stop(info: StepInfo) -> None:
        if info.step == 5:
            raise InterruptedError

    # Micro-batches 3 and 9 are in steps 2 and 5; the second is met again after the resume from step 3.
    with pytest.raises(InterruptedError):
        train(Toy(), Data(poison=(3, 9)), settings, out_dir=tmp_path, on_step=stop)
    assert train(Toy(), Data(poison=(3, 9)), settings, out_dir=tmp_path).skipped == 2
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["process"]) for line in lines] == [(2, 0), (5, 0)]
    assert lines[0]["sources"] == [f"shard.tar:{micro}-{i}" for micro in (2, 3) for i in range(6)]
    assert lines[0]["losses"] == {"loss": "nan", "loss_twice": "nan"}
    train(Toy(), Data(), settings, out_dir=tmp_path, resume="never")
    assert not (tmp_path / "nonfinite.jsonl").exists()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_start_step_is_called_once_before_every_optimizer_step(tmp_path: Path, accumulate: int) -> None:
    calls: list[object] = []

    class Starting(Toy):
        def start_step(self, step: int) -> None:
            calls.append(step)

        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            calls.append("forward")
            return super().forward(x, y)

    settings = dataclasses.replace(SETTINGS, steps=2, accumulate=accumulate)
    train(Starting(), Data(), settings, out_dir=tmp_path)
    assert calls == [0, *["forward"] * accumulate, 1, *["forward"] * accumulate]
    calls.clear()
    train(Starting(), Data(), dataclasses.replace(settings, steps=3), out_dir=tmp_path)
    assert calls == [2, *["forward"] * accumulate]


def test_the_contrastive_batch_is_a_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    class Contrastive(Toy):
        contrastive = True

    with caplog.at_level("INFO", logger="trips"):
        report = train(Contrastive(), Data(), dataclasses.replace(SETTINGS, accumulate=4))
    assert report.contrastive_batch == 6 and train(Toy(), Data(), SETTINGS).contrastive_batch is None
    told = [record.message for record in caplog.records if "contrastive" in record.message]
    assert len(told) == 1 and "compares 6 samples" in told[0] and "4 micro-batches" in told[0]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save

    def fill(value: Any, file: Any) -> None:
        if value["step"] == 4:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(value, file)

    monkeypatch.setattr(torch, "save", fill)
    settings = dataclasses.replace(SETTINGS, save_every=2, keep_last=1)
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt: cannot be written.*No space left"):
        train(Toy(), Data(), settings, out_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert train(Toy(), Data(), settings, out_dir=tmp_path).resumed_from == 2


@pytest.mark.parametrize("crash", ["exception", "kill"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    class Killed(BaseException):
        """No handler of ours sees a kill."""

    real, error = os.replace, OSError("no space left") if crash == "exception" else Killed()

    def replace(source: Path, target: Path) -> None:
        if "00000004" in str(target):
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    settings = dataclasses.replace(SETTINGS, save_every=2, keep_last=1)
    with pytest.raises(CheckpointError if crash == "exception" else Killed):
        train(Toy(), Data(), settings, out_dir=tmp_path)
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000002.pt"]
    model, straight = Toy(), Toy()
    assert train(model, Data(), settings, out_dir=tmp_path).resumed_from == 2
    train(straight, Data(), SETTINGS)
    assert same(state(model), state(straight)) or torch.cuda.is_available()
    assert [p.name for p in folder.iterdir()] == ["step-00000006.pt"]


def test_rotation(tmp_path: Path) -> None:
    train(Toy(), Data(), dataclasses.replace(SETTINGS, save_every=1, keep_last=2), out_dir=tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005.pt", "step-00000006.pt"]


def test_damaged_checkpoints(tmp_path: Path) -> None:
    train(Toy(), Data(), dataclasses.replace(SETTINGS, save_every=3), out_dir=tmp_path)
    old, new = list_checkpoints(tmp_path / "checkpoints")
    new.write_bytes(new.read_bytes()[:1000])
    assert train(Toy(), Data(), SETTINGS, out_dir=tmp_path).resumed_from == 3  # the one before
    old.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt"):
        train(Toy(), Data(), SETTINGS, resume=old)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(Toy(), Data(), SETTINGS, resume=tmp_path / "absent.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        read_checkpoint(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(old, {"step": 9})  # a file where the folder should be


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    train(Toy(), Data(), SETTINGS, out_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"vision\.weight of shape \(8, 4\) for \(9, 4\)"):
        train(Toy(width=9), Data(), SETTINGS, out_dir=tmp_path)


def test_changed_settings_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Toy(), Data(), SETTINGS, out_dir=tmp_path)
    train(Toy(), Data(), dataclasses.replace(SETTINGS, steps=8, log_every=5), out_dir=tmp_path)
    assert "steps 6 -> 8" in caplog.text and "log_every" not in caplog.text


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="accumulate"):
        dataclasses.replace(SETTINGS, accumulate=0)
    with pytest.raises(ConfigError, match="precision"):
        dataclasses.replace(SETTINGS, precision="fp8")
    with pytest.raises(ConfigError, match="parallel.*auto | ddp | fsdp"):
        dataclasses.replace(SETTINGS, parallel="tensor")
    with pytest.raises(DataError, match="step 3"):
        short = SimpleNamespace(batches=lambda start, num: Data().batches(start, 2))
        train(Toy(), short, SETTINGS)

    class Lossless(Toy):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"logits": x}

    with pytest.raises(ConfigError, match="Lossless: .*no scalar loss"):
        train(Lossless(), Data(), SETTINGS)


def test_bfloat16_runs_and_keeps_float32_parameters() -> None:
    seen = []

    class Noting(Toy):
        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            seen.append(self.vision(x).dtype)
            return super().forward(x, y)

    model = Noting()
    train(model, Data(), dataclasses.replace(SETTINGS, precision="bf16"))
    assert set(seen) == {torch.bfloat16} and model.head.weight.dtype == torch.float32
