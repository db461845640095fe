"""Pre-training: two gloo processes with half a batch each against one with the whole batch.

The two processes run this file as a program, see the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import pair_batch, tiny_pretraining_model
from torch import Tensor

SETTINGS: dict[str, dict[str, object]] = {
    "queue": {},
    "queue-global": {"negatives": "global"},
    "batch-alone": {"queue_size": 0},
    "batch-alone-global": {"queue_size": 0, "negatives": "global"},
    "literal-global": {
        "queue_size": 0, "alpha": 0.0, "negatives": "global", "itc_guide": "text", "itm_guide": "reuse",
        "mlm_guide": "full",
    },
}  # fmt: skip
ROWS = 4
LOCAL = torch.tensor([1, 0, 3, 2])  # the other pair of the same half
ACROSS = (torch.tensor([1, 3, 0, 0]), torch.tensor([2, 0, 3, 1]))


def one_pass(name: str, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Losses, gradients and queue after a pass over the share of one process, averaged over processes."""
    model = tiny_pretraining_model(SETTINGS[name]).train()
    batch, rows = pair_batch(ROWS), ROWS // size
    first, length = rank * rows, batch["input_ids"].shape[1]
    share = slice(first, first + rows)
    negatives, offset = (ACROSS, 0) if "global" in name else ((LOCAL, LOCAL), first)
    places = torch.arange(ROWS) * length + 1  # one masked token a row: then the mean of means is the mean
    batch |= {"mlm_positions": places, "mlm_labels": batch["input_ids"].flatten()[places]}
    batch = {key: value[share] for key, value in batch.items()}
    batch["mlm_positions"] = batch["mlm_positions"] - first * length
    out = model(**batch, negatives=tuple(index[share] - offset for index in negatives))
    out.loss.backward()
    found = {key: getattr(out, key) for key in ("loss_itc", "loss_itm", "loss_mlm")}
    found |= {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if size > 1:
        for value in found.values():
            dist.all_reduce(value)
            value /= size
    return found if model.queue is None else found | dict(model.queue.state_dict())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Tensor]]]:
    """What each of two processes found, per setting."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_equal_one_with_the_whole_batch(results, name) -> None:
    expected = one_pass(name)
    for found in results[name]:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


if __name__ == "__main__":
    target, own_rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{target / 'init'}", rank=own_rank, world_size=2)
    torch.save({name: one_pass(name, own_rank, 2) for name in SETTINGS}, target / f"{own_rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
