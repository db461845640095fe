"""The straight-through gate in a running tower: no value changes, and its gradient is that of a loop version.

The gate as a function of tensors is tested with `trips.selection`.
"""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds, selections
from tiny import FAMILIES, images, tiny_encoder

from trips.config import SelectionConfig
from trips.vision import VisionEncoder

HALF = SelectionConfig(layers=(2, 3), keep_rate=0.5)


@pytest.fixture(scope="module")
def doubles() -> dict[str, VisionEncoder]:
    """In float64, so that gradients agree to what the float32 scores allow."""
    return {family: tiny_encoder(family, HALF, width=16).double() for family in FAMILIES}


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_changes_no_value(family, dtype, observe) -> None:
    """Bitwise, everything that comes out; and behind the final norm nothing else happens."""
    encoder, text_cls = tiny_encoder(family, HALF).to(dtype), torch.randn(2, 32, dtype=dtype)
    for inattentive in ("fuse", "renormalise", "drop"):
        selection = SelectionConfig(layers=(1, 3, 4), keep_rate=0.7, inattentive=inattentive)
        literal, gated = (
            encoder(images().to(dtype), text_cls, setting, observe=observe, output_hidden_states=True)
            for setting in (selection, selection.replace(learning="gate", gate_temperature=0.2))
        )
        assert literal.last_hidden_state.dtype == gated.last_hidden_state.dtype == dtype
        for out in (literal, gated):
            assert torch.equal(out.last_hidden_state, encoder.reader.final_norm(out.hidden_states[-1]))
        for ours, theirs in zip(literal.hidden_states, gated.hidden_states, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(literal.positions, gated.positions)


def gate_worths(records: list[list[float]], worth: list[float], fused: bool) -> list[tuple[list[int], list[float]]]:
    """Of one row: what each location kept, and what each of these is worth at the end of the tower (0 if lost later).

    Args:
        records: logits of every location; the number kept is told by the next one's length, the last one's by worth.
    """
    sizes = [len(logits) - fused for logits in records[1:]] + [len(worth) - fused]
    names: list[object] = list(range(len(records[0])))
    chosen = []
    for location, (logits, k) in enumerate(zip(records, sizes, strict=True)):
        places = reference.best(logits, k)
        names = [names[place] for place in places]
        chosen.append((places, list(names)))
        names += [f"fused {location}"] * fused
    ends = dict(zip(names, worth, strict=True))
    return [(places, [ends.get(name, 0.0) for name in kept]) for places, kept in chosen]


def gradients_of(scalar: torch.Tensor, inputs: list[torch.Tensor], along: torch.Tensor | None = None) -> torch.Tensor:
    """One long vector, zeros where nothing arrives."""
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(x).flatten() for x in inputs])
    found = torch.autograd.grad(scalar, inputs, along, retain_graph=True, allow_unused=True)
    pairs = zip(inputs, found, strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for x, g in pairs])


def check_gate_gradient(encoder: VisionEncoder, selection: SelectionConfig, temperature: float) -> torch.Tensor:
    """The gate's gradient is the literal one and, per location, worth times the slope of the loop version's gate.

    Every kept token's worth is what the loss sees of it behind the final norm: the product of its gates has value 1,
    so that each location adds its own slope. Returns what the gate adds.
    """
    pixels, text_cls = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    inputs = [text_cls.requires_grad_(), *encoder.parameters()]
    literal = encoder(pixels, text_cls, selection)
    tokens = literal.last_hidden_state
    direction = torch.randn(tokens.shape, dtype=torch.float64)
    loss = (tokens * direction).sum()
    worth = (tokens * direction).sum(dim=2)[:, 1:].tolist()
    without = expected = gradients_of(loss, inputs)
    logits = [record.logits for record in literal.selections]
    slopes = [torch.zeros_like(each) for each in logits]
    for row in range(2):
        each = [location[row].tolist() for location in logits]
        if not each:
            continue
        for location, (kept, worths) in enumerate(gate_worths(each, worth[row], selection.inattentive != "drop")):
            slope = reference.gate_gradient(each[location], kept, worths, temperature)
            slopes[location][row] = torch.tensor(slope)
    for location, along in zip(logits, slopes, strict=True):
        expected = expected + gradients_of(location, inputs, along)
    gated = encoder(pixels, text_cls, selection.replace(learning="gate", gate_temperature=temperature))
    ours = gradients_of((gated.last_hidden_state * direction).sum(), inputs)
    # the scores are float32 by design
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))
    return ours - without


@given(
    selection=selections(4), family=st.sampled_from(FAMILIES), temperature=st.sampled_from([0.3, 1.0, 4.0]), seed=seeds
)
@settings(max_examples=20)
def test_gate_gradient_equals_the_loop_version(doubles, selection, family, temperature, seed) -> None:
    torch.manual_seed(seed)
    check_gate_gradient(doubles[family], selection, temperature)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_of_a_token_is_the_product_over_its_locations(doubles, family) -> None:
    """Three locations, where some tokens leave early and a fused token is kept by a later location."""
    selection = SelectionConfig(layers=(1, 2, 4), keep_rate=(0.6, 0.8, 0.7))
    with torch.no_grad():
        out = doubles[family](images(8).double(), torch.randn(8, 16, dtype=torch.float64), selection)
    assert any(-1 in row for record in out.selections[1:] for row in record.kept.tolist())
    added = check_gate_gradient(doubles[family], selection, 1.0)
    assert float(added.abs().max()) > 1e-3


def test_gate_of_a_token_kept_twice_has_both_slopes() -> None:
    """Both locations teach their own query projection through the tokens that outlive them."""
    encoder = tiny_encoder("clip", HALF.replace(learning="gate", inattentive="drop"))
    text_cls = torch.randn(2, 32)
    encoder(images(), text_cls).last_hidden_state.square().sum().backward()
    gated = {name: p.grad for name, p in encoder.named_parameters() if "q_proj" in name and "layers.0" not in name}
    encoder.zero_grad()
    encoder(images(), text_cls, HALF.replace(inattentive="drop")).last_hidden_state.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if name in gated:
            changed = not torch.allclose(gated[name], parameter.grad, rtol=0, atol=1e-6)
            assert changed == ("layers.1." in name or "layers.2." in name), name
