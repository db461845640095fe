"""Losses against closed forms and per-token loops."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from strategies import seeds, shapes

from trips.errors import ShapeError
from trips.losses import answer_log_likelihood, answer_loss, guidance_distillation_loss


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


def test_answer_likelihood_equals_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    ids = torch.tensor([[2, 7, 3, 0, 0], [2, 8, 9, 10, 3], [2, 3, 0, 0, 0]])
    mask = (ids != 0).long()
    expected = []
    for a in range(3):
        total = 0.0
        for t in range(1, 5):
            if mask[a, t]:
                total += math.log(reference.softmax(logits[a, t - 1].tolist())[ids[a, t]])
        expected.append(total)
    likelihood = answer_log_likelihood(logits, ids, mask)
    torch.testing.assert_close(likelihood, torch.tensor(expected))
    weights = torch.tensor([0.5, 0.3, 1.0])
    loss = -(0.5 * expected[0] + 0.3 * expected[1] + 1.0 * expected[2]) / 2
    torch.testing.assert_close(answer_loss(likelihood, weights, 2), torch.tensor(loss))


def test_answer_likelihood_counts_no_padding_and_stays_in_float32() -> None:
    logits, ids = torch.randn(2, 4, 9).bfloat16(), torch.tensor([[2, 5, 3, 0], [2, 6, 3, 0]])
    mask = (ids != 0).long()
    other = ids.clone()
    other[:, 3] = 8
    assert torch.equal(answer_log_likelihood(logits, ids, mask), answer_log_likelihood(logits, other, mask))
    assert answer_log_likelihood(logits, ids, mask).dtype == torch.float32
