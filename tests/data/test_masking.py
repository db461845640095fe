"""Masking: the shares over many tokens, what never happens, and that the generator alone decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from trips.data.masking import mask_tokens
from trips.errors import ConfigError, DataError, ShapeError

PAD, CLS, SEP, MASK = 0, 1, 4, 7  # scattered, so that the words between them count
SPECIAL = {PAD, CLS, SEP, MASK}
VOCABULARY = 30


def test_shares_are_15_80_10_10() -> None:
    """Over 60,000 tokens in texts of 8 to 31 words; bounds are five standard deviations."""
    rng = np.random.default_rng(0)
    candidates = chosen = masked = kept = replaced = 0
    for _ in range(3000):
        words = rng.integers(10, 1000, size=rng.integers(8, 32))
        ids = np.concatenate([[CLS], words, [SEP, PAD, PAD]])
        masked_ids, positions, labels = mask_tokens(ids.tolist(), SPECIAL, 1000, MASK, rng)
        now = masked_ids[positions]
        candidates, chosen = candidates + words.size, chosen + len(positions)
        masked += int((now == MASK).sum())
        kept += int((now == labels).sum())
        replaced += int(((now != MASK) & (now != labels)).sum())
    assert masked + kept + replaced == chosen

    def close(count: int, total: int, share: float) -> bool:
        return abs(count - share * total) < 5 * (total * share * (1 - share)) ** 0.5

    assert candidates > 50_000 and close(chosen, candidates, 0.15)
    assert close(masked, chosen, 0.8) and close(kept, chosen, 0.1) and close(replaced, chosen, 0.1)


def test_rounding_of_short_texts_keeps_the_mean() -> None:
    """Ten words: 1 or 2 are chosen, each half of the time; three words: always 1."""
    rng = np.random.default_rng(3)
    counts = [len(mask_tokens(range(10, 20), SPECIAL, VOCABULARY, MASK, rng).positions) for _ in range(4000)]
    assert set(counts) == {1, 2} and abs(np.mean(counts) - 1.5) < 5 * 0.5 / 4000**0.5
    assert {len(mask_tokens([9, 9, 9], SPECIAL, VOCABULARY, MASK, rng).positions) for _ in range(50)} == {1}


def test_every_place_and_every_word_has_the_same_chance() -> None:
    """Chi-square against flat shares: places of a text, and words that stand in for another."""
    rng, runs = np.random.default_rng(1), 6000
    ids = [CLS] + [9] * 20 + [SEP]
    places, words = np.zeros(22), np.zeros(VOCABULARY)
    for _ in range(runs):
        masked_ids, positions, _ = mask_tokens(ids, SPECIAL, VOCABULARY, MASK, rng)
        places[positions.numpy()] += 1
        now = masked_ids[positions].numpy()
        np.add.at(words, now[(now != MASK) & (now != 9)], 1)
    assert places[[0, 21]].sum() == 0 and words[sorted(SPECIAL)].sum() == 0
    flat = places.sum() / 20
    assert ((places[1:21] - flat) ** 2 / flat).sum() < 43.8  # 19 degrees of freedom, p = 0.001
    drawable = [w for w in range(VOCABULARY) if w not in SPECIAL | {9}]
    flat = words.sum() / len(drawable)
    assert flat > 50 and ((words[drawable] - flat) ** 2 / flat).sum() < 51.2  # 24 degrees of freedom, p = 0.001


texts = st.lists(st.sampled_from([CLS, SEP, PAD, 2, 5, 9, 17, 29]), max_size=20)


@given(ids=texts, probability=st.floats(0.01, 1), as_mask=st.booleans(), seed=seeds)
def test_properties_of_any_text(ids, probability, as_mask, seed) -> None:
    """Special tokens stay, labels are what stood there, nothing changes elsewhere, at least one word is asked for."""
    places = [i in SPECIAL for i in ids]
    special = torch.tensor(places, dtype=torch.bool) if as_mask else SPECIAL
    given_ids = torch.tensor(ids, dtype=torch.long)
    result = mask_tokens(given_ids, special, VOCABULARY, MASK, np.random.default_rng(seed), probability)
    masked_ids, positions, labels = result
    assert given_ids.tolist() == ids  # the input is left alone
    assert [t.dtype for t in result] == [torch.long] * 3 and masked_ids.shape == (len(ids),)
    chosen = positions.tolist()
    assert chosen == sorted(set(chosen)) and not any(places[p] for p in chosen)
    assert labels.tolist() == [ids[p] for p in chosen]
    free = places.count(False)
    low, high = int(probability * free), int(probability * free) + 1
    assert (1 if free else 0) <= len(chosen) <= free and (low <= len(chosen) <= max(high, 1))
    for place, (old, new) in enumerate(zip(ids, masked_ids.tolist(), strict=True)):
        if place not in chosen:
            assert new == old
        else:
            assert 0 <= new < VOCABULARY and (new == MASK or new not in {i for i in ids if i in SPECIAL} | {MASK})
    again = mask_tokens(ids, special, VOCABULARY, MASK, np.random.default_rng(seed), probability)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


def test_another_seed_asks_for_other_words() -> None:
    ids = list(range(8, 28))
    drawn = {
        tuple(mask_tokens(ids, SPECIAL, VOCABULARY, MASK, np.random.default_rng(seed)).positions.tolist())
        for seed in range(20)
    }
    assert len(drawn) > 10


def test_the_only_ordinary_word_is_the_only_one_drawn() -> None:
    """Vocabulary of five, four of them special: what replaces a word is the fifth."""
    rng, seen = np.random.default_rng(2), set()
    for _ in range(200):
        seen |= set(mask_tokens([3, 3], {0, 1, 2, 4}, 5, 4, rng, probability=1.0).masked_ids.tolist())
    assert seen == {3, 4}


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"probability": 0.0}, ConfigError, "probability"),
        ({"probability": 1.5}, ConfigError, "probability"),
        ({"probability": float("nan")}, ConfigError, "probability"),
        ({"mask_token_id": 30}, ConfigError, "mask_token_id"),
        ({"special": [1, 0]}, ConfigError, "special"),
        ({"special": set(range(30))}, ConfigError, "vocab_size"),
        ({"special": set(range(30)) - {MASK}}, ConfigError, "vocab_size"),  # [MASK] is no word either
        ({"special": [True]}, ShapeError, "special"),
        ({"ids": torch.zeros(2, 2, dtype=torch.long)}, ShapeError, "ids"),
        ({"ids": [5, 30]}, DataError, "ids"),
        ({"ids": [-1, 5]}, DataError, "ids"),
    ],
)
def test_errors_name_the_argument(change, error, name) -> None:
    good = {"ids": [5, 6], "special": SPECIAL, "vocab_size": VOCABULARY, "mask_token_id": MASK}
    mask_tokens(**good, rng=np.random.default_rng(0))
    with pytest.raises(error, match=name):
        mask_tokens(**(good | change), rng=np.random.default_rng(0))
