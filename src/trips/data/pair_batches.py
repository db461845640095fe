"""Batches of image-text pairs: what `TripsForPreTraining` takes, with the words of MLM hidden (3.3, 4.1).

Legend: B pairs of a batch, L tokens of a text (always `max_text_length` of the processor: shapes that never change, and
never depend on what else is in the batch), M masked places of the batch, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trips.data.masking import mask_tokens
from trips.errors import ConfigError
from trips.processor import TripsProcessor

_MASK = 1  # parts the generator of the masking from the others of a position, in `trips.data.pairs`


@dataclass(frozen=True)
class PairItem:
    """One pair, decoded and encoded, before collation.

    Attributes:
        pixels: (H, W, 3) uint8.
        input_ids: token ids with [CLS], at most L.
        image_id, caption_id: 63-bit hashes of the image's id and of the text.
        source: name of the sample, "CORPUS/FILE.tar:KEY".
        position: (seed, epoch, position), which decides the masking.
        skipped: (source, reason) of bad samples that this one stands in for.
        retries: failed attempts at fetching a shard meanwhile.
    """

    pixels: np.ndarray
    input_ids: list[int]
    image_id: int
    caption_id: int
    source: str
    position: tuple[int, int, int]
    skipped: tuple[tuple[str, str], ...] = ()
    retries: int = 0


class PairCollator:
    """Joins pairs into the batch that `TripsForPreTraining` takes; masks words for MLM.

    Args:
        processor: the dataset's.
        mlm: choose and hide words (`trips.data.masking.mask_tokens`).
        mask_probability: share of the words to predict.
    Raises:
        ConfigError: MLM without a [MASK] token.
    """

    def __init__(self, processor: TripsProcessor, mlm: bool = True, mask_probability: float = 0.15) -> None:
        self.processor, self.mlm, self.mask_probability = processor, mlm, mask_probability
        tokenizer = processor.tokenizer
        # Asked once: a tokenizer of transformers takes longer to answer than a text takes to be masked.
        self._pad_id, self._mask_id, self._vocab_size = tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        if mlm and self._mask_id is None:
            raise ConfigError("special token is not set", item="tokenizer", found=None, expected="[MASK]")

    def __call__(self, items: Sequence[PairItem]) -> dict[str, Any]:
        """Collate pairs.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `input_ids`, `attention_mask` (B, L) long; `image_ids`, `caption_ids`
            (B,) long, equal where image or text are the same; with MLM `mlm_input_ids` (B, L) long, and of the places
            to predict `mlm_positions` (M,) long, in (B * L) row-major, ascending, and `mlm_labels` (M,) long. Beside
            them `sources` (B), `skipped`, a (source, reason) for each bad sample met, and `retries`, a count.
        """
        input_ids = np.full((len(items), self.processor.max_text_length), self._pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, item in enumerate(items):
            input_ids[row, : len(item.input_ids)] = item.input_ids
            attention_mask[row, : len(item.input_ids)] = 1
        batch: dict[str, Any] = {
            "pixel_values": self.processor.normalise([item.pixels for item in items]),
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "image_ids": torch.tensor([item.image_id for item in items]),
            "caption_ids": torch.tensor([item.caption_id for item in items]),
            "sources": [item.source for item in items],
            "skipped": [entry for item in items for entry in item.skipped],
            "retries": sum(item.retries for item in items),
        }
        return {**batch, **self._mask(items, input_ids)} if self.mlm else batch

    def _mask(self, items: Sequence[PairItem], input_ids: np.ndarray) -> dict[str, Tensor]:
        masked_ids = input_ids.copy()
        positions, labels = [], []
        for row, item in enumerate(items):
            rng = np.random.default_rng((*item.position, _MASK))
            masked = mask_tokens(
                item.input_ids, self._special, self._vocab_size, self._mask_id, rng, self.mask_probability
            )
            masked_ids[row, : len(item.input_ids)] = masked.masked_ids.numpy()
            positions.append(masked.positions.numpy() + row * input_ids.shape[1])
            labels.append(masked.labels.numpy())
        return {
            "mlm_input_ids": torch.from_numpy(masked_ids),
            "mlm_positions": torch.from_numpy(np.concatenate(positions)),
            "mlm_labels": torch.from_numpy(np.concatenate(labels)),
        }
