"""Operation counts of the second stage of retrieval in closed form (section 5.1.3); conventions of `trips.bench.flops`.

A baseline without selection pays for the fusion alone per pair, since its image states serve all texts. Where the text
selects, the layers behind the first selection run per pair too: that the pass is cheaper does not make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.bench.flops import _fusion_products, _text_products, _vision_pass
from trips.config import SelectionConfig, TripsConfig
from trips.tasks.reranking import RerankGuide, computed_per_pair, rerank_selection


@dataclass(frozen=True)
class RerankingFlopCount:
    """Operations of the second stage of retrieval, in units of 1e9.

    Attributes:
        image: once per image: the prefix, or where no text selects, the whole tower.
        text: once per text: text encoder.
        pair: for each pair: the suffix where the text selects, fusion, matching head.
    """

    image: float
    text: float
    pair: float


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
        ConfigError: a location beyond the last layer.
    """
    chosen = rerank_selection(selection or config.selection, guide)
    seen = _vision_pass(config, grid, chosen)
    pair = _fusion_products(config, text_length, seen.tokens) + 2 * config.text_config.hidden_size
    image = seen.prefix
    if computed_per_pair(chosen):
        pair += seen.suffix
    else:
        image += seen.suffix
    products = (image, _text_products(config, text_length), pair)
    return RerankingFlopCount(*(2 * value / 1e9 for value in products))
