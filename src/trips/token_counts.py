"""Where selection stands and how many tokens it leaves (section 3.2): plain integers, no tensors.

Layer numbers are 1-based, as in the paper; N is the number of image patches without [CLS], r a keep rate,
k = ceil(r n) the number of tokens kept of n candidates.
"""

from __future__ import annotations

import operator

from trips.errors import ConfigError
from trips.options import SelectionConfig


def num_kept(num_candidates: int, keep_rate: float) -> int:
    """k = ceil(r n), at least 1, free of float error (section 3.2, step 4).

    The product is taken on the decimal that the user wrote: 0.55 of 100 is 55, not the 56 of a float product. Plain
    integers, so that torch.compile can follow.
    """
    digits, _, exponent = repr(float(keep_rate)).partition("e")
    whole, _, decimals = digits.partition(".")
    denominator = 10 ** (len(decimals) - int(exponent or 0))
    return max(1, min(num_candidates, -(-int(whole + decimals) * num_candidates // denominator)))


def merging_rounds(num_candidates: int, num_kept: int) -> tuple[int, ...]:
    """Tokens that each round of merging by similarity leaves, from n candidates to k.

    A round pairs tokens, so it removes at most half of them. There are as few rounds as possible; each keeps about the
    same share, since a round that removes all it can has no choice left which pairs to merge.

    Args:
        num_candidates: n.
        num_kept: k, from 1 to n.
    Returns:
        falling counts that end in k; none if k = n.
    """
    # torch.compile must not follow the counts as unknowns, which takes it minutes: one graph for each resolution.
    num_candidates, num_kept = operator.index(num_candidates), operator.index(num_kept)
    left, rounds = num_candidates, 0
    while left > num_kept:
        left, rounds = left - left // 2, rounds + 1
    counts, left = [], num_candidates
    for remaining in range(rounds, 0, -1):
        even = round(left * (num_kept / left) ** (1 / remaining))
        left = max(left - left // 2, even)
        counts.append(left)
    return tuple(counts)


def selection_placement(num_layers: int, num_locations: int) -> tuple[int, ...]:
    """1-based locations j = i s + 1 with s = L / (t + 1) (section 3.2).

    The paper's own main setting (5, 10) does not follow it: L = 12, t = 2 gives (5, 9).

    Raises:
        ConfigError: L is not divisible by t + 1.
    """
    step, rest = divmod(num_layers, max(num_locations, 0) + 1)
    if rest or num_locations < 1:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {num_locations + 1} equal parts",
            item="num_locations",
            found=num_locations,
            expected="t with L divisible by t + 1",
        )
    return tuple(i * step + 1 for i in range(1, num_locations + 1))


def token_counts(num_patches: int, num_layers: int, selection: SelectionConfig) -> list[tuple[int, int]]:
    """Tokens ([CLS] included) that enter attention and FFN of every vision layer.

    The fused token is a candidate at the next location (k of 576 + 0, then of 404 + 1 tokens).

    Args:
        num_patches: N, patches without [CLS].
        num_layers: L, vision layers.
        selection: the setting; one that is not active leaves N + 1 everywhere.
    Returns:
        L pairs (tokens in attention, tokens in FFN).
    Raises:
        ConfigError: a location lies beyond the last layer.
    """
    check_locations(selection, num_layers)
    rates = dict(zip(selection.layers, selection.rates, strict=True)) if selection.active else {}
    fused = selection.fuses
    counts, n = [], num_patches
    for layer in range(1, num_layers + 1):
        before = n
        if layer in rates and (k := num_kept(n, rates[layer])) < n:
            n = k + fused
        counts.append((before + 1, n + 1))
    return counts


def check_locations(selection: SelectionConfig, num_layers: int) -> None:
    """Raise `ConfigError` if a location of an active selection lies beyond the last of `num_layers` layers."""
    if beyond := [layer for layer in selection.layers if selection.active and layer > num_layers]:
        raise ConfigError(
            "location beyond the last layer",
            item="selection.layers",
            found=beyond[0],
            expected=f"1 to {num_layers}",
        )
