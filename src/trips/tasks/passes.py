"""Which vision passes a training step needs, and the pairs that meet in the fusion encoder (section 3.3).

`VisionPlan` turns the three guides of `PretrainingConfig` into passes: whose selection the contrastive feature, the
negative pairs and the masked text see. `fuse_pairs` makes what is missing in one vision pass over cached prefixes, and
fuses everything in one call.

Dimensions: B pairs of this process, N patches, L text tokens, E image tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trips.config import PretrainingConfig, SelectionConfig
from trips.distributed import all_gather, all_gather_with_gradient, world
from trips.model import TripsModel
from trips.vision import VisionOutput, VisionPrefix


@dataclass(frozen=True)
class VisionPlan:
    """Which selections the image states of a step have seen.

    Attributes:
        pairs: setting of the positive pairs, and of all passes but the contrastive one.
        contrast: setting of the contrastive image feature; None: the states of the positive pairs serve.
        anew: the image of a negative pair is selected by the text it is paired with.
        masked: the image behind the masked text is selected by the masked text.
        observe: a full-patch step, which scores at every location and removes nothing.
        everywhere: negatives come from the batches of all processes.
    """

    pairs: SelectionConfig
    contrast: SelectionConfig | None
    anew: bool
    masked: bool
    observe: bool
    everywhere: bool

    @classmethod
    def of(
        cls, selection: SelectionConfig, options: PretrainingConfig, observe: bool = False, mlm: bool = True
    ) -> VisionPlan:
        """The plan with the fewest passes: where nothing is removed, or not by the text, one pass serves them all.

        Args:
            selection: setting of the step.
            options: the guides.
            observe: a full-patch step.
            mlm: whether the step has a masked text.
        """
        removes = not observe and selection.active and min(selection.rates) < 1
        by_text = removes and selection.guide == "text"
        if not removes and not observe:
            selection = selection.replace(guide="none")  # the same tower, of which nothing is left for the suffix
        return cls(
            selection,
            contrastive_selection(selection, options) if removes else None,
            by_text and options.itm_guide == "anew",
            by_text and mlm and options.mlm_guide == "masked",
            observe,
            options.negatives == "global",
        )

    def unobserved(self) -> SelectionConfig:
        """Setting of the positive pairs without the scores of a full-patch step, which the teacher has no use for."""
        return self.pairs.replace(keep_rate=1.0) if self.observe else self.pairs


def contrastive_selection(selection: SelectionConfig, options: PretrainingConfig) -> SelectionConfig | None:
    """Setting of the contrastive image feature; None where it is that of the positive pairs."""
    if options.itc_guide == "image" and selection.guide != "image":
        return selection.replace(guide="image")
    # The same locations, so that the prefix is shared, with nothing removed at them.
    return selection.replace(keep_rate=1.0) if options.itc_guide == "none" else None


def fuse_pairs(
    trips: TripsModel,
    plan: VisionPlan,
    prefix: VisionPrefix,
    first: VisionOutput,
    text: Tensor,
    masked: Tensor | None,
    attention_mask: Tensor,
    negatives: tuple[Tensor, Tensor],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fuse blocks of B rows: (image, text), (negative image, text), (image, negative text) and (image, masked text).

    Args:
        trips: the towers.
        plan: of this step.
        prefix: B rows.
        first: the pass that the contrastive feature came from; where `plan.contrast` is None, of the positive pairs.
        text, masked: (B, L, D) of the text encoder; masked is None where there is none, and so has no block.
        attention_mask: (B, L) of both.
        negatives: (image_index, text_index), both (B,): rows of this process, or of all if `plan.everywhere`.
        generator: noise of the random guide.
    Returns:
        (4 B, L, D) fused states, 3 B without a masked text, and the fusion's attention (B, E - 1) of the first block in
        a full-patch step.
    """
    rows, (image_index, text_index) = text.shape[0], negatives
    other_text = _pool(text, plan).index_select(0, text_index)
    other_mask = (all_gather(attention_mask) if plan.everywhere else attention_mask).index_select(0, text_index)

    pooled, start = prefix.states, 0
    if plan.anew and plan.everywhere:
        pooled, start = all_gather_with_gradient(prefix.states), world()[0] * rows
    own = torch.arange(start, start + rows, device=text.device)
    asked: list[tuple[Tensor, Tensor]] = []  # rows of the pooled images, and the texts that select
    if plan.contrast is not None:
        asked.append((own, text))
    if plan.anew:
        asked += [(image_index, text), (own, other_text)]
    if plan.masked:
        asked.append((own, masked))
    states = iter(())
    if asked:
        index = torch.cat([image for image, _ in asked])
        guides = torch.cat([guide[:, 0] for _, guide in asked])
        asked_prefix = VisionPrefix(pooled, prefix.grid, prefix.layer).take(index)
        passed = trips.vision.suffix(asked_prefix, guides, plan.pairs, generator=generator)
        states = iter(passed.last_hidden_state.split(rows))
    image = first.last_hidden_state if plan.contrast is None else next(states)
    if plan.anew:
        other_image, image_again = next(states), next(states)
    else:
        other_image, image_again = _pool(image, plan).index_select(0, image_index), image
    blocks = [
        (text, attention_mask, image),
        (text, attention_mask, other_image),
        (other_text, other_mask, image_again),
    ]
    if masked is not None:
        blocks.append((masked, attention_mask, next(states) if plan.masked else image))
    if not plan.observe:
        return trips.fusion(*(torch.cat(parts) for parts in zip(*blocks)))[0], None
    # Only the positive pairs teach: the others need not pay for the attention maps.
    fused, attention = trips.fusion(*blocks[0], output_image_attention=True)
    rest, _ = trips.fusion(*(torch.cat(parts) for parts in zip(*blocks[1:])))
    return torch.cat([fused, rest]), attention


def _pool(states: Tensor, plan: VisionPlan) -> Tensor:
    """The rows that negatives are taken from."""
    return all_gather_with_gradient(states) if plan.everywhere else states
