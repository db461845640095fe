"""One run at a time in a folder: a lock that the system itself takes back from a process that dies.

Two runs in one folder would overwrite each other's checkpoints. The file says who holds the lock; that it exists says
nothing, so a killed run leaves no stale lock behind.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
from pathlib import Path

from trips.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger("trips")

LOCK_FILE = "run.lock"
_held: set[RunLock] = set()  # of this process


class RunLock:
    """Exclusive use of a run folder, as a context manager or by `acquire` and `release`.

    Args:
        folder: the run folder; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Where the file system has no locks, the run goes on without one, with a warning.

        Raises:
            CheckpointError: another run holds it, named by process and host; or the folder cannot be written.
        """
        path = self.folder / LOCK_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError("cannot be written", item=self.folder, found=str(error)) from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise CheckpointError(
                "another run is writing here",
                item=self.folder,
                found=holder,
                hint="wait for it or end it, or choose another output folder",
            ) from error
        except OSError as error:
            logger.warning("%s: no lock against a second run (%s)", self.folder, error)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the note
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        self._handle = handle
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; without one, nothing happens."""
        if self._handle is None:
            return
        _held.discard(self)
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _let_go() -> None:
    """A forked child, such as a worker that decodes images, must not keep the lock of a parent that was killed."""
    for lock in _held:
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
