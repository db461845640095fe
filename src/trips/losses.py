"""Losses as functions of tensors; no module is known here.

Dimensions: B rows, n candidates of a selection, A answers, T answer tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trips.errors import ShapeError


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


def answer_log_likelihood(logits: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
    """log P(answer | question, image): the sum over its tokens behind [CLS], end token included.

    Args:
        logits: (A, T, V) of the decoder fed with the answer; place t predicts token t + 1.
        answer_ids: (A, T) [CLS] pieces [SEP] padding.
        answer_mask: (A, T), 0 for padding.
    Returns:
        (A,) float32, at most 0.
    """
    token_loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), answer_ids[:, 1:], reduction="none")
    return -(token_loss * answer_mask[:, 1:]).sum(dim=1)


def answer_loss(log_likelihood: Tensor, weights: Tensor, num_questions: int) -> Tensor:
    """Weighted answer loss (5.1.1, after ALBEF): - sum of weight * log-likelihood / number of questions.

    Args:
        log_likelihood: (A,) from `answer_log_likelihood`.
        weights: (A,) share of the people who gave the answer.
        num_questions: B.
    """
    return -(weights * log_likelihood).sum() / num_questions
