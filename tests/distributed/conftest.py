"""Starts two processes once for all tests that compare with them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPT, SOURCE = Path(__file__).with_name("scenarios.py"), Path(__file__).resolve().parents[2] / "src"


def start(scenario: str, folder: Path, world: int = 1, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a scenario in processes of its own, as a launcher would start them; waits for the end of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    shared = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        running.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), scenario, str(folder)],
                env={**os.environ, **shared, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [
            subprocess.CompletedProcess(process.args, process.returncode, output)
            for process, output in [(process, process.communicate(timeout=240)[0]) for process in running]
        ]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="session")
def start_scenario() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """`start`, which is made for a CPU."""
    if torch.cuda.is_available():
        pytest.skip("made for processes on a CPU")
    return start


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory, start_scenario: Callable) -> Path:
    """Folder of what two processes wrote, started in accelerate's environment for FSDP."""
    folder = tmp_path_factory.mktemp("two")
    ended = start_scenario("together", folder, world=2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert [process.returncode for process in ended] == [0, 0], "\n".join(process.stdout[-3000:] for process in ended)
    return folder
