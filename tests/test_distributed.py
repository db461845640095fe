"""Gathering: the identity in one process, and two gloo processes against one with the whole batch.

The two processes run this file as a program, see the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trips.distributed import all_gather, all_gather_with_gradient, world
from trips.errors import ShapeError
from trips.losses import itc_loss, positive_mass
from trips.momentum import FeatureQueue, update_momentum

PROCESSES, ROWS = 2, 3


def test_one_process_is_the_identity() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert world() == (0, 1)
    assert torch.equal(all_gather(rows), rows) and not all_gather(rows).requires_grad
    all_gather_with_gradient(rows).square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows.detach())


@pytest.mark.parametrize("gather", [all_gather, all_gather_with_gradient])
def test_a_number_has_no_rows(gather) -> None:
    with pytest.raises(ShapeError, match="rows"):
        gather(torch.tensor(1.0))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images and texts of all processes with ids; two texts of one image sit in different processes."""
    torch.manual_seed(3)
    return torch.randn(6, 5), torch.randn(6, 5), torch.tensor([4, 1, 2**62, 1, 3, 2**62 + 1])


def contrast(model: nn.Module, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
    """ITC over the rows of all processes, mean over the own rows."""
    image_features, text_features = F.normalize(model(image), dim=1), F.normalize(model(text), dim=1)
    targets = positive_mass(ids, all_gather(ids))
    candidates = all_gather_with_gradient(image_features), all_gather_with_gradient(text_features)
    return itc_loss(image_features, text_features, *candidates, 0.2, targets, targets)


def small_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(5, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_rows_come_in_order_of_rank(results) -> None:
    image, _, ids = batch()
    for rank, result in enumerate(results):
        assert result["world"] == (rank, PROCESSES)
        assert torch.equal(result["image"], image) and torch.equal(result["ids"], ids)
        assert torch.equal(result["flags"], ids > 2)
        assert not result["image"].requires_grad


def test_gradients_of_two_processes_are_those_of_one(results) -> None:
    model = small_model()
    loss = contrast(model, *batch())
    loss.backward()
    torch.testing.assert_close(sum(r["loss"] for r in results) / PROCESSES, loss.detach(), rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        averaged = sum(r["gradients"][name] for r in results) / PROCESSES
        torch.testing.assert_close(averaged, parameter.grad, rtol=0, atol=1e-6)
        # Without the rows of the others there would be another gradient: the test can fail.
        assert not torch.allclose(results[0]["gradients"][name], parameter.grad, atol=1e-3)


def test_backward_sums_over_processes_and_takes_the_own_rows(results) -> None:
    """Process r weighs row i of the gathered rows by (r + 1) * i."""
    for rank, result in enumerate(results):
        rows = torch.arange(ROWS, dtype=torch.float) + ROWS * rank
        torch.testing.assert_close(result["own"], (3 * rows).unsqueeze(1).expand(ROWS, 2))


def test_queue_is_the_same_in_every_process(results) -> None:
    image, text, ids = batch()
    torch.manual_seed(7)
    queue = FeatureQueue(8, 5)
    queue.enqueue(image, text, ids)
    for result in results:
        assert all(torch.equal(result["queue"][name], value) for name, value in queue.state_dict().items())


def test_moving_average_of_shards_is_that_of_the_whole(results) -> None:
    momentum, online = small_model(), small_model()
    nn.init.ones_(online.weight)
    update_momentum(momentum, online, 0.9)
    for result in results:
        for name, parameter in momentum.named_parameters():
            torch.testing.assert_close(result["shards"][name], parameter.detach(), rtol=0, atol=1e-7)


def _process(folder: Path, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES
    )
    own = slice(ROWS * rank, ROWS * (rank + 1))
    image, text, ids = (tensor[own] for tensor in batch())
    model = small_model()
    loss = contrast(model, image, text, ids)
    loss.backward()

    weighed = torch.zeros(ROWS, 2, requires_grad=True)
    # Transposed, so that the gradient arrives in an order of memory that no collective takes.
    gathered = all_gather_with_gradient(weighed.T.contiguous().T)
    ((rank + 1) * torch.arange(PROCESSES * ROWS) * gathered.T).sum().backward()

    torch.manual_seed(7)
    queue = FeatureQueue(8, 5)
    queue.enqueue(all_gather(image), all_gather(text), all_gather(ids))

    momentum, online = small_model().requires_grad_(False), small_model()
    nn.init.ones_(online.weight)
    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    fully_shard(momentum, mesh=mesh)
    fully_shard(online, mesh=mesh)
    update_momentum(momentum, online, 0.9)

    result = {
        "world": world(),
        "image": all_gather(image),
        "ids": all_gather(ids),
        "flags": all_gather(ids > 2),
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "own": weighed.grad,
        "queue": queue.state_dict(),
        "shards": {name: p.full_tensor() for name, p in momentum.named_parameters()},
    }
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    # The interpreter's own end now and then aborts ("terminate called"): gloo's threads outlive what they refer to.
    os._exit(0)


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(sys.argv[2]))
