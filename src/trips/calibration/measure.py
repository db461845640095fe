"""What a guide keeps, beside what the fusion encoder would look at: figures of a calibration, before and after.

Dimensions: T texts, R rows (an image of a text), N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trips.calibration.fit import Observed, batches, fuse
from trips.calibration.pairs import TextGroup
from trips.config import SelectionConfig
from trips.losses import selection_distillation_loss
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.selection import relevance_logits


@dataclass(frozen=True)
class GuideFigures:
    """Means of one guide over held-out texts.

    Attributes:
        teacher_mass: share of the fusion encoder's attention, of a pass with all patches, on the patches that are left
            behind each location.
        overlap: share of the patches left in the end that another text about the same image keeps too; 1: the text is
            ignored. None where no image has two texts.
        kl: divergence of a_cls from the teacher at each location, in nats, all patches there; None of noise.
        output_cosine: cosine of the fused [CLS] with that of a pass with all patches.
    """

    teacher_mass: tuple[float, ...]
    overlap: float | None
    kl: tuple[float, ...] | None
    output_cosine: float


@torch.no_grad()
def measure(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    groups: Sequence[TextGroup],
    observed: Observed,
    selection: SelectionConfig,
    batch_size: int,
    seed: int = 0,
) -> GuideFigures:
    """Select as at test time, and look at what is left.

    Args:
        model: in evaluation mode.
        groups: what `observed` was made of, in its order.
        selection: the guide.
        seed: of noise.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    masses: list[Tensor] = []
    left: list[Tensor] = []
    cosines: list[Tensor] = []
    row = text = 0
    for batch in batches(model, processor, groups, batch_size):
        vision = model.trips.vision
        prefix = vision.prefix(batch.pixel_values, selection).take(batch.image_index)
        guide = model.trips.encode_text(batch.input_ids, batch.attention_mask)[:, 0]
        rows, texts = len(batch.image_index), len(batch.input_ids)
        guide = guide.repeat_interleave(rows // texts, dim=0)
        image = vision.suffix(prefix, guide, selection, generator=generator)
        fused = fuse(model, batch, image.last_hidden_state)[0].float()
        teacher = observed.teacher[row : row + rows]
        kept = [_mask(record.kept, teacher.shape[1]) for record in image.selections]
        masses.append(torch.stack([(teacher * mask).sum(dim=1) for mask in kept], dim=1))
        left.append(kept[-1])
        cosines.append(torch.cosine_similarity(fused, observed.fused_cls[text : text + texts]))
        row, text = row + rows, text + texts
    return GuideFigures(
        tuple(torch.cat(masses).mean(dim=0).tolist()),
        overlap(torch.cat(left), observed.image_index),
        None if selection.guide == "random" else divergence(model, observed, selection),
        torch.cat(cosines).mean().item(),
    )


def overlap(kept: Tensor, image_index: Tensor) -> float | None:
    """Mean share of a text's patches that other texts about its image keep; None where no image has two texts.

    Args:
        kept: (R, N) 1 where a patch is left, else 0. image_index: (R,).
    """
    same = image_index.unsqueeze(1) == image_index.unsqueeze(0)
    same.fill_diagonal_(False)
    if not same.any():
        return None
    shares = (kept @ kept.T) / kept.sum(dim=1, keepdim=True).clamp_min(1)
    return shares[same].mean().item()


def divergence(model: TripsPreTrainedModel, observed: Observed, selection: SelectionConfig) -> tuple[float, ...] | None:
    """KL of a_cls from the teacher at each location, with all patches there; None where the text does not guide."""
    if selection.guide != "text":
        return None
    vision = model.trips.vision
    heads = vision.config.num_attention_heads if selection.heads == "per_head" else 1
    found = []
    for layer in selection.layers:
        total, rows = 0.0, len(observed.teacher)
        for part in torch.arange(rows, device=observed.teacher.device).split(256):
            patches = observed.scored[layer].index_select(0, observed.image_index[part]).float()
            query = vision.text_query(layer - 1, observed.text_cls[part].to(model.dtype), selection).float()
            logits = relevance_logits(query, patches, heads)
            loss = selection_distillation_loss([logits], observed.teacher[part], selection.distill_temperature)
            total += len(part) / rows * loss.item()
        found.append(total)
    return tuple(found)


def teachers_own(observed: Observed, num_kept: Sequence[int]) -> tuple[float, ...]:
    """Teacher mass of the best k patches at each location: what no guide can pass."""
    ranked = observed.teacher.sort(dim=1, descending=True).values
    return tuple(ranked[:, :k].sum(dim=1).mean().item() for k in num_kept)


def _mask(positions: Tensor, num_patches: int) -> Tensor:
    """(R, k) grid positions, -1 for a fused token -> (R, N) ones and zeros."""
    mask = torch.zeros(len(positions), num_patches + 1, device=positions.device)
    return mask.scatter_(1, positions % (num_patches + 1), 1.0)[:, :-1]  # -1 falls into the last column
