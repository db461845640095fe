"""Small runs that tests compare over numbers of processes: models, data, and one table of what to run.

`python scenarios.py NAME FOLDER` runs one of `SCENARIOS` in a process of its own; rank and world come from the
environment, as a launcher sets them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests share tiny.py, also in a process of its own

from distributed.reranking_runs import reranked
from tiny import ANSWER_MASK, ANSWERS, pair_batch, texts, tiny_pretraining_model, tiny_vqa_model

from trips.errors import CheckpointError
from trips.train.checkpoint import list_checkpoints
from trips.train.lock import RunLock
from trips.train.loop import train
from trips.train.schedule import SelectionSchedule
from trips.train.settings import StepInfo, TrainReport, TrainSettings

SETTINGS = TrainSettings(
    steps=2, lr=1e-3, vision_lr=1e-3, weight_decay=0.1, precision="fp32", log_every=1, clip_norm=0.5, trackers=()
)
# A constant rate: a run of four steps is the first half of one of eight.
LONG = dataclasses.replace(SETTINGS, steps=8, save_every=2, keep_last=9, lr_floor=1.0)


class Block(nn.Module):
    """What FSDP shards by itself, with a width that does not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Toy(nn.Module):
    """A regression with a frozen part, a parameter without a use, a tie, and dropout if asked for."""

    _no_split_modules = ("Block",)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.vision = nn.Linear(4, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = Block().requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.head, self.unused = nn.Linear(7, 1), nn.Parameter(torch.ones(3))
        self.again = nn.Linear(7, 1)
        self.again.weight = self.head.weight
        self.register_buffer("steps", torch.zeros(()))

    def start_step(self, step: int) -> None:
        assert step == int(self.steps)  # once before every optimizer step, whatever the accumulation
        self.steps.add_(1)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        states = self.vision(x)
        for block in self.blocks:
            states = self.dropout(block(states))
        out = self.head(states) + self.again(self.frozen(states))
        return SimpleNamespace(loss=(out[:, 0] - y).square().mean())


class ToyData:
    """Eight rows a step, this process's share of them; every row is its own source."""

    def __init__(self, rank: int = 0, world: int = 1, poison: tuple[tuple[int, int], ...] = ()) -> None:
        self.rank, self.world, self.poison = rank, world, poison

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        for step in range(start_step, start_step + num_steps):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            y = x.sum(dim=1)
            for bad_step, row in self.poison:
                if bad_step == step:
                    y[row] = torch.nan
            own = slice(self.rank * 8 // self.world, (self.rank + 1) * 8 // self.world)
            yield {"x": x[own], "y": y[own], "sources": [f"row {step}-{i}" for i in range(8)[own]]}


class Repeated:
    """Batches made by a function of (seed, rank, world)."""

    def __init__(self, make: Callable[[int, int, int], dict[str, Any]], rank: int, world: int) -> None:
        self.make, self.rank, self.world = make, rank, world

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        return (self.make(step + 2, self.rank, self.world) for step in range(start_step, start_step + num_steps))


def vqa_batch(seed: int, rank: int, world: int) -> dict[str, Tensor]:
    """Four images with a question and an answer each."""
    ids, mask = texts(4, seed=seed)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    whole = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    whole |= {"answer_ids": ANSWERS, "answer_mask": ANSWER_MASK}
    return {name: value[rank * 4 // world : (rank + 1) * 4 // world] for name, value in whole.items()}


def pretraining_batch(seed: int, rank: int, world: int) -> dict[str, Any]:
    """Four pairs, of which each process of two has two, and one masked word in each."""
    whole, own = pair_batch(4, seed=seed), slice(rank * 4 // world, (rank + 1) * 4 // world)
    length, first = whole["input_ids"].shape[1], own.start
    rows = torch.arange(4)[own]
    batch = {name: whole[name][own] for name in ("pixel_values", "input_ids", "attention_mask", "image_ids")}
    batch["caption_ids"] = whole["caption_ids"][own]
    batch["mlm_positions"] = (rows - first) * length + 1
    batch["mlm_labels"] = batch["input_ids"][:, 1].clone()
    batch["mlm_input_ids"] = batch["input_ids"].clone()
    batch["mlm_input_ids"][:, 1] = 1
    return batch


class PretrainingWithGivenNegatives(nn.Module):
    """Negatives are drawn at random, and never the same over two numbers of processes: here each pair has its own."""

    contrastive = True

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        options = {"negatives": "global", "queue_size": 9}
        self.model = tiny_pretraining_model(options, learning="distill").train()

    def start_step(self, step: int) -> None:
        self.model.start_step(step)

    def forward(self, **batch: Any) -> Any:
        # The first pair's negative is the last pair, and so on: rows 1 and 2 show one image.
        everywhere = torch.tensor([3, 0, 0, 0])
        rank = int(os.environ.get("RANK", "0")) if self.world > 1 else 0
        own = everywhere[rank * 4 // self.world : (rank + 1) * 4 // self.world]
        return self.model(**batch, negatives=(own, own))


def data_of(make: Callable[[int, int, int], dict[str, Any]], rank: int, world: int) -> Repeated:
    return Repeated(make, rank, world)


def run(kind: str, mode: str, out: Path | None, rank: int = 0, world: int = 1, **changes: Any) -> TrainReport:
    """Train one of the three models; the parameters at the end stand in the last checkpoint."""
    settings = dataclasses.replace(SETTINGS, parallel=mode, **changes)
    if kind == "toy":
        model = Toy()
        for parameter in model.parameters():
            parameter.data.add_(rank)  # the first process's values are what counts
        return train(model, ToyData(rank, world), dataclasses.replace(settings, accumulate=2), out_dir=out)
    if kind == "vqa":
        model, make = tiny_vqa_model(learning="distill"), vqa_batch
        selection = model.config.selection
    else:
        model, make = PretrainingWithGivenNegatives(world), pretraining_batch
        selection = model.model.config.selection
    schedule = SelectionSchedule(selection, settings.steps, distill_every=2)
    return train(model, data_of(make, rank, world), settings, schedule=schedule, out_dir=out)


KINDS = ("toy", "vqa", "pretraining")


def equality(out: Path, rank: int, world: int) -> None:
    """Every model by DDP and by FSDP, which is what accelerate's environment asks for here."""
    for kind in KINDS:
        for mode in ("ddp", "auto"):
            report = run(kind, mode, out / f"{kind}-{mode}", rank, world)
            if rank == 0:
                told = {"losses": report.losses, "contrastive_batch": report.contrastive_batch}
                (out / f"{kind}-{mode}.json").write_text(json.dumps(told))


def interchange(out: Path, rank: int, world: int) -> None:
    """Four steps by one, four more by the other; the finished model of FSDP is whole in every process."""
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        folder = out / f"{first}-{second}"
        train(Toy(), ToyData(rank, world), dataclasses.replace(LONG, parallel=first, steps=4), out_dir=folder)
        model, seen = Toy(), []
        report = train(
            model,
            ToyData(rank, world),
            dataclasses.replace(LONG, parallel=second),
            out_dir=folder,
            evaluator=lambda whole: {"bias": whole.head.bias.item()},
            on_step=lambda info, seen=seen: seen.append(info.step),
        )
        assert report.resumed_from == 4 and seen == [5, 6, 7, 8]
        assert rank or report.evaluation == {"bias": model.head.bias.item()}
        torch.save(model.state_dict(), out / f"{first}-{second}-{rank}.pt")


def signalled(out: Path, rank: int, world: int) -> None:
    """A signal to the second process alone ends both after the same step; both go on to the end."""

    def send(info: StepInfo) -> None:
        if info.step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for mode in ("ddp", "fsdp"):
        settings = dataclasses.replace(LONG, parallel=mode, save_every=0)
        straight, stopped = Toy(0.5), Toy(0.5)
        train(straight, ToyData(rank, world), settings)
        report = train(stopped, ToyData(rank, world), settings, out_dir=out / mode, on_step=send)
        assert (report.interrupted, report.steps) == (True, 4), report
        assert [path.name for path in list_checkpoints(out / mode / "checkpoints")] == ["step-00000004.pt"]
        report = train(stopped, ToyData(rank, world), settings, out_dir=out / mode)
        assert not report.interrupted and report.resumed_from == 4
        ends = (straight.state_dict(), stopped.state_dict())
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), mode


def poisoned(out: Path, rank: int, world: int) -> None:
    """A bad sample in the second process: both leave the step out, and the first writes down whose it was."""
    for mode in ("ddp", "fsdp"):
        model = Toy()
        data = ToyData(rank, world, poison=((1, 5),))
        report = train(model, data, dataclasses.replace(SETTINGS, parallel=mode, steps=3), out_dir=out / mode)
        assert report.skipped == 1 and all(p.isfinite().all() for p in model.parameters())
        lines = [json.loads(line) for line in (out / mode / "nonfinite.jsonl").read_text().splitlines()]
        assert [(line["step"], line["process"]) for line in lines] == [(2, 0), (2, 1)]
        assert lines[0]["losses"]["loss"] > 0 and lines[1]["losses"]["loss"] == "nan"
        assert "row 1-5" in lines[1]["sources"] and "row 1-5" not in lines[0]["sources"]


def locked(out: Path, rank: int, world: int) -> None:
    """A second run in the folder is refused in every process, and nobody waits for another."""
    lock = RunLock(out / "run")
    if rank == 0:
        lock.acquire()
    assert_refused("another run is writing here", rank, world, out / "run", SETTINGS)
    lock.release()


def apart(out: Path, rank: int, world: int) -> None:
    """Two nodes without a common file system: the second would start anew while the first goes on."""
    folder = out / f"node-{rank}"
    train(Toy(), ToyData(rank, world), dataclasses.replace(LONG, steps=2), out_dir=folder)
    assert_refused("newest steps 2, 0.*all nodes must share", rank, world, folder, LONG)


def assert_refused(why: str, rank: int, world: int, folder: Path, settings: TrainSettings) -> None:
    with pytest.raises(CheckpointError, match=why):
        train(Toy(), ToyData(rank, world), settings, out_dir=folder)


def killed(out: Path, rank: int, world: int) -> None:
    """Killed after the fifth step; every step's loss is written down."""
    with open(out / "losses.jsonl", "w") as file:

        def note(info: StepInfo) -> None:
            file.write(json.dumps(info.losses["loss"].item()) + "\n")
            file.flush()
            if info.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        train(Toy(0.5), ToyData(), LONG, out_dir=out / "run", on_step=note)


def together(out: Path, rank: int, world: int) -> None:
    """All that needs two processes, in one start of them."""
    for scenario in (equality, interchange, signalled, poisoned, locked, apart, reranked):
        folder = out / scenario.__name__
        folder.mkdir(exist_ok=True)
        scenario(folder, rank, world)


SCENARIOS = {scenario.__name__: scenario for scenario in (together, killed)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process holds the store that the other still talks to
        torch.distributed.destroy_process_group()
