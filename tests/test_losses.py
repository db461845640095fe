"""Losses against closed forms and loops over tokens."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, shapes

from trips.errors import ShapeError
from trips.losses import IGNORED, answer_log_likelihood, answer_loss, guidance_distillation_loss


@given(shape=shapes(), seed=seeds)
def test_distillation_equals_the_closed_form(shape, seed) -> None:
    batch, n, _, _ = shape
    torch.manual_seed(seed)
    logits, teacher = torch.randn(batch, n), torch.softmax(2 * torch.randn(batch, n), dim=1)
    loss = guidance_distillation_loss(logits, teacher)
    assert float(loss) == pytest.approx(reference.kl_divergence(logits.tolist(), teacher.tolist()), abs=2e-5)
    assert float(loss) >= -1e-6


def test_distillation_is_zero_at_its_teacher_and_takes_zeros() -> None:
    logits = torch.randn(3, 5)
    assert float(guidance_distillation_loss(logits, torch.softmax(logits, dim=1))) == pytest.approx(0, abs=1e-6)
    one_hot = torch.eye(5)[:3]
    expected = -torch.log_softmax(logits, dim=1)[range(3), range(3)].mean()
    torch.testing.assert_close(guidance_distillation_loss(logits, one_hot), expected)


def test_distillation_teaches_the_student_only() -> None:
    """The gradient is (softmax(logits) - teacher) / B, and none goes to the teacher."""
    logits = torch.randn(2, 4, requires_grad=True)
    source = torch.randn(2, 4, requires_grad=True)
    teacher = torch.softmax(source, dim=1)
    guidance_distillation_loss(logits, teacher).backward()
    torch.testing.assert_close(logits.grad, (torch.softmax(logits, dim=1) - teacher).detach() / 2)
    assert source.grad is None


def test_distillation_refuses_other_patches() -> None:
    with pytest.raises(ShapeError, match="guidance_distillation_loss"):
        guidance_distillation_loss(torch.zeros(2, 4), torch.full((2, 5), 0.2))


@given(places=st.integers(0, 12), num_answers=st.integers(1, 4), seed=seeds)
def test_answer_likelihood_equals_a_loop_over_places(places, num_answers, seed) -> None:
    """Places in any order, some of them padding, some answers without any."""
    torch.manual_seed(seed)
    logits, targets = 2 * torch.randn(places, 7), torch.randint(-2, 7, (places,))
    targets[targets < 0] = IGNORED
    answer = torch.randint(num_answers, (places,))
    expected = [0.0] * num_answers
    for row, target, a in zip(logits.tolist(), targets.tolist(), answer.tolist(), strict=True):
        if target != IGNORED:
            expected[a] += math.log(reference.softmax(row)[target])
    likelihood = answer_log_likelihood(logits, targets, answer, num_answers)
    assert likelihood.shape == (num_answers,)
    torch.testing.assert_close(likelihood, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    weights = torch.rand(num_answers)
    loss = -sum(w * e for w, e in zip(weights.tolist(), expected, strict=True)) / 3
    torch.testing.assert_close(answer_loss(likelihood, weights, 3), torch.tensor(loss), rtol=1e-5, atol=1e-5)


def test_answer_likelihood_gradient_is_that_of_each_place_alone() -> None:
    """weight (one-hot - softmax) where a token is predicted, exactly nothing where not."""
    logits = torch.randn(5, 9, requires_grad=True)
    targets, answer = torch.tensor([3, IGNORED, 0, 8, IGNORED]), torch.tensor([1, 1, 0, 1, 0])
    weights = torch.tensor([0.25, 0.75])
    (weights * answer_log_likelihood(logits, targets, answer, 2)).sum().backward()
    expected = torch.zeros(5, 9)
    for place, (target, a) in enumerate(zip(targets.tolist(), answer.tolist(), strict=True)):
        if target != IGNORED:
            expected[place] = -weights[a] * torch.tensor(reference.softmax(logits[place].tolist()))
            expected[place, target] += weights[a]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)
    assert not logits.grad[[1, 4]].any()


def test_answer_likelihood_counts_no_padding_and_stays_in_float32() -> None:
    logits, answer = torch.randn(6, 9).bfloat16(), torch.tensor([0, 0, 0, 1, 1, 1])
    padded = torch.tensor([5, 3, IGNORED, 6, 3, IGNORED])
    real = padded != IGNORED
    likelihood = answer_log_likelihood(logits, padded, answer, 2)
    assert torch.equal(likelihood, answer_log_likelihood(logits[real], padded[real], answer[real], 2))
    assert torch.equal(likelihood, answer_log_likelihood(logits.float(), padded, answer, 2))
    assert likelihood.dtype == torch.float32
