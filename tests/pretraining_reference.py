"""The three losses of pre-training by one pair at a time, through the public encoders."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trips.config import SelectionConfig
from trips.losses import itc_loss, itm_loss, mlm_loss, positive_mass, soft_targets
from trips.tasks.pretraining import TripsForPreTraining

# itc_guide, itm_guide, mlm_guide
GUIDES = list(itertools.product(("image", "none", "text"), ("anew", "reuse"), ("masked", "full")))
NEGATIVES = (torch.tensor([1, 0, 0]), torch.tensor([2, 0, 0]))  # image of every text, text of every image


def options_of(itc: str, itm: str, mlm: str, **more: object) -> dict[str, object]:
    return {"itc_guide": itc, "itm_guide": itm, "mlm_guide": mlm, **more}


def image_states(side: nn.Module, batch: dict, row: int, guide: Tensor, selection: SelectionConfig) -> Tensor:
    """(1, E, D) of one image under one text, through the whole vision encoder."""
    return side.trips.vision(batch["pixel_values"][row : row + 1], guide, selection).last_hidden_state


def text_states(side: nn.Module, batch: dict, row: int, key: str = "input_ids") -> Tensor:
    return side.trips.encode_text(batch[key][row : row + 1], batch["attention_mask"][row : row + 1])


def features(side: nn.Module, batch: dict, selection: SelectionConfig, itc: str) -> tuple[Tensor, Tensor]:
    """(B, P) of images and texts, one at a time."""
    if itc == "image" and selection.active:
        selection = selection.replace(guide="image")
    elif itc == "none":
        selection = SelectionConfig(layers=(), guide="none")
    image, text = [], []
    for row in range(len(batch["input_ids"])):
        if side.trips.config.architecture == "single":
            prefix = side.trips.encode_prefix(batch["pixel_values"][row : row + 1])
            image_alone = side.trips.image_alone(prefix, selection)[:, 0]
            text_alone = side.trips.text_alone(*(batch[key][row : row + 1] for key in ("input_ids", "attention_mask")))
            image.append(F.normalize(side.image_projection(image_alone)))
            text.append(F.normalize(side.text_projection(text_alone[:, 0])))
            continue
        words = text_states(side, batch, row)[:, 0]
        image.append(F.normalize(side.image_projection(image_states(side, batch, row, words, selection)[:, 0])))
        text.append(F.normalize(side.text_projection(words)))
    return torch.cat(image), torch.cat(text)


def pair_states(
    side: nn.Module, batch: dict, image: int, text: int, selection: SelectionConfig, guide: Tensor, key: str
) -> Tensor:
    """(1, L, D) of one text with one image; the guide is another text's only in the dual-stream model."""
    mask = batch["attention_mask"][text : text + 1]
    if side.trips.config.architecture == "single":
        pixels = batch["pixel_values"][image : image + 1]
        return side.trips(batch[key][text : text + 1], mask, pixels, selection=selection).last_hidden_state
    states = image_states(side, batch, image, guide[:, 0], selection)
    return side.trips.fusion(text_states(side, batch, text, key), mask, states)[0]


def mlm_logits(side: nn.Module, batch: dict, selection: SelectionConfig, mlm: str) -> Tensor:
    """(M, V), one masked place at a time; the head by transformers' parts, the embeddings by a product."""
    found, length = [], batch["input_ids"].shape[1]
    for place in batch["mlm_positions"].tolist():
        row, token = divmod(place, length)
        words = text_states(side, batch, row, "mlm_input_ids")
        guide = words if mlm == "masked" else text_states(side, batch, row)
        fused = pair_states(side, batch, row, row, selection, guide, "mlm_input_ids")
        hidden = side.mlm_head.transform(fused[0, token])
        found.append(side.trips.text.embeddings.word_embeddings.weight @ hidden + side.mlm_head.bias)
    return torch.stack(found)


def matching(model: TripsForPreTraining, batch: dict, selection: SelectionConfig, itm: str, negatives) -> Tensor:
    """(3 B, 2), one pair at a time."""
    rows = range(len(batch["input_ids"]))
    pairs = [(row, row) for row in rows]
    pairs += [(int(negatives[0][row]), row) for row in rows] + [(row, int(negatives[1][row])) for row in rows]
    found = []
    for image, text in pairs:
        words = text_states(model, batch, text)
        guide = words if itm == "anew" else text_states(model, batch, image)
        fused = pair_states(model, batch, image, text, selection, guide, "input_ids")
        found.append(model.itm_head(fused[0, 0]))
    return torch.stack(found)


@torch.no_grad()
def expected_losses(model: TripsForPreTraining, batch: dict, selection: SelectionConfig, negatives=NEGATIVES) -> dict:
    """The losses of a model with its config's options, pair by pair."""
    options = model.config.pretraining
    image, text = features(model, batch, selection, options.itc_guide)
    image_pool, text_pool, ids = image, text, batch["image_ids"]
    taught_logits = None
    if model.momentum is not None:
        taught = features(model.momentum, batch, selection, options.itc_guide)
        pools = taught
        if model.queue is not None:
            queue = model.queue
            pools = torch.cat([taught[0], queue.image_features]), torch.cat([taught[1], queue.text_features])
            image_pool, text_pool, ids = *pools, torch.cat([ids, queue.image_ids])
        if options.alpha > 0:
            taught_logits = mlm_logits(model.momentum, batch, selection, options.mlm_guide)
    image_targets = text_targets = positive_mass(batch["image_ids"], ids)
    if options.alpha > 0:
        image_targets = soft_targets(taught[0] @ pools[1].T / model.temperature, image_targets, options.alpha)
        text_targets = soft_targets(taught[1] @ pools[0].T / model.temperature, text_targets, options.alpha)
    labels = torch.tensor([1] * len(image) + [0] * (2 * len(image)))
    return {
        "loss_itc": itc_loss(image, text, image_pool, text_pool, model.temperature, image_targets, text_targets),
        "loss_itm": itm_loss(matching(model, batch, selection, options.itm_guide, negatives), labels),
        "loss_mlm": mlm_loss(
            mlm_logits(model, batch, selection, options.mlm_guide), batch["mlm_labels"], taught_logits, options.alpha
        ),
    }
