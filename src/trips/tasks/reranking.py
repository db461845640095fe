"""The second stage of retrieval: pairs of a shortlist scored by matching (section 5.1.3, after ALBEF).

What ALBEF computes once per image, TRIPS computes per pair: every text selects its own patches. What has seen no text,
the prefix, is computed once per image here, for all texts that meet it from either direction; text states once per
text. With the image [CLS] as the guide the whole image is computed once, and a pair costs its fusion alone. TRIPS-S
has no such guide and no prefix but the patch embeddings: each of its pairs costs a whole pass.

Dimensions: U different texts, S pairs, B rows of a batch, L text tokens, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trips.config import SelectionConfig, token_counts
from trips.errors import ConfigError
from trips.options import Architecture
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.vision import VisionPrefix

RerankGuide = Literal["text", "image"]

_SPARE_BLOCKS = 4  # blocks of images per process at least, where there are so many images: they end at about one time


@dataclass(frozen=True)
class TextTable:
    """Token ids of U different texts, without padding.

    Attributes:
        tokens: (sum of lengths,) int32 ids, one text behind the other.
        starts, lengths: (U,) where each text begins, and its tokens.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TextTable:
        """From the ids of each text, as `TripsProcessor.token_ids` gives them."""
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]))
        return cls(tokens, lengths.cumsum(0) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) texts -> `input_ids` and `attention_mask` (B, L), padded with 0 to the longest of them."""
        places, mask = _padded(self.starts[index], self.lengths[index])
        return self.tokens[places.clamp(max=len(self.tokens) - 1)].long() * mask, mask

    def by_length(self, batch_size: int, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """All texts, or (n,) of them, in batches of similar length: little padding."""
        index = torch.arange(len(self)) if index is None else index
        return index[self.lengths[index].argsort(stable=True)].split(batch_size)


def rerank_selection(
    selection: SelectionConfig, guide: RerankGuide, architecture: Architecture = "dual"
) -> SelectionConfig:
    """Setting of the second stage: "text" is the model's own, "image" lets the image [CLS] ask in its place.

    Where nothing is removed there is no guide.

    Raises:
        ConfigError: "image" in a single-stream model, whose images have no states without the text of their pair.
    """
    if architecture == "single" and guide == "image":
        raise ConfigError(
            "every pair of a single-stream model is read with its text", item="guide", found=guide, expected="text"
        )
    if not selection.active or min(selection.rates) == 1:
        return selection.replace(guide="none")
    return selection.replace(guide="image") if guide == "image" else selection


def computed_per_pair(selection: SelectionConfig, architecture: Architecture = "dual") -> bool:
    """Whether a setting of `rerank_selection` makes image states that depend on the text; in TRIPS-S any does."""
    return architecture == "single" or (selection.active and selection.guide == "text")


class Reranker:
    """Matching scores of many pairs of few images and texts, in bounded memory.

    Args:
        model: in evaluation mode.
        texts: all texts that pairs may name.
        load_pixels: list of image numbers to (n, 3, H, W).
        num_patches: N of those pixels.
        guide: see `rerank_selection`.
        batch_size: images per batch; four times as many texts and pairs.
        memory_gb: most memory for states that are kept between batches, in GB of the model's device; what a batch
            needs while it is computed comes on top. Text states are kept for good if all of them fit beside a batch
            of images, else encoded anew for every block. At least an image and a batch of texts are kept.
        selection: the model's setting, else ``config.selection``.
    """

    def __init__(
        self,
        model: TripsForImageTextRetrieval,
        texts: TextTable,
        load_pixels: Callable[[list[int]], Tensor],
        num_patches: int,
        *,
        guide: RerankGuide = "text",
        batch_size: int = 32,
        memory_gb: float = 4.0,
        selection: SelectionConfig | None = None,
    ) -> None:
        if guide not in ("text", "image"):
            raise ConfigError("unknown guide", item="guide", found=guide, expected="text | image")
        self.model, self.texts, self.load_pixels = model, texts, load_pixels
        architecture = model.config.architecture
        self.selection = rerank_selection(selection or model.config.selection, guide, architecture)
        self.per_pair = computed_per_pair(self.selection, architecture)
        self.batch_size, self.pair_batch = batch_size, 4 * batch_size
        vision, size, memory = model.config.vision_config, model.dtype.itemsize, memory_gb * 1e9
        seen = token_counts(num_patches, vision.num_hidden_layers, self.selection)[-1][1]
        image_bytes = (1 + num_patches if self.per_pair else seen) * vision.hidden_size * size
        self.token_bytes = model.config.text_config.hidden_size * size
        all_texts = len(texts.tokens) * self.token_bytes
        self.keeps_texts = all_texts + batch_size * image_bytes <= memory
        # Few images at a time where the texts are there already, else many, so that a text is encoded seldom.
        self.most_images = batch_size if self.keeps_texts else max(1, int(memory / 2 / image_bytes))
        self.most_tokens = int(memory / 2 / self.token_bytes)
        self._kept: _TextStates | None = None

    def blocks(self, images: Tensor, processes: int = 1) -> list[slice]:
        """Cut (S,) sorted image numbers of pairs into parts for `score`, each with whole images."""
        numbers, counts = images.unique_consecutive(return_counts=True)
        share = max(self.batch_size, -(-len(numbers) // (_SPARE_BLOCKS * processes)))
        ends = [0, *(int(part.sum()) for part in counts.split(min(self.most_images, share)))]
        edges = torch.tensor(ends).cumsum(0).tolist()
        return [slice(start, stop) for start, stop in zip(edges, edges[1:])]

    @torch.no_grad()
    def score(self, images: Tensor, texts: Tensor, on_batch: Callable[[int], None] = lambda pairs: None) -> Tensor:
        """ITM logit of "match" of the pairs of one block.

        Args:
            images, texts: (S,) numbers, on the CPU.
            on_batch: called with the pairs of each batch done.
        Returns:
            (S,) float32 on the model's device.
        """
        numbers, rows = images.unique(return_inverse=True)
        prefix = self._encode_images(numbers.tolist())
        device = prefix.states.device
        scores = torch.empty(len(images), device=device)
        # By length, so that little is padded, and then by text, so that each is encoded once.
        order = torch.argsort(self.texts.lengths[texts] * len(self.texts) + texts, stable=True)
        for segment in self._segments(order, texts):
            states = self._text_states(texts[segment])
            for batch in segment.split(self.pair_batch):
                text_states, mask = states.batch(texts[batch])
                scores[batch.to(device)] = self._match(prefix, rows[batch].to(device), text_states, mask).float()
                on_batch(len(batch))
        return scores

    def _encode_images(self, numbers: list[int]) -> VisionPrefix:
        """What all pairs of the images share: their prefix, or where no text selects, their final states."""
        vision, device = self.model.trips.vision, next(self.model.parameters()).device
        kept: VisionPrefix | None = None
        for start in range(0, len(numbers), self.batch_size):
            pixels = self.load_pixels(numbers[start : start + self.batch_size]).to(device)
            part = self.model.trips.encode_prefix(pixels, self.selection)
            states = part.states
            if not self.per_pair:
                states = vision.suffix(part, None, self.selection).last_hidden_state
            if kept is None:
                kept = VisionPrefix(states.new_empty(len(numbers), *states.shape[1:]), part.grid, part.layer)
            kept.states[start : start + len(states)] = states
        return kept

    def _match(self, prefix: VisionPrefix, rows: Tensor, text_states: Tensor, mask: Tensor) -> Tensor:
        """(B,) logits; rows: (B,) image of each text."""
        if self.per_pair:
            options = {"attention_mask": mask, "text_states": text_states, "selection": self.selection}
            return self.model.match(prefix, rows, **options)
        fused, _ = self.model.trips.fusion(text_states, mask, prefix.states.index_select(0, rows))
        return self.model.itm_head(fused[:, 0])[:, 1]

    def _segments(self, order: Tensor, texts: Tensor) -> Iterator[Tensor]:
        """Cut pairs in their order so that the states of a part's texts fit; a text may end one and begin the next."""
        if self.keeps_texts:
            yield order
            return
        sorted_texts = texts[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = sorted_texts[1:] != sorted_texts[:-1]
        tokens = (self.texts.lengths[sorted_texts] * new).cumsum(0)
        start = 0
        while start < len(order):
            before = int(tokens[start - 1]) if start else 0
            stop = int(torch.searchsorted(tokens, before + self.most_tokens, right=True))
            stop = max(stop, min(start + self.pair_batch, len(order)))
            yield order[start:stop]
            start = stop

    def _text_states(self, texts: Tensor) -> _TextStates:
        if not self.keeps_texts:
            return _TextStates(self.model, self.texts, texts.unique(), self.pair_batch)
        if self._kept is None:
            self._kept = _TextStates(self.model, self.texts, torch.arange(len(self.texts)), self.pair_batch)
        return self._kept


class _TextStates:
    """States of some texts, packed without padding: (tokens, D)."""

    def __init__(self, model: TripsForImageTextRetrieval, table: TextTable, index: Tensor, batch_size: int) -> None:
        device = next(model.parameters()).device
        self.lengths, self.starts = table.lengths, torch.zeros_like(table.starts)
        self.states: Tensor | None = None
        total, filled = int(table.lengths[index].sum()), 0
        for batch in table.by_length(batch_size, index):
            input_ids, mask = table.batch(batch)
            states = model.trips.encode_text(input_ids.to(device), mask.to(device)).flatten(0, 1)
            places = mask.flatten().nonzero().flatten()  # on the CPU: nothing waits
            if self.states is None:
                self.states = states.new_empty(total, states.shape[1])
            self.states[filled : filled + len(places)] = states.index_select(0, places.to(device))
            lengths = table.lengths[batch]
            self.starts[batch] = filled + lengths.cumsum(0) - lengths
            filled += len(places)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) texts -> states (B, L, D) and `attention_mask` (B, L); behind a text stand states of others."""
        places, mask = _padded(self.starts[index], self.lengths[index])
        places = places.clamp(max=len(self.states) - 1).to(self.states.device)
        states = self.states.index_select(0, places.flatten()).view(*places.shape, -1)
        return states, mask.to(self.states.device)


def _padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) starts and lengths -> (B, L) places, which run on behind the end, and the mask of those before it."""
    steps = torch.arange(int(lengths.max()))
    return starts[:, None] + steps, (steps < lengths[:, None]).long()
