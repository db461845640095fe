"""Operation counts in closed form from a configuration: every matrix product, attention products included.

One multiply-add is two operations. Norms, softmax, biases and embeddings look-ups are left out, as everywhere.
`count_flops` is one pair through the model; `count_pretraining_flops` one pair in a step of section 3.3, whose passes
it takes from the same plan as the model does; `count_reasoning_flops` one statement with all its images.

Letters: D width, F inner width of the FFN, n image tokens, L text tokens, e image tokens that reach the fusion,
P projection width, C contrastive candidates, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.config import PretrainingConfig, SelectionConfig, TripsConfig, num_kept, token_counts
from trips.tasks.passes import VisionPlan

_MASKED_SHARE = 0.15  # of the tokens behind [CLS], as the collator of pairs masks them


@dataclass(frozen=True)
class FlopCount:
    """Operations of one text and its image or images, in units of 1e9.

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


@dataclass(frozen=True)
class PretrainingFlopCount:
    """Forward operations of one pair in a pre-training step, in units of 1e9.

    Attributes:
        vision_prefix: patch embedding and layers before the first selection, once per image.
        vision_suffix: all passes through the other layers, the guide's score and fusion in them.
        text: text encoder on the caption and on the masked caption.
        fusion: fusion encoder on the pair, its two negatives and the masked caption.
        heads: projections, similarities to the candidates and among the batch, ITM and MLM heads.
        teacher: what has no gradient: the momentum teacher with its similarities, and in a distillation step the
            attention maps that teach the guide.
    """

    vision_prefix: float
    vision_suffix: float
    text: float
    fusion: float
    heads: float
    teacher: float

    @property
    def forward(self) -> float:
        """Sum of all parts, in units of 1e9."""
        return self.vision_prefix + self.vision_suffix + self.text + self.fusion + self.heads + self.teacher

    @property
    def training(self) -> float:
        """Forward and backward of a step whose every part learns, in units of 1e9.

        The backward pass counts twice its forward. A few tenths of a percent too much at the paper's size: pixels and
        queue have no gradient.
        """
        return 3 * (self.forward - self.teacher) + self.teacher


def count_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    *,
    texts_per_image: float = 1,
    observe: bool = False,
) -> FlopCount:
    """Exact operations of one pair through `TripsModel`.

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, text tokens.
        selection: setting, else the model's.
        texts_per_image: texts that share the prefix of an image.
        observe: a full-patch step, which scores at every location, removes nothing, and asks the fusion encoder for
            its attention.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    selection = selection or config.selection
    if not observe and selection.active and min(selection.rates) == 1:
        selection = selection.replace(guide="none")  # as the model does: the whole tower, once per image
    seen = _vision_pass(config, grid, selection, observe)
    fusion = _fusion_products(config, text_length, seen.tokens)
    if observe:
        fusion += _attention_map_products(config, text_length, seen.tokens)
    products = (seen.prefix / texts_per_image + seen.suffix, _text_products(config, text_length), fusion)
    return FlopCount(*(2 * value / 1e9 for value in products))


def count_pretraining_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    pretraining: PretrainingConfig | None = None,
    masked_tokens: float | None = None,
    *,
    batch_size: int = 1,
    distill: bool = False,
    mlm: bool = True,
) -> PretrainingFlopCount:
    """Exact forward operations of one pair in a step of `TripsForPreTraining` (section 3.3).

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, text tokens, padding included.
        selection: setting, else the model's.
        pretraining: options of the objectives, else the model's.
        masked_tokens: M, tokens to predict per pair; else 15 % of those behind [CLS].
        batch_size: pairs that meet in the contrastive loss.
        distill: a full-patch step whose loss holds the guidance distillation.
        mlm: False counts a step of `TripsForImageTextRetrieval`, which has no masked words.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    selection, options = selection or config.selection, pretraining or config.pretraining
    plan = VisionPlan.of(selection, options, distill, mlm)
    pairs = _vision_pass(config, grid, plan.pairs, distill)
    first = pairs if plan.contrast is None else _vision_pass(config, grid, plan.contrast)
    again = (plan.contrast is not None) + 2 * plan.anew + plan.masked

    width, feature = config.text_config.hidden_size, options.projection_dim
    masked = max(1.0, _MASKED_SHARE * (text_length - 1)) if masked_tokens is None else masked_tokens
    text, fusion = _text_products(config, text_length), _fusion_products(config, text_length, pairs.tokens)
    projections = (config.vision_config.hidden_size + width) * feature
    mlm_head = mlm * masked * width * (width + config.text_config.vocab_size)
    similarities = 2 * (batch_size + options.queue_size) * feature
    negatives = 2 * batch_size * feature

    teacher, soft = 0.0, options.alpha > 0
    if options.has_teacher:
        taught = _vision_pass(config, grid, plan.unobserved())
        teacher += taught.prefix + (taught if plan.contrast is None else first).suffix + text + projections
        if soft:
            teacher += similarities
        if soft and mlm:
            teacher += text + fusion + mlm_head
            if plan.contrast is not None or plan.masked:
                teacher += taught.suffix
    if distill:
        teacher += _attention_map_products(config, text_length, pairs.tokens)
    products = (
        pairs.prefix,
        first.suffix + again * pairs.suffix,
        (1 + mlm) * text,
        (3 + mlm) * fusion,
        projections + similarities + negatives + 3 * 2 * width + mlm_head,
        teacher,
    )
    return PretrainingFlopCount(*(2 * value / 1e9 for value in products))


def count_reasoning_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    *,
    distill: bool = False,
) -> FlopCount:
    """Exact forward operations of one statement and its images through `TripsForVisualReasoning` (section 5.1.2).

    Args:
        config: the model's; ``config.reasoning`` says how many images there are and how they are fused.
        grid: patches (down, across) of each image.
        text_length: L, text tokens.
        selection: setting, else the model's.
        distill: a full-patch step whose loss holds the guidance distillation.
    Returns:
        vision of all images; the classifier is counted to the fusion.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    selection, options = selection or config.selection, config.reasoning
    if not distill and selection.active and min(selection.rates) == 1:
        selection = selection.replace(guide="none")
    seen, images, stacked = (
        _vision_pass(config, grid, selection, distill),
        options.num_images,
        options.fusion == "stacked",
    )
    blocks = images if stacked else 1  # of self-attention and FFN in each layer
    fusion = _fusion_products(config, text_length, seen.tokens, images, blocks)
    if distill:
        fusion += _attention_map_products(config, text_length, seen.tokens, images, blocks, keys=not stacked)
    width = config.text_config.hidden_size
    fusion += width**2 + width * options.num_classes
    products = (images * (seen.prefix + seen.suffix), _text_products(config, text_length), fusion)
    return FlopCount(*(2 * value / 1e9 for value in products))


@dataclass(frozen=True)
class _VisionPass:
    """Multiply-adds of `VisionEncoder.prefix` and `VisionEncoder.suffix`, and e, the tokens that come out."""

    prefix: int
    suffix: int
    tokens: int


def _vision_pass(
    config: TripsConfig, grid: tuple[int, int], selection: SelectionConfig, observe: bool = False
) -> _VisionPass:
    vision, num_patches = config.vision_config, grid[0] * grid[1]
    width, inner = vision.hidden_size, _inner_width(vision)
    kept = selection.replace(keep_rate=1.0) if observe else selection
    counts = token_counts(num_patches, vision.num_hidden_layers, kept)
    rates = dict(zip(kept.layers, kept.rates, strict=True)) if kept.active else {}
    first = min(rates, default=len(counts) + 1)
    prefix, suffix = num_patches * width * vision.num_channels * vision.patch_size**2, 0
    for layer, (before, after) in enumerate(counts, start=1):
        attention, ffn = 4 * before * width**2 + 2 * before**2 * width, 2 * after * width * inner
        if layer < first:
            prefix += attention + ffn
        elif layer == first:
            prefix, suffix = prefix + attention, suffix + ffn
        else:
            suffix += attention + ffn
        if layer in rates:
            removes = num_kept(before - 1, rates[layer]) < before - 1
            if removes or observe:
                suffix += _score_products(config, before - 1, selection)
            if removes and selection.inattentive != "drop":
                suffix += (before - 1) * width
    return _VisionPass(prefix, suffix, counts[-1][1])


def _score_products(config: TripsConfig, candidates: int, selection: SelectionConfig) -> int:
    """Multiply-adds of the guide at one location: query, keys if any, the scores."""
    if selection.guide == "random":
        return 0
    width = config.vision_config.hidden_size
    products = width**2 + candidates * width
    if selection.score == "keys":
        products += candidates * width**2
    if selection.guide == "text" and config.text_config.hidden_size != width:
        products += config.text_config.hidden_size * width
    return products


def _text_products(config: TripsConfig, length: int) -> int:
    """Multiply-adds of the text encoder."""
    text = config.text_config
    per_layer = 4 * length * text.hidden_size**2 + 2 * length**2 * text.hidden_size
    return text.num_hidden_layers * (per_layer + 2 * length * text.hidden_size * text.intermediate_size)


def _fusion_products(config: TripsConfig, length: int, tokens: int, images: int = 1, blocks: int = 1) -> int:
    """Multiply-adds of the fusion encoder, with a cross-attention for each image in every layer."""
    fusion, image_width = config.fusion_encoder_config, config.vision_config.hidden_size
    width = fusion.hidden_size
    own = 4 * length * width**2 + 2 * length**2 * width + 2 * length * width * fusion.intermediate_size
    cross = 2 * length * width**2 + 2 * tokens * width**2 + 2 * length * tokens * width
    mapped = tokens * image_width * width if image_width != width else 0
    return fusion.num_hidden_layers * (blocks * own + images * cross) + images * mapped


def _attention_map_products(
    config: TripsConfig, length: int, tokens: int, images: int = 1, blocks: int = 1, *, keys: bool = True
) -> int:
    """Multiply-adds of the fusion's attention maps, which are computed beside its layers, and of their mean.

    Stacked blocks have their keys already.
    """
    width = config.fusion_encoder_config.hidden_size
    own = 4 * length * width**2 + 2 * length**2 * width
    cross = length * width**2 + keys * tokens * width**2 + length * tokens * width
    return config.fusion_encoder_config.num_hidden_layers * (blocks * own + images * cross) + images * length * tokens


def _inner_width(vision: object) -> int:
    """F of a vision configuration; DINOv2 gives a ratio instead, and two thirds of it with a gated FFN."""
    if (inner := getattr(vision, "intermediate_size", None)) is not None:
        return inner
    inner = int(vision.hidden_size * vision.mlp_ratio)
    if getattr(vision, "use_swiglu_ffn", False):
        return (int(inner * 2 / 3) + 7) // 8 * 8 * 3 // 2  # three products of the gated width
    return inner
