"""Which models of transformers can be accelerated, and where they keep what a selection needs.

Two tables: `TOWERS` says how the vision tower of a family is built, `HOSTS` which tower, which scores and which text a
model class has. A new model is a row. Only pre-norm towers are here: layer j is x' = x + SA(LN1 x); y = x' + FFN(LN2
x'), and what enters it is scored after LN1, the norm that the layer itself reads its input through.

Dimensions: B images, n patches, D width of the tower, P width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPModel,
    Dinov2Model,
    PreTrainedModel,
    SiglipModel,
    ViTModel,
)

from trips.acceleration import texts
from trips.acceleration.settings import AccelerationGuide, AccelerationScore
from trips.errors import UnsupportedModelError
from trips.towers import find_module


@dataclass(frozen=True)
class Tower:
    """Names of the parts of one family of vision towers; alternatives in order of preference."""

    layers: tuple[str, ...]
    norm: str  # LN1
    query: tuple[str, ...]
    key: tuple[str, ...]
    num_cls: int = 1
    fused: bool = False  # query, key and value are one projection, in this order


@dataclass(frozen=True)
class Host:
    """What one model class offers.

    Attributes:
        family: row of `TOWERS`.
        tower: attribute that holds the tower; None: the model is the tower.
        text_scores: scores that a text guide can take here, the default first; empty: the model reads no text.
        text_guide: model, arguments of its forward, score -> (B, D) or (B, P) guide, None if no text is among them.
        shared: model, (B, n, D) states -> (B, n, P) patches in the space of image and text.
        methods: methods other than forward that see the text and call the tower, with the reader of their arguments.
        text_by_default: whether the text guides unless the user says otherwise.
    """

    family: str
    tower: str | None
    text_scores: tuple[AccelerationScore, ...] = ()
    text_guide: Callable[[Any, dict[str, Any], AccelerationScore], Tensor | None] | None = None
    shared: Callable[[Any, Tensor], Tensor] | None = None
    methods: tuple[tuple[str, Callable[[Any, dict[str, Any]], dict[str, Any]]], ...] = ()
    text_by_default: bool = True

    @property
    def free_guides(self) -> tuple[AccelerationGuide, ...]:
        """Guides that need no text, the best first."""
        return ("image", "keys_mean", "random") if TOWERS[self.family].num_cls else ("keys_mean", "random")

    @property
    def guides(self) -> tuple[AccelerationGuide, ...]:
        """Guides that this model can take, the default first."""
        if not self.text_scores:
            return self.free_guides
        return ("text", *self.free_guides) if self.text_by_default else (*self.free_guides, "text")

    def scores(self, guide: AccelerationGuide) -> tuple[AccelerationScore, ...]:
        """Scores that a guide can take, the default first."""
        return {"text": self.text_scores, "image": ("keys", "states"), "keys_mean": ("keys",), "random": ("noise",)}[
            guide
        ]


TOWERS: dict[str, Tower] = {
    "blip": Tower(("encoder.layers",), "layer_norm1", ("self_attn.qkv",), ("self_attn.qkv",), fused=True),
    "clip": Tower(("encoder.layers",), "layer_norm1", ("self_attn.q_proj",), ("self_attn.k_proj",)),
    "siglip": Tower(("encoder.layers",), "layer_norm1", ("self_attn.q_proj",), ("self_attn.k_proj",), num_cls=0),
    "vit": Tower(
        ("layers", "encoder.layer"),
        "layernorm_before",
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
    ),
    "dinov2": Tower(
        ("encoder.layer", "layers"),
        "norm1",
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
    ),
}


def blip_shared(model: BlipForImageTextRetrieval, states: Tensor) -> Tensor:
    """(B, n, D) -> (B, n, P) patches through the projection that the image [CLS] takes for the contrastive score."""
    return model.vision_proj(model.vision_model.post_layernorm(states))


def clip_shared(model: CLIPModel, states: Tensor) -> Tensor:
    """(B, n, D) -> (B, n, P) patches through the norm and the projection of the image [CLS]."""
    return model.visual_projection(model.vision_model.post_layernorm(states))


def siglip_shared(model: SiglipModel, states: Tensor) -> Tensor:
    """(B, n, D) -> (B, n, D) each patch as the pooling head would take it in, were it the only one.

    Attention over one token is its value through the output projection. The head's FFN, which would cost as much as
    that of a layer, is left out; the head adds it to what is scored here.
    """
    head, width = model.vision_model.head.attention, states.shape[-1]
    values = functional.linear(
        model.vision_model.post_layernorm(states), head.in_proj_weight[2 * width :], head.in_proj_bias[2 * width :]
    )
    return head.out_proj(values)


HOSTS: dict[type[PreTrainedModel], Host] = {
    BlipForQuestionAnswering: Host(
        "blip", "vision_model", ("states", "keys"), texts.blip_text, methods=(("generate", texts.as_given),)
    ),
    BlipForImageTextRetrieval: Host(
        "blip", "vision_model", ("shared", "states", "keys"), texts.blip_text, shared=blip_shared
    ),
    BlipForConditionalGeneration: Host(
        "blip",
        "vision_model",
        ("states", "keys"),
        texts.blip_prompt,
        methods=(("generate", texts.as_prompt),),
        text_by_default=False,
    ),
    CLIPModel: Host("clip", "vision_model", ("shared",), texts.shared_text, shared=clip_shared),
    SiglipModel: Host("siglip", "vision_model", ("shared",), texts.shared_text, shared=siglip_shared),
    ViTModel: Host("vit", None),
    Dinov2Model: Host("dinov2", None),
}


def host_of(model: nn.Module) -> Host:
    """The row of `HOSTS` for a model or a subclass of one; `UnsupportedModelError` for others."""
    for kind in type(model).__mro__:
        if kind in HOSTS:
            return HOSTS[kind]
    raise UnsupportedModelError(
        "not a model that trips can accelerate",
        item="accelerate",
        found=type(model).__name__,
        expected=" | ".join(kind.__name__ for kind in HOSTS),
    )


class TowerParts:
    """Reads the vision tower of a host. Holds references; looks modules up each time, since wrappers replace them."""

    def __init__(self, model: PreTrainedModel, host: Host) -> None:
        self.tower: PreTrainedModel = model if host.tower is None else getattr(model, host.tower)
        self.row = TOWERS[host.family]

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, first to last."""
        return find_module(self.tower, self.row.layers)

    @property
    def num_patches(self) -> int:
        """N at the resolution that the tower was made for."""
        size, patch = self.tower.config.image_size, self.tower.config.patch_size
        sizes, patches = ((x, x) if isinstance(x, int) else tuple(x) for x in (size, patch))
        return (sizes[0] // patches[0]) * (sizes[1] // patches[1])

    def normed(self, index: int, states: Tensor) -> Tensor:
        """LN1 of a layer (0-based index), on whatever has width D."""
        return getattr(self.layers[index], self.row.norm)(states)

    def query(self, index: int, normed: Tensor) -> Tensor:
        """(B, D) -> (B, D) through the layer's own W_q."""
        return self._project(find_module(self.layers[index], self.row.query), 0, normed)

    def keys(self, index: int, normed: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D) through the layer's own W_k."""
        return self._project(find_module(self.layers[index], self.row.key), 1, normed)

    def _project(self, projection: nn.Module, part: int, normed: Tensor) -> Tensor:
        if not self.row.fused:
            return projection(normed)
        width = normed.shape[-1]
        rows = slice(part * width, (part + 1) * width)
        if type(projection) is not nn.Linear or "forward" in vars(projection):  # adapted, quantised or offloaded
            return projection(normed)[..., rows]
        bias = None if projection.bias is None else projection.bias[rows]
        return functional.linear(normed, projection.weight[rows], bias)
