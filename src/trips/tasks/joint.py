"""The passes of a training step over pairs: what contrast, matching and masked words are computed from (section 3.3).

`PairPasses` is what `trips.tasks.retrieval` and the momentum teacher ask for. `DualPasses` shares prefixes and text
states between the pairs and fuses them; in TRIPS-S every pair is a pass of its own, all of them in one batch
(`JointPasses`), and the contrastive features come from text and image alone, each through the same stack.

Dimensions: B pairs of this process, L text tokens, E image tokens, D width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trips.distributed import all_gather, all_gather_with_gradient, world
from trips.errors import ConfigError
from trips.model import TripsModel
from trips.selection import Selection
from trips.single_stream import TripsSingleStreamModel
from trips.tasks.passes import VisionPlan, fuse_pairs
from trips.vision import VisionPrefix


class PairPasses(Protocol):
    """A step's passes.

    Attributes:
        image: (B, E, D) states whose [CLS] becomes the contrastive image feature.
        text: (B, L, D) the same of the texts.
        selections: records of the pass that `image` came from, for distillation.
    """

    image: Tensor
    text: Tensor
    selections: tuple[Selection, ...]

    def fuse(self, negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Blocks of (image, text), (negative image, text), (image, negative text) and, if any, (image, masked text).

        Args:
            negatives: (image_index, text_index), both (B,): rows of this process, or of all if ``plan.everywhere``.
        Returns:
            (3 B or 4 B, L, D), and the fusion's attention (B, E - 1) of the first block in a full-patch step.
        """
        ...


class DualPasses:
    """`PairPasses` of the dual-stream model.

    Args:
        trips: the towers. plan: of this step.
        pixel_values: (B, 3, H, W). input_ids, attention_mask: (B, L).
        masked_ids: (B, L) the texts with words hidden, or None.
        generator: noise of the random guide.
    """

    def __init__(
        self,
        trips: TripsModel,
        plan: VisionPlan,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        masked_ids: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        self.trips, self.plan, self.attention_mask, self.generator = trips, plan, attention_mask, generator
        ids, masks = input_ids, attention_mask
        if masked_ids is not None:
            ids, masks = torch.cat([input_ids, masked_ids]), attention_mask.repeat(2, 1)
        self.text, *masked = trips.encode_text(ids, masks).split(input_ids.shape[0])
        self.masked = masked[0] if masked else None
        self.prefix = trips.encode_prefix(pixel_values, plan.pairs)
        self.first = trips.vision.suffix(
            self.prefix,
            None if plan.contrast else self.text[:, 0],
            plan.contrast or plan.pairs,
            observe=plan.observe,
            generator=generator,
        )
        self.image, self.selections = self.first.last_hidden_state, self.first.selections

    def fuse(self, negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `PairPasses`."""
        return fuse_pairs(
            self.trips, self.plan, self.prefix, self.first, self.text, self.masked, self.attention_mask, negatives,
            self.generator,
        )  # fmt: skip


class JointPasses:
    """`PairPasses` of TRIPS-S; arguments as for `DualPasses`, `ConfigError` for a full-patch step."""

    def __init__(
        self,
        trips: TripsSingleStreamModel,
        plan: VisionPlan,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        masked_ids: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        if plan.observe:
            raise ConfigError("a single-stream model has no fusion encoder that could teach the guide", item="observe")
        self.trips, self.plan, self.generator = trips, plan, generator
        self.input_ids, self.attention_mask, self.masked_ids = input_ids, attention_mask, masked_ids
        self.prefix = trips.encode_prefix(pixel_values)
        self.image = trips.image_alone(self.prefix, plan.contrast or plan.pairs, generator)
        self.text = trips.text_alone(input_ids, attention_mask)
        self.selections: tuple[Selection, ...] = ()

    def fuse(self, negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `PairPasses`; there is no fusion encoder whose attention could teach."""
        (image_index, text_index), rows = negatives, len(self.input_ids)
        states, ids, masks, start = self.prefix.states, self.input_ids, self.attention_mask, 0
        if self.plan.everywhere:
            states, start = all_gather_with_gradient(states), world()[0] * rows
            ids, masks = all_gather(ids), all_gather(masks)
        own = torch.arange(start, start + rows, device=ids.device)
        blocks = [
            (own, self.input_ids, self.attention_mask),
            (image_index, self.input_ids, self.attention_mask),
            (own, ids.index_select(0, text_index), masks.index_select(0, text_index)),
        ]
        if self.masked_ids is not None:
            blocks.append((own, self.masked_ids, self.attention_mask))
        images, ids, masks = (torch.cat(parts) for parts in zip(*blocks))
        prefix = VisionPrefix(states, self.prefix.grid, self.prefix.layer)
        return self._read(prefix, images, ids, masks), None

    def read_masked(self) -> Tensor:
        """(B, L, D) joint states of the masked texts with their images, for the teacher."""
        own = torch.arange(len(self.input_ids), device=self.input_ids.device)
        return self._read(self.prefix, own, self.masked_ids, self.attention_mask)

    def _read(self, prefix: VisionPrefix, images: Tensor, ids: Tensor, masks: Tensor) -> Tensor:
        options = {"selection": self.plan.pairs, "generator": self.generator}
        return self.trips(ids, masks, prefix=prefix, image_index=images, **options).last_hidden_state


def start_passes(
    trips: TripsModel | TripsSingleStreamModel,
    plan: VisionPlan,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    masked_ids: Tensor | None,
    generator: torch.Generator | None,
) -> PairPasses:
    """The passes that the contrastive features need, by the model's architecture; see `DualPasses`."""
    passes = JointPasses if isinstance(trips, TripsSingleStreamModel) else DualPasses
    return passes(trips, plan, pixel_values, input_ids, attention_mask, masked_ids, generator)
