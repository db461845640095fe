"""Rates and memory by hand, and what the log holds."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from distributed.scenarios import SETTINGS, Toy, ToyData

from trips.train import speed
from trips.train.loop import train
from trips.train.settings import StepInfo
from trips.train.speed import Speedometer, peak_flops, peak_memory_mib


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def info(step: int) -> StepInfo:
    return StepInfo(step, None, False, {})


def test_laps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    meter = Speedometer(torch.device("cpu"), 3, False, lambda info: 1e6 * info.step)
    meter.peak = 1e8
    for step, samples in ((1, 10), (2, 20)):
        clock.now += 2
        meter.add(info(step), samples)
    with meter.pause():
        clock.now += 50
    first = meter.lap()
    assert first["samples_per_second"] == pytest.approx(3 * 30 / 4)
    assert first["mfu"] == pytest.approx((10 * 1e6 + 20 * 2e6) / 4 / 1e8)
    clock.now += 1
    meter.add(info(3), 5)
    second = meter.lap()
    assert (second["samples_per_second"], second["mfu"]) == pytest.approx((15.0, 5 * 3e6 / 1e8))
    assert meter.seconds == pytest.approx(5) and meter.samples_per_second == pytest.approx(3 * 35 / 5)


def test_no_step_no_rate_and_no_peak_no_mfu() -> None:
    meter = Speedometer(torch.device("cpu"), 1, True, 1e9)
    assert meter.samples_per_second == 0 and "mfu" not in meter.lap()


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
    ],
)
def test_peaks_of_the_data_sheets(name: str, half: float, single: float) -> None:
    assert (peak_flops(name, True), peak_flops(name, False)) == (half * 1e12, single * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA L400", "Some Device", ""])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name, True) is None


def test_memory_of_the_process() -> None:
    held = bytearray(64 * 2**20)
    assert 64 < peak_memory_mib(torch.device("cpu")) <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert len(held)


def test_the_log_holds_them(tmp_path: Path) -> None:
    train(Toy(), ToyData(), dataclasses.replace(SETTINGS, steps=3), out_dir=tmp_path, flops_per_sample=1e6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["samples_per_second"] > 0 and line["peak_memory_mib"] > 64
        assert ("mfu" in line) == (
            torch.cuda.is_available() and peak_flops(torch.cuda.get_device_name(), False) is not None
        )
