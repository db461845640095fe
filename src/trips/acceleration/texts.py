"""The text as a guide of a model of transformers: what asks the patches, and what is read from a call.

Text has to come before vision, while these models look at the image first. So the text takes a pass of its own, through
the model's own text encoder and without the image: in BLIP, 16 tokens cost about 2.5 % of a ViT-B at 384 px, 40 tokens
6 %. CLIP and SigLIP then encode the text once more for their scores.

Dimensions: B texts, L tokens, D width, P width of the shared space.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trips.acceleration.settings import AccelerationScore
from trips.errors import ConfigError


def _tensor(model: Any, ids: Any) -> Tensor:
    """(B, L) ids, which BLIP also takes as lists; a tensor stays where it is, as an offloaded model is nowhere."""
    return ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device=model.device)


def as_given(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Text of a method that takes it as forward does."""
    return arguments


def as_prompt(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Prompt of BLIP's captioning: its generate starts it with BOS and takes the last token, [SEP], away."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if ids is None:
        return arguments
    ids = _tensor(model, ids)[:, :-1].clone()
    ids[:, :1] = model.config.text_config.bos_token_id
    return {**arguments, "input_ids": ids, "attention_mask": None if mask is None else mask[:, :-1]}


def blip_text(model: Any, arguments: dict[str, Any], score: AccelerationScore) -> Tensor | None:
    """t_cls of BLIP's text encoder without cross-attention, its unimodal mode: (B, D), or (B, P) of length 1."""
    if (ids := arguments.get("input_ids")) is None:
        return None
    states = model.text_encoder(
        input_ids=_tensor(model, ids),
        attention_mask=arguments.get("attention_mask"),
        return_dict=True,
    ).last_hidden_state
    return functional.normalize(model.text_proj(states[:, 0]), dim=-1) if score == "shared" else states[:, 0]


def blip_prompt(model: Any, arguments: dict[str, Any], score: AccelerationScore) -> Tensor | None:
    """(B, D) the last token of the prompt in BLIP's caption decoder, which is causal: only the last has read it all.

    Raises:
        ConfigError: labels are given, the text is then what is to be predicted; or the prompt is empty.
    """
    if (ids := arguments.get("input_ids")) is None:
        return None
    if arguments.get("labels") is not None:
        raise ConfigError(
            "the text that guides would be the caption to be predicted",
            item="labels",
            hint='wrap the call in trips.acceleration.guided_by(model, input_ids=prompt), or use guide="image"',
        )
    if ids.shape[1] == 0:
        raise ConfigError("the text guides, but the prompt is empty", item="input_ids", found=tuple(ids.shape))
    mask = arguments.get("attention_mask")
    states = model.text_decoder.bert(
        input_ids=ids, attention_mask=mask, is_decoder=True, use_cache=False, return_dict=True
    ).last_hidden_state
    if mask is None:
        return states[:, -1]
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device) * mask
    return states[torch.arange(ids.shape[0], device=ids.device), places.argmax(dim=-1)]


def shared_text(model: Any, arguments: dict[str, Any], score: AccelerationScore) -> Tensor | None:
    """(B, P) caption feature of CLIP or SigLIP in the space of image and text, of length 1."""
    if arguments.get("input_ids") is None:
        return None
    names = ("input_ids", "attention_mask", "position_ids")
    features = model.get_text_features(**{name: arguments.get(name) for name in names}, return_dict=True)
    return functional.normalize(features.pooler_output, dim=-1)


def shared_scale(model: Any) -> Tensor | float:
    """What multiplies a cosine: the model's learnt inverse temperature, or the one that BLIP's configuration names."""
    learnt = getattr(model, "logit_scale", None)
    if learnt is None:
        return math.exp(model.config.logit_scale_init_value)
    return learnt.detach().exp()
