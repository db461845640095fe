"""Reasoning over several images: the loss against a loop, learning, saving, bad calls."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import reference
import torch
from reasoning_models import reasoning_batch, reasoning_config, tiny_reasoning_model
from tiny import images, texts
from torch import nn
from torch.utils.checkpoint import checkpoint

from trips.errors import ConfigError, ShapeError
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.train.optim import parameter_groups
from trips.train.parallel import checkpoint_layers

BOTH = pytest.mark.parametrize("fusion", ["merge", "stacked"])


@pytest.mark.parametrize("n", [1, 2, 3])
@BOTH
@torch.no_grad()
def test_loss_equals_a_loop_over_texts_and_images(fusion, n) -> None:
    model, inputs, total = tiny_reasoning_model({"fusion": fusion, "num_images": n}), reasoning_batch(3, n), 0.0
    out = model(**inputs)
    first, _, last = model.reasoning_head
    for row, label in enumerate(inputs["labels"].tolist()):
        real = int(inputs["attention_mask"][row].sum())  # the text alone, without padding
        text = model.trips.text(input_ids=inputs["input_ids"][row : row + 1, :real]).last_hidden_state
        seen = []
        for i in range(n):
            image = model.trips.vision(inputs["pixel_values"][row, i : i + 1], text[:, 0])
            seen.append(image.last_hidden_state)
            for ours, theirs in zip(out.selections, image.selections, strict=True):
                assert torch.equal(ours.kept[row * n + i], theirs.kept[0])
        fused = model.trips.fusion(text, torch.ones(1, real), torch.stack(seen, dim=1))[0][0, 0]
        inner = [max(0.0, float(value)) for value in first.weight @ fused + first.bias]
        logits = [reference.dot(w.tolist(), inner) + float(b) for w, b in zip(last.weight, last.bias, strict=True)]
        torch.testing.assert_close(out.logits[row], torch.tensor(logits), rtol=1e-4, atol=1e-4)
        total -= math.log(reference.softmax(logits)[label])
    assert float(out.loss) == pytest.approx(total / 3, rel=1e-4)
    assert torch.equal(out.loss, out.loss_task) and out.loss_distill is None
    torch.testing.assert_close(model.verify(*list(inputs.values())[:3]), out.logits.softmax(dim=1)[:, 1])


@torch.no_grad()
def test_each_image_is_seen_and_in_its_place() -> None:
    for fusion in ("merge", "stacked"):
        model, inputs = tiny_reasoning_model({"fusion": fusion}), reasoning_batch()
        plain = model(**inputs).logits
        for place in (0, 1):
            other = inputs["pixel_values"].clone()
            other[:, place] = images(3, seed=9)
            assert float((model(**{**inputs, "pixel_values": other}).logits - plain).abs().min()) > 1e-4
        swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1)}).logits
        assert float((swapped - plain).abs().min()) > 1e-4


@BOTH
@torch.no_grad()
def test_nothing_removed_is_no_selection_and_a_prefix_is_the_images(fusion) -> None:
    model, inputs = tiny_reasoning_model({"fusion": fusion}), reasoning_batch()
    settings = model.config.selection
    none, all_kept = (
        model(**inputs, selection=settings.replace(**changes)) for changes in ({"guide": "none"}, {"keep_rate": 1.0})
    )
    assert torch.equal(none.logits, all_kept.logits) and none.selections == ()
    prefix = model.trips.encode_prefix(inputs.pop("pixel_values").flatten(0, 1))
    assert torch.equal(model(**inputs, prefix=prefix).logits, model(**reasoning_batch()).logits)
    shared = prefix.take(torch.tensor([0, 1, 0, 1, 2, 3]))  # two statements about the same images
    pixels = reasoning_batch()["pixel_values"][[0, 0, 1]]
    assert torch.equal(
        model(**inputs, prefix=shared).logits, model(**{**reasoning_batch(), "pixel_values": pixels}).logits
    )


@pytest.mark.parametrize("learning", ["literal", "gate"])
def test_gradients_reach_the_words_through_the_selection_alone(learning) -> None:
    """What the fusion is given of the text is cut off: all that is left is the guide, on each of both images."""
    for guide, reached in (("text", True), ("image", False)):
        model = tiny_reasoning_model(learning=learning, guide=guide)
        model.trips.fusion.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        inputs = reasoning_batch()
        pixels = inputs["pixel_values"].requires_grad_()
        model(**inputs).loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        assert (gradient is not None and bool(gradient.any())) == reached
        assert bool(pixels.grad.flatten(2).any(dim=2).all())


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@BOTH
def test_distillation_step_adds_its_weighted_loss(fusion, temperature) -> None:
    model = tiny_reasoning_model({"fusion": fusion}, distill_weight=2.0, distill_temperature=temperature)
    inputs = reasoning_batch()
    out = model(**inputs, distill=True)
    plain = model.trips(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], observe=True)
    powers = [[weight ** (1 / temperature) for weight in row] for row in plain.image_attention.tolist()]
    teacher = [[power / sum(row) for power in row] for row in powers]
    expected = [reference.kl_divergence(record.logits.tolist(), teacher) for record in plain.selections]
    assert len(expected) == 2 and len(teacher) == 6
    assert float(out.loss_distill) == pytest.approx(sum(expected) / 2, rel=1e-3)
    torch.testing.assert_close(out.loss.detach(), out.loss_task + 2 * out.loss_distill)
    assert out.image_positions.shape == (6, 16)  # all patches were seen


@BOTH
def test_mixed_precision_reaches_every_weight(fusion) -> None:
    """The teacher is computed without gradient from weights that need it: a cached cast must not cut it off."""
    gradients = []
    for mixed in (False, True):
        model = tiny_reasoning_model({"fusion": fusion}).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = model(**reasoning_batch(), distill=True)
        assert out.logits.dtype == out.loss.dtype == torch.float32
        out.loss.backward()
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())})
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert gradients[0] == gradients[1] and any("crossattention" in name for name in gradients[0])


@BOTH
@torch.no_grad()
def test_half_precision(fusion) -> None:
    model, inputs = tiny_reasoning_model({"fusion": fusion}, guide="none"), reasoning_batch()
    plain = model(**inputs)
    for dtype, tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.03)):
        half = model.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
        assert half.logits.dtype == half.loss.dtype == torch.float32
        torch.testing.assert_close(half.logits, plain.logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("fusion", "changes"),
    [("merge", {"learning": "literal"}), ("merge", {"learning": "distill"}), ("stacked", {"learning": "gate"})],
    ids=str,
)
def test_tiny_model_learns_what_the_second_image_shows(fusion, changes) -> None:
    torch.manual_seed(0)
    model = TripsForVisualReasoning(reasoning_config({"fusion": fusion}, **changes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    (ids, mask), losses = texts(1), []
    pixels = images(2)[torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])]
    inputs = {"pixel_values": pixels, "input_ids": ids.expand(4, -1), "attention_mask": mask.expand(4, -1)}
    for _ in range(40):
        out = model(**inputs, labels=torch.tensor([1, 0, 1, 0]), distill=changes["learning"] == "distill")
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss_task))
    assert losses[-1] < 0.25 * losses[0]


def test_assignment_has_a_class_for_each_image_and_one_for_none() -> None:
    model = tiny_reasoning_model({"num_images": 3, "objective": "assignment"})
    inputs = reasoning_batch(4, 3) | {"labels": torch.arange(4)}
    out = model(**inputs)
    assert out.logits.shape == (4, 4)
    expected = [-math.log(reference.softmax(row)[label]) for label, row in enumerate(out.logits.tolist())]
    assert float(out.loss_task) == pytest.approx(sum(expected) / 4, rel=1e-5)
    with pytest.raises(ConfigError, match=r"reasoning\.objective: .*expected truth"):
        model.verify(inputs["pixel_values"], inputs["input_ids"])


# --- as a module among others


@BOTH
@torch.no_grad()
def test_saving_and_loading_is_bitwise(tmp_path, fusion) -> None:
    model = tiny_reasoning_model({"fusion": fusion, "num_images": 3})
    model.save_pretrained(tmp_path)
    loaded, info = TripsForVisualReasoning.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.reasoning == model.config.reasoning
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model(**reasoning_batch(3, 3)).loss, loaded.eval()(**reasoning_batch(3, 3)).loss)


@pytest.mark.parametrize("distill", [False, True])
@BOTH
def test_checkpointed_layers_change_no_gradient(fusion, distill) -> None:
    found = []
    for enable in (False, True):
        model = tiny_reasoning_model({"fusion": fusion}, learning="gate").train()
        if enable:
            checkpoint_layers(model, True)
            calls: list[nn.Module] = []
            for layer in model.trips.fusion.layer:
                layer._gradient_checkpointing_func = functools.partial(_counted, calls, layer)
        model(**reasoning_batch(), distill=distill).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == list(model.trips.fusion.layer)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _counted(calls: list[nn.Module], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    calls.append(layer)
    return checkpoint(*args, use_reentrant=False, **kwargs)


def test_training_step_reads_no_value_on_the_host() -> None:
    """Tensors of the meta device have no values: reading one would fail."""
    inputs = {name: tensor.to("meta") for name, tensor in reasoning_batch().items()}
    for fusion in ("merge", "stacked"):
        for learning, distill in (("literal", False), ("gate", False), ("distill", True)):
            model = tiny_reasoning_model({"fusion": fusion}, learning=learning).to("meta")
            model(**inputs, distill=distill).loss.backward()


@BOTH
def test_training_step_is_one_static_graph(fusion) -> None:
    model = tiny_reasoning_model({"fusion": fusion}, learning="gate").train()
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="eager")(**reasoning_batch()).loss
    torch.testing.assert_close(loss, model(**reasoning_batch()).loss)


def test_the_classifier_may_have_a_rate_of_its_own() -> None:
    model = tiny_reasoning_model()
    groups = parameter_groups(model, 1e-4, 1e-5, 0.01, 1e-3)
    members = {group["name"]: {id(p) for p in group["params"]} for group in groups}
    assert members["head"] == {id(model.reasoning_head[i].weight) for i in (0, 2)}
    assert members["head_no_decay"] == {id(model.reasoning_head[i].bias) for i in (0, 2)}
    for name, parameter in model.trips.fusion.named_parameters():
        plain = name.endswith("bias") or "LayerNorm" in name
        assert id(parameter) in members["rest_no_decay" if plain else "rest"]


# --- what is refused


def test_bad_calls_are_named() -> None:
    model, inputs = tiny_reasoning_model(), reasoning_batch()
    for changes, item, error in (
        ({"pixel_values": reasoning_batch(3, 3)["pixel_values"]}, r"pixel_values.*\(3, 2, 3, H, W\)", ShapeError),
        ({"pixel_values": images(6)}, "pixel_values", ShapeError),
        ({"pixel_values": reasoning_batch(2)["pixel_values"]}, "pixel_values", ShapeError),
        ({"pixel_values": None}, "pixel_values or prefix", ConfigError),
        ({"input_ids": None}, "input_ids", ConfigError),
        ({"attention_mask": torch.ones(3, 2)}, "input_ids", ShapeError),
        ({"prefix": model.trips.encode_prefix(images(2))}, "pixel_values or prefix", ConfigError),
        ({"prefix": model.trips.encode_prefix(images(2)), "pixel_values": None}, "prefix.*6 rows", ShapeError),
        ({"labels": torch.tensor([0, 1])}, "labels", ShapeError),
        ({"labels": torch.tensor([[0, 1, 1]])}, "labels", ShapeError),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "labels.*float32", ShapeError),
        ({"labels": torch.tensor([0, 2, 1])}, "labels.*0 to 1", ConfigError),
        ({"labels": torch.tensor([0, -100, 1])}, "labels", ConfigError),
    ):
        with pytest.raises(error, match=item):
            model(**{**inputs, **changes})
    for changes in ({"guide": "none"}, {"guide": "random"}, {"layers": ()}):
        with pytest.raises(ConfigError, match="distill"):
            model(**inputs, selection=model.config.selection.replace(**changes), distill=True)
    assert model(**inputs | {"labels": inputs["labels"].bool()}).loss == model(**inputs).loss
    assert model(*list(inputs.values())[:2]).loss is None
