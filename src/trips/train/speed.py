"""How fast a run is and what it takes: samples per second, share of the device's peak (MFU), peak memory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch

from trips.train.settings import StepInfo

FlopsPerSample = float | Callable[[StepInfo], float]

# Dense peak of NVIDIA's data sheets in TFLOP/s, (bf16 with float32 sums, fp32 outside the tensor cores), by the words
# that the driver's device name must hold; the first row that fits counts.
_PEAKS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("B200",), 2250.0, 75.0),
    (("H200",), 989.0, 67.0),
    (("H100", "PCIe"), 756.0, 51.0),
    (("H100", "NVL"), 835.0, 60.0),
    (("H100",), 989.0, 67.0),
    (("A100",), 312.0, 19.5),
    (("A10G",), 70.0, 35.0),
    (("A10",), 125.0, 31.2),
    (("L40S",), 362.0, 91.6),
    (("L4",), 121.0, 30.3),
    (("4090",), 165.2, 82.6),
    (("3090",), 71.0, 35.6),
)


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Floating-point operations per second of a device at its best, None for one that is not in the table.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        bf16: of bfloat16 products, else of float32 ones.
    """
    words = device_name.replace("-", " ").split()
    for needed, half, single in _PEAKS:
        if all(word in words for word in needed):
            return (half if bf16 else single) * 1e12
    return None


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory held so far in MiB: by tensors on a GPU, else by the whole process; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10  # bytes there, KiB elsewhere


class Speedometer:
    """Counts the samples of training steps and the time they take.

    Args:
        device: of this process.
        num_processes: all are taken to do as much as this one.
        bf16: whether products are in bfloat16.
        flops_per_sample: floating-point operations that training on one sample takes, forward and backward, as a number
            or as a function of the step. None leaves the MFU out, as does a device whose peak is unknown.
    """

    def __init__(
        self, device: torch.device, num_processes: int, bf16: bool, flops_per_sample: FlopsPerSample | None = None
    ) -> None:
        self.device, self.num_processes, self.flops_per_sample = device, num_processes, flops_per_sample
        self.peak = peak_flops(torch.cuda.get_device_name(device), bf16) if device.type == "cuda" else None
        self._samples = self._lap_samples = 0
        self._lap_flops = 0.0
        self._paused = 0.0
        self._start = self._lap_start = time.perf_counter()
        self._lap_paused = 0.0

    def add(self, info: StepInfo, samples: int) -> None:
        """Count a step of this process."""
        self._samples += samples
        self._lap_samples += samples
        if self.flops_per_sample is not None:
            flops = self.flops_per_sample(info) if callable(self.flops_per_sample) else self.flops_per_sample
            self._lap_flops += samples * flops

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in which no step is made: evaluation, checkpoints."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Wall time of the steps so far."""
        return time.perf_counter() - self._start - self._paused

    @property
    def samples_per_second(self) -> float:
        """Over all processes and steps so far; 0 before the first."""
        return self._samples * self.num_processes / self.seconds if self._samples else 0.0

    def lap(self) -> dict[str, float]:
        """Figures since the last call, for the log: ``samples_per_second``, ``mfu``, ``peak_memory_mib`` (so far).

        The MFU is the share of the device's peak that the model's operations, without any recomputed ones, make up.
        """
        now = time.perf_counter()
        seconds = max(now - self._lap_start - (self._paused - self._lap_paused), 1e-9)
        figures = {"samples_per_second": self._lap_samples * self.num_processes / seconds}
        if self.flops_per_sample is not None and self.peak is not None:
            figures["mfu"] = self._lap_flops / seconds / self.peak
        memory = peak_memory_mib(self.device)
        if memory is not None:
            figures["peak_memory_mib"] = memory
        self._lap_start, self._lap_paused, self._lap_samples, self._lap_flops = now, self._paused, 0, 0.0
        return figures
