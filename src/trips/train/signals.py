"""Ending a run in order: signals that ask for it, and processes that must agree on the step.

A scheduler sends SIGTERM before it takes a machine back, a person presses Ctrl-C. The step is finished, a checkpoint
is saved, and `train` returns; a second signal does what it does without this module.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import Tensor

# A launcher passes on what the terminal has already sent to every process: within a second it is the same signal.
_ECHO_SECONDS = 1.0


class Interruption:
    """Notes the first SIGTERM or SIGINT instead of dying of it, as a context manager.

    Outside the main thread, where python delivers no signals, it changes nothing.

    Attributes:
        requested: whether one has arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > _ECHO_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)


def leave_to_parent(_: int = 0) -> None:
    """Let only the parent end this process: the ``worker_init_fn`` of workers that read data.

    A terminal and many schedulers signal every process of a run alike, but the step that is to be finished needs its
    data, and a parent whose workers die loses it with all since the last checkpoint. Where the system does not tell
    who sent a SIGTERM (macOS, Windows), only Ctrl-C is kept off.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the thread below, and all after it
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)


class Agreement:
    """What all processes must decide alike: whether a step counts, and whether it is the last.

    One reduction of two numbers per step. A GPU is not waited for: there the answer to `stop` is that of the step
    before, which is the same step in every process.

    Args:
        device: where the flags live.
        num_processes: processes of the run.
    """

    def __init__(self, device: torch.device, num_processes: int) -> None:
        self.device, self.num_processes = device, num_processes
        self._lag = 0 if device.type == "cpu" else 1
        self._answers: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._stop = False

    def exchange(self, finite: Tensor, stop: bool) -> Tensor:
        """Tell the own flags of a step; returns whether it is finite everywhere, a scalar bool on the device."""
        if self.num_processes == 1:
            self._stop = stop
            return finite
        flags = torch.stack([(~finite).float(), torch.full_like(finite, stop, dtype=torch.float32)])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        if self._lag:
            answer = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._answers.append((answer, event))
        else:
            self._answers.append((flags, None))
        return flags[0] == 0

    def stop(self) -> bool:
        """Whether any process wants to stop; the same in all of them. Asked once after every `exchange`."""
        if len(self._answers) > self._lag:
            answer, event = self._answers.pop(0)
            if event is not None:
                event.synchronize()
            self._stop = bool(answer[1])
        return self._stop
