"""Two processes with half a batch each compute what one does with the whole, by DDP and by FSDP."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from distributed.scenarios import KINDS, LONG, Toy, ToyData, run

from trips.train.checkpoint import list_checkpoints, read_checkpoint
from trips.train.loop import train


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Report and checkpoint of every model, trained here."""
    found = {}
    for kind in KINDS:
        report = run(kind, "auto", tmp_path_factory.mktemp(kind))
        found[kind] = report, read_checkpoint(report.checkpoint)
    return found


# "auto" is FSDP in the environment that accelerate's launcher makes for it.
@pytest.mark.parametrize("mode", ["ddp", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(two_processes: Path, one_process: dict[str, tuple], kind: str, mode: str) -> None:
    folder = two_processes / "equality" / f"{kind}-{mode}"
    report, one = one_process[kind]
    (path,) = list_checkpoints(folder / "checkpoints")
    two, told = read_checkpoint(path), json.loads(folder.with_suffix(".json").read_text())
    assert told["losses"] == pytest.approx(report.losses, rel=1e-5)
    assert told["contrastive_batch"] == report.contrastive_batch == (4 if kind == "pretraining" else None)
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        # A key bias shifts all scores of a softmax alike: its gradient is rounding, which Adam blows up to a step.
        if not name.endswith(("key.bias", "k_proj.bias")):
            torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-5, msg=name)
    moments = one["optimizer"]["state"], two["optimizer"]["state"]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[0].items():
        torch.testing.assert_close(moments[1][index], values, rtol=1e-4, atol=1e-7, msg=str(index))


def test_both_share_the_model_as_they_say(two_processes: Path) -> None:
    """Their sums are rounded in another order, so equal bits would mean that one of them never ran."""
    states = [
        read_checkpoint(list_checkpoints(two_processes / "equality" / f"vqa-{mode}" / "checkpoints")[-1])["model"]
        for mode in ("ddp", "auto")
    ]
    assert not all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("order", ["ddp-fsdp", "fsdp-ddp"])
def test_checkpoints_are_interchangeable(two_processes: Path, order: str, tmp_path: Path) -> None:
    folder = two_processes / "interchange"
    straight, resumed = Toy(), Toy()
    train(straight, ToyData(), dataclasses.replace(LONG, save_every=0))
    checkpoint = folder / order / "checkpoints" / "step-00000004.pt"
    report = train(resumed, ToyData(), LONG, resume=checkpoint)  # of two processes, by one
    assert report.resumed_from == 4
    ends = [torch.load(folder / f"{order}-{rank}.pt") for rank in (0, 1)] + [resumed.state_dict()]
    for name, value in straight.state_dict().items():
        for end in ends:
            torch.testing.assert_close(end[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("scenario", ["signalled", "poisoned", "locked", "apart"])
def test_processes_agree(two_processes: Path, scenario: str) -> None:
    """The scenario's own assertions hold in both processes, which otherwise end with an error."""
    assert any((two_processes / scenario).iterdir())
