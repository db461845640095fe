"""Which words of a caption the model has to guess: the input of MLM (3.3, BERT's 15 / 80 / 10 / 10).

Drawn on the CPU while the batch is put together, by the generator it is given: a pure function of seed and sample.

Legend: L tokens of a text, M of them masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trips.errors import ConfigError, DataError, ShapeError

MASKED, REPLACED = 0.8, 0.1  # shares of the chosen tokens; the rest stays as it is


class MaskedTokens(NamedTuple):
    """A text with tokens to guess.

    Attributes:
        masked_ids: (L,) long, what the model reads.
        positions: (M,) long, the places to predict, ascending.
        labels: (M,) long, the tokens that stood there.
    """

    masked_ids: Tensor
    positions: Tensor
    labels: Tensor


def mask_tokens(
    ids: Sequence[int] | Tensor,
    special: AbstractSet[int] | Sequence[bool] | Tensor,
    vocab_size: int,
    mask_token_id: int,
    rng: np.random.Generator,
    probability: float = 0.15,
) -> MaskedTokens:
    """Choose tokens of a text and hide them: 80 % become [MASK], 10 % a random word, 10 % stay.

    The number of chosen tokens is `probability` of those that may be chosen, rounded up or down at random so that the
    mean is exact, and at least 1 (BERT also takes at least 1: a short caption would else often teach nothing).

    Args:
        ids: (L,) token ids, padding included or not.
        special: ids that are never chosen ([CLS], [SEP], [PAD]), as a set; or (L,) bool, true at such places.
        vocab_size: random words are drawn below it, special ones excluded: the set's, those found at the places of the
            mask, and [MASK].
        mask_token_id: id of [MASK].
        rng: source of randomness; its state alone decides the result.
        probability: share of tokens to predict, above 0 and at most 1.
    Returns:
        `MaskedTokens`; M is 0 only where every token is special.
    Raises:
        ConfigError: probability or [MASK] out of range, no word left to draw, or `special` neither a set nor bool.
        ShapeError: ids not of one dimension, or another length of the mask.
        DataError: a token id beyond the vocabulary.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    if tokens.ndim != 1:
        raise ShapeError("one text at a time is masked", item="ids", found=tokens.shape, expected="(L,)")
    if not 0 < probability <= 1:
        raise ConfigError("share out of range", item="probability", found=probability, expected="above 0, at most 1")
    if not 0 <= mask_token_id < vocab_size:
        raise ConfigError("no such token", item="mask_token_id", found=mask_token_id, expected=f"below {vocab_size}")
    if tokens.size and not (0 <= tokens.min() and tokens.max() < vocab_size):
        raise DataError(
            "token beyond the vocabulary", item="ids", found=tokens.tolist(), expected=f"below {vocab_size}"
        )
    if isinstance(special, AbstractSet):
        table = _table(frozenset(special), vocab_size, mask_token_id)
        is_special = table.special[tokens]
    else:
        is_special = _mask_of_places(tokens, special)
        table = _table(frozenset(tokens[is_special].tolist()), vocab_size, mask_token_id)
    if table.num_words == 0:
        raise ConfigError("every token is special: no word to draw", item="vocab_size", found=vocab_size)

    candidates = np.flatnonzero(~is_special)
    wanted = max(1, int(probability * candidates.size + rng.random()))
    positions = np.sort(rng.choice(candidates, size=min(wanted, candidates.size), replace=False))
    fate = rng.random(positions.size)
    words = rng.integers(table.num_words, size=positions.size)
    words += np.searchsorted(table.gaps, words, side="right")
    labels, masked = tokens[positions], tokens.copy()
    masked[positions] = np.where(fate < MASKED, mask_token_id, np.where(fate < MASKED + REPLACED, words, labels))
    return MaskedTokens(*(torch.from_numpy(a) for a in (masked, positions, labels)))


class _Table(NamedTuple):
    """The special tokens of a vocabulary of V.

    Attributes:
        special: (V,) bool, never chosen.
        gaps: the r-th word is r plus the number of these up to it; no rejection, so that the stream of draws is fixed.
        num_words: tokens that may be drawn.
    """

    special: np.ndarray
    gaps: np.ndarray
    num_words: int


# A run has one set of special tokens; made anew for each text it would cost as much as the masking itself.
@lru_cache(maxsize=16)
def _table(special: frozenset[int], vocab_size: int, mask_token_id: int) -> _Table:
    chosen_never = np.zeros(vocab_size, dtype=np.bool_)
    chosen_never[[token for token in special if 0 <= token < vocab_size]] = True
    drawn_never = chosen_never.copy()
    drawn_never[mask_token_id] = True
    ids = np.flatnonzero(drawn_never)
    return _Table(chosen_never, ids - np.arange(ids.size), vocab_size - ids.size)


def _mask_of_places(tokens: np.ndarray, special: Sequence[bool] | Tensor) -> np.ndarray:
    """(L,) bool of the places that are never chosen."""
    is_special = np.asarray(special)
    if is_special.dtype != np.bool_:
        expected = "a set of ids, or a bool for each token"
        raise ConfigError("cannot tell special tokens", item="special", found=str(is_special.dtype), expected=expected)
    if is_special.shape != tokens.shape:
        raise ShapeError("one value per token", item="special", found=is_special.shape, expected=tokens.shape)
    return is_special
