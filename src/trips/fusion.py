"""The fusion encoder: BERT layers with cross-attention, bidirectional (section 3.1).

Its layers are transformers' `BertLayer` modules in their decoder form, the only one with cross-attention. What makes
them causal there is the mask, so an explicit bidirectional mask is always given.

Dimensions: B rows, L text tokens, E image tokens ([CLS] first), D width, h heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention, BertLayer

from trips.errors import ConfigError

_ALIGNMENT = 8  # numbers; what torch's memory-efficient attention wants between the rows of a mask


class FusionEncoder(nn.Module):
    """Text tokens attend to each other and to the image tokens in every layer.

    Args:
        config: BertConfig with ``is_decoder`` and ``add_cross_attention`` set.
        image_width: width of the image tokens. Unlike the text's, they pass a linear map and a norm first.
        blocks_per_layer: blocks built for each layer of the configuration; for `trips.multi_image`.
    """

    def __init__(self, config: BertConfig, image_width: int | None = None, *, blocks_per_layer: int = 1) -> None:
        super().__init__()
        if not (config.is_decoder and config.add_cross_attention):
            raise ConfigError("needs is_decoder and add_cross_attention", item="fusion_encoder_config")
        if config._attn_implementation is None:
            config._attn_implementation = "sdpa"  # bare layers have no model class to choose fused attention for them
        self.config = config
        blocks = config.num_hidden_layers * blocks_per_layer
        self.layer = nn.ModuleList([BertLayer(config, layer_idx=i) for i in range(blocks)])
        if image_width is not None and image_width != config.hidden_size:
            self.image_projection = nn.Sequential(
                nn.Linear(image_width, config.hidden_size), nn.LayerNorm(config.hidden_size)
            )
        else:
            self.image_projection = None

    def forward(
        self, text_states: Tensor, attention_mask: Tensor, image_states: Tensor, output_image_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse.

        Args:
            text_states: (B, L, D) from the text encoder.
            attention_mask: (B, L), 1 for text, 0 for padding.
            image_states: (B, E, D) from the vision encoder.
            output_image_attention: also return the teacher of guidance distillation.
        Returns:
            (B, L, D) fused states, and `image_attention` or None.
        """
        if self.image_projection is not None:
            image_states = self.image_projection(image_states)
        mask = bidirectional_mask(attention_mask, text_states.dtype)
        states, maps = text_states, []
        for layer, memory in zip(self.layer, self.memories(image_states), strict=True):
            if output_image_attention:
                maps.append(self.attention_rows(layer, states, mask, memory))
            states = layer(states, mask, memory)
            states = states[0] if isinstance(states, tuple) else states
        return states, self.teacher(maps, attention_mask) if output_image_attention else None

    def memories(self, image_states: Tensor) -> Iterable[Tensor]:
        """What the cross-attention of each layer is given, in order: here the image tokens."""
        return [image_states] * len(self.layer)

    def attention_rows(self, layer: BertLayer, states: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
        """(B, L, E) cross-attention of one layer, recomputed, so that the layer stays fused."""
        return cross_attention_map(layer.crossattention, own_attention(layer, states, mask), memory)

    def teacher(self, maps: list[Tensor], attention_mask: Tensor) -> Tensor:
        """`image_attention` of the maps of all layers."""
        return image_attention(maps, attention_mask)

    def state_from_single(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This encoder's state dictionary from that of a `FusionEncoder` of one image: here the same."""
        return dict(state)


def bidirectional_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) ones and zeros -> (B, 1, L, L) additive mask: 0 where text may be read, else the minimum.

    Its rows lie a multiple of 8 numbers apart, whatever L: fused attention on a GPU would otherwise lay the mask out
    anew in every layer.
    """
    length, read = attention_mask.shape[1], attention_mask.to(dtype)
    if length % _ALIGNMENT:
        read = F.pad(read, (0, -length % _ALIGNMENT))
    closed = ((1 - read) * torch.finfo(dtype).min)[:, None, None, :length]
    return closed.expand(-1, 1, length, -1)


@torch.no_grad()
def own_attention(layer: BertLayer, states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, D) text states behind a layer's self-attention: what its cross-attention asks with."""
    return layer.attention(states, mask)[0]


@torch.no_grad()
def cross_attention_map(attention: BertAttention, text_states: Tensor, image_states: Tensor) -> Tensor:
    """(B, L, E) weights of a cross-attention, averaged over its heads, in float32."""
    attention, batch, length = attention.self, *text_states.shape[:2]
    heads = attention.num_attention_heads
    query = attention.query(text_states).view(batch, length, heads, -1).transpose(1, 2)
    key = attention.key(image_states).view(batch, image_states.shape[1], heads, -1).transpose(1, 2)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1).mean(dim=1)


@torch.no_grad()
def image_attention(maps: list[Tensor], attention_mask: Tensor) -> Tensor:
    """What the fusion encoder looks at: mean over layers, heads and text tokens, image [CLS] dropped, renormalised.

    Args:
        maps: per layer (B, L, E).
        attention_mask: (B, L); padding never counts.
    Returns:
        (B, E - 1), each row sums to 1.
    """
    weights = attention_mask.float() / attention_mask.sum(dim=1, keepdim=True)
    rows = torch.einsum("bl,ble->be", weights, torch.stack(maps).mean(dim=0))[:, 1:]
    return rows / rows.sum(dim=1, keepdim=True)
