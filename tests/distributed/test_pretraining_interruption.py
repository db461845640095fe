"""A pre-training run that is killed goes on with the samples and the losses of one that was not.

Shuffled shards, two corpora, two workers that read, queue, moving average, a ramp of the teacher's weight, full-patch
steps: all of it is at another place in every step of the run, and 21 steps follow the kill.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.pretraining_runs import KEYS, recorded, steps, write_shards

from trips.train.checkpoint import list_checkpoints, read_checkpoint
from trips.train.recipe_io import load_recipe
from trips.train.run import run_recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bitwise equality is promised on a CPU")

SCRIPT, SOURCE = Path(__file__).with_name("pretraining_runs.py"), Path(__file__).resolve().parents[2] / "src"
STRUCK, SAVED = 11, 9  # the step after which the signal comes, in the second epoch; the checkpoint before it


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shards: dict[str, Any]) -> Path:
    """Folder of the uninterrupted run, without workers."""
    folder = tmp_path_factory.mktemp("straight")
    train_on(folder, shards)
    return folder


def train_on(folder: Path, shards: dict[str, Any], **changes: Any) -> dict[str, Any]:
    with recorded(folder / "steps-0.jsonl"):
        return run_recipe(load_recipe("debug/pretrain_tiny", {**keys_of(folder, shards), **changes}))


def keys_of(folder: Path, shards: dict[str, Any]) -> dict[str, Any]:
    return {**KEYS, **shards, "run.out": str(folder / "out")}


def command(folder: Path, shards: dict[str, Any], **changes: Any) -> list[str]:
    keys = {**keys_of(folder, shards), **changes}
    return [str(SCRIPT), str(folder), *(f"--{key}={value}" for key, value in keys.items())]


def environment(**more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted workers find addresses of dead ones there
    return {**os.environ, **own, "TRIPS_TEST_STEP": str(STRUCK), **more}


def assert_same_end(folder: Path, straight: Path) -> None:
    """All that a checkpoint holds, to the bit: weights, teacher, queue, moments, random states."""
    ends = [read_checkpoint(list_checkpoints(run / "out" / "checkpoints")[-1]) for run in (folder, straight)]
    assert ends[0]["step"] == ends[1]["step"] == KEYS["optim.steps"]
    assert any(name.startswith("momentum.") for name in ends[0]["model"]) and "queue.pointer" in ends[0]["model"]
    assert not torch.equal(
        *(ends[0]["model"][f"{part}trips.text.embeddings.word_embeddings.weight"] for part in ("", "momentum."))
    )
    assert_equal(ends[0], ends[1], "checkpoint")


def assert_equal(a: Any, b: Any, name: str) -> None:
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{name}.{i}")
    else:
        assert a == b, name


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM"])
def test_killed_in_the_middle_of_an_epoch(tmp_path: Path, shards: dict[str, Any], straight: Path, sent: str) -> None:
    """SIGKILL hits the training process alone; SIGTERM all of its group, as a scheduler sends it: its workers too.

    The run that it is compared with has no workers.
    """
    group = {} if sent == "SIGKILL" else {"TRIPS_TEST_GROUP": "1"}
    process = subprocess.run(
        [sys.executable, *command(tmp_path, shards, **{"data.num_workers": 2})],
        env=environment(TRIPS_TEST_SIGNAL=str(int(signal.Signals[sent])), **group),
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert process.returncode == (-signal.SIGKILL if sent == "SIGKILL" else 0), process.stderr[-3000:]
    assert not (tmp_path / "out" / "results.json").exists() and not (tmp_path / "out" / "model").exists()
    whole, before = steps(straight / "steps-0.jsonl"), steps(tmp_path / "steps-0.jsonl")
    (tmp_path / "steps-0.jsonl").unlink()
    results = train_on(tmp_path, shards, **{"data.num_workers": 2})
    after = steps(tmp_path / "steps-0.jsonl")
    begin = SAVED if sent == "SIGKILL" else STRUCK + 1  # SIGTERM: the flag is read after the step that follows
    assert len(before) == max(STRUCK, begin) and len(after) == KEYS["optim.steps"] - begin >= 18
    assert before == whole[: len(before)] and after == whole[begin:]
    assert_same_end(tmp_path, straight)
    assert results["steps"] == KEYS["optim.steps"]


def test_two_nodes_whose_worker_is_killed_go_on_by_themselves(
    tmp_path: Path, shards: dict[str, Any], straight: Path
) -> None:
    """Two agents of torchrun on loopback: one worker dies once, both are started anew, the run goes on and ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "trips"]
    launcher += ["--local-addr", "127.0.0.1"]
    agents = []
    for node in range(2):
        with open(tmp_path / f"node-{node}.log", "w") as log:
            agents.append(
                subprocess.Popen(
                    [*launcher, "--node-rank", str(node), *command(tmp_path, shards)],
                    env=environment(TRIPS_TEST_SIGNAL=str(int(signal.SIGKILL))),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [agent.wait(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    logs = [(tmp_path / f"node-{node}.log").read_text() for node in range(2)]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert (tmp_path / "struck").exists() and any("resumed from" in log for log in logs)
    # Every step from the last checkpoint on was computed twice by each process, with the same result, or once.
    total, seen = KEYS["optim.steps"], []
    for rank in range(2):
        lines = steps(tmp_path / f"steps-{rank}.jsonl")
        numbers = [line["step"] for line in lines]
        assert numbers in [[*range(1, last + 1), *range(SAVED + 1, total + 1)] for last in (STRUCK - 1, STRUCK)]
        seen.append({line["step"]: line for line in lines})
        assert all(line == seen[-1][line["step"]] for line in lines)
    for line in steps(straight / "steps-0.jsonl"):
        assert line["sources"] == [source for of_rank in seen for source in of_rank[line["step"]]["sources"]]
    logged = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, total + 1))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["environment"]["processes"] == 2
