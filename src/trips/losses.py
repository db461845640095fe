"""Losses as functions of tensors; no module is known here.

Section 3.3: ITC, ITM with hard negatives, MLM, with ALBEF's soft targets; the answer loss of 5.1.1; guidance
distillation. None of them reads a value back from the device, except `check_negatives`, which is for the host.

Dimensions: B rows, C candidates of a contrast, P projection width, R image-text pairs that ITM judges, n candidates of
a selection, A answers, M predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trips.errors import DataError, ShapeError

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


def selection_distillation_loss(logits: Sequence[Tensor], attention: Tensor, temperature: float) -> Tensor:
    """Guidance distillation of a full-patch step: mean over its locations, towards the sharpened attention.

    Args:
        logits: (B, n) of every location.
        attention: (B, n) of the fusion encoder over the same patches, rows sum to 1, without gradient.
        temperature: below 1 it sharpens, attention ** (1 / temperature).
    Returns:
        scalar, in nats.
    """
    teacher = attention ** (1 / temperature)
    teacher = teacher / teacher.sum(dim=1, keepdim=True)
    return torch.stack([guidance_distillation_loss(location, teacher) for location in logits]).mean()


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


def positive_mass(ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Targets of ITC without a teacher (3.3): mass spread evenly over the candidates of the same image.

    Args:
        ids: (B,) image id of each row, long.
        candidate_ids: (C,) image id of each candidate, long; the -1 of an unfilled queue meets no row.
    Returns:
        (B, C) float32; each row sums to 1, or to 0 where no candidate has its id.
    """
    same = ids.unsqueeze(1) == candidate_ids.unsqueeze(0)
    return same.float() / same.sum(dim=1, keepdim=True).clamp(min=1)


def soft_targets(teacher_logits: Tensor, positive_mass: Tensor, alpha: float | Tensor) -> Tensor:
    """Targets of ITC with momentum distillation (3.3, after ALBEF): alpha * softmax + (1 - alpha) * positives.

    Args:
        teacher_logits: (B, C) similarities of the momentum features, divided by the temperature.
        positive_mass: (B, C) from `positive_mass`.
        alpha: share of the teacher, 0 to 1; a number or a 0-d tensor on the same device.
    Returns:
        (B, C) float32 without gradient.
    Raises:
        ShapeError: shapes differ.
    """
    _expect_shape("positive_mass", positive_mass, tuple(teacher_logits.shape))
    teacher = torch.softmax(teacher_logits.detach().float(), dim=-1)
    return alpha * teacher + (1 - alpha) * positive_mass


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    image_candidates: Tensor,
    text_candidates: Tensor,
    temperature: float | Tensor,
    image_targets: Tensor,
    text_targets: Tensor,
) -> Tensor:
    """Image-text contrast, ITC (3.3): cross-entropy with soft targets, mean of the two directions.

    Args:
        image_features: (B, P) normalised, of the image [CLS].
        text_features: (B, P) normalised, of the text [CLS].
        image_candidates: (C_image, P) what a text is compared with: features of this step, then those of the queue.
        text_candidates: (C_text, P) the same for an image.
        temperature: what the similarities are divided by; a number or a 0-d tensor.
        image_targets: (B, C_text) rows of image to text, each sums to 1.
        text_targets: (B, C_image) rows of text to image.
    Returns:
        scalar float32, in nats.
    Raises:
        ShapeError: widths, or targets and candidates, differ.
    """
    rows, width = image_features.shape
    _expect_shape("text_features", text_features, (rows, width))
    _expect_shape("image_candidates", image_candidates, (image_candidates.shape[0], width))
    _expect_shape("text_candidates", text_candidates, (text_candidates.shape[0], width))
    _expect_shape("image_targets", image_targets, (rows, text_candidates.shape[0]))
    _expect_shape("text_targets", text_targets, (rows, image_candidates.shape[0]))
    # Out of autocast: a similarity rounded to bfloat16 (2 ** -9) is off by 0.03 once divided by a temperature of 0.07.
    with torch.autocast(image_features.device.type, enabled=False):
        image_logits = image_features.float() @ text_candidates.float().T / temperature
        text_logits = text_features.float() @ image_candidates.float().T / temperature
        image_loss, text_loss = F.cross_entropy(image_logits, image_targets), F.cross_entropy(text_logits, text_targets)
        return (image_loss + text_loss) / 2


def forbidden_negatives(
    image_ids: Tensor, caption_ids: Tensor, candidate_image_ids: Tensor, candidate_caption_ids: Tensor
) -> Tensor:
    """Which candidates may not stand as a negative: those of the same image or of the same caption.

    Args:
        image_ids, caption_ids: (B,) ids of the rows, long.
        candidate_image_ids, candidate_caption_ids: (C,) ids of the candidates.
    Returns:
        (B, C) bool.
    """
    same_image = image_ids.unsqueeze(1) == candidate_image_ids.unsqueeze(0)
    return same_image | (caption_ids.unsqueeze(1) == candidate_caption_ids.unsqueeze(0))


def check_negatives(
    image_ids: Tensor | Sequence[int], caption_ids: Tensor | Sequence[int], item: object = "batch"
) -> None:
    """Refuse, on the host, a batch in which a pair has no hard negative.

    Asking the device would stop it once per step; the ids are known when the batch is put together.

    Args:
        image_ids: (B,) ids of the images, on the CPU.
        caption_ids: (B,) ids of the captions, on the CPU.
        item: name of the batch in the message.
    Raises:
        DataError: some pair shares its image or its caption with every pair of the batch.
        ShapeError: unequal numbers of ids.
    """
    images, captions = torch.as_tensor(image_ids), torch.as_tensor(caption_ids)
    _expect_shape("caption_ids", captions, tuple(images.shape))
    stuck = forbidden_negatives(images, captions, images, captions).all(dim=1).nonzero().flatten().tolist()
    if stuck:
        raise DataError(
            "no hard negative can be drawn for some pairs",
            item=item,
            found=f"rows {', '.join(map(str, stuck[:8]))}{', ...' if len(stuck) > 8 else ''} of {len(images)}",
            expected="a pair with another image and another caption for each",
            hint="a larger batch, or fewer pairs of one image in it",
        )


@torch.no_grad()
def sample_hard_negatives(similarity: Tensor, forbidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One hard negative per row for ITM (3.3), drawn by contrastive similarity.

    Args:
        similarity: (B, C) logits, i.e. divided by the temperature; candidates are drawn from their softmax.
        forbidden: (B, C) bool, never drawn; see `forbidden_negatives`.
        generator: source of randomness on the device of `similarity`.
    Returns:
        (B,) long, columns. A row with everything forbidden gets 0: `check_negatives` refuses such a batch beforehand.
    Raises:
        ShapeError: shapes differ.
    """
    _expect_shape("forbidden", forbidden, tuple(similarity.shape))
    logits = similarity.float()
    # The largest of logit - log Exp(1) is a draw from the softmax (Gumbel). torch.multinomial checks its input and
    # would wait for the device. Masked last, so that no noise, nor a NaN of it, lets a forbidden column win.
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits - noise).masked_fill(forbidden, float("-inf")).argmax(dim=1)


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Image-text matching, ITM (3.3): cross-entropy of match or no match.

    Args:
        logits: (R, 2) of the fused text [CLS]; column 1 is "match".
        labels: (R,) long, 1 for a true pair.
    Returns:
        scalar float32, in nats.
    """
    return F.cross_entropy(logits.float(), labels)


def mlm_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """Masked language modelling, MLM (3.3): (1 - alpha) * cross-entropy + alpha * cross-entropy with the teacher.

    Args:
        logits: (M, V) at the masked places of the whole batch.
        labels: (M,) long, the tokens that stood there.
        teacher_logits: (M, V) of the momentum model, or None: plain cross-entropy, whatever alpha.
        alpha: share of the teacher, 0 to 1; a number or a 0-d tensor.
    Returns:
        scalar float32, mean over places, in nats; 0 where no place is masked.
    Raises:
        ShapeError: student and teacher differ in shape.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    loss = F.nll_loss(log_probabilities, labels, reduction="sum")
    if teacher_logits is not None:
        _expect_shape("teacher_logits", teacher_logits, tuple(logits.shape))
        teacher = torch.softmax(teacher_logits.detach().float(), dim=-1)
        loss = (1 - alpha) * loss - alpha * (teacher * log_probabilities).sum()
    return loss / max(labels.shape[0], 1)


def _expect_shape(item: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError("does not fit the other tensors", item=item, found=tuple(tensor.shape), expected=expected)
