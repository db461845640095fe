"""One run at a time in a folder, and no lock outlives its process."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from distributed.scenarios import SETTINGS, Toy, ToyData

from trips.errors import CheckpointError
from trips.train.lock import LOCK_FILE, RunLock
from trips.train.loop import train
from trips.train.settings import StepInfo


def test_a_second_run_names_the_first(tmp_path: Path) -> None:
    def again(info: StepInfo) -> None:
        with pytest.raises(CheckpointError, match=rf"{tmp_path.name}: another run.*process {os.getpid()} on "):
            train(Toy(), ToyData(), SETTINGS, out_dir=tmp_path, resume="never")

    report = train(Toy(), ToyData(), SETTINGS, out_dir=tmp_path, on_step=again)
    assert report.steps == 2
    train(Toy(), ToyData(), SETTINGS, out_dir=tmp_path)


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    def fail(info: StepInfo) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(Toy(), ToyData(), SETTINGS, out_dir=tmp_path, on_step=fail)
    train(Toy(), ToyData(), SETTINGS, out_dir=tmp_path)


def test_what_a_dead_run_left_behind_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere since long ago and much longer than the new one\n")
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
        assert "elsewhere" not in (tmp_path / LOCK_FILE).read_text()


def _wait(connection) -> None:
    connection.send("running")
    connection.recv()


def test_a_forked_worker_does_not_hold_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    lock, (ours, theirs) = RunLock(tmp_path), multiprocessing.Pipe()
    lock.acquire()
    worker = multiprocessing.get_context("fork").Process(target=_wait, args=(theirs,))
    worker.start()
    ours.recv()
    handle, lock._handle = lock._handle, None
    os.close(handle)  # what the system does with a killed process
    try:
        with RunLock(tmp_path):
            assert worker.is_alive()
    finally:
        ours.send(None)
        worker.join()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run").acquire()
