"""Pre-training runs of the packaged recipe on small shards, whose every step is written down.

`python pretraining_runs.py FOLDER [--KEY=VALUE ...]` trains in a process of its own, as a launcher may start several,
and appends to steps-RANK.jsonl in FOLDER. The environment says what befalls it: ``TRIPS_TEST_SIGNAL`` and
``TRIPS_TEST_STEP``, once, sent by the last process to itself, or with ``TRIPS_TEST_GROUP`` to its whole process group.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests share pair_shards.py, also in a process of its own

from pair_shards import sample, write_tar

from trips.train import run
from trips.train.loop import train
from trips.train.pair_data import PairTrainingData
from trips.train.recipe_io import load_recipe
from trips.train.settings import StepInfo

# Two corpora, 31 pairs an epoch: steps of 4 pairs end in the middle of shards, and 7 steps are an epoch.
KEYS = {
    "data.weights": "[1.0,0.5]",
    "data.image_size": 32,
    "data.max_text_length": 10,
    "data.shuffle_shards": 2,
    "optim.batch_size": 4,
    "optim.steps": 30,
    "run.precision": "fp32",
    "run.save_every": 3,
    "run.trackers": "[]",
    "model.pretraining.queue_size": 10,  # no multiple of the batch
    "model.selection.learning": "distill",  # every fourth step is another computation
    "schedule.alpha_ramp_epochs": 2,
}


def write_shards(folder: Path) -> dict[str, Any]:
    """Shards of two corpora without a common text, and a test part; returns the keys of a recipe that names them."""
    numbers = itertools.count()
    patterns = []
    for name, counts in (("first", [7, 4, 9, 5]), ("second", [8, 5]), ("test", [6])):
        for shard, count in enumerate(counts):
            chosen = list(itertools.islice(numbers, count))
            samples = {f"{number:05d}": {**sample(number, 2), "jpg": photo(number)} for number in chosen}
            write_tar(folder / name / f"{shard:05d}.tar", samples)
        patterns.append(str(folder / name / "*.tar"))
    return {"data.train": json.dumps(patterns[:2]), "data.test": json.dumps(patterns[2:])}


def photo(number: int) -> bytes:
    """Four by three coloured fields: no two pictures, and no two parts of one, are alike."""
    fields, buffer = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8), io.BytesIO()
    Image.fromarray(fields).resize((48, 36), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


@contextlib.contextmanager
def recorded(path: Path, after_step: Callable[[int], None] = lambda step: None) -> Iterator[None]:
    """Append a line per step of the runs inside: number, losses, and samples of this process."""
    whole, sources = PairTrainingData.batches, []

    def batches(self: PairTrainingData, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        for batch in whole(self, start_step, num_steps):
            sources.extend(batch["sources"])
            yield batch

    def note(info: StepInfo) -> None:
        losses = {name: value.item() for name, value in info.losses.items()}
        file.write(json.dumps({"step": info.step, "losses": losses, "sources": sources}) + "\n")
        file.flush()
        sources.clear()
        after_step(info.step)

    with (
        open(path, "a") as file,
        mock.patch.object(PairTrainingData, "batches", batches),
        mock.patch.object(run, "train", functools.partial(train, on_step=note)),
    ):
        yield


def steps(path: Path) -> list[dict[str, Any]]:
    """What `recorded` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(folder: Path, overrides: list[str]) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def strike(step: int) -> None:
        flag = folder / "struck"
        if rank == world - 1 and step == int(os.environ.get("TRIPS_TEST_STEP", "0")) and not flag.exists():
            flag.touch()
            number = int(os.environ["TRIPS_TEST_SIGNAL"])
            if "TRIPS_TEST_GROUP" in os.environ:  # by another process: workers obey their parent
                subprocess.run([sys.executable, "-c", f"import os; os.killpg(0, {number})"])
            else:
                os.kill(os.getpid(), number)

    with recorded(folder / f"steps-{rank}.jsonl", strike):
        run.run_recipe(load_recipe("debug/pretrain_tiny", overrides))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    main(Path(sys.argv[1]), sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
