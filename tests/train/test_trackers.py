"""Trackers of accelerate: events that TensorBoard itself can read, any tracker by name, names that are none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from distributed.scenarios import LONG, SETTINGS, Toy, ToyData

from trips.errors import ConfigError, MissingDependencyError
from trips.train import trackers
from trips.train.loop import train
from trips.train.settings import StepInfo

accelerate_tracking = pytest.importorskip("accelerate.tracking")
LoggerType = accelerate_tracking.LoggerType


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of every tag that TensorBoard finds."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_is_the_default_and_survives_a_resume(tmp_path: Path) -> None:
    settings = dataclasses.replace(LONG, save_every=4, trackers=("tensorboard",))

    def stop(info: StepInfo) -> None:
        if info.step == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(Toy(), ToyData(), settings, out_dir=tmp_path, on_step=stop)
    train(Toy(), ToyData(), settings, out_dir=tmp_path, evaluator=lambda model: {"accuracy": 0.5})
    found = scalars(tmp_path / "tensorboard" / "trips")
    assert found["train/loss"] == list(range(1, 9)) and found["evaluation/accuracy"] == [8]
    assert {"train/lr", "train/vision_lr", "train/samples_per_second", "train/skipped"} <= set(found)


def test_any_tracker_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple] = []

    class Notes(accelerate_tracking.GeneralTracker):
        name, requires_logging_directory = "wandb", False

        def __init__(self, run_name: str) -> None:
            super().__init__()
            told.append(("opened", run_name))

        @property
        def tracker(self) -> None:
            return None

        def start(self) -> None:
            pass

        def store_init_configuration(self, values: dict) -> None:
            told.append(("settings", values["lr"]))

        def log(self, values: dict, step: int | None = None) -> None:
            told.append((step, sorted(values)))

        def finish(self) -> None:
            told.append(("finished",))

    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "wandb", Notes)
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [LoggerType.WANDB])
    train(Toy(), ToyData(), dataclasses.replace(SETTINGS, trackers=("wandb",)), out_dir=tmp_path)
    assert told[:2] == [("opened", "trips"), ("settings", 1e-3)] and told[-1] == ("finished",)
    assert [entry[0] for entry in told[2:-1]] == [1, 2] and "train/loss" in told[2][1]
    assert not (tmp_path / "tensorboard").exists()


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="trackers: accelerate has no such tracker; found 'tensorbord'"):
        train(Toy(), ToyData(), dataclasses.replace(SETTINGS, trackers=("tensorbord",)), out_dir=tmp_path)
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    with pytest.raises(MissingDependencyError, match="wandb"):
        train(Toy(), ToyData(), dataclasses.replace(SETTINGS, trackers=("wandb",)), out_dir=tmp_path)


def test_a_missing_tensorboard_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    monkeypatch.setattr(trackers, "_missing_board_told", False)
    settings = dataclasses.replace(SETTINGS, trackers=("tensorboard",))
    for name in ("a", "b"):
        assert train(Toy(), ToyData(), settings, out_dir=tmp_path / name).steps == 2
        assert (tmp_path / name / "metrics.jsonl").is_file() and not (tmp_path / name / "tensorboard").exists()
    assert caplog.text.count("no TensorBoard events") == 1
