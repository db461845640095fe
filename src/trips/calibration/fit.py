"""Full-patch passes that show what the fusion encoder looks at, and the queries that ask for it (beyond the paper).

Once the patches and the teacher are known, the distillation of one layer is convex in the map that is sought: the
logits of the scores "states" and "raw_states" are linear in it, and its loss is a cross-entropy. L-BFGS finds it in
seconds, without a learning rate; nothing of the model is trained.

Dimensions: T texts, n images of each, R = T n rows, I images, N patches, D_t and D widths of text and vision tower.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trips.calibration.pairs import TextGroup
from trips.config import SelectionConfig
from trips.losses import selection_distillation_loss
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.selection import relevance_logits

RIDGES = (0.3, 0.03, 0.003)  # weights of mean A^2 to choose from, strongest first
_STEPS = 30  # of L-BFGS, for each of them
_CHUNK = 1 << 24  # numbers of patch states at a time, 64 MiB


@dataclass
class Observed:
    """What full-patch passes have shown of some groups.

    Attributes:
        text_cls: (R, D_t) t_cls, once for each image of its text.
        teacher: (R, N) the fusion encoder's attention, rows sum to 1.
        image_index: (R,) row of the image.
        scored: (I, N, D) of each layer: what a query meets there, in half precision.
        fused_cls: (T, D_t) fused [CLS].
    """

    text_cls: Tensor
    teacher: Tensor
    image_index: Tensor
    scored: dict[int, Tensor]
    fused_cls: Tensor


@dataclass
class _Parts:
    text_cls: list[Tensor] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)
    image_index: list[Tensor] = field(default_factory=list)
    scored: dict[int, list[Tensor]] = field(default_factory=dict)
    fused_cls: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class GroupBatch:
    """Some groups as tensors.

    Attributes:
        groups: how many. pixel_values: (I, 3, H, W). input_ids, attention_mask: (T, L).
        image_index: (R,) row of the image of each text, text by text.
    """

    groups: int
    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor


def batches(
    model: TripsPreTrainedModel, processor: TripsProcessor, groups: Sequence[TextGroup], batch_size: int
) -> Iterator[GroupBatch]:
    """Groups in their order, as many at a time as hold `batch_size` texts, at least one."""
    start = 0
    while start < len(groups):
        end, count = start, 0
        while end < len(groups) and (end == start or count + len(groups[end].texts) <= batch_size):
            count += len(groups[end].texts)
            end += 1
        part = groups[start:end]
        pixels = processor.normalise([image for group in part for image in group.images])
        n = len(part[0].images)
        rows = [i * n + image for i, group in enumerate(part) for _ in group.texts for image in range(n)]
        encoded = processor(text=[text for group in part for text in group.texts]).to(model.device)
        yield GroupBatch(
            len(part),
            pixels.to(model.device, model.dtype),
            encoded["input_ids"],
            encoded["attention_mask"],
            torch.tensor(rows, device=model.device),
        )
        start = end


@torch.no_grad()
def observe(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    groups: Sequence[TextGroup],
    selection: SelectionConfig,
    batch_size: int,
    deadline: float | None = None,
) -> tuple[Observed, int]:
    """One full-patch pass over the groups; the images of a group go through the tower once for all its texts.

    Args:
        model: in evaluation mode.
        selection: its layers and its score.
        deadline: of `time.monotonic`; no batch begins behind it but the first.
    Returns:
        what was seen, and of how many groups.
    """
    parts, seen, images = _Parts(), 0, 0
    for batch in batches(model, processor, groups, batch_size):
        if seen and deadline is not None and time.monotonic() > deadline:
            break
        states, scored = _full_pass(model, batch.pixel_values, selection)
        fused, attention, text_cls = fuse(model, batch, states.index_select(0, batch.image_index))
        parts.text_cls.append(text_cls.float())
        parts.teacher.append(attention.float())
        parts.image_index.append(batch.image_index + images)
        parts.fused_cls.append(fused.float())
        for layer, patches in scored.items():
            parts.scored.setdefault(layer, []).append(patches.half())
        seen, images = seen + batch.groups, images + len(batch.pixel_values)
    joined = {layer: torch.cat(patches) for layer, patches in parts.scored.items()}
    found = Observed(
        torch.cat(parts.text_cls), torch.cat(parts.teacher), torch.cat(parts.image_index), joined,
        torch.cat(parts.fused_cls),
    )  # fmt: skip
    return found, seen


def fuse(model: TripsPreTrainedModel, batch: GroupBatch, image_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of a batch with (R, E, D) image states: fused [CLS] (T, D_t), attention (R, E - 1), t_cls (R, D_t)."""
    trips, n = model.trips, len(batch.image_index) // len(batch.input_ids)
    text = trips.encode_text(batch.input_ids, batch.attention_mask)
    several = hasattr(trips.fusion, "num_images")
    states = image_states.unflatten(0, (-1, n)) if several else image_states
    fused, attention = trips.fusion(text, batch.attention_mask, states, True)
    return fused[:, 0], attention, text[:, 0].repeat_interleave(n, dim=0)


def _full_pass(
    model: TripsPreTrainedModel, pixel_values: Tensor, selection: SelectionConfig
) -> tuple[Tensor, dict[int, Tensor]]:
    """(I, 1 + N, D) all patches behind the tower, and what queries meet at each location on the way."""
    vision = model.trips.vision
    reader, scored = vision.reader, {}
    states = reader.embed(pixel_values)
    for index in range(len(reader.layers)):
        if index + 1 in selection.layers:
            states = reader.attend(index, states)
            scored[index + 1] = vision.scored(index, states, selection)
            states = reader.feed_forward(index, states)
        else:
            states = reader.layer(index, states)
    return reader.final_norm(states), scored


def fit_query(
    train: Observed, validation: Observed, layer: int, num_heads: int, temperature: float
) -> tuple[Tensor, Tensor, float]:
    """The map whose scores come nearest to the teacher, with the ridge that validates best.

    Args:
        train, validation: of different images.
        layer: 1-based.
        num_heads: as in `relevance_logits`.
        temperature: sharpens the teacher, see `selection_distillation_loss`.
    Returns:
        weight (D_t, D), bias (D,), and the ridge.
    """
    patches = train.scored[layer].flatten(0, 1).float()
    centre, spread = patches.mean(dim=0), patches.std(dim=0).clamp_min(1e-6)
    middle = train.text_cls.mean(dim=0)
    size = (train.text_cls - middle).square().mean().sqrt().clamp_min(1e-6)
    width, text_width = len(centre), len(middle)
    variables = torch.zeros(text_width + 1, width, device=centre.device, requires_grad=True)

    def loss_of(observed: Observed, ridge: float | None) -> float:
        """Mean loss; with a ridge its gradient too. In units of the data's own spread, which L-BFGS needs."""
        rows, total = len(observed.teacher), 0.0
        step = max(1, _CHUNK // observed.scored[layer][0].numel())
        for start in range(0, rows, step):
            part = slice(start, start + step)
            met = observed.scored[layer].index_select(0, observed.image_index[part]).float() - centre
            text = (observed.text_cls[part] - middle) / size
            query = (text @ variables[:-1] / text_width**0.5 + variables[-1]) / spread
            logits = relevance_logits(query, met, num_heads)
            share = len(met) / rows
            loss = share * selection_distillation_loss([logits], observed.teacher[part], temperature)
            if ridge is not None:
                loss.backward()
            total += loss.item()
        if ridge is None:
            return total
        penalty = ridge * variables[:-1].square().mean()
        penalty.backward()
        return total + penalty.item()

    best: tuple[float, Tensor, float] | None = None
    for ridge in RIDGES:
        optimiser = torch.optim.LBFGS([variables], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

        def closure(ridge: float = ridge, optimiser: torch.optim.Optimizer = optimiser) -> float:
            optimiser.zero_grad()
            return loss_of(train, ridge)

        with torch.enable_grad():
            optimiser.step(closure)
        with torch.no_grad():
            loss = loss_of(validation, None)
        if best is None or loss < best[0]:
            best = (loss, variables.detach().clone(), ridge)
    _, found, ridge = best
    weight = found[:-1] / text_width**0.5 / size / spread
    return weight, found[-1] / spread - middle @ weight, ridge
