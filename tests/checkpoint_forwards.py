"""Forward passes written out from the tensors of public checkpoints, without a module of any library.

Dimensions: B rows, n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD = 64


def linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    bias = tensors.get(f"{name}.bias")
    return x @ tensors[f"{name}.weight"].T + (0 if bias is None else bias)


def norm(tensors: Mapping[str, Tensor], name: str, x: Tensor, epsilon: float) -> Tensor:
    """Zero mean, unit variance, scale and shift."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / (variance + epsilon).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads of 64, one by one; mask (B, n) or (B, m, n), 1 where keys may be read."""
    out = []
    for start in range(0, query.shape[-1], HEAD):
        q, k, v = (x[..., start : start + HEAD] for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) / HEAD**0.5
        if mask is not None:
            scores = scores.masked_fill((mask if mask.ndim == 3 else mask[:, None]) == 0, -1e30)
        out.append(torch.softmax(scores, -1) @ v)
    return torch.cat(out, -1)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def patches(weight: Tensor, bias: Tensor | None, pixels: Tensor) -> Tensor:
    """(B, N, D): cut, flatten, project."""
    size = weight.shape[-1]
    cut = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, 3, down, across, size, size)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return cut @ weight.flatten(1).T + (0 if bias is None else bias)


def openai_clip(tensors: Mapping[str, Tensor], pixels: Tensor, act: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """States behind ln_pre and behind every block, from OpenAI's names without prefix; last the normed ones."""
    x = patches(tensors["conv1.weight"], None, pixels)
    first = tensors["class_embedding"].expand(len(x), 1, -1)
    x = norm(tensors, "ln_pre", torch.cat([first, x], 1) + tensors["positional_embedding"], 1e-5)
    states, layer = [x], 0
    while f"transformer.resblocks.{layer}.ln_1.weight" in tensors:
        at = f"transformer.resblocks.{layer}."
        y = norm(tensors, at + "ln_1", x, 1e-5)
        joint = y @ tensors[at + "attn.in_proj_weight"].T + tensors[at + "attn.in_proj_bias"]
        x = x + linear(tensors, at + "attn.out_proj", attention(*joint.chunk(3, -1)))
        x = x + linear(
            tensors, at + "mlp.c_proj", act(linear(tensors, at + "mlp.c_fc", norm(tensors, at + "ln_2", x, 1e-5)))
        )
        states.append(x)
        layer += 1
    return [*states, norm(tensors, "ln_post", x, 1e-5)]


def timm_vit(tensors: Mapping[str, Tensor], pixels: Tensor, act: Callable[[Tensor], Tensor] = F.gelu) -> list[Tensor]:
    """States of the embeddings and behind every block, from timm's names; last the normed ones."""
    x = patches(tensors["patch_embed.proj.weight"], tensors.get("patch_embed.proj.bias"), pixels)
    if "cls_token" in tensors:
        x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + tensors["pos_embed"]
    states, layer = [x], 0
    while f"blocks.{layer}.norm1.weight" in tensors:
        at = f"blocks.{layer}."
        joint = linear(tensors, at + "attn.qkv", norm(tensors, at + "norm1", x, 1e-6))
        branch = linear(tensors, at + "attn.proj", attention(*joint.chunk(3, -1)))
        x = x + branch * tensors.get(at + "ls1.gamma", torch.ones(()))
        y = norm(tensors, at + "norm2", x, 1e-6)
        if at + "mlp.w12.weight" in tensors:
            gate, up = linear(tensors, at + "mlp.w12", y).chunk(2, -1)
            branch = linear(tensors, at + "mlp.w3", F.silu(gate) * up)
        else:
            branch = linear(tensors, at + "mlp.fc2", act(linear(tensors, at + "mlp.fc1", y)))
        x = x + branch * tensors.get(at + "ls2.gamma", torch.ones(()))
        states.append(x)
        layer += 1
    return [*states, norm(tensors, "norm", x, 1e-6)]


def bert_embeddings(tensors: Mapping[str, Tensor], root: str, ids: Tensor) -> Tensor:
    """Words, places and the first kind, normed."""
    x = tensors[f"{root}embeddings.word_embeddings.weight"][ids]
    x = x + tensors[f"{root}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + tensors[f"{root}embeddings.token_type_embeddings.weight"][0]
    return norm(tensors, f"{root}embeddings.LayerNorm", x, 1e-12)


def bert_layer(
    tensors: Mapping[str, Tensor], at: str, x: Tensor, mask: Tensor, image: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Self-attention, cross-attention where there are image (or question) states, FFN; a norm behind each."""
    for part, source, seen in (("attention", None, mask), ("crossattention", image, image_mask)):
        if part == "crossattention" and image is None:
            continue
        source = x if source is None else source
        q = linear(tensors, f"{at}{part}.self.query", x)
        k, v = (linear(tensors, f"{at}{part}.self.{name}", source) for name in ("key", "value"))
        out = linear(tensors, f"{at}{part}.output.dense", attention(q, k, v, seen))
        x = norm(tensors, f"{at}{part}.output.LayerNorm", x + out, 1e-12)
    y = linear(tensors, f"{at}output.dense", F.gelu(linear(tensors, f"{at}intermediate.dense", x)))
    return norm(tensors, f"{at}output.LayerNorm", x + y, 1e-12)


def mlm_head(tensors: Mapping[str, Tensor], root: str, words: Tensor, x: Tensor) -> Tensor:
    """BERT's head: dense, GELU, norm, the word embeddings, a bias."""
    x = F.gelu(linear(tensors, f"{root}transform.dense", x))
    return norm(tensors, f"{root}transform.LayerNorm", x, 1e-12) @ words.T + tensors[f"{root}bias"]
