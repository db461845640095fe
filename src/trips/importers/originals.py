"""A vision tower from the tensors alone: which family it is, and the configuration that follows from its shapes.

Width, depth, width of the FFN, patch, and grid are read off the tensors. What they do not show is settled by what is
known of the family (heads of 64, norms, activations) or has to be said: CLIP's activation differs between
OpenAI's weights and most of open_clip's.

Dimensions: N patches, D width, p tokens before the patches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, Dinov2Config, PreTrainedConfig, SiglipVisionConfig, ViTConfig

from trips.errors import CheckpointError, ConfigError
from trips.importers.files import TensorFile
from trips.importers.naming import Parts, check_shapes, family_of_parts, read_parts, translate
from trips.importers.positions import square_grid
from trips.processor_checks import positive_int

Activation = Literal["quick_gelu", "gelu"]

HEAD_WIDTH = 64
_OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")  # only OpenAI's own files hold them


@dataclass
class Original:
    """A tower in the form that transformers loads.

    Attributes:
        config: of its family. state: tensors under the names that transformers stores. ignored: names in the file.
    """

    config: PreTrainedConfig
    state: dict[str, Tensor]
    ignored: list[str] = field(default_factory=list)


def read_original(
    file: TensorFile,
    *,
    num_heads: int | None = None,
    activation: Activation | None = None,
    known: tuple[str, str] | None = None,
) -> Original:
    """The vision tower in a file of tensors, whatever scheme names them.

    Args:
        file: see `read_tensors`.
        num_heads: attention heads; of 64 each unless given or told by an open_clip_config.json beside the file.
        activation: of a CLIP; as an open_clip_config.json beside the file tells, or OpenAI's own file, unless given.
        known: see `read_parts`.
    Raises:
        CheckpointError: names, shapes or position table are of no tower that trips knows; the error names the key.
        ConfigError: the width is no multiple of the heads; the activation of a CLIP is not known.
    """
    parts = read_parts(file.tensors, file.path, known)
    check_shapes(parts, file.path)
    family = family_of_parts(parts)
    patch = parts.find("patch", "weight")
    width, channels, *sides = patch.shape
    if len(set(sides)) != 1:
        raise CheckpointError("patches are no squares", item=file.path, found=tuple(sides))
    beside = _open_clip(file.path)
    if num_heads is None:
        num_heads = _told_heads(beside, width) or max(width // HEAD_WIDTH, 1)
    if width % positive_int(num_heads, "num_heads"):
        raise ConfigError("width is no multiple of the heads", item="num_heads", found=(width, num_heads))
    ignored = [*parts.ignored, *file.others]
    grid = _settle_positions(parts, family, file.path, ignored)
    shape = {
        "hidden_size": width,
        "num_hidden_layers": parts.num_layers,
        "num_attention_heads": num_heads,
        "image_size": grid * sides[0],
        "patch_size": sides[0],
        "num_channels": channels,
    }
    config = _CONFIGS[family](parts, shape, lambda: _activation(activation, beside, file))
    return Original(config, translate(parts, f"hf_{family}"), sorted(ignored))


def _settle_positions(parts: Parts, family: str, path: Path, ignored: list[str]) -> int:
    """Bring [CLS] and position table to the shape of their family; patches along one side."""
    part = next(part for part in parts.parts if part.role == "position")
    rows = part.value.reshape(-1, part.value.shape[-1])
    before = 0 if family == "siglip" else 1
    distilled = next((name for name in parts.ignored if name.endswith(("dist_token", "distillation_token"))), None)
    if distilled is not None and square_grid(len(rows), 2):
        rows = torch.cat([rows[:1], rows[2:]])  # the token that DeiT's teacher spoke to is left out, place and all
        ignored.append(f"{part.source}[1], the place of {distilled}")
    if before and square_grid(len(rows), 0) and not square_grid(len(rows), 1):
        rows = torch.cat([torch.zeros_like(rows[:1]), rows])  # only patches have a place (DeiT III)
    grid = square_grid(len(rows), before)
    if grid is None:
        raise CheckpointError(
            "the position table is that of no square of patches",
            item=f"{path}: {part.source}",
            found=tuple(part.value.shape),
            expected=f"{before} + n x n rows",
        )
    part.value = rows if family in ("clip", "siglip") else rows[None]
    for other in parts.parts:
        if other.role == "cls":
            other.value = other.value.reshape(-1) if family == "clip" else other.value.reshape(1, 1, -1)
        elif other.role == "mask":
            other.value = other.value.reshape(1, -1)
    return grid[0]


def _clip_config(parts: Parts, shape: dict[str, Any], activation: Any) -> PreTrainedConfig:
    inner = parts.find("fc1", "weight").shape[0]
    return CLIPVisionConfig(intermediate_size=inner, hidden_act=activation(), **shape)


def _siglip_config(parts: Parts, shape: dict[str, Any], _: Any) -> PreTrainedConfig:
    inner = parts.find("fc1", "weight").shape[0]
    return SiglipVisionConfig(intermediate_size=inner, vision_use_head=False, **shape)


def _vit_config(parts: Parts, shape: dict[str, Any], _: Any) -> PreTrainedConfig:
    inner, bias = parts.find("fc1", "weight").shape[0], _has_bias(parts)
    epsilon = 1e-6 if parts.scheme == "timm" else ViTConfig().layer_norm_eps  # each as its library has it
    return ViTConfig(intermediate_size=inner, layer_norm_eps=epsilon, qkv_bias=bias, **shape)


def _dinov2_config(parts: Parts, shape: dict[str, Any], _: Any) -> PreTrainedConfig:
    width, gate = shape["hidden_size"], parts.find("gate", "weight")
    ratio = 4 if gate is not None else parts.find("fc1", "weight").shape[0] // width
    return Dinov2Config(
        mlp_ratio=ratio,
        use_swiglu_ffn=gate is not None,
        qkv_bias=_has_bias(parts),
        use_mask_token=parts.find("mask") is not None,
        **shape,
    )


_CONFIGS = {"clip": _clip_config, "siglip": _siglip_config, "vit": _vit_config, "dinov2": _dinov2_config}


def _has_bias(parts: Parts) -> bool:
    return any(parts.find(role, "bias") is not None for role in ("qkv", "query"))


def _open_clip(path: Path) -> dict[str, Any]:
    """The model's section of an open_clip_config.json beside the weights, empty without one."""
    config = path.parent / "open_clip_config.json"
    if not config.is_file():
        return {}
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_cfg")
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"cannot be read ({error})", item=config) from error
    return found if isinstance(found, dict) else {}


def _told_heads(beside: dict[str, Any], width: int) -> int | None:
    head = (beside.get("vision_cfg") or {}).get("head_width")
    return width // head if isinstance(head, int) and 0 < head <= width else None


def _activation(given: Activation | None, beside: dict[str, Any], file: TensorFile) -> str:
    if given is not None:
        return given
    if beside:
        return "quick_gelu" if beside.get("quick_gelu") else "gelu"
    if any(name in file.tensors or name in file.others for name in _OPENAI_MARKS):
        return "quick_gelu"
    raise ConfigError(
        "the tensors of a CLIP do not tell its activation",
        item="activation",
        expected='"quick_gelu" (OpenAI, and open_clip\'s models with quickgelu in their name) or "gelu"',
        hint="an open_clip_config.json beside the file tells it too",
    )


def original_file(folder: Path, *, pickled: bool = False) -> Path | None:
    """The one file of weights in a folder that transformers did not write; None where it did.

    Raises:
        CheckpointError: several files, or none.
    """
    config = folder / "config.json"
    try:
        if config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8")):
            return None
    except (ValueError, OSError, TypeError):
        return None  # transformers says what is wrong with it
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".ckpt") if pickled else (".safetensors",)
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if not files:
        return None
    if len(files) > 1:
        raise CheckpointError(
            "several files of weights",
            item=folder,
            found=[file.name for file in files],
            hint="name the one that you mean",
        )
    return files[0]
