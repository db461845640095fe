"""Parameter groups are a partition by the documented rule; the schedule meets its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from trips.errors import ConfigError
from trips.train.optim import build_adamw, build_schedule, learning_rates, parameter_groups, warmup_cosine


class Toy(nn.Module):
    """Real towers of transformers under the names that task models use, with a tie and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.vision = Dinov2Model(Dinov2Config(**small, image_size=28))
        self.text = BertModel(BertConfig(**small, intermediate_size=32, vocab_size=20))
        self.head = nn.Linear(16, 20)
        self.head.weight = self.text.embeddings.word_embeddings.weight
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def test_groups_partition_the_trainable_parameters() -> None:
    model = Toy()
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 1e-4, 0.05)}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(ids) == len(set(ids)) and set(ids) == trainable
    # By the objects themselves, without names: what belongs to vision is what that module owns.
    vision = {id(p) for p in model.vision.parameters()}
    assert vision == {id(p) for name in ("vision", "vision_no_decay") for p in groups[name]["params"]}
    # Decayed: exactly the weights of linear and convolution layers and the word tables.
    tables = [model.text.embeddings.word_embeddings, model.text.embeddings.token_type_embeddings]
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] + tables
    decayed = {id(m.weight) for m in layers}
    assert decayed == {id(p) for name in ("vision", "rest") for p in groups[name]["params"]}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "vision": (1e-4, 0.05),
        "vision_no_decay": (1e-4, 0.0),
        "rest": (1e-3, 0.05),
        "rest_no_decay": (1e-3, 0.0),
    }


def test_groups_refuse_nothing_to_train_and_bad_rates() -> None:
    with pytest.raises(ConfigError, match="no trainable"):
        parameter_groups(nn.ReLU(), 1e-3, 1e-3, 0.0)
    with pytest.raises(ConfigError, match="vision_lr"):
        parameter_groups(nn.Linear(2, 2), 1e-3, -1.0, 0.0)


@given(total=st.integers(2, 400), warmup=st.integers(0, 100), floor=st.floats(0, 1))
def test_warmup_and_cosine(total: int, warmup: int, floor: float) -> None:
    warmup = min(warmup, total - 1)
    shares = [warmup_cosine(step, total, warmup, floor) for step in range(total + 5)]
    assert all(floor - 1e-9 <= share <= 1 + 1e-9 for share in shares)
    assert shares[warmup] == pytest.approx(1)
    assert shares[total:] == pytest.approx([floor] * 5)
    if warmup:  # linear: equal differences from the floor to the peak
        steps = [b - a for a, b in zip(shares[:warmup], shares[1 : warmup + 1])]
        assert shares[0] == pytest.approx(floor) and steps == pytest.approx([(1 - floor) / warmup] * warmup)
    # The cosine as torch has it, a recursion rather than this closed form.
    peak = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([peak], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=floor)
    for share in shares[warmup:total]:
        assert share == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        cosine.step()


def test_schedule_scales_each_group_by_its_own_peak() -> None:
    model = Toy()
    optimizer = build_adamw(parameter_groups(model, 1e-3, 1e-4, 0.05))
    schedule = build_schedule(optimizer, total=10, warmup=2, floor=0.1)
    seen = []
    for _ in range(10):
        seen.append(learning_rates(optimizer.param_groups))
        optimizer.step()
        schedule.step()
    assert seen[0] == pytest.approx({"lr": 1e-4, "vision_lr": 1e-5})
    assert seen[2] == pytest.approx({"lr": 1e-3, "vision_lr": 1e-4})
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    assert seen[6] == pytest.approx({"lr": 1e-3 * middle, "vision_lr": 1e-4 * middle})


def test_heads_have_a_rate_of_their_own_where_one_is_given() -> None:
    class Headed(nn.Module):
        heads = ("head",)

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    model = Headed()
    alike = {group["name"]: group for group in parameter_groups(model, 1e-3, 1e-4, 0.05)}
    assert set(alike) == {"rest", "rest_no_decay"} and len(alike["rest"]["params"]) == 2
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 1e-4, 0.05, 1e-2)}
    assert groups["head"]["params"][0] is model.head.weight and groups["head"]["lr"] == 1e-2
    assert groups["head_no_decay"]["params"][0] is model.head.bias and groups["head_no_decay"]["weight_decay"] == 0
    assert groups["rest"]["params"][0] is model.body.weight and groups["rest"]["lr"] == 1e-3
    assert learning_rates(list(groups.values())) == {"lr": 1e-3, "head_lr": 1e-2}
    with pytest.raises(ConfigError, match="head_lr"):
        parameter_groups(model, 1e-3, 1e-4, 0.05, -1.0)


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("meta", False)])
def test_all_parameters_of_a_group_are_updated_at_once(device: str, fused: bool) -> None:
    """In one fused kernel where the device has one, else by operations over lists, never one by one."""
    optimizer = build_adamw(parameter_groups(Toy().to(device), 1e-3, 1e-4, 0.05))
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (fused, not fused)
