"""Relevance metrics against sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trips.errors import ShapeError
from trips.metrics import consistency, kept_mask, recall_at_k, relevance_gain, relevance_recall


@st.composite
def kept_and_relevant(draw):
    n, rows = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    k = draw(st.integers(1, n))
    kept, relevant = [], []
    for _ in range(rows):
        row = draw(st.permutations(range(n)))[:k]
        if draw(st.booleans()):
            row[0] = -1  # a fused token
        kept.append(row)
        relevant.append(draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    return torch.tensor(kept), torch.tensor(relevant)


@given(kept_and_relevant())
def test_recall_equals_counting_in_sets(case):
    kept, relevant = case
    for row, (positions, wanted) in enumerate(zip(kept.tolist(), relevant.tolist(), strict=True)):
        want = {i for i, flag in enumerate(wanted) if flag}
        assert relevance_recall(kept, relevant)[row].item() == pytest.approx(len(want & set(positions)) / len(want))
        assert set(kept_mask(kept, len(wanted))[row].nonzero().flatten().tolist()) == set(positions) - {-1}


def test_gain_takes_out_what_is_kept_whatever_the_text():
    relevant = torch.tensor([[True, True, False, False]])
    own, other = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
    assert relevance_gain(own, other, relevant).item() == 0.5
    assert relevance_gain(own, own, relevant).item() == 0.0


def test_rows_must_fit():
    with pytest.raises(ShapeError, match="relevant"):
        relevance_recall(torch.zeros(2, 1, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool))


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**16))
def test_recall_at_k_equals_sorting_by_hand(queries, candidates, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, candidates, generator=generator)
    relevant = torch.rand(queries, candidates, generator=generator) < 0.3
    relevant[:, seed % candidates] = True
    expected = {}
    for k in (1, 3):
        hits = 0
        for row in range(queries):
            ranked = sorted(range(candidates), key=lambda c: -scores[row, c].item())
            hits += any(relevant[row, c].item() for c in ranked[:k])
        expected[k] = pytest.approx(hits / queries)
    assert recall_at_k(scores, relevant, (1, 3)) == expected


def test_scores_that_are_all_alike_find_nothing():
    assert recall_at_k(torch.zeros(2, 5), torch.eye(2, 5, dtype=torch.bool), (1,)) == {1: 0.0}


def test_a_query_without_a_relevant_candidate_is_refused():
    with pytest.raises(ShapeError, match="relevant"):
        recall_at_k(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")), min_size=1, max_size=12))
def test_consistency_equals_looking_through_every_group(answers):
    correct, groups = [right for right, _ in answers], [group for _, group in answers]
    whole = 0
    for group in sorted(set(groups)):
        whole += all(right for right, of in answers if of == group)
    assert consistency(correct, groups) == pytest.approx(whole / len(set(groups)))


def test_consistency_by_hand():
    assert consistency([True, True, True, False], ["x", "y", "x", "y"]) == 0.5
    assert consistency([True, True], ["x", "x"]) == 1.0
    for correct, groups in (([True], []), ([], []), ([True], ["x", "y"])):
        with pytest.raises(ShapeError, match="groups"):
            consistency(correct, groups)
