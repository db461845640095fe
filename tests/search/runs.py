"""An indexing run in a process of its own: `python runs.py FOLDER OUT [NUMBER]` kills itself after NUMBER batches."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from search.collections_of_noise import tiny_pipeline

from trips.search import build
from trips.search.index import ImageIndex


def run(folder: str, out: str, number: int | None = None) -> dict:
    """What a run reports and then finds: batches of 2 pictures in shards of 4."""
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(build, "SHARD_SIZE", 4):
        index = ImageIndex.build(folder, tiny_pipeline(batch_size=2), out=out, progress=progress)
    hits = [(hit.path, hit.score) for hit in index.search("a red bus", 30, rerank=0)]
    report = {name: getattr(index.report, name) for name in ("total", "computed", "kept", "removed", "bad")}
    return {**report, "hits": hits}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(*sys.argv[1:3], *map(int, sys.argv[3:]))))
