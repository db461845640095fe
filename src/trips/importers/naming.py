"""How public checkpoints call the parts of a ViT: a table, and the reader that turns one scheme into another.

A scheme is one row of `SCHEMES`: for every role of a part its name there, {n} the number of a layer from 0. A target is
the scheme in which transformers stores a family; what no role of the source matches is an error, never left out.

Dimensions: N patches, D width, F width of the FFN, p tokens before the patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trips.errors import CheckpointError
from trips.importers.files import check_floating
from trips.importers.report import first_names

_TIMM = {
    "cls": "cls_token",
    "position": "pos_embed",
    "patch": "patch_embed.proj",
    "pre_norm": "norm_pre",
    "norm1": "blocks.{n}.norm1",
    "qkv": "blocks.{n}.attn.qkv",
    "out": "blocks.{n}.attn.proj",
    "norm2": "blocks.{n}.norm2",
    "fc1": "blocks.{n}.mlp.fc1",
    "fc2": "blocks.{n}.mlp.fc2",
    "gate": "blocks.{n}.mlp.w12",
    "down": "blocks.{n}.mlp.w3",
    "scale1": "blocks.{n}.ls1.gamma",
    "scale2": "blocks.{n}.ls2.gamma",
    "mask": "mask_token",
    "final_norm": "norm",
}
_HF_CLIP = {
    "cls": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight",
    "patch": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "norm1": "encoder.layers.{n}.layer_norm1",
    "query": "encoder.layers.{n}.self_attn.q_proj",
    "key": "encoder.layers.{n}.self_attn.k_proj",
    "value": "encoder.layers.{n}.self_attn.v_proj",
    "out": "encoder.layers.{n}.self_attn.out_proj",
    "norm2": "encoder.layers.{n}.layer_norm2",
    "fc1": "encoder.layers.{n}.mlp.fc1",
    "fc2": "encoder.layers.{n}.mlp.fc2",
    "final_norm": "post_layernorm",
}
_HF_SELF = "encoder.layer.{n}.attention."
_HF_VIT = {
    "cls": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection",
    "norm1": "encoder.layer.{n}.layernorm_before",
    "query": _HF_SELF + "attention.query",
    "key": _HF_SELF + "attention.key",
    "value": _HF_SELF + "attention.value",
    "out": _HF_SELF + "output.dense",
    "norm2": "encoder.layer.{n}.layernorm_after",
    "fc1": "encoder.layer.{n}.intermediate.dense",
    "fc2": "encoder.layer.{n}.output.dense",
    "final_norm": "layernorm",
}
SCHEMES: dict[str, dict[str, str]] = {
    "hf_clip": _HF_CLIP,
    "hf_siglip": {role: name for role, name in _HF_CLIP.items() if role not in ("cls", "pre_norm")},
    "hf_vit": _HF_VIT,
    "hf_dinov2": {
        **_HF_VIT,
        "norm1": "encoder.layer.{n}.norm1",
        "norm2": "encoder.layer.{n}.norm2",
        "fc1": "encoder.layer.{n}.mlp.fc1",
        "fc2": "encoder.layer.{n}.mlp.fc2",
        "gate": "encoder.layer.{n}.mlp.weights_in",
        "down": "encoder.layer.{n}.mlp.weights_out",
        "scale1": "encoder.layer.{n}.layer_scale1.lambda1",
        "scale2": "encoder.layer.{n}.layer_scale2.lambda1",
        "mask": "embeddings.mask_token",
    },
    "timm": _TIMM,
    "openai": {
        "cls": "class_embedding",
        "position": "positional_embedding",
        "patch": "conv1",
        "pre_norm": "ln_pre",
        "norm1": "transformer.resblocks.{n}.ln_1",
        "qkv": "transformer.resblocks.{n}.attn.in_proj",
        "out": "transformer.resblocks.{n}.attn.out_proj",
        "norm2": "transformer.resblocks.{n}.ln_2",
        "fc1": "transformer.resblocks.{n}.mlp.c_fc",
        "fc2": "transformer.resblocks.{n}.mlp.c_proj",
        "scale1": "transformer.resblocks.{n}.ls_1.gamma",
        "scale2": "transformer.resblocks.{n}.ls_2.gamma",
        "final_norm": "ln_post",
    },
}
# A scheme is known by its patch embedding and first layer; a prefix names the part of a larger model.
_MARKS = {name: [roles["patch"] + ".weight", roles["norm1"].format(n=0) + ".weight"] for name, roles in SCHEMES.items()}
_PREFIXES = ("", "visual.", "visual.trunk.", "vision_model.", "vit.", "deit.", "dinov2.", "backbone.", "encoder.")
# What stands beside the tower, by scheme: the other half of a CLIP, heads, poolings.
_BESIDE = {
    "openai": ("proj", "attn_pool."),
    "timm": ("head.", "head_dist.", "pre_logits.", "attn_pool.", "dist_token"),
    "hf_vit": ("pooler.", "embeddings.mask_token", "embeddings.distillation_token"),
    "hf_siglip": ("head.",),
    "hf_clip": ("embeddings.position_ids",),
}
_OUTSIDE = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale",
            "logit_bias", "text.", "text_model.", "visual_projection.", "visual.head.", "classifier.", "attn_mask",
            "cls_classifier.", "distillation_classifier.", "pooler.", "input_resolution", "context_length",
            "vocab_size")  # fmt: skip


@dataclass
class Part:
    """One tensor of a source, by what it is.

    Attributes:
        role: key of a scheme. leaf: "weight", "bias", or "" for a bare tensor. layer: from 0, None outside the layers.
        source: its name in the file. value: the tensor.
    """

    role: str
    leaf: str
    layer: int | None
    source: str
    value: Tensor


@dataclass
class Parts:
    """A tower by roles, and the names of the file that lie beside it."""

    scheme: str
    parts: list[Part]
    ignored: list[str]

    def find(self, role: str, leaf: str = "") -> Tensor | None:
        """The tensor of a role, of the first layer where layers have it; None without one."""
        return next((part.value for part in self.parts if (part.role, part.leaf) == (role, leaf)), None)

    @property
    def num_layers(self) -> int:
        """One more than the highest number of a layer."""
        return 1 + max((part.layer for part in self.parts if part.layer is not None), default=-1)


def identify(names: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Scheme and prefix of the vision tower among these tensors, None where no scheme fits."""
    for prefix in _PREFIXES:
        for scheme, marks in _MARKS.items():
            if all(prefix + mark in names for mark in marks):
                if scheme == "hf_siglip" and prefix + _HF_CLIP["cls"] in names:
                    scheme = "hf_clip"
                if scheme == "hf_clip" and prefix + _HF_CLIP["cls"] not in names:
                    scheme = "hf_siglip"
                return scheme, prefix
    return None


def read_parts(tensors: Mapping[str, Tensor], item: object, known: tuple[str, str] | None = None) -> Parts:
    """Sort tensors into the roles of their scheme.

    Args:
        tensors: by the names of the file.
        item: the file, for messages.
        known: scheme and prefix, found by `identify` unless given.
    Raises:
        CheckpointError: no scheme fits; a name that has no role and does not stand beside a tower; a layer that lacks
            what another has.
    """
    found = known or identify(tensors)
    if found is None:
        raise CheckpointError(
            "the names of its tensors are those of no vision tower that trips knows",
            item=item,
            found=first_names(tensors),
            expected="CLIP, SigLIP, ViT, DeiT or DINOv2 as transformers, OpenAI, open_clip, timm or Meta name them",
        )
    scheme, prefix = found
    beside, outside = tuple(prefix + name for name in _BESIDE.get(scheme, ())), _OUTSIDE if prefix else ()
    if not prefix and scheme.startswith("hf_"):
        outside = ("pooler.",)
    readers = [(role, _pattern(prefix + name)) for role, name in SCHEMES[scheme].items()]
    result, unexpected = Parts(scheme, [], []), []
    for name, value in tensors.items():
        match = next(((role, hit) for role, pattern in readers if (hit := pattern.fullmatch(name))), None)
        if match is not None:
            role, hit = match
            layer = hit.groupdict().get("n")
            result.parts.append(Part(role, hit["leaf"] or "", None if layer is None else int(layer), name, value))
        elif name.startswith(beside) or (outside and not name.startswith(prefix) and name.startswith(outside)):
            result.ignored.append(name)
        else:
            unexpected.append(name)
    if unexpected:
        raise CheckpointError("unexpected keys", item=item, found=first_names(unexpected))
    _check_complete(result, prefix, item)
    return result


def _pattern(template: str) -> re.Pattern[str]:
    """A role's template as a pattern; OpenAI's fused projection parts its leaf by a stroke."""
    name = re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)")
    return re.compile(name + r"(?:[._](?P<leaf>weight|bias))?")


def _check_complete(parts: Parts, prefix: str, item: object) -> None:
    names = SCHEMES[parts.scheme]
    there = {(part.role, part.layer, part.leaf) for part in parts.parts}
    needed = {(role, layer, leaf) for role, at, leaf in there if at is not None for layer in range(parts.num_layers)}
    needed |= {("patch", None, "weight"), ("position", None, "")}
    needed |= {("final_norm", None, leaf) for leaf in ("weight", "bias")}
    needed |= {("pre_norm", None, leaf) for leaf in ("weight", "bias") if any(role == "pre_norm" for role, *_ in there)}
    fused = "qkv" if "qkv" in names else "query"
    for layer in range(max(parts.num_layers, 1)):
        for role in ("norm1", fused, "out", "norm2"):
            needed.add((role, layer, "weight"))
    if missing := needed - there:
        raise CheckpointError(
            "missing keys",
            item=item,
            found=first_names(
                prefix + names[role].format(n=layer) + (f".{leaf}" if leaf else "") for role, layer, leaf in missing
            ),
        )


def check_shapes(parts: Parts, item: Path) -> None:
    """Raise `CheckpointError` that names the first tensor of another shape than follows from the patch embedding's.

    Integers are refused too; see `check_floating`.
    """
    check_floating({part.source: part.value for part in parts.parts}, item)
    width = parts.find("patch", "weight").shape[0]
    ffn = parts.find("fc1", "weight")
    inner = ffn.shape[0] if ffn is not None else None
    out = {"qkv": 3 * width, "query": width, "key": width, "value": width, "out": width, "fc1": inner, "fc2": width}
    into = {"fc2": inner}
    for part in parts.parts:
        shape = tuple(part.value.shape)
        if part.role in out:
            expected = (out[part.role],) if part.leaf == "bias" else (out[part.role], into.get(part.role, width))
        elif part.role in ("position", "cls", "mask", "gate", "down", "patch"):
            wide = part.role not in ("gate", "down", "patch")
            expected = (*shape[:-1], width) if wide else shape
        else:
            expected = (width,)
        if shape != expected:
            raise CheckpointError("tensor of another shape", item=f"{item}: {part.source}", found=shape,
                                  expected=expected)  # fmt: skip


def translate(parts: Parts, target: str) -> dict[str, Tensor]:
    """The tower under the names of another scheme; fused projections are cut in the order query, key, value.

    Raises:
        CheckpointError: a role that the target has no name for.
    """
    names, result = SCHEMES[target], {}
    for part in parts.parts:
        pieces = {part.role: part.value}
        if part.role == "qkv" and "qkv" not in names:
            pieces = dict(zip(("query", "key", "value"), part.value.chunk(3), strict=True))
        for role, value in pieces.items():
            if role not in names:
                raise CheckpointError(f"{target} has no such part", item=part.source)
            name = names[role].format(n=part.layer)
            result[name + (f".{part.leaf}" if part.leaf else "")] = value.clone()
    return result


def family_of_parts(parts: Parts) -> str:
    """ "clip", "siglip", "vit" or "dinov2", told by the parts that only one of them has."""
    if parts.scheme.startswith("hf_"):
        return parts.scheme.removeprefix("hf_")
    if parts.scheme == "openai" or parts.find("pre_norm", "weight") is not None:
        return "clip"
    if parts.find("cls") is None:
        return "siglip"
    return "vit" if parts.find("scale1") is None else "dinov2"
