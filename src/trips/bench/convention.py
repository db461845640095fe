"""The operation counts that the paper prints in its Tables 3 to 7, as a closed form: not what the model costs.

The paper does not say how it counts. This form reproduces 19 of its 24 different figures to 0.02 G, most to 0.01; it
was found from them, and no other reading of rounding and fused token comes near. Compare `trips.bench.flops`, which
leaves nothing out; the library never prints one under the name of the other.

Letters: N patches, n_l tokens ([CLS] and fused token included) behind layer l, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from trips.config import SelectionConfig, TripsConfig, token_counts
from trips.errors import ConfigError

_TEXT_TOKENS = 10  # the paper says 40, with which no figure can be had
_TEXT_PRODUCTS = 6 * 24 + 6 * 28  # of D² per token: text encoder; self-attention, cross query and output, FFN of fusion


def paper_convention_g(
    image_size: int | tuple[int, int],
    locations: Sequence[int],
    keep_rate: float | Sequence[float] | None,
    *,
    fuse: bool = True,
    patch: int = 16,
    width: int = 768,
    num_layers: int = 12,
) -> float:
    """Operations of one pair by the paper's convention, in units of 1e9.

    D² (16 sum of n_l + 24 n_last + 2 N + 312 · 10): two per multiply-add of linear layers and patch convolution. Per
    token of the image 16 D² for the FFN of each layer, behind its selection, and 24 D² for the fusion's keys and
    values; 2 D² per patch for the embedding; 312 D² per token of the text, of which there are 10.

    Left out are the products of attention, as of most counters that look at modules, and with them the projections of
    the image tower's attention (8 D² per token and layer): the attention module of CLIP's own code holds them inside,
    where such a counter does not see them. That is why a model costs 1.7 times what its figure says at 384 pixels, and
    why selection seems to save a little more than it does.

    Args:
        image_size: pixels of a side, or (down, across); what is behind the last whole patch is not seen.
        locations: 1-based layers; empty without selection.
        keep_rate: one for all or one per location; anything without selection.
        fuse: whether a fused token goes on.
        patch, width, num_layers: of the image tower; those of text and fusion are BERT-base's.
    Raises:
        ConfigError: a location beyond the last layer, a rate outside (0, 1], an image smaller than a patch.
    """
    down, across = whole_grid((image_size, image_size) if isinstance(image_size, int) else image_size, patch)
    num_patches = down * across
    rates = tuple(keep_rate) if isinstance(keep_rate, Sequence) else keep_rate
    selection = SelectionConfig(
        layers=tuple(locations), keep_rate=rates if locations else 1.0, inattentive="fuse" if fuse else "drop"
    )
    behind = [after for _, after in token_counts(num_patches, num_layers, selection)]
    constant = 2 * num_patches + _TEXT_PRODUCTS * _TEXT_TOKENS
    return width**2 * (16 * sum(behind) + 24 * behind[-1] + constant) / 1e9


def whole_grid(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Patches (down, across) that fit into an image; `ConfigError` if none does."""
    if min(image_size) < patch:
        raise ConfigError("smaller than a patch", item="image_size", found=image_size, expected=f">= {patch}")
    return image_size[0] // patch, image_size[1] // patch


def convention_of(
    config: TripsConfig, image_size: int | tuple[int, int], selection: SelectionConfig | None = None
) -> float | None:
    """`paper_convention_g` of a configuration; None where the convention says nothing.

    It is defined for the paper's model: a dual stream of ViT-B/16 and BERT-base in two halves, and a selection that
    chooses among the patches.
    """
    selection = selection or config.selection
    if not _is_paper_model(config) or (selection.active and selection.guide == "similarity"):
        return None
    locations, rates = (selection.layers, selection.rates) if selection.active else ((), None)
    return paper_convention_g(image_size, locations, rates, fuse=selection.inattentive != "drop")


def _is_paper_model(config: TripsConfig) -> bool:
    """Whether the sizes are those of the paper's model."""
    paper, sizes = TripsConfig(), ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size")
    towers = ("vision_config", "text_config", "fusion_encoder_config")
    return config.architecture == "dual" and all(
        getattr(getattr(config, tower), size, None) == getattr(getattr(paper, tower), size, None)
        for tower in towers
        for size in sizes
    )
