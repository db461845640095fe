"""Operation counts of both stages of retrieval in closed form (section 5.1.3); conventions of `trips.bench.flops`.

A baseline without selection pays for the fusion alone per pair, since its image states serve all texts. Where the text
selects, the layers behind the first selection run per pair too: that the pass is cheaper does not make up for it. In
TRIPS-S all layers do.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.bench.products import fusion_products, joint_products, patch_products, text_products, vision_pass
from trips.config import SelectionConfig, TripsConfig
from trips.tasks.passes import VisionPlan
from trips.tasks.reranking import RerankGuide, computed_per_pair, rerank_selection


@dataclass(frozen=True)
class FeatureFlopCount:
    """Operations of the first stage of retrieval, in units of 1e9; comparing two features costs next to nothing.

    Attributes:
        image: for each image: the vision tower under a guide that knows no text, and the projection.
        text: for each text: text encoder and projection.
    """

    image: float
    text: float


@dataclass(frozen=True)
class RerankingFlopCount:
    """Operations of the second stage of retrieval, in units of 1e9.

    Attributes:
        image: once per image: the prefix, or where no text selects, the whole tower; in TRIPS-S the patch embedding.
        text: once per text: text encoder; in TRIPS-S nothing.
        pair: for each pair: the suffix where the text selects, fusion, matching head; in TRIPS-S stack and head.
    """

    image: float
    text: float
    pair: float


def count_feature_flops(
    config: TripsConfig, grid: tuple[int, int], text_length: int, selection: SelectionConfig | None = None
) -> FeatureFlopCount:
    """Exact operations of `TripsForImageTextRetrieval.encode_image` and `encode_texts`.

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, text tokens, padding included.
        selection: setting, else the model's.
    Raises:
        ConfigError: a location beyond the last layer.
    """
    options = config.pretraining
    free = options.replace(itc_guide="image") if options.itc_guide == "text" else options
    plan = VisionPlan.of(selection or config.selection, free)
    chosen, num_patches = plan.contrast or plan.pairs, grid[0] * grid[1]
    if config.architecture == "single":
        image = patch_products(config.vision_config, num_patches) + joint_products(config, num_patches, 1, chosen)
        text = joint_products(config, 0, text_length, SelectionConfig(guide="none"))
    else:
        seen = vision_pass(config, grid, chosen)
        image, text = seen.prefix + seen.suffix, text_products(config, text_length)
    image += config.vision_config.hidden_size * options.projection_dim
    text += config.text_config.hidden_size * options.projection_dim
    return FeatureFlopCount(2 * image / 1e9, 2 * text / 1e9)


def count_reranking_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    guide: RerankGuide = "text",
) -> RerankingFlopCount:
    """Exact operations of `trips.tasks.reranking.Reranker`; without the shared prefix a pair costs image + pair.

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, text tokens, padding included.
        selection: the model's setting, else that of the configuration.
        guide: of the second stage, see `rerank_selection`.
    Raises:
        ConfigError: a location beyond the last layer; the image as guide of TRIPS-S.
    """
    chosen = rerank_selection(selection or config.selection, guide, config.architecture)
    head = 2 * config.text_config.hidden_size
    if config.architecture == "single":
        num_patches = grid[0] * grid[1]
        embedding = patch_products(config.vision_config, num_patches)
        pair = joint_products(config, num_patches, text_length, chosen) + head
        return RerankingFlopCount(2 * embedding / 1e9, 0.0, 2 * pair / 1e9)
    seen = vision_pass(config, grid, chosen)
    pair = fusion_products(config, text_length, seen.tokens) + head
    image = seen.prefix
    if computed_per_pair(chosen):
        pair += seen.suffix
    else:
        image += seen.suffix
    products = (image, text_products(config, text_length), pair)
    return RerankingFlopCount(*(2 * value / 1e9 for value in products))
