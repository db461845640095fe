"""Multiply-adds of the model's parts in closed form: what all counts of `trips.bench` are sums of.

Attention products are included; norms, softmax, biases and look-ups are not.

Letters: D width, F inner width of the FFN, n image tokens, L text tokens, e image tokens that reach the fusion,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import BertConfig, PreTrainedConfig

from trips.config import SelectionConfig, TripsConfig, merging_rounds, num_kept, token_counts
from trips.errors import ConfigError


@dataclass(frozen=True)
class VisionPass:
    """Multiply-adds of `VisionEncoder.prefix` and `VisionEncoder.suffix`, and e, the tokens that come out."""

    prefix: int
    suffix: int
    tokens: int


def settled(selection: SelectionConfig) -> SelectionConfig:
    """A setting as the models take it: one that removes nothing has no guide, and no suffix either."""
    return selection.replace(guide="none") if selection.active and min(selection.rates) == 1 else selection


def attention_products(tokens: int, width: int) -> int:
    """Self-attention of one layer: four projections and two products of the tokens with each other."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def vision_pass(
    config: TripsConfig, grid: tuple[int, int], selection: SelectionConfig, observe: bool = False
) -> VisionPass:
    """ViT-TRIPS on one image; a full-patch step (`observe`) scores at every location and removes nothing.

    Raises:
        ConfigError: a location beyond the last layer; nothing to observe, since similarity merges.
    """
    if observe and selection.guide == "similarity":
        raise ConfigError("no guide scores the patches", item="observe", found=selection.guide)
    vision, num_patches = config.vision_config, grid[0] * grid[1]
    width, inner = vision.hidden_size, inner_width(vision)
    kept = selection.replace(keep_rate=1.0) if observe else selection
    counts = token_counts(num_patches, vision.num_hidden_layers, kept)
    rates = dict(zip(kept.layers, kept.rates, strict=True)) if kept.active else {}
    first = min(rates, default=len(counts) + 1)
    prefix, suffix = patch_products(vision, num_patches), 0
    for layer, (before, after) in enumerate(counts, start=1):
        attention, ffn = attention_products(before, width), 2 * after * width * inner
        if layer < first:
            prefix += attention + ffn
        elif layer == first:
            prefix, suffix = prefix + attention, suffix + ffn
        else:
            suffix += attention + ffn
        if layer in rates:
            candidates, k = before - 1, num_kept(before - 1, rates[layer])
            if selection.guide == "similarity":
                suffix += merging_products(vision, candidates, k)
            elif observe or k < candidates:
                suffix += score_products(config, candidates, selection)
            if k < candidates and selection.fuses:
                suffix += candidates * width
    return VisionPass(prefix, suffix, counts[-1][1])


def joint_products(config: TripsConfig, num_patches: int, staying: int, selection: SelectionConfig) -> int:
    """The stack of TRIPS-S over a text and an image; `patch_products` come on top.

    Args:
        num_patches: N; 0 for a text alone.
        staying: tokens that are never removed: [CLS] and the words; 1 for an image alone.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    vision = config.vision_config
    width, products = vision.hidden_size, 0
    rates = dict(zip(selection.layers, selection.rates, strict=True)) if selection.active else {}
    for layer, counts in enumerate(token_counts(num_patches, vision.num_hidden_layers, selection), start=1):
        before, after = (count - 1 + staying for count in counts)
        products += attention_products(before, width) + 2 * after * width * inner_width(vision)
        candidates = before - staying
        if layer not in rates or (k := num_kept(candidates, rates[layer])) == candidates:
            continue
        if selection.guide == "similarity":
            products += merging_products(vision, candidates, k)
        elif selection.guide != "random":  # the row of [CLS]: query, keys, their products
            products += width**2 + candidates * width**2 + candidates * width
        if selection.fuses:
            products += candidates * width
    return products


def patch_products(vision: PreTrainedConfig, num_patches: int) -> int:
    """Patch embedding of one image."""
    return num_patches * vision.hidden_size * vision.num_channels * vision.patch_size**2


def score_products(config: TripsConfig, candidates: int, selection: SelectionConfig) -> int:
    """The guide at one location: query, keys if any, the scores."""
    if selection.guide == "random":
        return 0
    width = config.vision_config.hidden_size
    products = width**2 + candidates * width
    if selection.score == "keys":
        products += candidates * width**2
    if selection.guide == "text" and config.text_config.hidden_size != width:
        products += config.text_config.hidden_size * width
    return products


def merging_products(vision: PreTrainedConfig, candidates: int, kept: int) -> int:
    """Merging by similarity at one location: keys, cosines of the two sets of each round, and the means of what merges.

    Heads are compared by the mean of their keys, so cosines and the keys of later rounds have the width of one head.
    """
    if kept == candidates:
        return 0
    head = vision.hidden_size // vision.num_attention_heads
    products, tokens = candidates * vision.hidden_size**2, candidates
    for left in merging_rounds(candidates, kept):
        second = tokens // 2
        products += (tokens - second) * second * head + second * (tokens - left) * (vision.hidden_size + head)
        tokens = left
    return products


def text_products(config: TripsConfig, length: int) -> int:
    """Text encoder."""
    text = config.text_config
    ffn = 2 * length * text.hidden_size * text.intermediate_size
    return text.num_hidden_layers * (attention_products(length, text.hidden_size) + ffn)


def fusion_products(config: TripsConfig, length: int, tokens: int, images: int = 1, blocks: int = 1) -> int:
    """Fusion encoder, with a cross-attention for each image in every layer.

    Args:
        blocks: of self-attention and FFN in each layer.
    """
    fusion, image_width = config.fusion_encoder_config, config.vision_config.hidden_size
    width = fusion.hidden_size
    own = attention_products(length, width) + 2 * length * width * fusion.intermediate_size
    cross = 2 * length * width**2 + 2 * tokens * width**2 + 2 * length * tokens * width
    mapped = tokens * image_width * width if image_width != width else 0
    return fusion.num_hidden_layers * (blocks * own + images * cross) + images * mapped


def attention_map_products(
    config: TripsConfig, length: int, tokens: int, images: int = 1, blocks: int = 1, *, keys: bool = True
) -> int:
    """The fusion's attention maps, which are computed beside its layers, and their mean.

    Args:
        keys: False for stacked blocks, which have their keys already.
    """
    width = config.fusion_encoder_config.hidden_size
    own = attention_products(length, width)
    cross = length * width**2 + keys * tokens * width**2 + length * tokens * width
    return config.fusion_encoder_config.num_hidden_layers * (blocks * own + images * cross) + images * length * tokens


def memory_products(decoder: BertConfig, length: float) -> float:
    """Keys and values of L question states for all layers of an answer decoder."""
    return decoder.num_hidden_layers * 2 * length * decoder.hidden_size**2


def decoder_products(decoder: BertConfig, length: float, tokens: float, behind: float = 0) -> float:
    """All layers of an answer decoder on some tokens, without `memory_products`.

    Args:
        length: question states that are attended to.
        tokens: read at once.
        behind: tokens read before, whose keys and values are kept.
    """
    width = decoder.hidden_size
    own = 4 * tokens * width**2 + 2 * tokens * (behind + tokens) * width
    cross = 2 * tokens * width**2 + 2 * tokens * length * width
    return decoder.num_hidden_layers * (own + cross + 2 * tokens * width * decoder.intermediate_size)


def word_head_products(config: BertConfig, places: float) -> float:
    """BERT's head over the vocabulary: its own layer and the product with all words, at some places."""
    return places * config.hidden_size * (config.hidden_size + config.vocab_size)


def inner_width(vision: PreTrainedConfig) -> int:
    """F of a vision configuration; DINOv2 gives a ratio instead, and two thirds of it with a gated FFN."""
    if (inner := getattr(vision, "intermediate_size", None)) is not None:
        return inner
    inner = int(vision.hidden_size * vision.mlp_ratio)
    if getattr(vision, "use_swiglu_ffn", False):
        return (int(inner * 2 / 3) + 7) // 8 * 8 * 3 // 2  # three products of the gated width
    return inner
