"""The queue against a deque, the moving average against a loop over parameters."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

from trips.errors import ConfigError, ShapeError
from trips.momentum import FeatureQueue, update_momentum


def rows_in_order(queue: FeatureQueue) -> list[tuple[int, list[float], list[float]]]:
    """From the oldest to the youngest: the ring read from its pointer."""
    start = int(queue.pointer)
    ring = zip(queue.image_ids.tolist(), queue.image_features.tolist(), queue.text_features.tolist(), strict=True)
    rows = list(ring)
    return rows[start:] + rows[:start]


@given(st.integers(1, 7).flatmap(lambda q: st.tuples(st.just(q), st.lists(st.integers(1, 3 * q), max_size=6))), seeds)
def test_queue_equals_a_deque_for_any_batch_sizes(sizes, seed) -> None:
    size, batches = sizes
    torch.manual_seed(seed)
    queue, width = FeatureQueue(size, 3), 3
    expected = deque(rows_in_order(queue), maxlen=size)
    for number, rows in enumerate(batches):
        image, text, ids = torch.randn(rows, width), torch.randn(rows, width), 100 * number + torch.arange(rows)
        queue.enqueue(image, text, ids)
        expected.extend(zip(ids.tolist(), image.tolist(), text.tolist(), strict=True))
        assert rows_in_order(queue) == list(expected)
        assert int(queue.pointer) == sum(batches[: number + 1]) % size


def test_new_queue_is_unit_rows_of_no_image_and_reset_makes_it_so_again() -> None:
    queue = FeatureQueue(9, 5)
    for _ in range(2):
        for rows in (queue.image_features, queue.text_features):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(9))
        assert not torch.equal(queue.image_features, queue.text_features)
        assert queue.image_ids.tolist() == [-1] * 9 and int(queue.pointer) == 0
        queue.enqueue(torch.full((4, 5), 7.0), torch.full((4, 5), 7.0), torch.arange(4))
        queue.reset()
    assert not list(queue.parameters())
    assert set(queue.state_dict()) == {"image_features", "text_features", "image_ids", "pointer"}


def test_queue_goes_on_from_its_state() -> None:
    first, second = FeatureQueue(5, 2), FeatureQueue(5, 2)
    first.enqueue(torch.randn(3, 2), torch.randn(3, 2), torch.arange(3))
    second.load_state_dict(first.state_dict())
    image, text, ids = torch.randn(4, 2), torch.randn(4, 2), torch.arange(4) + 2**62
    first.enqueue(image, text, ids)
    second.enqueue(image, text, ids)
    assert rows_in_order(first) == rows_in_order(second)
    assert 2**62 + 3 in first.image_ids.tolist()  # ids of 63 bits stay exact


def test_queue_takes_other_dtypes_and_no_gradient() -> None:
    queue = FeatureQueue(4, 2)
    image = torch.randn(2, 2, requires_grad=True)
    queue.enqueue(image.bfloat16(), image.double(), torch.arange(2))
    assert queue.image_features.dtype == torch.float32 and not queue.image_features.requires_grad
    assert torch.equal(queue.image_features[:2], image.detach().bfloat16().float())


def test_queue_after_the_loss_leaves_the_gradient_alone() -> None:
    """Candidates are a copy (cat), so writing into the ring before backward is allowed."""
    queue, features = FeatureQueue(4, 3), torch.randn(2, 3, requires_grad=True)
    old = queue.image_features.clone()
    loss = (features @ torch.cat([features.detach(), queue.image_features]).T).sum()
    queue.enqueue(features, features, torch.arange(2))
    loss.backward()
    torch.testing.assert_close(features.grad, (features.detach().sum(0) + old.sum(0)).expand(2, 3))


@pytest.mark.parametrize(
    ("image", "text", "ids", "name"),
    [((2, 4), (2, 3), 2, "image"), ((2, 3), (1, 3), 2, "text"), ((2, 3), (2, 3), 3, "image")],
)
def test_queue_names_what_does_not_fit(image, text, ids, name) -> None:
    queue = FeatureQueue(4, 3)
    before = rows_in_order(queue)
    with pytest.raises(ShapeError, match=name):
        queue.enqueue(torch.zeros(image), torch.zeros(text), torch.zeros(ids, dtype=torch.long))
    assert rows_in_order(queue) == before


@pytest.mark.parametrize(("size", "width", "name"), [(0, 3, "size"), (3, 0, "width"), (-1, 3, "size")])
def test_queue_needs_room(size, width, name) -> None:
    with pytest.raises(ConfigError, match=name):
        FeatureQueue(size, width)


def test_neither_reads_a_value_back() -> None:
    """Tensors of the meta device have no values: whatever reads one fails."""
    queue = FeatureQueue(4, 3).to("meta")
    rows = torch.zeros(9, 3, device="meta")
    queue.enqueue(rows, rows, torch.zeros(9, dtype=torch.long, device="meta"))
    update_momentum(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"), 0.995)


def test_enqueue_is_one_graph_under_compile() -> None:
    queue, plain = FeatureQueue(5, 2), FeatureQueue(5, 2)
    plain.load_state_dict(queue.state_dict())
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend="eager")
    for number in range(3):
        image, text, ids = torch.randn(3, 2), torch.randn(3, 2), torch.arange(3) + 3 * number
        compiled(image, text, ids)
        plain.enqueue(image, text, ids)
    assert rows_in_order(queue) == rows_in_order(plain)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@given(decay=st.floats(0, 1), steps=st.integers(1, 4), seed=seeds)
def test_moving_average_equals_a_loop(decay, steps, seed) -> None:
    torch.manual_seed(seed)
    momentum, online = small_model(), small_model()
    expected = {name: p.detach().double() for name, p in momentum.named_parameters()}
    for _ in range(steps):
        for parameter in online.parameters():
            parameter.data.normal_()
        update_momentum(momentum, online, decay)
        for name, parameter in online.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, parameter in momentum.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_moving_average_leaves_buffers_and_the_model_alone() -> None:
    momentum, online = small_model(), small_model()
    online(torch.randn(8, 3))  # moves the running mean
    model, buffers = snapshot(online), {name: b.clone() for name, b in momentum.named_buffers()}
    update_momentum(momentum, online, 0.0)
    assert all(torch.equal(value, model[name]) for name, value in online.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in momentum.named_buffers())
    assert all(torch.equal(p, model[name]) for name, p in momentum.named_parameters())  # decay 0 copies, bitwise
    still = snapshot(momentum)
    update_momentum(momentum, small_model(), 1.0)
    assert all(torch.equal(value, still[name]) for name, value in momentum.state_dict().items())


def test_moving_average_goes_by_name_and_keeps_the_ties() -> None:
    """The model has a head that the teacher lacks, and two names for one weight: it moves once."""

    class Tied(nn.Module):
        def __init__(self, head: bool) -> None:
            super().__init__()
            if head:
                self.head = nn.Linear(2, 2)
            self.words, self.decoder = nn.Embedding(5, 2), nn.Linear(2, 5)
            self.decoder.weight = self.words.weight

    momentum, online = Tied(head=False), Tied(head=True)
    expected = 0.9 * momentum.words.weight.detach() + 0.1 * online.words.weight.detach()
    momentum.requires_grad_(False)
    update_momentum(momentum, online, 0.9)
    torch.testing.assert_close(momentum.words.weight, expected)
    assert momentum.decoder.weight is momentum.words.weight


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_moving_average_refuses_a_decay_out_of_range(decay) -> None:
    with pytest.raises(ConfigError, match="decay"):
        update_momentum(small_model(), small_model(), decay)


@pytest.mark.parametrize(
    "online",
    [nn.Linear(3, 5), nn.Linear(3, 4).double(), nn.Linear(3, 4, bias=False)],
    ids=["shape", "dtype", "missing"],
)
def test_moving_average_names_the_parameter_that_does_not_fit(online) -> None:
    momentum = nn.Linear(3, 4)
    before = snapshot(momentum)
    with pytest.raises(ShapeError, match="weight|bias"):
        update_momentum(momentum, online, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in momentum.state_dict().items())


@pytest.mark.gpu
def test_no_synchronisation_on_cuda() -> None:
    queue, rows = FeatureQueue(8, 4).cuda(), torch.randn(5, 4, device="cuda")
    momentum, online, ids = nn.Linear(4, 4).cuda(), nn.Linear(4, 4).cuda(), torch.arange(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        queue.enqueue(rows, rows, ids)
        queue.enqueue(rows, rows, ids)
        update_momentum(momentum, online, 0.995)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(queue.pointer) == 2
