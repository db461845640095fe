"""Text-relevant image patch selection as functions of tensors (section 3.2, Figure 2c).

In the order of the paper: the product of the guide's query with the patches, a_cls (TD-ATT), the k best, the fused
token (ITF), and all of it as one step. No parameters live here and no model is known here.

Dimensions: B rows (one guide each), n candidate tokens ([CLS] excluded), k kept, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trips.config import Inattentive
from trips.errors import ShapeError

FUSED = -1  # stands for "a fused token" where a patch position is expected


@dataclass
class Selection:
    """What one location kept, for figures, metrics and tests.

    Attributes:
        layer: 1-based vision layer.
        scores: (B, n) a_cls over the candidates, float32, detached.
        logits: (B, n) float32; their softmax is a_cls; carries gradient.
        candidates: (B, n) position of every candidate in the original patch grid (row-major), -1 for a fused token.
        index: (B, k) which candidates were kept, in image order.
        kept: (B, k) their positions in the patch grid, -1 for a fused token of an earlier location.
    """

    layer: int
    scores: Tensor
    logits: Tensor
    candidates: Tensor
    index: Tensor
    kept: Tensor


def relevance_logits(query: Tensor, patches: Tensor, num_heads: int = 1) -> Tensor:
    """Logits whose softmax is a_cls: q · v / sqrt(d), before the softmax of TD-ATT.

    With several heads the softmaxes of the heads are averaged (EViT's way) and the logarithm of the average is
    returned, so that the softmax of the result is again a_cls.

    Args:
        query: (B, D) the guide through the layer's query projection.
        patches: (B, n, D) what is scored: states or keys, without the image [CLS].
        num_heads: 1 for one product over the full width.
    Returns:
        (B, n) float32.
    Raises:
        ShapeError: batch sizes or widths differ, or D is not divisible by num_heads.
    """
    if query.ndim != 2 or patches.ndim != 3 or query.shape != (patches.shape[0], patches.shape[2]):
        raise ShapeError(
            "query and patches do not fit",
            item="relevance_logits",
            found=(tuple(query.shape), tuple(patches.shape)),
            expected="(B, D) and (B, n, D)",
        )
    width = query.shape[1]
    if width % num_heads:
        raise ShapeError("width not divisible by the number of heads", item="num_heads", found=num_heads)
    batch, n = patches.shape[:2]
    head = width // num_heads
    keys = patches.view(batch, n, num_heads, head).permute(0, 2, 3, 1)  # (B, h, d, n)
    rows = torch.matmul(query.view(batch, num_heads, 1, head), keys).squeeze(2)  # (B, h, n)
    logits = rows.float() * head**-0.5
    if num_heads == 1:
        return logits.squeeze(1)
    return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=1) - torch.log(logits.new_tensor(num_heads))


def text_relevance(q_text: Tensor, patches: Tensor, num_heads: int = 1) -> Tensor:
    """Attention of the text [CLS] over the image patches, a_cls (Eq. 2).

    Args:
        q_text: (B, D) text [CLS] through the layer's own query projection.
        patches: (B, n, D) patch tokens after self-attention, without the image [CLS].
        num_heads: 1 for the full width as printed.
    Returns:
        (B, n) weights, each row sums to 1, in float32 whatever the input dtype.
    Raises:
        ShapeError: widths or batch sizes differ.
    """
    return torch.softmax(relevance_logits(q_text, patches, num_heads), dim=-1)


def top_patches(scores: Tensor, num_kept: int) -> Tensor:
    """Indices of the k candidates with the largest score, in image order (section 3.2, step 4).

    Ties go to the lowest index. A stable sort, because topk leaves the order of ties open.

    Args:
        scores: (B, n).
        num_kept: k.
    Returns:
        (B, k) int64, ascending in every row.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return torch.sort(order[:, :num_kept], dim=-1).values


def fuse_inattentive(patches: Tensor, a_cls: Tensor, kept: Tensor, renormalise: bool = False) -> Tensor:
    """The fused token v_f = sum of a_cls[z] v_z over the tokens z that are not kept (Eq. 3).

    Zero weight at the kept places makes it one product over all n: nothing but the kept tokens is ever gathered.

    Args:
        patches: (B, n, D) the residual stream.
        a_cls: (B, n) weights over all n candidates.
        kept: (B, k) indices of the kept ones.
        renormalise: divide by the weight that was dropped (not in the paper).
    Returns:
        (B, 1, D) in the dtype of the patches.
    """
    weights = a_cls.scatter(1, kept, 0.0)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.bmm(weights.unsqueeze(1).to(patches.dtype), patches)


def straight_through_gate(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """Factor of value exactly 1 on each kept token that lets gradient reach its score (beyond the paper).

    1 + g - stopgrad(g) with g = sigmoid((score - stopgrad(smallest kept score)) / temperature), the score being
    log a_cls: its gradient has no part along the mean of the patches, which would change all scores alike and drown
    what tells patches apart.

    Args:
        logits: (B, n) of the candidates. index: (B, k) the kept ones.
        temperature: width of the sigmoid.
    Returns:
        (B, k) ones, with gradient.
    """
    kept = torch.log_softmax(logits, dim=-1).gather(1, index)
    gate = torch.sigmoid((kept - kept.detach().amin(dim=-1, keepdim=True)) / temperature)
    return 1.0 + (gate - gate.detach())


def select_patches(
    states: Tensor,
    logits: Tensor,
    num_kept: int,
    candidates: Tensor,
    *,
    layer: int,
    inattentive: Inattentive = "fuse",
) -> tuple[Tensor, Tensor, Selection]:
    """One selection: keep the k best patches, fuse the rest (section 3.2, steps 4 to 6).

    Args:
        states: (B, 1 + n, D) tokens after self-attention, image [CLS] first; a fused token is a candidate like any.
        logits: (B, n) from `relevance_logits`.
        num_kept: k, at least 1. k = n leaves the tokens untouched and fuses nothing.
        candidates: (B, n) original grid position of every candidate, -1 for a fused token.
        layer: 1-based layer number, for the record.
        inattentive: what becomes of the n - k others.
    Returns:
        tokens [v_cls, v_1 .. v_k, v_f] of shape (B, k + 2, D), or (B, k + 1, D) when dropped or k = n; their
        positions without [CLS]; the record.
    Raises:
        ShapeError: logits or candidates do not fit the states.
    """
    n = states.shape[1] - 1
    if logits.shape != (states.shape[0], n) or candidates.shape != logits.shape or not 1 <= num_kept <= n:
        raise ShapeError(
            "states, logits, candidates and k do not fit",
            item=f"layer {layer}",
            found=(tuple(states.shape), tuple(logits.shape), tuple(candidates.shape), num_kept),
            expected="(B, 1 + n, D), (B, n), (B, n), 1 <= k <= n",
        )
    a_cls = torch.softmax(logits, dim=-1)
    if num_kept == n:
        everything = torch.arange(n, device=states.device).expand(states.shape[0], -1)
        return states, candidates, Selection(layer, a_cls.detach(), logits, candidates, everything, candidates)
    kept = top_patches(logits.detach(), num_kept)  # (B, k)
    positions = candidates.gather(1, kept)
    cls, patches = states.split([1, n], dim=1)
    kept_patches = _take_patches(states, kept)  # (B, k, D)
    record = Selection(layer, a_cls.detach(), logits, candidates, kept, positions)
    if inattentive == "drop":
        return torch.cat([cls, kept_patches], dim=1), positions, record
    fused = fuse_inattentive(patches, a_cls, kept, renormalise=inattentive == "renormalise")
    positions = torch.cat([positions, positions.new_full((positions.shape[0], 1), FUSED)], dim=1)
    return torch.cat([cls, kept_patches, fused], dim=1), positions, record


def semi_orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) fixed map with orthonormal rows or columns, whichever are fewer; seeded, no parameters."""
    noise = torch.randn(max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(noise).Q
    # Contiguous, as it will be after saving and loading: products then round alike and reloading is bitwise.
    return (basis if rows >= columns else basis.T).contiguous()


def _take_patches(states: Tensor, index: Tensor) -> Tensor:
    """(B, 1 + n, D) tokens, (B, k) candidates -> (B, k, D).

    Whole rows of one matrix: forward and backward take half the time of a gather, which looks up every number.
    """
    batch, tokens, width = states.shape
    starts = torch.arange(1, batch * tokens, tokens, device=states.device).unsqueeze(1)  # first patch of each row
    return states.flatten(0, 1).index_select(0, (index + starts).flatten()).view(batch, -1, width)
