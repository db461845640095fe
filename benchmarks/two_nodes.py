"""Two nodes on one machine: pre-training under two agents of torchrun, with a worker killed in the middle.

    python benchmarks/two_nodes.py ../shared/data/flickr8k-mini-train-*.tar
    python benchmarks/two_nodes.py --steps 40 --kill-at 15 --save-every 10 SHARDS      # to see that it runs

Both agents stand for a node with one process each and meet on the loopback; everything else is the command of
docs/training.md, on the CPU with gloo. First the recipe debug/pretrain_tiny runs through. Then it runs again, and once
the first node has logged the step, the process on the second node is killed (SIGKILL). The agents start both anew, the
run goes on from its last checkpoint, and its losses are compared with those of the first run, step by step. The telling
lines of the second run's log are kept. Linux only: the process to kill is found in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trips.environment import describe_environment

TELLING = re.compile(
    r"resumed from|contrastive loss compares|failed \(exitcode|Worker group|new nodes from|restart_count=|worker group"
    r"|Connection (closed|reset)"
)
STEP = re.compile(r"train step (\d+)/")
RECIPE = "debug/pretrain_tiny"


def start_nodes(folder: Path, overrides: list[str]) -> list[subprocess.Popen[bytes]]:
    """Two agents, each with a log of its own in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "two-nodes"]
    launcher += ["--local-addr", "127.0.0.1", "-m", "trips.cli", "train", RECIPE, *overrides]
    shown = {"LOGLEVEL": "INFO", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # Otherwise workers that are started anew meet in the store of the dead ones, and try their addresses.
    shown["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    nodes = []
    for node in range(2):
        with open(folder / f"node-{node}.log", "wb") as log:
            nodes.append(subprocess.Popen(launcher, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **shown}))
    return nodes


def train(folder: Path, overrides: list[str], kill_at: int | None, timeout: float = 900) -> tuple[list[int], float]:
    """Run to the end; returns the agents' exit codes and the seconds it took. Kills once if asked to."""
    folder.mkdir(parents=True)
    began, nodes = time.monotonic(), start_nodes(folder, [*overrides, f"--run.out={folder / 'out'}"])
    try:
        while any(node.poll() is None for node in nodes):
            if time.monotonic() - began > timeout:
                raise SystemExit(f"no end after {timeout:.0f} s; logs in {folder}")
            if kill_at is not None and len(losses(folder)) >= kill_at:
                worker = int(Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()[0])
                os.kill(worker, signal.SIGKILL)
                kill_at = None
            time.sleep(0.02)
    finally:
        for node in nodes:
            node.terminate()
    return [node.wait() for node in nodes], time.monotonic() - began


def losses(folder: Path) -> dict[int, float]:
    """Mean loss over both nodes by step, as metrics.jsonl has it now."""
    path = folder / "out" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records}


def telling_lines(folder: Path, save_every: int) -> list[str]:
    """What the agents and the first process said of death and return; of the steps every so many."""
    kept = []
    for node in range(2):
        for line in (folder / f"node-{node}.log").read_text(encoding="utf-8", errors="replace").splitlines():
            step = STEP.search(line)
            if TELLING.search(line) or (step and int(step[1]) % save_every == 0):
                kept.append(f"node {node} | {line.strip()}")
    hidden = {str(folder): "RUN", sys.executable: "python", str(Path(sys.executable).resolve()): "python"}
    for text, shown in hidden.items():
        kept = [line.replace(text, shown) for line in kept]
    return [line[:240] for line in kept]


def main() -> None:
    """Both runs and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="WebDataset tars of image-text pairs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=int, default=120, help="step after which the worker is killed")
    parser.add_argument("--log", default="benchmarks/results/two_nodes.log", help="file for the telling lines")
    arguments = parser.parse_args()
    shards = json.dumps([str(Path(shard).resolve()) for shard in arguments.shards])
    overrides = [f"--data.train={shards}", "--data.test=[]", f"--optim.steps={arguments.steps}"]
    overrides += ["--run.log_every=1", f"--run.save_every={arguments.save_every}", "--run.precision=fp32"]
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        codes, seconds = train(whole, overrides, None)
        codes_killed, seconds_killed = train(killed, overrides, arguments.kill_at)
        expected, found = losses(whole), losses(killed)
        verdict = [
            f"without a kill: exit codes {codes}, {len(expected)} steps logged, {seconds:.0f} s",
            f"killed at step {arguments.kill_at}: exit codes {codes_killed}, {len(found)} steps logged, "
            f"{seconds_killed:.0f} s",
            f"results.json written: {(killed / 'out' / 'results.json').is_file()}",
            f"losses of all steps equal to the bit: {expected == found}; largest difference "
            f"{max((abs(expected[step] - found.get(step, float('inf'))) for step in expected), default=0.0):.2g}",
        ]
        lines = telling_lines(killed, arguments.save_every)
    environment = describe_environment()
    about = {key: environment[key] for key in ("device", "torch", "transformers", "date") if key in environment}
    head = [f"{RECIPE}, two agents of torchrun with one process each, gloo on loopback", json.dumps(about), *verdict]
    Path(arguments.log).write_text("\n".join([*head, "", *lines]) + "\n", encoding="utf-8")
    print("\n".join(verdict), f"log: {arguments.log}", sep="\n")
    if codes + codes_killed != [0] * 4 or not expected.keys() == found.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
