"""What is measured: how well a selection keeps what a text speaks of, and how well images and texts find each other.

Relevance recall: the share of the patches of what is mentioned that survive. Relevance gain: that, minus the same
under a text of the same type about another image; it takes out what is kept whatever the text. Chance is the share of
patches kept.

Consistency: pairs of images and sentences that share a sentence (NLVR2), right only together.

Dimensions: B texts, k kept tokens, N patches; Q queries, C candidates of retrieval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from trips.errors import ShapeError


def kept_mask(kept: Tensor, num_patches: int) -> Tensor:
    """(B, k) grid positions, -1 for fused tokens -> (B, N) bool, true where the patch itself was kept."""
    spare = torch.where(kept < 0, num_patches, kept)  # fused tokens go to one column that is cut off
    mask = torch.zeros(kept.shape[0], num_patches + 1, dtype=torch.bool, device=kept.device)
    return mask.scatter(1, spare, True)[:, :num_patches]


def relevance_recall(kept: Tensor, relevant: Tensor) -> Tensor:
    """Share of the relevant patches that were kept.

    Args:
        kept: (B, k) positions from a `Selection`, -1 for fused tokens, which count as lost.
        relevant: (B, N) bool.
    Returns:
        (B,) float32; NaN for a text that speaks of no patch.
    Raises:
        ShapeError: numbers of rows differ.
    """
    if kept.shape[0] != relevant.shape[0]:
        raise ShapeError("one row per text is needed", item="relevant", found=relevant.shape[0], expected=kept.shape[0])
    hits = kept_mask(kept, relevant.shape[1]) & relevant
    return hits.sum(dim=1).float() / relevant.sum(dim=1).float()


def relevance_gain(kept: Tensor, kept_for_other: Tensor, relevant: Tensor) -> Tensor:
    """Recall under the own text minus recall under another text, on the same image and its own relevant patches.

    Args:
        kept: (B, k) under the own text. kept_for_other: (B, k) under a text of the same type about another image.
        relevant: (B, N) bool, of the own text.
    Returns:
        (B,) float32 in [-1, 1]; 0 for a guide that does not read.
    """
    return relevance_recall(kept, relevant) - relevance_recall(kept_for_other, relevant)


def recall_at_k(scores: Tensor, relevant: Tensor, ranks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of queries with a relevant candidate among the best k (any of an image's captions counts).

    A candidate that ties with another one ranks behind it, so scores that are all alike find nothing by luck of order.

    Args:
        scores: (Q, C), higher is better.
        relevant: (Q, C) bool, at least one true per query.
        ranks: the k.
    Raises:
        ShapeError: shapes differ, or a query without a relevant candidate.
    """
    if scores.shape != relevant.shape or scores.ndim != 2 or not bool(relevant.any(dim=1).all()):
        raise ShapeError(
            "every query needs a relevant candidate",
            item="relevant",
            found=tuple(relevant.shape),
            expected=tuple(scores.shape),
        )
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~(scores < best) & ~relevant).sum(dim=1)  # what is no number finds nothing
    return {k: (ahead < k).float().mean().item() for k in ranks}


def consistency(correct: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """Share of groups whose members are all right: sentences judged right beside each of their images (NLVR2).

    Args:
        correct: whether each answer is right.
        groups: the group of each, such as its sentence; members need not stand together.
    Raises:
        ShapeError: numbers differ, or there are none.
    """
    if len(correct) != len(groups) or not groups:
        raise ShapeError("one group per answer is needed", item="groups", found=len(groups), expected=len(correct) or 1)
    all_right: dict[Hashable, bool] = {}
    for right, group in zip(correct, groups, strict=True):
        all_right[group] = all_right.get(group, True) and bool(right)
    return sum(all_right.values()) / len(all_right)


def recall_of_shortlist(scores: Tensor, relevant: Tensor, ranks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of queries with a relevant candidate among the best k of a shortlist; what is not on it ranks below.

    A query whose shortlist has no relevant candidate finds nothing. Ties count as in `recall_at_k`; a score that is no
    number ranks the relevant candidate last.

    Args:
        scores: (Q, k) of the second stage, higher is better.
        relevant: (Q, k) bool.
        ranks: none above k tells anything that k does not, unless the shortlist holds all candidates.
    Raises:
        ShapeError: shapes differ.
    """
    if scores.shape != relevant.shape or scores.ndim != 2:
        found, expected = tuple(relevant.shape), tuple(scores.shape)
        raise ShapeError("does not fit the scores", item="relevant", found=found, expected=expected)
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~(scores < best) & ~relevant).sum(dim=1).masked_fill(~relevant.any(dim=1), max(ranks))
    return recall_of_ahead(ahead, ranks)


def recall_of_ahead(ahead: Tensor, ranks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall from the number of candidates that stand before each query's best relevant one: (Q,)."""
    return {k: (ahead < k).float().mean().item() for k in ranks}
