"""torch.compile: every region is one graph, and what a batch says never makes another (k is static, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import images, pair_batch, randomise, texts, tiny_config, tiny_pretraining_model, tiny_vqa_model
from torch import Tensor, nn

from trips.model import TripsModel
from trips.tasks.vqa import predicted_tokens

GRAPHS: list[Any] = []


def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Backend that notes each graph it is given and runs it as it is."""
    GRAPHS.append(graph)
    return graph


def compiled(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    torch._dynamo.reset()
    GRAPHS.clear()
    return torch.compile(function, fullgraph=fullgraph, backend=counting)


def vqa_batch(seed: int, answers: int = 4, length: int = 4) -> dict[str, Tensor]:
    """Two questions about two images with the given number of answers; what is padded differs with the seed."""
    ids, mask = texts(2, 8, seed)
    generator = torch.Generator().manual_seed(seed)
    answer_ids = torch.randint(4, 40, (answers, length), generator=generator)
    answer_mask = torch.ones_like(answer_ids)
    return {
        "pixel_values": images(2, seed=seed),
        "input_ids": ids,
        "attention_mask": mask,
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "answer_index": torch.arange(answers) % 2,
        "answer_weights": torch.rand(answers, generator=generator),
        "answer_tokens": predicted_tokens(answer_mask),
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("region", ["prefix", "suffix", "fusion", "whole"])
def test_a_region_is_one_graph_whatever_the_batch_says(region: str, training: bool) -> None:
    model = randomise(TripsModel(tiny_config(learning="gate"))).train(training)

    def given(seed: int) -> tuple[Any, ...]:
        ids, mask = texts(2, 8, seed)
        if region == "whole":
            return ids, mask, images(seed=seed)
        with torch.no_grad():
            if region == "prefix":
                return (images(seed=seed),)
            states, prefix = model.encode_text(ids, mask), model.encode_prefix(images(seed=seed))
            if region == "suffix":
                return prefix, states[:, 0]
            return states, mask, model.vision.suffix(prefix, states[:, 0]).last_hidden_state

    plain = {
        "prefix": lambda pixels: model.encode_prefix(pixels).states,
        "suffix": lambda prefix, text_cls: model.vision.suffix(prefix, text_cls).last_hidden_state,
        "fusion": lambda states, mask, image: model.fusion(states, mask, image)[0],
        "whole": lambda ids, mask, pixels: model(ids, mask, pixels).last_hidden_state,
    }[region]
    function = compiled(plain)
    with torch.set_grad_enabled(training):
        for seed in range(3):
            torch.testing.assert_close(function(*given(seed)), plain(*given(seed)), rtol=0, atol=1e-6)
    assert len(GRAPHS) == 1


def gradients(model: nn.Module, step: Callable[..., Tensor], batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    step(**batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_a_vqa_step_is_one_graph_per_kind_of_shape() -> None:
    """Batches of other questions need none; another number of answers needs one more, which then serves them all."""
    model = tiny_vqa_model().train()

    def plain(**batch: Tensor) -> Tensor:
        return model(**batch).loss

    step = compiled(plain)
    for seed in range(3):
        batch = vqa_batch(seed)
        for mine, theirs in zip(gradients(model, step, batch), gradients(model, plain, batch), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert len(GRAPHS) == 1
    for answers in (5, 6, 7, 9):
        batch = vqa_batch(answers, answers)
        torch.testing.assert_close(step(**batch), plain(**batch), rtol=0, atol=1e-5)
    assert len(GRAPHS) == 2


def test_a_pretraining_step_is_compiled_once() -> None:
    """In parts, since its settings are worked out in between, but never again for another batch."""
    model = tiny_pretraining_model({"alpha": 0.4}).train()
    chosen = torch.tensor([1, 0, 0]), torch.tensor([1, 0, 0])

    def plain(**batch: Tensor) -> Tensor:
        return model(**batch, negatives=chosen).loss

    step, graphs = compiled(plain, fullgraph=False), []
    for seed in (2, 3, 4):
        state = {name: buffer.clone() for name, buffer in model.queue.named_buffers()}
        mine = step(**pair_batch(seed=seed)).detach()
        model.queue.load_state_dict(state)
        torch.testing.assert_close(mine, plain(**pair_batch(seed=seed)).detach(), rtol=0, atol=1e-5)
        graphs.append(len(GRAPHS))
    assert graphs[0] == graphs[-1] > 0
