"""The functions of section 3.2 against loops over Python numbers, for random shapes, rates, ties and dtypes."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keep_rates, seeds, shapes, tied_scores

from trips.config import num_kept
from trips.errors import ShapeError
from trips.selection import (
    fuse_inattentive,
    relevance_logits,
    select_patches,
    straight_through_gate,
    text_relevance,
    top_patches,
)

# Relative to the size of the values: bfloat16 keeps 8 bits, and a sum of products may lose a few more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2}
dtypes = st.sampled_from(list(TOLERANCE))
inattentives = st.sampled_from(["fuse", "renormalise", "drop"])
temperatures = st.floats(0.1, 5.0)
scales = st.sampled_from([0.0, 1.0, 30.0, 1e4])


def rows(tensor: torch.Tensor) -> list:
    return tensor.double().tolist()


@given(shape=shapes(), dtype=dtypes, seed=seeds)
def test_text_relevance_equals_loops(shape, dtype, seed) -> None:
    batch, n, heads, width = shape
    torch.manual_seed(seed)
    query, patches = torch.randn(batch, width).to(dtype), torch.randn(batch, n, width).to(dtype)
    a_cls = text_relevance(query, patches, heads)
    expected = [reference.relevance(q, p, heads) for q, p in zip(rows(query), rows(patches), strict=True)]
    assert a_cls.dtype == torch.float32
    torch.testing.assert_close(a_cls.double(), torch.tensor(expected).double(), rtol=TOLERANCE[dtype], atol=1e-5)
    torch.testing.assert_close(a_cls.sum(dim=1), torch.ones(batch), rtol=0, atol=1e-5)
    again = torch.softmax(relevance_logits(query, patches, heads), dim=-1)
    torch.testing.assert_close(again, a_cls)


@given(shape=shapes(), seed=seeds)
def test_permuting_patches_permutes_relevance(shape, seed) -> None:
    batch, n, heads, width = shape
    torch.manual_seed(seed)
    query, patches, order = torch.randn(batch, width), torch.randn(batch, n, width), torch.randperm(n)
    moved = text_relevance(query, patches[:, order], heads)
    torch.testing.assert_close(moved, text_relevance(query, patches, heads)[:, order])


@given(scores=tied_scores(), rate=keep_rates)
def test_top_patches_breaks_ties_by_the_lowest_index(scores, rate) -> None:
    k = num_kept(scores.shape[1], rate)
    assert top_patches(scores, k).tolist() == [reference.best(row, k) for row in scores.tolist()]


@given(shape=shapes(), rate=keep_rates, seed=seeds)
def test_kept_are_unique_rising_in_range_and_the_best(shape, rate, seed) -> None:
    batch, n, _, _ = shape
    torch.manual_seed(seed)
    scores, k = torch.randn(batch, n), num_kept(shape[1], rate)
    kept = top_patches(scores, k)
    assert kept.shape == (batch, k) and bool((kept[:, 1:] > kept[:, :-1]).all())
    assert int(kept.min()) >= 0 and int(kept.max()) < n
    if k < n:
        rest = scores.scatter(1, kept, -math.inf)
        assert bool((scores.gather(1, kept).amin(1) >= rest.amax(1)).all())


@given(shape=shapes(), rate=keep_rates, inattentive=inattentives, dtype=dtypes, ties=st.booleans(), seed=seeds)
def test_select_patches_equals_loops(shape, rate, inattentive, dtype, ties, seed) -> None:
    batch, n, _, width = shape
    torch.manual_seed(seed)
    states, logits = torch.randn(batch, n + 1, width).to(dtype), torch.randn(batch, n)
    if ties:
        logits = logits.round()
    candidates = torch.stack([torch.randperm(50)[:n] - 1 for _ in range(batch)])  # -1: a fused token among them
    k = num_kept(n, rate)
    tokens, positions, record = select_patches(states, logits, k, candidates, layer=3, inattentive=inattentive)

    expected = [
        reference.select(row, scores, k, places, inattentive)
        for row, scores, places in zip(rows(states), logits.tolist(), candidates.tolist(), strict=True)
    ]
    assert positions.tolist() == [places for _, places in expected]
    assert tokens.dtype == dtype
    # [CLS] and the kept tokens are copies: equal bitwise. Only the fused token is arithmetic.
    assert rows(tokens[:, : k + 1]) == [out[: k + 1] for out, _ in expected]
    expected_tokens = torch.tensor([out for out, _ in expected], dtype=torch.float64)
    torch.testing.assert_close(tokens.double(), expected_tokens, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    assert record.layer == 3 and torch.equal(record.candidates, candidates)
    assert record.kept.tolist() == [places[:k] for _, places in expected]
    assert record.index.tolist() == [reference.best(row, k) for row in logits.tolist()]
    assert torch.equal(candidates.gather(1, record.index), record.kept)
    assert record.logits is logits and not record.scores.requires_grad
    torch.testing.assert_close(record.scores, torch.softmax(logits, dim=1))


@given(shape=shapes(), inattentive=inattentives, seed=seeds)
def test_keeping_all_is_the_identity(shape, inattentive, seed) -> None:
    batch, n, _, width = shape
    torch.manual_seed(seed)
    states, candidates = torch.randn(batch, n + 1, width), torch.arange(n).expand(batch, -1)
    tokens, positions, record = select_patches(
        states, torch.randn(batch, n), n, candidates, layer=1, inattentive=inattentive
    )
    assert tokens is states and positions is candidates and torch.equal(record.kept, candidates)
    assert record.index.tolist() == [list(range(n))] * batch


@given(shape=shapes(), renormalise=st.booleans(), seed=seeds)
def test_fused_token_equals_loops(shape, renormalise, seed) -> None:
    batch, n, _, width = shape
    torch.manual_seed(seed)
    patches, a_cls = torch.randn(batch, n, width), torch.softmax(torch.randn(batch, n), dim=1)
    kept = top_patches(a_cls, max(1, n // 2))
    fused = fuse_inattentive(patches, a_cls, kept, renormalise)
    if n == 1:  # nothing left: an empty sum
        assert torch.equal(fused, torch.zeros(batch, 1, width))
        return
    expected = [
        [reference.fuse(p, a, k, renormalise)]
        for p, a, k in zip(rows(patches), rows(a_cls), kept.tolist(), strict=True)
    ]
    torch.testing.assert_close(fused.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)


def test_weights_of_the_fused_token_are_those_over_all_candidates() -> None:
    """Not renormalised: the fused token of identical patches shrinks to the dropped mass."""
    states, logits = torch.ones(1, 5, 2), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    tokens, _, record = select_patches(states, logits, 2, torch.arange(4).unsqueeze(0), layer=1)
    torch.testing.assert_close(tokens[0, -1], record.scores[0, :2].sum().expand(2))
    tokens, _, _ = select_patches(states, logits, 2, torch.arange(4).unsqueeze(0), layer=1, inattentive="renormalise")
    torch.testing.assert_close(tokens[0, -1], torch.ones(2))


@given(shape=shapes(), rate=keep_rates, temperature=temperatures, dtype=dtypes, scale=scales, seed=seeds)
def test_gate_leaves_values_bitwise_alone(shape, rate, temperature, dtype, scale, seed) -> None:
    """Also where the softmax and the sigmoid have run into their ends."""
    batch, n, _, width = shape
    torch.manual_seed(seed)
    logits, k = scale * torch.randn(batch, n), num_kept(n, rate)
    gate = straight_through_gate(logits, top_patches(logits, k), temperature)
    assert torch.equal(gate, torch.ones(batch, k))
    tokens = torch.randn(batch, k, width).to(dtype)
    assert torch.equal(tokens * gate.unsqueeze(-1).to(dtype), tokens)


@given(shape=shapes(), rate=keep_rates, temperature=temperatures, ties=st.booleans(), seed=seeds)
def test_gate_gradient_equals_differences_of_the_loop_version(shape, rate, temperature, ties, seed) -> None:
    batch, n, _, _ = shape
    torch.manual_seed(seed)
    logits, worth = 2 * torch.randn(batch, n), torch.randn(batch, num_kept(n, rate))
    if ties:
        logits = logits.round()
    index = top_patches(logits, worth.shape[1])
    logits.requires_grad_()
    (worth * straight_through_gate(logits, index, temperature)).sum().backward()
    expected = [
        reference.gate_gradient(row, kept, w, temperature)
        for row, kept, w in zip(rows(logits.detach()), index.tolist(), rows(worth), strict=True)
    ]
    tolerance = 1e-5 / temperature
    torch.testing.assert_close(logits.grad, torch.tensor(expected), rtol=1e-4, atol=tolerance)
    # Raising all logits alike changes no a_cls: whatever the kept tokens are worth, the gradient has no such part.
    torch.testing.assert_close(logits.grad.sum(dim=1), torch.zeros(batch), rtol=0, atol=n * tolerance)


def test_gate_raises_what_is_worth_keeping_and_lowers_all_others() -> None:
    logits = torch.randn(1, 6, requires_grad=True)
    kept = reference.best(logits[0].tolist(), 3)
    straight_through_gate(logits, torch.tensor([kept]), 0.5)[0, 1].backward()
    assert [place for place in range(6) if logits.grad[0, place] > 0] == [kept[1]]
    assert bool((logits.grad != 0).all())


@given(shape=shapes(), rate=keep_rates, seed=seeds)
def test_gate_does_not_see_what_all_patches_share(shape, rate, seed) -> None:
    """The query learns what tells patches apart: moving all of them alike leaves its gradient as it was."""
    batch, n, heads, width = shape
    torch.manual_seed(seed)
    query, patches, shift = torch.randn(batch, width), torch.randn(batch, n, width), 3 * torch.randn(batch, 1, width)
    k, gradients = num_kept(n, rate), []
    index = top_patches(relevance_logits(query, patches, heads), k)
    for seen in (patches, patches + shift):
        query.requires_grad_().grad = None
        gate = straight_through_gate(relevance_logits(query, seen, heads), index)
        (gate * torch.linspace(-1, 2, k)).sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_literal_selection_leaves_kept_tokens_without_gradient_to_the_scores() -> None:
    logits = torch.randn(1, 6, requires_grad=True)
    args = (torch.randn(1, 7, 4), logits, 3, torch.arange(6).unsqueeze(0))
    assert not select_patches(*args, layer=1, inattentive="drop")[0].requires_grad
    (gradient,) = torch.autograd.grad(select_patches(*args, layer=1)[0][:, :4].sum(), logits, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_literal_gradient_is_that_of_the_fused_token() -> None:
    """Against finite differences in float64 through the loop version."""
    torch.manual_seed(3)
    states = torch.randn(1, 6, 3, dtype=torch.float64)
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    direction, candidates = torch.randn(3, dtype=torch.float64), torch.arange(5).unsqueeze(0)
    tokens, _, _ = select_patches(states, logits, 2, candidates, layer=1)
    (tokens[0] @ direction).sum().backward()

    def value(row: list[float]) -> float:
        out, _ = reference.select(states[0].tolist(), row, 2, list(range(5)), "fuse")
        return sum(reference.dot(token, direction.tolist()) for token in out)

    numeric = reference.slopes(value, logits[0].tolist())
    torch.testing.assert_close(logits.grad[0], torch.tensor(numeric, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert float(logits.grad.abs().min()) > 0  # kept scores get gradient too, through the softmax over all


@pytest.mark.parametrize(
    ("query", "patches", "heads"),
    [
        ((2, 4), (2, 3, 5), 1),
        ((1, 4), (2, 3, 4), 1),
        ((2, 4), (2, 4), 1),
        ((2, 1, 4), (2, 3, 4), 1),
        ((2, 4), (2, 3, 4), 3),
    ],
)
def test_relevance_refuses_what_does_not_fit(query, patches, heads) -> None:
    with pytest.raises(ShapeError, match="relevance_logits|num_heads"):
        text_relevance(torch.zeros(query), torch.zeros(patches), heads)


@pytest.mark.parametrize(
    ("logits", "candidates", "k"),
    [
        ((2, 4), (2, 5), 2),
        ((2, 5), (2, 4), 2),
        ((1, 5), (2, 5), 2),
        ((2, 5), (2, 5), 0),
        ((2, 5), (2, 5), 6),
    ],
)
def test_select_refuses_what_does_not_fit(logits, candidates, k) -> None:
    with pytest.raises(ShapeError, match="layer 7"):
        select_patches(torch.zeros(2, 6, 3), torch.zeros(logits), k, torch.zeros(candidates, dtype=torch.long), layer=7)
