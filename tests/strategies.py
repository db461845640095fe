"""What hypothesis draws: shapes, keep rates, placements, masks, settings of the selection."""

from __future__ import annotations

from typing import get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from trips.config import Heads, Inattentive, QueryNorm, Score, SelectionConfig

seeds = st.integers(0, 2**31 - 1)
keep_rates = st.one_of(
    st.sampled_from([0.05, 0.1, 0.3, 0.35, 0.5, 0.55, 0.7, 0.9, 1.0]),
    st.floats(1e-3, 1.0, allow_nan=False, exclude_min=True),
    st.integers(1, 1000).map(lambda thousandths: thousandths / 1000),
)


@st.composite
def shapes(draw: st.DrawFn, max_candidates: int = 24) -> tuple[int, int, int, int]:
    """(B, n, heads, D) with D divisible by heads."""
    heads = draw(st.sampled_from([1, 2, 4]))
    return draw(st.integers(1, 3)), draw(st.integers(1, max_candidates)), heads, heads * draw(st.integers(1, 4))


@st.composite
def placements(draw: st.DrawFn, num_layers: int, min_size: int = 1, max_size: int = 3) -> tuple[int, ...]:
    """Rising 1-based layers, the last one included among the possible."""
    layers = st.sets(st.integers(1, num_layers), min_size=min_size, max_size=min(max_size, num_layers))
    return tuple(sorted(draw(layers)))


@st.composite
def selections(draw: st.DrawFn, num_layers: int, guides: tuple[str, ...] = ("text", "image")) -> SelectionConfig:
    """A setting with one rate or one per location, over every way to guide, score and fuse."""
    layers = draw(placements(num_layers))
    rates = draw(st.one_of(keep_rates, st.tuples(*[keep_rates] * len(layers))))
    return SelectionConfig(
        layers=layers,
        keep_rate=rates,
        guide=draw(st.sampled_from(guides)),
        score=draw(st.sampled_from(get_args(Score))),
        query_norm=draw(st.sampled_from(get_args(QueryNorm))),
        heads=draw(st.sampled_from(get_args(Heads))),
        inattentive=draw(st.sampled_from(get_args(Inattentive))),
    )


@st.composite
def text_masks(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """(batch, length) ones, then zeros; at least one token a row."""
    lengths = [draw(st.integers(1, length)) for _ in range(batch)]
    return torch.tensor([[int(place < n) for place in range(length)] for n in lengths])


@st.composite
def tied_scores(draw: st.DrawFn, max_candidates: int = 24) -> Tensor:
    """(B, n) float32 scores of few values, so that most are ties."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, max_candidates))
    return torch.tensor([[float(draw(st.integers(-2, 2))) for _ in range(n)] for _ in range(batch)])
