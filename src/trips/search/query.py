"""The second stage of a search: the best hits matched with the words, which select the patches (section 5.1.3).

Dimensions: k hits of the first stage, B of a batch, L text tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from trips.errors import DataError
from trips.images import FileSlice
from trips.options import RankBy
from trips.search.features import Trained
from trips.selection import Selection

logger = logging.getLogger("trips")


@dataclass(frozen=True)
class Hit:
    """A picture that a search has found.

    Attributes:
        path: of the picture, or "path.tar:KEY".
        score: probability that the words describe it; without reranking its similarity.
        first_stage_rank: place among all pictures by similarity, from 1.
        similarity: cosine of the contrastive features, -1 to 1.
        image: where the picture is, for `trips.images.load_image`.
        selection: what the words kept of it at each location, one row each; empty without reranking, or where the model
            removes nothing.
    """

    path: str
    score: float
    first_stage_rank: int
    similarity: float
    image: Path | FileSlice = field(repr=False)
    selection: tuple[Selection, ...] = field(default=(), repr=False)


@torch.no_grad()
def encode_words(trained: Trained, words: str) -> np.ndarray:
    """Contrastive feature of a text: (P,) float32.

    Raises:
        DataError: a blank text.
    """
    encoded = trained.processor(text=[words]).to(trained.model.device)
    return trained.model.encode_texts(encoded["input_ids"], encoded["attention_mask"])[0].float().cpu().numpy()


@torch.no_grad()
def rerank_hits(trained: Trained, words: str, hits: Sequence[Hit], rank_by: RankBy = "both") -> list[Hit]:
    """Hits matched with the words and ordered anew; a picture that is gone since it was indexed is named and left out.

    "match" goes by the probability of a match alone, as ALBEF does. "both" adds what the first stage knew, as a product
    of two experts: log-odds of the match plus similarity over the temperature, both of which were learnt as logits. So
    a matching head that knows little changes little.
    """
    model, processor = trained.model, trained.processor
    encoded = processor(text=[words]).to(model.device)
    mask = encoded["attention_mask"]
    states = model.trips.encode_text(encoded["input_ids"], mask)
    scored: list[tuple[float, Hit]] = []
    temperature = model.temperature.float().cpu().item()
    for start in range(0, len(hits), trained.batch_size):
        kept, arrays = [], []
        for hit in hits[start : start + trained.batch_size]:
            try:
                arrays.append(processor.resize(hit.image, name=hit.path))
                kept.append(hit)
            except DataError as error:
                logger.warning("left out of the hits, index its folder again: %s", error)
        if not kept:
            continue
        prefix = model.trips.encode_prefix(processor.normalise(arrays).to(model.device, model.dtype))
        rows = torch.arange(len(kept), device=mask.device)
        alike = torch.zeros_like(rows)
        output = model.trips(
            None, mask[alike], image_index=rows, prefix=prefix, text_states=states[alike]
        )  # as `match` does, which does not return the selections
        logits = model.itm_head(output.last_hidden_state[:, 0])
        odds = (logits[:, 1] - logits[:, 0]).double().cpu()  # of the match, as logarithms
        for row, (hit, odd, probability) in enumerate(zip(kept, odds.tolist(), odds.sigmoid().tolist(), strict=True)):
            records = tuple(_row(record, row) for record in output.selections or ())
            rank = odd + hit.similarity / temperature if rank_by == "both" else odd
            scored.append((rank, replace(hit, score=probability, selection=records)))
    return [hit for _, hit in sorted(scored, key=lambda pair: (-pair[0], pair[1].first_stage_rank))]


def _row(record: Selection, row: int) -> Selection:
    """One picture's part of a record, on the CPU."""
    return Selection(
        record.layer,
        *(getattr(record, name)[row : row + 1].cpu() for name in ("scores", "logits", "candidates", "index", "kept")),
    )
