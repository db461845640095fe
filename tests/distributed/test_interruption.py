"""A run that is killed, or asked to stop, ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.scenarios import LONG, Toy, ToyData

from trips.train import signals
from trips.train.checkpoint import list_checkpoints
from trips.train.lock import LOCK_FILE
from trips.train.loop import train
from trips.train.settings import StepInfo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bitwise equality is promised on a CPU")


def losses_of(**options: Any) -> list[float]:
    """Train with dropout; the loss of every step."""
    losses: list[float] = []
    train(Toy(0.5), ToyData(), LONG, on_step=lambda info: losses.append(info.losses["loss"].item()), **options)
    return losses


def test_killed_and_resumed(tmp_path: Path, start_scenario: Callable) -> None:
    (process,) = start_scenario("killed", tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stdout
    assert (tmp_path / "run" / LOCK_FILE).read_text()  # nobody cleared it, and it stops nobody
    before = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    after, expected = losses_of(out_dir=tmp_path / "run"), losses_of()
    assert (len(before), len(after)) == (5, 4)  # the newest checkpoint was of step 4
    assert before == expected[:5] and after == expected[4:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step(tmp_path: Path, number: int) -> None:
    losses: list[float] = []

    def send(info: StepInfo) -> None:
        losses.append(info.losses["loss"].item())
        if len(losses) == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    report = train(Toy(0.5), ToyData(), LONG, out_dir=tmp_path, on_step=send)
    assert (report.interrupted, report.steps, report.checkpoint.name) == (True, 4, "step-00000004.pt")
    assert signal.getsignal(number) == before
    report = train(Toy(0.5), ToyData(), LONG, out_dir=tmp_path, on_step=send)
    assert (report.interrupted, report.steps, report.resumed_from) == (False, 8, 4)
    assert losses == losses_of()
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 9))


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    def send(info: StepInfo) -> None:
        if info.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(Toy(), ToyData(), LONG, out_dir=tmp_path, on_step=send).interrupted


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ECHO_SECONDS", -1.0)
    seen = []

    def send(info: StepInfo) -> None:
        seen.append(info.step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), ToyData(), LONG, out_dir=tmp_path, on_step=send)
    assert seen == [1] and not list_checkpoints(tmp_path / "checkpoints")
    assert signal.getsignal(signal.SIGINT) == before


def test_an_echo_of_the_first_signal_does_not_count() -> None:
    with signals.Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    reports = []
    worker = threading.Thread(target=lambda: reports.append(train(Toy(), ToyData(), LONG)))
    worker.start()
    worker.join()
    assert reports[0].steps == 8
