"""Image-text contrast over the batches of all processes and a queue, and the hard negatives drawn by it (3.3).

Dimensions: B pairs of this process, W processes, P projection width, Q queue length, C = W B + Q candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trips.distributed import all_gather, all_gather_with_gradient, world
from trips.losses import forbidden_negatives, itc_loss, positive_mass, sample_hard_negatives, soft_targets
from trips.momentum import FeatureQueue
from trips.tasks.teacher import TeacherOutput


@dataclass
class Candidates:
    """What the features of a batch are compared with: those of this step, by rank, then the queue.

    Attributes:
        image, text: (C, P). The teacher's with a queue; else the model's own, with gradient.
        taught_image, taught_text: (C, P) the teacher's, None without one; with a queue the same as `image`, `text`.
        ids: (C,) image ids, -1 for unfilled rows of the queue.
        num_now: W B, how many of them are of this step.
    """

    image: Tensor
    text: Tensor
    taught_image: Tensor | None
    taught_text: Tensor | None
    ids: Tensor
    num_now: int

    @classmethod
    def gather(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        image_ids: Tensor,
        taught: TeacherOutput | None,
        queue: FeatureQueue | None,
    ) -> Candidates:
        """Of all processes, from the features of this one; a queue needs a teacher."""
        ids = all_gather(image_ids)
        now, image, text = ids.shape[0], None, None
        if taught is not None:
            image, text = all_gather(taught.image_features), all_gather(taught.text_features)
        if queue is None:
            own = all_gather_with_gradient(image_features), all_gather_with_gradient(text_features)
            return cls(*own, image, text, ids, now)
        # Copies: a later enqueue must not change what backward reads.
        image, text = torch.cat([image, queue.image_features]), torch.cat([text, queue.text_features])
        return cls(image, text, image, text, torch.cat([ids, queue.image_ids]), now)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    candidates: Candidates,
    temperature: Tensor,
    taught: TeacherOutput | None = None,
    alpha: float | Tensor = 0.0,
) -> Tensor:
    """ITC of a batch: positives share their mass by image id, and the teacher softens the targets (after ALBEF).

    Args:
        image_features, text_features: (B, P) normalised. image_ids: (B,).
        candidates: see `Candidates`.
        temperature: divides the similarities, the teacher's too.
        taught: the teacher's features; None: hard targets.
        alpha: share of the teacher in the targets.
    Returns:
        scalar float32.
    """
    image_targets = text_targets = positive_mass(image_ids, candidates.ids)
    if taught is not None:
        image_logits = similarity(taught.image_features, candidates.taught_text, temperature)
        text_logits = similarity(taught.text_features, candidates.taught_image, temperature)
        image_targets = soft_targets(image_logits, image_targets, alpha)
        text_targets = soft_targets(text_logits, text_targets, alpha)
    return itc_loss(
        image_features, text_features, candidates.image, candidates.text, temperature, image_targets, text_targets
    )


@torch.no_grad()
def similarity(features: Tensor, candidates: Tensor, temperature: Tensor) -> Tensor:
    """(B, C) float32 similarities over the temperature, without gradient, whatever autocast says."""
    with torch.autocast(features.device.type, enabled=False):
        return features.float() @ candidates.float().T / temperature.float()


def draw_negatives(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
    candidates: Candidates,
    temperature: Tensor,
    everywhere: bool,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard negatives for ITM, drawn by contrastive similarity to the candidates of this step (after ALBEF).

    Args:
        image_features, text_features: (B, P). image_ids, caption_ids: (B,); equal ids never meet as negatives.
        candidates: see `Candidates`.
        temperature: divides the similarities.
        everywhere: from the batches of all processes, else from this one's.
        generator: source of the draws.
    Returns:
        (B,) image of every text and (B,) text of every image: rows of this process, or of all.
    """
    rows, rank = image_ids.shape[0], world()[0]
    place, ids, captions = slice(rank * rows, (rank + 1) * rows), image_ids, caption_ids
    if everywhere:
        place, ids, captions = slice(candidates.num_now), candidates.ids[: candidates.num_now], all_gather(caption_ids)
    forbidden = forbidden_negatives(image_ids, caption_ids, ids, captions)
    to_image = similarity(text_features, candidates.image[place], temperature)
    to_text = similarity(image_features, candidates.text[place], temperature)
    return (
        sample_hard_negatives(to_image, forbidden, generator),
        sample_hard_negatives(to_text, forbidden, generator),
    )
