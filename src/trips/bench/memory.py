"""What a function holds at its peak, and the largest batch that fits.

Memory is torch's own count of the bytes in tensors, on a CPU from the profiler's record of every allocation: it depends
neither on the allocator nor on what ran before, so that two subjects in one process can be compared.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trips.errors import ConfigError

_SHARE = 0.8  # of the memory that is free now: others want some too


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes in tensors while a function runs, beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would speak on stderr at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def largest_batch(fits: Callable[[int], bool], cap: int) -> int:
    """Largest batch that fits: doubling, then bisection to a sixteenth.

    Args:
        fits: whether a batch of a size does; one that is larger than one that does not is never asked for.
        cap: largest to try.
    Raises:
        ConfigError: not even a batch of one fits.
    """
    if cap < 1:
        raise ConfigError("not a batch size", item="max_batch", found=cap, expected=">= 1")
    if not fits(1):
        raise ConfigError("not even one pair fits into the memory of this device", item="batch_sizes")
    good, bad = 1, cap + 1
    while good < cap and good * 2 < bad:
        size = good * 2
        if fits(size):
            good = size
        else:
            bad = size
    if good < cap < bad and fits(cap):
        return cap
    bad = min(bad, cap)
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def fitting(run: Callable[[int], Any], device: torch.device) -> Callable[[int], bool]:
    """Whether a batch fits: on a GPU it is tried, on a CPU told from the peaks of one pair and of two.

    On a CPU too large a batch would not fail but start to swap, or end the process.

    Args:
        run: makes a batch of a size and runs it.
        device: where.
    """
    if device.type == "cuda":
        return lambda size: _runs(run, size, device)
    free = free_bytes()
    if free is None:
        return lambda size: True
    one, two = (peak_bytes(lambda size=size: run(size), device) for size in (1, 2))
    return lambda size: one + (size - 1) * max(0, two - one) <= _SHARE * free


def free_bytes() -> int | None:
    """Memory of this machine that is free for new work; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _runs(run: Callable[[int], Any], size: int, device: torch.device) -> bool:
    try:
        run(size)
        torch.cuda.synchronize(device)
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
