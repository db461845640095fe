"""Optimizer: parameter groups, AdamW, learning-rate schedule (section 4.1, and ALBEF's rules where it is silent).

The paper trains the vision tower at a rate of its own (1e-5 beside 1e-4 in pre-training), so the groups are vision
and rest, each crossed with decay and no decay. Heads that no public checkpoint has may have a third rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trips.errors import ConfigError

_UNDECAYED = frozenset(
    ("cls_token", "class_embedding", "mask_token", "pos_embed", "position_embedding", "position_embeddings")
)
_FUSED_DEVICES = frozenset(("cpu", "cuda", "mps", "xpu"))


def is_vision(name: str) -> bool:
    """Whether a parameter name lies under a submodule called ``vision``."""
    return "vision" in name.split(".")[:-1]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies, by timm's rule.

    Left out are biases and everything with at most one dimension (norms, LayerScale, temperature), and by name the
    [CLS], mask and position tables of either tower. ALBEF's script lets the position tables decay; timm, from which
    it took the rule, does not, and there is no reason to pull a position towards zero.
    """
    parts = name.split(".")
    return parameter.ndim > 1 and parts[-1] != "bias" and _UNDECAYED.isdisjoint(parts)


def parameter_groups(
    model: nn.Module, lr: float, vision_lr: float, weight_decay: float, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Vision, rest and heads crossed with decay and no decay; every trainable parameter lies in exactly one group.

    Args:
        model: the module to train; vision parameters are those under a submodule named ``vision``. Tied parameters
            count once, under their first name. A model names its heads in an attribute ``heads``.
        lr: peak learning rate of everything but vision.
        vision_lr: peak learning rate of the vision tower.
        weight_decay: decoupled weight decay of the decayed groups.
        head_lr: peak learning rate of the heads; None counts them to the rest.
    Returns:
        Non-empty groups for a torch optimizer, in a fixed order, with an extra key ``name``: "vision", "rest" or
        "head", or these with "_no_decay".
    Raises:
        ConfigError: a negative value, or nothing to train.
    """
    rates = {"vision": vision_lr, "rest": lr, "head": lr if head_lr is None else head_lr}
    for item, value in (
        ("lr", lr),
        ("vision_lr", vision_lr),
        ("head_lr", rates["head"]),
        ("weight_decay", weight_decay),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError("must not be negative", item=item, found=value)
    heads = getattr(model, "heads", ()) if head_lr is not None else ()
    members: dict[str, list[nn.Parameter]] = {f"{kind}{end}": [] for kind in rates for end in ("", "_no_decay")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "vision" if is_vision(name) else "head" if name.split(".")[0] in heads else "rest"
            members[group if is_decayed(name, parameter) else f"{group}_no_decay"].append(parameter)
    groups = [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name.removesuffix("_no_decay")],
            "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]
    if not groups:
        raise ConfigError("has no trainable parameter", item=type(model).__name__)
    return groups


def build_adamw(groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, as one fused kernel where the device has it, else a few for all parameters.

    The fused kernel is not only faster: it can leave out a step on the device's own word, see `train`.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, betas=betas, fused=fused, foreach=not fused)


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.1) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to the floor.

    The floor is a share of each group's own peak; a tenth is ALBEF's 1e-5 beside its peak of 1e-4. The warm-up
    starts from that floor, as ALBEF's does, so the first step is not wasted on a rate of zero.

    Args:
        step: steps already done, 0 before the first.
        total: steps of the whole run; from there on the share stays at the floor.
        warmup: steps until the peak; 0 starts at the peak.
        floor: share of the peak at the start of the warm-up and at the end, in [0, 1].
    """
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    if step >= total:
        return floor
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def build_schedule(
    optimizer: torch.optim.Optimizer, total: int, warmup: int, floor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """`warmup_cosine` on every group of an optimizer, to be stepped once after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total, warmup, floor))


def learning_rates(groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Current rates for the log: ``lr`` of the rest, ``vision_lr``, ``head_lr``, as far as there are such groups."""
    kinds = {group["name"].removesuffix("_no_decay"): group["lr"] for group in groups}
    return {"lr" if kind == "rest" else f"{kind}_lr": rate for kind, rate in kinds.items()}
