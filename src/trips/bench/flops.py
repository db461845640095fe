"""Operation counts in closed form from a configuration: every matrix product, attention products included.

One multiply-add is two operations. Norms, softmax, biases and embeddings look-ups are left out, as everywhere.

Letters: D width, F inner width of the FFN, n image tokens, L text tokens, e image tokens that reach the fusion.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.config import SelectionConfig, TripsConfig, token_counts


@dataclass(frozen=True)
class FlopCount:
    """Operations of one image-text pair, in units of 1e9.

    Attributes:
        vision: patch embedding, vision layers, and the guide's score and fusion.
        text: text encoder.
        fusion: fusion encoder.
    """

    vision: float
    text: float
    fusion: float

    @property
    def total(self) -> float:
        """Sum of the three, in units of 1e9."""
        return self.vision + self.text + self.fusion


def count_flops(
    config: TripsConfig, grid: tuple[int, int], text_length: int, selection: SelectionConfig | None = None
) -> FlopCount:
    """Exact operations of one pair through `TripsModel`.

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, text tokens.
        selection: setting, else the model's.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    selection = selection or config.selection
    vision, num_patches = config.vision_config, grid[0] * grid[1]
    width, inner = vision.hidden_size, _inner_width(vision)
    counts = token_counts(num_patches, vision.num_hidden_layers, selection)
    products = num_patches * width * vision.num_channels * vision.patch_size**2
    for index, (before, after) in enumerate(counts):
        products += 4 * before * width**2 + 2 * before**2 * width + 2 * after * width * inner
        if selection.active and index + 1 in selection.layers:
            products += _guide_products(config, before - 1, width, selection)
    text, fusion, length = config.text_config, config.fusion_encoder_config, text_length
    per_layer = 4 * length * text.hidden_size**2 + 2 * length**2 * text.hidden_size
    per_layer += 2 * length * text.hidden_size * text.intermediate_size
    text_products = text.num_hidden_layers * per_layer
    reaching = counts[-1][1]
    cross = 2 * length * fusion.hidden_size**2 + 2 * reaching * fusion.hidden_size**2
    cross += 2 * length * reaching * fusion.hidden_size
    own = 4 * length * fusion.hidden_size**2 + 2 * length**2 * fusion.hidden_size
    own += 2 * length * fusion.hidden_size * fusion.intermediate_size
    fusion_products = fusion.num_hidden_layers * (own + cross)
    if width != fusion.hidden_size:
        fusion_products += reaching * width * fusion.hidden_size
    return FlopCount(*(2 * value / 1e9 for value in (products, text_products, fusion_products)))


def _guide_products(config: TripsConfig, candidates: int, width: int, selection: SelectionConfig) -> int:
    """Multiply-adds of one location: query, keys if any, the scores, the fused token."""
    if selection.guide == "random":
        return candidates * width
    products = width**2 + 2 * candidates * width
    if selection.score == "keys":
        products += candidates * width**2
    if selection.guide == "text" and config.text_config.hidden_size != width:
        products += config.text_config.hidden_size * width
    return products


def _inner_width(vision: object) -> int:
    """F of a vision configuration; DINOv2 gives a ratio instead, and two thirds of it with a gated FFN."""
    if (inner := getattr(vision, "intermediate_size", None)) is not None:
        return inner
    inner = int(vision.hidden_size * vision.mlp_ratio)
    if getattr(vision, "use_swiglu_ffn", False):
        return (int(inner * 2 / 3) + 7) // 8 * 8 * 3 // 2  # three products of the gated width
    return inner
