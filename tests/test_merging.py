"""Merging by similarity against loops over single tokens, what it conserves, and as a guide in a running tower."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import keep_rates, placements, seeds
from tiny import FAMILIES, images, texts, tiny_config, tiny_encoder, tiny_vqa_model
from torch import Tensor

from trips.config import SelectionConfig, merging_rounds, num_kept, token_counts
from trips.errors import ConfigError, ShapeError
from trips.merging import merge_patches
from trips.model import TripsModel

ALIKE = SelectionConfig(layers=(2, 3), keep_rate=0.5, guide="similarity")


def merged_by_loops(
    tokens: list[Tensor], keys: list[Tensor], sizes: list[float], num_left: int
) -> tuple[list[Tensor], list[float], list[int]]:
    """One row: tokens, sizes and which candidates are left; a pair at a time, in each round of the plan."""
    places = list(range(len(tokens)))
    for left in merging_rounds(len(tokens), num_left):
        links = []
        for one in range(0, len(tokens), 2):
            likeness = [
                (float(torch.cosine_similarity(keys[one], keys[other], dim=0)), -other)
                for other in range(1, len(tokens), 2)
            ]
            best, other = max(likeness)
            links.append((-best, one, -other))
        gone = sorted(links)[: len(tokens) - left]
        total = list(sizes)
        summed = [(token * size, key * size) for token, key, size in zip(tokens, keys, sizes, strict=True)]
        for _, one, other in gone:
            total[other] += sizes[one]
            summed[other] = (
                summed[other][0] + tokens[one] * sizes[one],
                summed[other][1] + keys[one] * sizes[one],
            )
        stays = [place for place in range(len(tokens)) if place not in {one for _, one, _ in gone}]
        tokens, keys = ([summed[place][part] / total[place] for place in stays] for part in (0, 1))
        sizes, places = [total[place] for place in stays], [places[place] for place in stays]
    return tokens, sizes, places


def drawn(rows: int, n: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """states, keys, candidates and sizes of 1 to 4 patches."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 1 + n, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(rows, n, width, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (rows, n), generator=generator).float()
    return states, keys, torch.arange(100, 100 + n).expand(rows, -1), sizes


@given(rows=st.integers(1, 3), n=st.integers(2, 30), rate=keep_rates, heads=st.sampled_from([1, 2]), seed=seeds)
def test_equals_the_loops_over_tokens(rows, n, rate, heads, seed) -> None:
    k = min(num_kept(n, rate), n - 1)
    states, keys, candidates, sizes = drawn(rows, n, 8 * heads, seed)
    tokens, positions, new_sizes, record = merge_patches(states, keys, k, candidates, sizes, layer=3, num_heads=heads)
    assert tokens.shape == (rows, k + 1, states.shape[2]) and torch.equal(tokens[:, 0], states[:, 0])
    for row in range(rows):
        compared = keys[row].view(n, heads, 8).mean(1)
        expected, counts, places = merged_by_loops(list(states[row, 1:]), list(compared), sizes[row].tolist(), k)
        torch.testing.assert_close(tokens[row, 1:], torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert new_sizes[row].tolist() == counts
        assert record.index[row].tolist() == places and positions[row].tolist() == [100 + place for place in places]
    assert record.layer == 3 and torch.equal(record.kept, positions) and torch.equal(record.candidates, candidates)


@given(n=st.integers(2, 40), rate=keep_rates, seed=seeds)
def test_patches_and_their_weighted_mean_are_conserved(n, rate, seed) -> None:
    k = min(num_kept(n, rate), n - 1)
    states, keys, candidates, sizes = drawn(2, n, 6, seed)
    tokens, _, new_sizes, _ = merge_patches(states, keys, k, candidates, sizes, layer=1)
    assert torch.equal(new_sizes.sum(1), sizes.sum(1)) and float(new_sizes.min()) >= 1
    before = (states[:, 1:] * sizes.unsqueeze(2)).sum(1)
    torch.testing.assert_close((tokens[:, 1:] * new_sizes.unsqueeze(2)).sum(1), before, rtol=1e-5, atol=1e-4)


@given(n=st.integers(1, 2000), rate=keep_rates)
def test_rounds_reach_k_and_none_removes_more_than_half(n, rate) -> None:
    left, k = n, num_kept(n, rate)
    counts = merging_rounds(n, k)
    for count in counts:
        assert left - left // 2 <= count < left
        left = count
    assert left == k
    fewest, reach = 0, n
    while reach > k:
        reach, fewest = -(-reach // 2), fewest + 1
    assert len(counts) == fewest


def test_rounds_keep_about_the_same_share_each() -> None:
    assert merging_rounds(576, 404) == (404,)
    assert merging_rounds(576, 260) == (387, 260)
    assert merging_rounds(576, 58) == (324, 183, 103, 58)
    assert merging_rounds(5, 2) == (3, 2) and merging_rounds(3, 1) == (2, 1) and merging_rounds(7, 7) == ()


@given(n=st.integers(4, 20), seed=seeds)
def test_order_within_the_two_sets_does_not_matter(n, seed) -> None:
    """Patches may be permuted as long as each stays in its set: the same tokens come out of a round."""
    states, keys, candidates, sizes = drawn(1, n, 8, seed)
    k = n - n // 3
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(n)
    for start in (0, 1):
        mine = torch.arange(start, n, 2)
        order[start::2] = mine[torch.randperm(len(mine), generator=generator)]
    plain = merge_patches(states, keys, k, candidates, sizes, layer=1)
    moved = torch.cat([states[:, :1], states[:, 1:][:, order]], dim=1)
    other = merge_patches(moved, keys[:, order], k, candidates[:, order], sizes[:, order], layer=1)
    ranks = [positions.argsort(dim=1)[0] for positions in (plain[1], other[1])]
    assert torch.equal(plain[1][0, ranks[0]], other[1][0, ranks[1]])
    torch.testing.assert_close(plain[0][0, 1:][ranks[0]], other[0][0, 1:][ranks[1]], rtol=1e-5, atol=1e-6)


def test_the_most_alike_go_first_and_the_record_says_who_they_are() -> None:
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0], [1.0, -1.0], [1.0, 0.5]]])
    states = torch.arange(14.0).view(1, 7, 2)
    tokens, positions, sizes, record = merge_patches(states, keys, 5, torch.arange(6)[None], layer=1)
    assert positions.tolist() == [[1, 2, 3, 4, 5]] and sizes.tolist() == [[2, 1, 1, 1, 1]]
    assert tokens[0, 1].tolist() == [3.0, 4.0]  # the mean of [2, 3] and [4, 5]
    assert int(record.scores.argmin()) in (0, 1) and int(record.scores.argmax()) == 3  # like nobody, the opposite
    torch.testing.assert_close(record.scores, torch.softmax(record.logits, dim=1))
    torch.testing.assert_close(record.scores.sum(1), torch.ones(1))


def test_gradient_flows_through_the_means_and_not_through_the_match() -> None:
    states, keys, candidates, sizes = drawn(1, 9, 4, 3)
    states.requires_grad_()
    keys.requires_grad_()
    weights = torch.randn(4, 4, dtype=torch.float64)
    (merge_patches(states, keys, 3, candidates, sizes, layer=1)[0][0] * weights).sum().backward()
    found, states.grad = states.grad, None
    expected, _, _ = merged_by_loops(list(states[0, 1:]), list(keys[0].detach()), sizes[0].tolist(), 3)
    (torch.stack([states[0, 0], *expected]) * weights).sum().backward()
    torch.testing.assert_close(found, states.grad, rtol=1e-5, atol=1e-6)
    assert keys.grad is None and float(found.abs().min()) > 0


def test_half_precision_keeps_its_type() -> None:
    states, keys, candidates, _ = drawn(2, 12, 8, 0)
    tokens, _, sizes, record = merge_patches(states.bfloat16(), keys.bfloat16(), 4, candidates, layer=1)
    assert tokens.dtype == torch.bfloat16 and sizes.dtype == record.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("key_shape", "places", "k", "heads"),
    [((2, 5, 8), 6, 3, 1), ((1, 6, 8), 6, 3, 1), ((2, 6), 6, 3, 1), ((2, 6, 8), 5, 3, 1), ((2, 6, 8), 6, 6, 1),
     ((2, 6, 8), 6, 0, 1), ((2, 6, 8), 6, 3, 3)],
)  # fmt: skip
def test_misfits_are_named(key_shape, places, k, heads) -> None:
    with pytest.raises(ShapeError, match="layer 7"):
        merge_patches(torch.zeros(2, 7, 8), torch.zeros(key_shape), k, torch.zeros(2, places), layer=7, num_heads=heads)


@pytest.fixture(scope="module")
def doubles() -> dict:
    return {family: tiny_encoder(family, ALIKE, width=16).double() for family in FAMILIES}


@given(layers=placements(4), rate=keep_rates, family=st.sampled_from(FAMILIES), down=st.integers(1, 4), seed=seeds)
@settings(max_examples=30)
@torch.no_grad()
def test_a_tower_merges_as_the_loops_do(doubles, layers, rate, family, down, seed) -> None:
    """All three families, sizes carried from one location to the next."""
    encoder, selection = doubles[family], ALIKE.replace(layers=layers, keep_rate=rate)
    torch.manual_seed(seed)
    pixels = torch.randn(2, 3, 8 * down, 24, dtype=torch.float64)
    out = encoder(pixels, None, selection)
    reader, states = encoder.reader, encoder.reader.embed(pixels)
    places, sizes = [list(range(3 * down))] * 2, [[1.0] * (3 * down)] * 2
    for layer in range(1, 5):
        states, n = reader.attend(layer - 1, states), states.shape[1] - 1
        if layer in layers and (k := num_kept(n, rate)) < n:
            keys = reader.keys(layer - 1, states[:, 1:]).view(2, n, 4, 4).mean(2)
            rows = []
            for row in range(2):
                tokens, sizes[row], stay = merged_by_loops(list(states[row, 1:]), list(keys[row]), sizes[row], k)
                places[row] = [places[row][place] for place in stay]
                rows.append(torch.stack([states[row, 0], *tokens]))
            states = torch.stack(rows)
        states = reader.feed_forward(layer - 1, states)
    assert out.positions.tolist() == places
    torch.testing.assert_close(out.last_hidden_state, reader.final_norm(states), rtol=1e-4, atol=1e-5)
    assert out.last_hidden_state.shape[1] == token_counts(3 * down, 4, selection)[-1][1]


@torch.no_grad()
def test_keep_rate_one_is_the_tower_itself() -> None:
    encoder = tiny_encoder("clip", ALIKE)
    whole = encoder(images(), selection=ALIKE.replace(keep_rate=1.0))
    plain = encoder(images(), selection=ALIKE.replace(guide="none"))
    torch.testing.assert_close(whole.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
    assert not whole.selections


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_alone_is_the_row_of_its_batch(doubles, family) -> None:
    pixels = images(3).double()
    batch, alone = doubles[family](pixels), doubles[family](pixels[1:2])
    assert torch.equal(alone.positions[0], batch.positions[1])
    torch.testing.assert_close(alone.last_hidden_state[0], batch.last_hidden_state[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_graph_whatever_the_images(family) -> None:
    encoder = tiny_encoder(family, ALIKE.replace(keep_rate=0.2))
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for seed in (1, 2):
        out, plain = compiled(images(seed=seed)), encoder(images(seed=seed))
        torch.testing.assert_close(out.last_hidden_state, plain.last_hidden_state)
        assert torch.equal(out.positions, plain.positions)


def test_no_value_is_read_on_the_host() -> None:
    encoder = tiny_encoder("clip", ALIKE.replace(keep_rate=0.1, learning="gate")).to("meta")
    out = encoder(images().to("meta"))
    assert out.last_hidden_state.shape == (2, 2, 32)  # 16 patches, 2, 1


def test_the_model_runs_without_asking_the_text() -> None:
    model = TripsModel(tiny_config(guide="similarity", learning="gate", inattentive="fuse")).eval()
    ids, mask = texts()
    out = model(ids, mask, images())
    assert out.image_states.shape[1] == 1 + 4 and int(out.image_positions.min()) >= 0
    out.last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in model.vision.tower.encoder.parameters())


def test_there_is_no_guide_to_teach() -> None:
    assert SelectionConfig().can_learn and SelectionConfig(guide="image").can_learn and SelectionConfig().fuses
    for guide in ("similarity", "random", "none"):
        assert not SelectionConfig(guide=guide).can_learn
    assert not ALIKE.fuses and not SelectionConfig(inattentive="drop").fuses and not SelectionConfig(layers=()).fuses
    with pytest.raises(ConfigError, match="observe"):
        tiny_encoder("clip", ALIKE)(images(), observe=True)
    model, (ids, mask) = tiny_vqa_model(guide="similarity"), texts()
    with pytest.raises(ConfigError, match="no guide to teach"):
        model(images(), ids, mask, distill=True)
