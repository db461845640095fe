"""Several images under FSDP2: two gloo processes with half a batch each against one with the whole batch.

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
from tiny import images, randomise, texts, tiny_config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trips.config import ReasoningConfig
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.train.checkpoint import gathered
from trips.train.parallel import checkpoint_layers, shard

# fusion, a distillation step, checkpointed layers
SETTINGS = {
    "merge": ("merge", False, False),
    "merge-distill": ("merge", True, True),
    "stacked": ("stacked", False, True),
    "stacked-distill": ("stacked", True, False),
}


class Root(nn.Module):
    """FSDP looks for gradients in what a root returns: the loss alone, as the training loop's does."""

    def __init__(self, model: TripsForVisualReasoning) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor | bool) -> Tensor:
        return self.model(**batch).loss


def one_pass(name: str, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Loss and gradients after a pass over the share of one process, averaged over processes."""
    fusion, distill, checkpointed = SETTINGS[name]
    config = tiny_config(learning="distill" if distill else "gate")
    config.reasoning = ReasoningConfig(fusion=fusion)
    model = randomise(TripsForVisualReasoning(config)).train()
    checkpoint_layers(model, checkpointed)
    root = Root(model)
    if size > 1:
        shard(root, torch.device("cpu"), (config.selection,))
        apart = [isinstance(layer, FSDPModule) for layer in model.trips.fusion.layer]
        assert len(apart) == (2 if fusion == "merge" else 4) and all(one != distill for one in apart)
    ids, mask = texts(4)
    whole = {"pixel_values": images(8).unflatten(0, (4, 2)), "input_ids": ids, "attention_mask": mask}
    whole["labels"] = torch.tensor([1, 0, 0, 1])
    share = slice(rank * 4 // size, (rank + 1) * 4 // size)
    loss = root(**{key: value[share] for key, value in whole.items()}, distill=distill)
    loss.backward()
    loss = loss.detach().clone()
    if size > 1:
        dist.all_reduce(loss)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss / size, **(gathered(gradients) if size > 1 else gradients)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
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
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SETTINGS)
def test_two_sharded_processes_equal_one_with_the_whole_batch(results, name) -> None:
    expected = one_pass(name)
    for found in (rank[name] for rank in results):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


if __name__ == "__main__":
    target, own_rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(own_rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{target / 'init'}", rank=own_rank, world_size=2)
    torch.save({name: one_pass(name, own_rank, 2) for name in SETTINGS}, target / f"{own_rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
