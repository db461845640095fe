"""Losses as functions of tensors; no module is known here.

Dimensions: B rows, n candidates of a selection, A answers, M predicted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trips.errors import ShapeError

IGNORED = -100  # as target: the place counts nothing


def guidance_distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence from the fusion encoder's attention to a_cls (beyond the paper: it teaches what to keep).

    Args:
        logits: (B, n) of one location in a full-patch pass; their softmax is a_cls.
        teacher: (B, n) attention over the same patches, rows sum to 1, without gradient.
    Returns:
        scalar, mean over rows, in nats.
    Raises:
        ShapeError: shapes differ.
    """
    if logits.shape != teacher.shape:
        raise ShapeError(
            "student and teacher see different patches",
            item="guidance_distillation_loss",
            found=tuple(logits.shape),
            expected=tuple(teacher.shape),
        )
    return F.kl_div(torch.log_softmax(logits.float(), dim=-1), teacher.detach(), reduction="batchmean")


def answer_log_likelihood(logits: Tensor, targets: Tensor, answer: Tensor, num_answers: int) -> Tensor:
    """log P(answer | question, image): the sum over its tokens behind [CLS], end token included.

    Args:
        logits: (M, V) of the decoder at the M places that predict a token.
        targets: (M,) the tokens that follow, IGNORED for padding.
        answer: (M,) which answer each place belongs to.
        num_answers: A.
    Returns:
        (A,) float32, at most 0.
    """
    token_loss = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORED)
    return -token_loss.new_zeros(num_answers).index_add(0, answer, token_loss)


def answer_loss(log_likelihood: Tensor, weights: Tensor, num_questions: int) -> Tensor:
    """Weighted answer loss (5.1.1, after ALBEF): - sum of weight * log-likelihood / number of questions.

    Args:
        log_likelihood: (A,) from `answer_log_likelihood`.
        weights: (A,) share of the people who gave the answer.
        num_questions: B.
    """
    return -(weights * log_likelihood).sum() / num_questions
