"""Where each ViT family of transformers keeps its parts (section 3.1: the host tower stays what it is).

A family is one row of `FAMILIES`. A name may have alternatives, since releases of transformers rename modules; the
first that exists is taken. A pre-norm layer is x' = x + SA(LN1 x); y = x' + FFN(LN2 x'): `attend` gives x',
`feed_forward` gives y, and selection happens between them. Nothing of a forward pass of transformers is copied: a
layer that does not select is called as the module it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from trips.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Names of the parts of one ViT family; dotted paths, alternatives in order of preference."""

    model_class: type[PreTrainedModel]
    layers: tuple[str, ...]
    pre_norm: str | None  # between embeddings and first layer
    final_norm: str
    attention: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    attention_norm: str
    ffn_norm: str
    after_attention: tuple[str, ...]  # modules applied to the attention output before the residual sum
    ffn: tuple[str, ...]  # modules from normalised state to the FFN branch's output
    interpolation_flag: bool  # whether the embeddings want interpolate_pos_encoding=True
    cls: str | None  # [CLS] in the embeddings, and the table whose first row is its position
    positions: str
    model_kwargs: tuple[tuple[str, object], ...] = ()
    num_class_tokens: int = 1  # tokens before the patches


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(
        model_class=CLIPVisionModel,
        layers=("encoder.layers",),
        pre_norm="pre_layrnorm",
        final_norm="post_layernorm",
        attention="self_attn",
        query=("self_attn.q_proj",),
        key=("self_attn.k_proj",),
        attention_norm="layer_norm1",
        ffn_norm="layer_norm2",
        after_attention=(),
        ffn=("mlp",),
        interpolation_flag=True,
        cls="class_embedding",
        positions="position_embedding.weight",
    ),
    "vit": Family(
        model_class=ViTModel,
        layers=("layers", "encoder.layer"),
        pre_norm=None,
        final_norm="layernorm",
        attention="attention",
        query=("attention.q_proj", "attention.attention.query"),
        key=("attention.k_proj", "attention.attention.key"),
        attention_norm="layernorm_before",
        ffn_norm="layernorm_after",
        after_attention=("dropout",),
        ffn=("mlp", "dropout"),
        interpolation_flag=True,
        cls="cls_token",
        positions="position_embeddings",
        model_kwargs=(("add_pooling_layer", False),),
    ),
    "dinov2": Family(
        model_class=Dinov2Model,
        layers=("encoder.layer", "layers"),
        pre_norm=None,
        final_norm="layernorm",
        attention="attention",
        query=("attention.q_proj", "attention.attention.query"),
        key=("attention.k_proj", "attention.attention.key"),
        attention_norm="norm1",
        ffn_norm="norm2",
        after_attention=("layer_scale1", "drop_path"),
        ffn=("mlp", "layer_scale2", "drop_path"),
        interpolation_flag=False,
        cls="cls_token",
        positions="position_embeddings",
    ),
    "siglip_vision_model": Family(
        model_class=SiglipVisionModel,
        layers=("encoder.layers",),
        pre_norm=None,
        final_norm="post_layernorm",
        attention="self_attn",
        query=("self_attn.q_proj",),
        key=("self_attn.k_proj",),
        attention_norm="layer_norm1",
        ffn_norm="layer_norm2",
        after_attention=(),
        ffn=("mlp",),
        interpolation_flag=True,
        cls=None,
        positions="position_embedding.weight",
        num_class_tokens=0,
    ),
}


def find_module(root: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The first of several dotted names that `root` has; `UnsupportedModelError` names them all otherwise."""
    for name in names:
        module: object = root
        for part in name.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError("has none of the expected parts", item=type(root).__name__, expected=" | ".join(names))


def family_of(config: PreTrainedConfig) -> Family:
    """The row of `FAMILIES` for a vision configuration; `UnsupportedModelError` for others."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            "not a vision tower that trips knows",
            item="vision_config.model_type",
            found=config.model_type,
            expected=" | ".join(FAMILIES),
        )
    return FAMILIES[config.model_type]


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights from its configuration; its attention is the configured one, fused by default.

    Raises:
        UnsupportedModelError: another family, or one without [CLS], which contrast and the image's own guide ask for.
            (A mean of the patches in its place would be a token that the tower's attention has never seen.)
    """
    family = family_of(config)
    if not family.num_class_tokens:
        raise UnsupportedModelError(
            "this tower has no [CLS]",
            item="vision_config.model_type",
            found=config.model_type,
            hint="trips.accelerate takes a transformers model with such a tower as it is",
        )
    return family.model_class._from_config(config, **dict(family.model_kwargs))


@lru_cache
def _takes_mask(module_class: type[nn.Module]) -> bool:
    return "attention_mask" in inspect.signature(module_class.forward).parameters


def _mask_argument(module: nn.Module, mask: Tensor | None) -> dict[str, Tensor | None]:
    # Some releases want an absent mask spelt out, others do not take one.
    if _takes_mask(type(module)):
        return {"attention_mask": mask}
    if mask is not None:
        raise UnsupportedModelError(
            "takes no mask in this release of transformers, so texts cannot be padded in it",
            item=type(module).__name__,
            hint="a ViT or CLIP tower, or a newer transformers",
        )
    return {}


class TowerReader:
    """Reads one tower by its family's row. Holds references, no modules: state-dict keys stay the tower's own."""

    def __init__(self, tower: PreTrainedModel) -> None:
        self.tower, self.family = tower, family_of(tower.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, first to last; looked up each time, since wrappers may replace them."""
        return find_module(self.tower, self.family.layers)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, D), positions interpolated to the grid at hand, pre-norm applied."""
        pixel_values = pixel_values.to(self.tower.dtype)  # not every family's embeddings do it themselves
        kwargs = {"interpolate_pos_encoding": True} if self.family.interpolation_flag else {}
        states = self.tower.embeddings(pixel_values, **kwargs)
        return getattr(self.tower, self.family.pre_norm)(states) if self.family.pre_norm else states

    def cls(self) -> Tensor:
        """(1, 1, D) [CLS] as `embed` puts it before the patches, but for any dropout."""
        token, positions = (
            attrgetter(name)(self.tower.embeddings) for name in (self.family.cls, self.family.positions)
        )
        width = token.shape[-1]
        states = token.view(1, 1, width) + positions.view(1, -1, width)[:, :1]
        return getattr(self.tower, self.family.pre_norm)(states) if self.family.pre_norm else states

    def layer(self, index: int, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """A whole layer (0-based index), called as the module it is; mask: added to the attention's scores."""
        layer = self.layers[index]
        out = layer(states, **_mask_argument(layer, mask))
        return out[0] if isinstance(out, tuple) else out

    def attend(self, index: int, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """x' = x + SA(LN1 x), the pre-norm form of Eq. 1; mask: as in `layer`."""
        return self._half(self._attend, index, states, mask)

    def feed_forward(self, index: int, states: Tensor) -> Tensor:
        """y = x' + FFN(LN2 x')."""
        return self._half(self._feed_forward, index, states)

    def _half(self, half: Callable[..., Tensor], index: int, *inputs: Tensor | None) -> Tensor:
        """A half of a layer, recomputed in the backward pass if transformers would recompute the whole layer."""
        layer = self.layers[index]
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            return layer._gradient_checkpointing_func(half, index, *inputs)
        return half(index, *inputs)

    def _attend(self, index: int, states: Tensor, mask: Tensor | None) -> Tensor:
        layer = self.layers[index]
        attention = getattr(layer, self.family.attention)
        out = attention(getattr(layer, self.family.attention_norm)(states), **_mask_argument(attention, mask))
        branch = out[0] if isinstance(out, tuple) else out
        for name in self.family.after_attention:
            branch = getattr(layer, name)(branch)
        return states + branch

    def _feed_forward(self, index: int, states: Tensor) -> Tensor:
        layer = self.layers[index]
        branch = self.normed(index, states)
        for name in self.family.ffn:
            branch = getattr(layer, name)(branch)
        return states + branch

    def normed(self, index: int, states: Tensor) -> Tensor:
        """LN2 of the layer: the norm that follows the attention residual."""
        return getattr(self.layers[index], self.family.ffn_norm)(states)

    def query(self, index: int, guide: Tensor, through_norm: bool) -> Tensor:
        """(B, D) guide -> (B, D) through LN1, if asked, and the layer's own W_q with its bias."""
        layer = self.layers[index]
        if through_norm:
            guide = getattr(layer, self.family.attention_norm)(guide)
        return find_module(layer, self.family.query)(guide)

    def keys(self, index: int, states: Tensor) -> Tensor:
        """(B, n, D) states -> (B, n, D) through LN1 and the layer's own W_k."""
        layer = self.layers[index]
        return find_module(layer, self.family.key)(getattr(layer, self.family.attention_norm)(states))

    def final_norm(self, states: Tensor) -> Tensor:
        """The tower's last norm, on all tokens."""
        return getattr(self.tower, self.family.final_norm)(states)
