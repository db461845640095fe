"""Public checkpoints in miniature: the key layout of each library, written from a model of transformers.

Each mapping is spelt out here on its own, in the direction opposite to the library's, from the names that transformers
writes to disk.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

WIDTH, LAYERS, PATCH, SIZE = 128, 3, 8, 32  # two heads of 64, a grid of 4 x 4


def tower(family: str, **changes: object) -> PreTrainedModel:
    """A tower without weights of its own; `changes` go into its configuration."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": WIDTH // 64,
             "image_size": SIZE, "patch_size": PATCH, **changes}  # fmt: skip
    if family == "clip":
        return CLIPVisionModel(CLIPVisionConfig(intermediate_size=192, **shape))
    if family == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(intermediate_size=192, **shape))
    if family == "vit":
        return ViTModel(ViTConfig(intermediate_size=192, **{"layer_norm_eps": 1e-6, **shape}), add_pooling_layer=False)
    return Dinov2Model(Dinov2Config(mlp_ratio=2, **shape))


def on_disk(model: PreTrainedModel) -> dict[str, Tensor]:
    """What transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _renamed(stored: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    result = {}
    for name, value in stored.items():
        for pattern, new in rules:
            if re.fullmatch(pattern, name):
                result[re.sub(pattern, new, name)] = value
                break
        else:
            raise KeyError(name)
    return result


def _fused(tensors: dict[str, Tensor], joint: str) -> dict[str, Tensor]:
    """Join NAME.<q>, NAME.<k>, NAME.<v> into one tensor, in this order."""
    result = {name: value for name, value in tensors.items() if "<" not in name}
    for name in [name for name in tensors if "<q>" in name]:
        rows = [tensors[name.replace("<q>", part)] for part in ("<q>", "<k>", "<v>")]
        result[name.replace(".<q>", joint)] = torch.cat(rows)
    return result


def openai(model: CLIPVisionModel) -> dict[str, Tensor]:
    """OpenAI's and open_clip's names, without prefix."""
    block = r"transformer.resblocks.\1."
    rules = [
        (r"embeddings\.class_embedding", "class_embedding"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"embeddings\.patch_embedding\.weight", "conv1.weight"),
        (r"pre_layrnorm\.(.*)", r"ln_pre.\1"),
        (r"post_layernorm\.(.*)", r"ln_post.\1"),
        (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.*)", block + r"ln_\2.\3"),
        (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.*)", block + r"attn.<\2>_\3"),
        (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", block + r"attn.out_proj.\2"),
        (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(.*)", block + r"mlp.c_fc.\2"),
        (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(.*)", block + r"mlp.c_proj.\2"),
    ]
    return _fused(_renamed(on_disk(model), rules), ".in_proj")


def timm(model: PreTrainedModel) -> dict[str, Tensor]:
    """timm's names, which are also those of DeiT, MAE, DINO and, with ls1 and ls2, of DINOv2."""
    rules = [
        (r"embeddings\.(cls_token|mask_token)", r"\1"),
        (r"embeddings\.class_embedding", "cls_token"),
        (r"embeddings\.position_embedding(s|\.weight)", "pos_embed"),
        (r"embeddings\.patch_embedding(?:s\.projection)?\.(.*)", r"patch_embed.proj.\1"),
        (r"pre_layrnorm\.(.*)", r"norm_pre.\1"),
        (r"(?:post_layernorm|layernorm)\.(.*)", r"norm.\1"),
    ]
    block, layer = r"blocks.\1.", r"encoder\.layers?\.(\d+)\."
    rules += [
        (layer + r"(?:layer_norm1|layernorm_before|norm1)\.(.*)", block + r"norm1.\2"),
        (layer + r"(?:layer_norm2|layernorm_after|norm2)\.(.*)", block + r"norm2.\2"),
        (layer + r"self_attn\.([qkv])_proj\.(.*)", block + r"attn.<\2>.\3"),
        (layer + r"attention\.attention\.query\.(.*)", block + r"attn.<q>.\2"),
        (layer + r"attention\.attention\.key\.(.*)", block + r"attn.<k>.\2"),
        (layer + r"attention\.attention\.value\.(.*)", block + r"attn.<v>.\2"),
        (layer + r"(?:self_attn\.out_proj|attention\.output\.dense)\.(.*)", block + r"attn.proj.\2"),
        (layer + r"(?:mlp\.fc1|intermediate\.dense)\.(.*)", block + r"mlp.fc1.\2"),
        (layer + r"(?:mlp\.fc2|output\.dense)\.(.*)", block + r"mlp.fc2.\2"),
        (layer + r"mlp\.weights_in\.(.*)", block + r"mlp.w12.\2"),
        (layer + r"mlp\.weights_out\.(.*)", block + r"mlp.w3.\2"),
        (layer + r"layer_scale([12])\.lambda1", block + r"ls\2.gamma"),
    ]
    named = _renamed({name: value for name, value in on_disk(model).items() if not name.startswith("head.")}, rules)
    result = _fused(named, ".qkv")
    for name in ("cls_token", "pos_embed"):
        if name in result:
            result[name] = result[name].reshape(1, -1, WIDTH)
    return result
