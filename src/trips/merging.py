"""Merging of patches that are alike, in place of choosing among them: the control without any guide.

Written after "Token Merging: Your ViT But Faster" (ICLR 2023): bipartite soft matching of the layer's keys. No text and
no [CLS] has a say; the place is that of section 3.2, between a layer's attention and its FFN. Two things differ from
the publication. The keys are those of the tokens after the layer's attention, where selection sees them too, through
the layer's own norm and key projection. And there is no proportional attention (the logarithm of a token's size added
to the attention logits), which the publication leaves open: the host's attention would have to be copied for it.

Dimensions: B rows, n candidate tokens ([CLS] excluded), k tokens left, D width, h heads, d = D / h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trips.config import merging_rounds
from trips.errors import ShapeError
from trips.selection import Selection


def merge_patches(
    states: Tensor,
    keys: Tensor,
    num_kept: int,
    candidates: Tensor,
    sizes: Tensor | None = None,
    *,
    layer: int,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Selection]:
    """One location: merge the patches that are most alike until k are left; the counterpart of `select_patches`.

    A round parts the tokens alternately into sets A and B, links each token of A to the most similar token of B, and
    merges the most similar of these pairs; the token of B stays where it is. `merging_rounds` says how many rounds
    there are and what each leaves; later rounds match the means of the keys. Gradient flows through the means alone.

    Args:
        states: (B, 1 + n, D) tokens after self-attention, image [CLS] first, which is never merged.
        keys: (B, n, D) their keys, without the [CLS]; only compared, so they get no gradient.
        num_kept: k, from 1 to n - 1.
        candidates: (B, n) original grid position of every candidate.
        sizes: (B, n) patches that each candidate stands for, float32; ones if not given.
        layer: 1-based layer number, for the record.
        num_heads: h; heads are compared by the mean of their keys.
    Returns:
        tokens [v_cls, v_1 .. v_k] of shape (B, k + 1, D), in image order; their positions (B, k), each that of the
        candidate which the others were merged into; their sizes (B, k); the record, whose logits are minus the largest
        cosine similarity to a candidate of the other set: the more alike, the lower.
    Raises:
        ShapeError: keys, candidates or sizes do not fit the states.
    """
    rows, n = states.shape[0], states.shape[1] - 1
    sizes = torch.ones(rows, n, device=states.device) if sizes is None else sizes
    shapes = (tuple(keys.shape), tuple(candidates.shape), tuple(sizes.shape), num_kept)
    fits = keys.ndim == 3 and keys.shape[:2] == candidates.shape == sizes.shape == (rows, n) and 1 <= num_kept < n
    if not fits or keys.shape[2] % num_heads:
        raise ShapeError(
            "states, keys, candidates, sizes and k do not fit",
            item=f"layer {layer}",
            found=(tuple(states.shape), *shapes),
            expected="(B, 1 + n, D), (B, n, D), (B, n), (B, n), 1 <= k < n",
        )
    patches, keys = states[:, 1:], keys.detach().unflatten(2, (num_heads, -1)).mean(2)  # (B, n, d)
    index, logits = torch.arange(n, device=states.device).expand(rows, -1), None
    for left in merging_rounds(n, num_kept):
        similarity = _similarity(keys)
        if logits is None:
            logits = _largest(similarity).neg()
        pairing, sizes = _pair(similarity, sizes, left)
        patches, keys = pairing.mean(patches), pairing.mean(keys)
        index = index.gather(1, pairing.survivors)
    positions = candidates.gather(1, index)
    record = Selection(layer, torch.softmax(logits, dim=-1), logits, candidates, index, positions)
    return torch.cat([states[:, :1], patches], dim=1), positions, sizes, record


@dataclass(frozen=True)
class _Pairing:
    """Which tokens of a round become which, for a round of m tokens that removes r of the ceil(m / 2) in set A.

    Attributes:
        rest: (B, |A| - r) tokens of A that stay. merged: (B, r) those that do not; both count within A.
        own: (B, |B|, 1) weight of a token of B in its mean. shares: (B, |B|, r) weights of the merged ones.
        survivors: (B, m - r) tokens of the round that are left, in image order.
        order: (B, m - r) their places in [rest, B].
    """

    rest: Tensor
    merged: Tensor
    own: Tensor
    shares: Tensor
    survivors: Tensor
    order: Tensor

    def mean(self, tokens: Tensor) -> Tensor:
        """(B, m, C) -> (B, m - r, C), size-weighted means in image order.

        One small product: sums of scattered rows would come out in another order at every run on a GPU.
        """
        first, second = tokens[:, 0::2], tokens[:, 1::2]
        shared = torch.bmm(self.shares.to(tokens.dtype), _rows(first, self.merged))
        means = second * self.own.to(tokens.dtype) + shared
        return _rows(torch.cat([_rows(first, self.rest), means.to(first.dtype)], dim=1), self.order)


def _similarity(keys: Tensor) -> Tensor:
    """(B, m, d) -> (B, |A|, |B|) cosines between the tokens at even and those at odd places, float32."""
    unit = F.normalize(keys.float(), dim=-1)
    return torch.bmm(unit[:, 0::2], unit[:, 1::2].mT).float()


def _largest(similarity: Tensor) -> Tensor:
    """(B, |A|, |B|) -> (B, m) each token's largest cosine with the other set."""
    largest = similarity.new_empty(similarity.shape[0], similarity.shape[1] + similarity.shape[2])
    largest[:, 0::2], largest[:, 1::2] = similarity.amax(2), similarity.amax(1)
    return largest


def _pair(similarity: Tensor, sizes: Tensor, left: int) -> tuple[_Pairing, Tensor]:
    """Link A to B, keep the most similar links; also returns the sizes (B, left) of what is left.

    Ties go to the lowest index among the links, by a stable sort.
    """
    num_second = similarity.shape[2]
    removed = sizes.shape[1] - left
    likeness, target = similarity.max(2)  # (B, |A|)
    ranked = torch.sort(likeness, dim=1, descending=True, stable=True).indices
    merged, rest = ranked[:, :removed], ranked[:, removed:]

    second = torch.arange(num_second, device=sizes.device)
    chosen = target.gather(1, merged).unsqueeze(1) == second.view(1, -1, 1)  # (B, |B|, r)
    first_sizes, second_sizes = sizes[:, 0::2], sizes[:, 1::2]
    weights = chosen * first_sizes.gather(1, merged).unsqueeze(1)
    totals = second_sizes + weights.sum(2)
    places = torch.cat([2 * rest, (2 * second + 1).expand(rest.shape[0], -1)], dim=1)
    survivors, order = places.sort(dim=1)
    pairing = _Pairing(
        rest, merged, (second_sizes / totals).unsqueeze(2), weights / totals.unsqueeze(2), survivors, order
    )
    return pairing, torch.cat([first_sizes.gather(1, rest), totals], dim=1).gather(1, order)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, m, C) rows of tokens at (B, j) places -> (B, j, C)."""
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
