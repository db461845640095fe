"""Operation counts in closed form from a configuration: every matrix product, attention products included.

One multiply-add is two operations. Norms, softmax, biases and embeddings look-ups are left out, as everywhere.
`count_flops` is one pair through the model; `count_pretraining_flops` one pair in a step of section 3.3, whose passes
it takes from the same plan as the model does; `count_reasoning_flops` one statement with all its images.

Letters: D width, F inner width of the FFN, n image tokens, L text tokens, e image tokens that reach the fusion,
P projection width, C contrastive candidates, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.architecture import check_single_stream
from trips.bench.products import (
    attention_map_products,
    fusion_products,
    joint_products,
    patch_products,
    settled,
    text_products,
    vision_pass,
    word_head_products,
)
from trips.config import PretrainingConfig, SelectionConfig, TripsConfig
from trips.errors import ConfigError
from trips.tasks.passes import VisionPlan

_MASKED_SHARE = 0.15  # of the tokens behind [CLS], as the collator of pairs masks them


@dataclass(frozen=True)
class FlopCount:
    """Operations of one text and its image or images, in units of 1e9.

    Attributes:
        vision: patch embedding, vision layers, and the guide's score and fusion.
        text: text encoder.
        fusion: fusion encoder. In TRIPS-S the whole stack, and then patch embedding alone is left for vision.
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
        fusion: fusion encoder on the pair, its two negatives and the masked caption. In TRIPS-S the joint passes of
            these four; the stack over image and caption alone is then the suffix and the text.
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
    """Exact operations of one pair through `TripsModel` or `TripsSingleStreamModel`.

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, text tokens.
        selection: setting, else the model's.
        texts_per_image: texts that share the prefix of an image.
        observe: a full-patch step, which scores at every location, removes nothing, and asks the fusion encoder for
            its attention.
    Raises:
        ConfigError: a location beyond the last layer; a full-patch step of TRIPS-S, or where similarity merges.
    """
    selection = selection or config.selection
    if config.architecture == "single":
        embedding, stack = _joint_pass(config, grid, text_length, selection, observe)
        return FlopCount(2 * embedding / texts_per_image / 1e9, 0.0, 2 * stack / 1e9)
    if not observe:
        selection = settled(selection)
    seen = vision_pass(config, grid, selection, observe)
    fusion = fusion_products(config, text_length, seen.tokens)
    if observe:
        fusion += attention_map_products(config, text_length, seen.tokens)
    products = (seen.prefix / texts_per_image + seen.suffix, text_products(config, text_length), fusion)
    return FlopCount(*(2 * value / 1e9 for value in products))


def exact_ratio(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    subject: SelectionConfig | None = None,
    baseline: SelectionConfig | None = None,
) -> float:
    """How many times the operations of a pair under one setting those under another are: the speed-up to hope for.

    Args:
        config, grid, text_length: see `count_flops`.
        subject: setting, else the model's.
        baseline: what it is compared with, else no selection.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    baseline = baseline or SelectionConfig(guide="none")
    before, after = (count_flops(config, grid, text_length, setting).total for setting in (baseline, subject))
    return before / after


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
    width, feature = config.text_config.hidden_size, options.projection_dim
    masked = max(1.0, _MASKED_SHARE * (text_length - 1)) if masked_tokens is None else masked_tokens
    projections = (config.vision_config.hidden_size + width) * feature
    mlm_head = mlm * word_head_products(config.text_config, masked)
    similarities = 2 * (batch_size + options.queue_size) * feature
    heads = projections + similarities + 2 * batch_size * feature + 3 * 2 * width + mlm_head
    soft = options.alpha > 0

    if config.architecture == "single":
        embedding, pair = _joint_pass(config, grid, text_length, plan.pairs, distill)
        image = joint_products(config, grid[0] * grid[1], 1, plan.contrast or plan.pairs)
        text = joint_products(config, 0, text_length, SelectionConfig(guide="none"))
        teacher = embedding + image + text + projections + soft * similarities + (soft and mlm) * (pair + mlm_head)
        products = (embedding, image, text, (3 + mlm) * pair, heads, options.has_teacher * teacher)
        return PretrainingFlopCount(*(2 * value / 1e9 for value in products))

    pairs = vision_pass(config, grid, plan.pairs, distill)
    first = pairs if plan.contrast is None else vision_pass(config, grid, plan.contrast)
    again = (plan.contrast is not None) + 2 * plan.anew + plan.masked
    text, fusion = text_products(config, text_length), fusion_products(config, text_length, pairs.tokens)
    teacher = 0.0
    if options.has_teacher:
        taught = vision_pass(config, grid, plan.unobserved())
        teacher += taught.prefix + (taught if plan.contrast is None else first).suffix + text + projections
        if soft:
            teacher += similarities
        if soft and mlm:
            teacher += text + fusion + mlm_head
            if plan.contrast is not None or plan.masked:
                teacher += taught.suffix
    if distill:
        teacher += attention_map_products(config, text_length, pairs.tokens)
    products = (
        pairs.prefix,
        first.suffix + again * pairs.suffix,
        (1 + mlm) * text,
        (3 + mlm) * fusion,
        heads,
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
    width = config.text_config.hidden_size
    if config.architecture == "single":
        embedding, stack = _joint_pass(config, grid, text_length, selection, distill)
        head = options.num_images * width**2 + width * options.num_classes
        products = (options.num_images * embedding, 0, options.num_images * stack + head)
        return FlopCount(*(2 * value / 1e9 for value in products))
    if not distill:
        selection = settled(selection)
    seen = vision_pass(config, grid, selection, distill)
    images, stacked = options.num_images, options.fusion == "stacked"
    blocks = images if stacked else 1  # of self-attention and FFN in each layer
    fusion = fusion_products(config, text_length, seen.tokens, images, blocks)
    if distill:
        fusion += attention_map_products(config, text_length, seen.tokens, images, blocks, keys=not stacked)
    fusion += width**2 + width * options.num_classes
    products = (images * (seen.prefix + seen.suffix), text_products(config, text_length), fusion)
    return FlopCount(*(2 * value / 1e9 for value in products))


def _joint_pass(
    config: TripsConfig, grid: tuple[int, int], text_length: int, selection: SelectionConfig, observe: bool
) -> tuple[int, int]:
    """Multiply-adds of patch embedding and stack of TRIPS-S; `ConfigError` for what it cannot do."""
    check_single_stream(selection)
    if observe:
        raise ConfigError("a single-stream model has no fusion encoder that could teach the guide", item="observe")
    num_patches = grid[0] * grid[1]
    embedding = patch_products(config.vision_config, num_patches)
    return embedding, joint_products(config, num_patches, text_length, selection)
