"""Checkpointed gradients and a compiled forward change what a step costs, not what it computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distributed.scenarios import SETTINGS, Repeated, Toy, ToyData, vqa_batch
from tiny import FAMILIES, tiny_vqa_model
from torch import Tensor, nn

from trips.errors import ConfigError
from trips.train import parallel
from trips.train.loop import train
from trips.train.schedule import SelectionSchedule


def trained(family: str, **changes: object) -> tuple[dict[str, Tensor], list[int]]:
    """State after two steps, and how often each layer's norm between attention and FFN ran."""
    model = tiny_vqa_model(family=family, learning="distill")
    counts = [0] * 4

    def count(index: int) -> None:
        counts[index] += 1

    for index, layer in enumerate(model.trips.vision.reader.layers):
        norm = getattr(layer, model.trips.vision.reader.family.ffn_norm)
        norm.register_forward_hook(lambda *_, index=index: count(index))
    schedule = SelectionSchedule(model.config.selection, 2, distill_every=2)
    train(model, Repeated(vqa_batch, 0, 1), dataclasses.replace(SETTINGS, **changes), schedule=schedule)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return model.state_dict(), counts


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_gradients_are_the_same(family: str) -> None:
    (plain, ran), (checkpointed, ran_again) = trained(family), trained(family, gradient_checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=0, msg=name)
    # Layers 2 and 3 select: their norm also prepares the scores, once a step, which is not computed again.
    assert ran == [2, 4, 4, 2] and ran_again == [4, 6, 6, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitwise equality is promised on a CPU")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward_is_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    real = torch._dynamo.lookup_backend(backend)
    monkeypatch.setattr(parallel, "COMPILE_BACKEND", lambda graph, inputs: graphs.append(graph) or real(graph, inputs))
    plain, compiled = Toy(), Toy()
    train(plain, ToyData(), SETTINGS)
    train(compiled, ToyData(), dataclasses.replace(SETTINGS, compile=True))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert graphs
    seen = len(graphs)
    torch._dynamo.reset()
    compiled(torch.zeros(3, 4), torch.zeros(3))  # the caller's model is again what it was
    assert len(graphs) == seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitwise equality is promised on a CPU")
def test_a_compiled_task_model_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "COMPILE_BACKEND", "eager")
    plain, compiled = trained("clip", steps=1)[0], trained("clip", steps=1, compile=True)[0]
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-6, msg=name)


def test_nothing_to_checkpoint_is_an_error() -> None:
    class Plain(nn.Linear):
        pass

    with pytest.raises(ConfigError, match="Plain: has no layers that can be checkpointed"):
        train(Plain(2, 2), ToyData(), dataclasses.replace(SETTINGS, gradient_checkpointing=True))
