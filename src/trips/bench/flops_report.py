"""What `trips flops` tells: a model without and with selection, by image size, in exact operations.

Beside the exact count, and never in its place, stands the paper's own (`trips.bench.convention`) where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from trips.bench.answer_flops import count_answer_ranking_flops
from trips.bench.convention import convention_of, whole_grid
from trips.bench.flops import count_flops, count_pretraining_flops, count_reasoning_flops
from trips.bench.methods import KeptTokens, kept_tokens
from trips.bench.retrieval_flops import count_feature_flops, count_reranking_flops
from trips.config import SelectionConfig, TripsConfig, token_counts
from trips.errors import ConfigError
from trips.options import FlopTask

TOP_K = 128  # candidate answers that are read to their end
_COUNTED: dict[str, str] = {
    "pair": "one image and one text",
    "vqa": f"one question about an image, the best {TOP_K} candidate answers ranked",
    "retrieval": "one pair of the second stage, where text states and what of the image has seen no text are stored",
    "nlvr2": "one sentence and its images",
    "pretraining": "one pair in a training step, backward pass included; its parts forward only",
}


@dataclass(frozen=True)
class FlopRow:
    """One setting at one image size; operations in units of 1e9.

    Attributes:
        image_size: pixels (down, across).
        guide: "none" is the baseline without selection.
        layers, keep_rates: locations; none for the baseline.
        patches: N.
        kept: what each location does to the patch tokens.
        tokens: that enter attention and FFN of every layer, [CLS] included.
        parts: operations by part of the model.
        exact_g: operations of what the report counts.
        exact_ratio: how many times those of this setting the baseline's are.
        paper_convention_g: by the paper's way of counting; None where it says nothing.
    """

    image_size: tuple[int, int]
    guide: str
    layers: tuple[int, ...]
    keep_rates: tuple[float, ...]
    patches: int
    kept: tuple[KeptTokens, ...]
    tokens: tuple[tuple[int, int], ...]
    parts: dict[str, float]
    exact_g: float
    exact_ratio: float
    paper_convention_g: float | None


@dataclass(frozen=True)
class FlopReport:
    """Rows, and what they count.

    Attributes:
        task: see `FlopTask`. counts: what one of it is, in words.
        architecture: of the model.
        text_length: L.
        rows: for each image size the baseline and, unless it is the same, the subject.
    """

    task: FlopTask
    counts: str
    architecture: str
    text_length: int
    rows: tuple[FlopRow, ...]

    def table(self, per_layer: bool = False) -> RenderableType:
        """As tables for people; `per_layer` adds the tokens of every layer."""
        parts = list(self.rows[0].parts)
        convention = any(row.paper_convention_g is not None for row in self.rows)
        table = Table(title=f"10⁹ operations (exact): {self.counts}; {self.text_length} text tokens")
        table.title_justify = "left"
        table.add_column("px", justify="right")
        table.add_column("guide")
        for name in [*parts, "exact", "ratio", *(["paper's convention"] if convention else [])]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in self.rows:
            figures = [*row.parts.values(), row.exact_g]
            said = "-" if row.paper_convention_g is None else f"{row.paper_convention_g:.2f}"
            cells = [*map(_figure, figures), f"{row.exact_ratio:.3f}", *([said] if convention else [])]
            table.add_row(_size(row), row.guide, *cells)
        lines = [f"{_size(row)} px, {row.guide}: {_told(row)}" for row in self.rows if row.kept]
        return Group(table, *lines, *([self._layers()] if per_layer else []))

    def _layers(self) -> Table:
        table = Table(title="image tokens in attention / FFN, [CLS] included", title_justify="left")
        table.add_column("layer", justify="right")
        for row in self.rows:
            table.add_column(f"{_size(row)} px, {row.guide}", justify="right")
        for layer, counts in enumerate(zip(*(row.tokens for row in self.rows)), start=1):
            table.add_row(str(layer), *(f"{before} / {after}" for before, after in counts))
        return table


def flop_report(
    config: TripsConfig,
    image_sizes: Sequence[int | tuple[int, int]],
    text_length: int,
    selection: SelectionConfig | None = None,
    *,
    task: FlopTask = "pair",
    candidates: int = 3129,
    answer_length: float = 3,
) -> FlopReport:
    """Count a model without and with selection.

    Args:
        config: the model's.
        image_sizes: pixels of a side, or (down, across); whole patches are seen.
        text_length: L.
        selection: the subject's, else the model's.
        task: what is counted.
        candidates, answer_length: see `count_answer_ranking_flops`; for "vqa" alone.
    Raises:
        ConfigError: a location beyond the last layer, an image smaller than a patch, a text without tokens.
    """
    selection = selection or config.selection
    if text_length < 1:
        raise ConfigError("not a number of tokens", item="text_length", found=text_length, expected=">= 1")
    rows: list[FlopRow] = []
    for image_size in image_sizes:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = whole_grid(size, config.vision_config.patch_size)
        baseline = None
        for setting in (SelectionConfig(guide="none"), *([selection] if selection.active else [])):
            parts, total = _count(config, grid, text_length, setting, task, candidates, answer_length)
            baseline = baseline or total
            rows.append(_row(config, size, grid, setting, parts, total, baseline, task))
    return FlopReport(task, _COUNTED[task], config.architecture, text_length, tuple(rows))


def _count(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig,
    task: FlopTask,
    candidates: int,
    answer_length: float,
) -> tuple[dict[str, float], float]:
    """Parts, and what they come to."""
    if task == "pretraining":
        step = count_pretraining_flops(config, grid, text_length, selection)
        return dataclasses.asdict(step), step.training
    if task == "retrieval":
        stored = count_feature_flops(config, grid, text_length, selection)
        pairs = count_reranking_flops(config, grid, text_length, selection)
        parts = {"image feature": stored.image, "text feature": stored.text}
        return {**parts, "image": pairs.image, "text": pairs.text, "pair": pairs.pair}, pairs.pair
    if task == "vqa":
        count = count_answer_ranking_flops(
            config, grid, text_length, selection, candidates=candidates, top_k=TOP_K, answer_length=answer_length
        )
    else:
        count = (count_reasoning_flops if task == "nlvr2" else count_flops)(config, grid, text_length, selection)
    return dataclasses.asdict(count), count.total


def _row(
    config: TripsConfig,
    size: tuple[int, int],
    grid: tuple[int, int],
    selection: SelectionConfig,
    parts: dict[str, float],
    total: float,
    baseline: float,
    task: FlopTask,
) -> FlopRow:
    num_patches = grid[0] * grid[1]
    return FlopRow(
        image_size=size,
        guide=selection.guide,
        layers=selection.layers if selection.active else (),
        keep_rates=selection.rates if selection.active else (),
        patches=num_patches,
        kept=kept_tokens(config, num_patches, selection),
        tokens=tuple(token_counts(num_patches, config.vision_config.num_hidden_layers, selection)),
        parts=parts,
        exact_g=total,
        exact_ratio=baseline / total,
        paper_convention_g=convention_of(config, size, selection) if task == "pair" else None,
    )


def _size(row: FlopRow) -> str:
    down, across = row.image_size
    return str(down) if down == across else f"{across} x {down}"


def _told(row: FlopRow) -> str:
    """Tokens in and kept at each location, in words."""

    def said(kept: Iterable[KeptTokens]) -> Iterable[str]:
        for at in kept:
            fused = f" and {at.left - at.kept} fused" if at.left > at.kept else ""
            yield f"layer {at.layer}: {at.entered} tokens in, {at.kept} kept{fused}"

    return "; ".join(said(row.kept))


def _figure(value: float) -> str:
    """Two decimals, more for what is small."""
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.3g}"
