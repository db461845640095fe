"""Other models on the same machine, with random weights of ViT-B size: ViLT, BLIP, CLIP, and transformers' own parts.

Table 3 quotes their cost from another paper; here they run beside the subject. `transformers_pair` is the control for
overhead: the parts of transformers that `TripsModel` without selection consists of, called as their users call them.

Fused attention is on wherever transformers offers it, which `Peer.attention` tells: CLIP and `transformers_pair` have
it, ViLT and BLIP compute their attention maps.

Dimensions: B pairs, L text tokens, N image patches, D width, P projection width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertModel,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    ViltConfig,
    ViltModel,
)
from transformers.models.bert.modeling_bert import BertEncoder

from trips.bench.counter import counted_flops
from trips.config import bert_variant
from trips.errors import ConfigError
from trips.fusion import bidirectional_mask
from trips.model import TripsModel
from trips.towers import TowerReader, build_tower


@dataclass(frozen=True)
class PeerSize:
    """Sizes of a peer, by default those of ViT-B and BERT-base.

    Attributes:
        hidden_size, num_layers, num_heads, intermediate_size: of the vision tower and, but for CLIP, of the text's;
            CLIP's text tower has two thirds of the width and heads, as published.
        vocab_size: of the text.
        patch_size: pixels of a patch's side; None: as published, 32 for ViLT and 16 for the others.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    patch_size: int | None = None


@dataclass(frozen=True)
class Peer:
    """A model that takes pairs of an image and a text.

    Attributes:
        name: as asked for.
        module: in evaluation mode.
        call: (pixel_values (B, 3, H, W), input_ids (B, L)) -> a tensor: the forward pass of B pairs.
        image_size: pixels of a side. text_length: L.
        vocab_size: ids stay below it. end_token: what a text must end in, None if it does not matter.
    """

    name: str
    module: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]
    image_size: int
    text_length: int
    vocab_size: int
    end_token: int | None = None

    @property
    def attention(self) -> str:
        """How attention is computed: "sdpa" is fused, "eager" makes the maps."""
        return self.module.config._attn_implementation

    def inputs(self, batch_size: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A random batch for `call` without padding, on the device and in the precision of the weights."""
        weight, generator = next(self.module.parameters()), torch.Generator().manual_seed(seed)
        pixels = torch.randn(batch_size, 3, self.image_size, self.image_size, generator=generator)
        shape = (batch_size, self.text_length)
        ids = torch.randint(self.vocab_size // 2, self.vocab_size - 1, shape, generator=generator)
        if self.end_token is not None:
            ids[:, -1] = self.end_token
        return pixels.to(weight.device, weight.dtype), ids.to(weight.device)

    def count(self) -> float:
        """Operations of one pair as torch counts them, in units of 1e9; instant for a peer on the meta device."""
        with torch.no_grad():
            return counted_flops(self.call, *self.inputs())


def peer(
    name: str,
    image_size: int = 384,
    text_length: int = 40,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: PeerSize | None = None,
) -> Peer:
    """A published model with random weights, nothing downloaded.

    "vilt" is one stack over words and patches. Its patches are embedded here in their order, where transformers draws
    the order at random, with loops and look-ups on the host: the states of the words are the same, it is faster, and it
    can be compiled. "blip" is the vision tower and the text encoder with cross-attention that both its matching and its
    question answering start with. "clip" embeds image and text apart and compares them. Tables of text positions are as
    long as the text needs.

    Args:
        name: see `PEERS`.
        image_size: pixels of a side, a multiple of the patch.
        text_length: L.
        device, dtype: of the weights; on "meta" there are none, which is enough to count.
        size: other than ViT-B.
    Raises:
        ConfigError: no such peer; sizes that do not fit.
    """
    if name not in PEERS:
        raise ConfigError("no such peer", item="peers", found=name, expected=" | ".join(PEERS))
    build, patch = PEERS[name]
    size = size or PeerSize()
    patch = size.patch_size or patch
    if image_size < patch or image_size % patch:
        raise ConfigError("no multiple of the patch size", item="image_size", found=image_size, expected=f"of {patch}")
    if text_length < 1:
        raise ConfigError("no text", item="text_length", found=text_length, expected=">= 1")
    if size.hidden_size % size.num_heads:
        raise ConfigError("width not divisible by the heads", item="size", found=size)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        module, call, end_token = build(size, image_size, patch, text_length)
    module = module.eval().to(device, dtype)
    return Peer(name, module, call, image_size, text_length, size.vocab_size, end_token)


_Built = tuple[PreTrainedModel, Callable[[Tensor, Tensor], Tensor], int | None]


def _vilt(size: PeerSize, image_size: int, patch: int, text_length: int) -> _Built:
    config = ViltConfig(
        **_stack(size),
        image_size=image_size,
        patch_size=patch,
        vocab_size=size.vocab_size,
        max_position_embeddings=max(40, text_length),
    )
    model = _fused(ViltModel, config, add_pooling_layer=False)

    def call(pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """(B, L + 1 + N, D) states of words, image [CLS] and patches."""
        embeddings = model.embeddings
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)  # (B, N, D)
        image = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        image = image + embeddings.position_embeddings
        read, seen = torch.ones_like(input_ids), input_ids.new_ones(image.shape[:2])
        states, _ = embeddings(input_ids, read, None, None, seen, None, image)
        return model.layernorm(model.encoder(states).last_hidden_state)  # nothing is padded: no mask

    return model, call, None


def _blip(size: PeerSize, image_size: int, patch: int, text_length: int) -> _Built:
    spread = {"initializer_range": 0.02}  # the vision tower's default of 1e-10 would time numbers next to zero
    vision = BlipVisionConfig(**_stack(size), **spread, image_size=image_size, patch_size=patch)
    text = BlipTextConfig(
        **_stack(size),
        **spread,
        encoder_hidden_size=size.hidden_size,
        bos_token_id=None,
        sep_token_id=None,
        vocab_size=size.vocab_size,
        max_position_embeddings=max(512, text_length),
    )
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = _fused(BlipForImageTextRetrieval, config)

    def call(pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """(B, L, D) text states that have seen the image, by the parts of the model.

        Its own forward makes a mask of ones for the image on the CPU, to be copied to the device in every layer.
        """
        image = model.vision_model(pixel_values=pixel_values).last_hidden_state
        return model.text_encoder(input_ids=input_ids, encoder_hidden_states=image).last_hidden_state

    return model, call, None


def _clip(size: PeerSize, image_size: int, patch: int, text_length: int) -> _Built:
    width, heads = 2 * size.hidden_size // 3, 2 * size.num_heads // 3
    if 3 * width != 2 * size.hidden_size or not heads or width % heads:
        raise ConfigError("two thirds of width and heads do not fit together", item="size", found=size)
    vision = CLIPVisionConfig(**_stack(size), image_size=image_size, patch_size=patch, projection_dim=width)
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=heads,
        vocab_size=size.vocab_size,
        bos_token_id=None,
        eos_token_id=size.vocab_size - 1,
        max_position_embeddings=max(77, text_length),
        projection_dim=width,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)
    model = _fused(CLIPModel, config)

    def call(pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """(B, B) similarities, B^2 P operations beside those of the towers."""
        return model(input_ids=input_ids, pixel_values=pixel_values).logits_per_image

    return model, call, text.eos_token_id


PEERS: dict[str, tuple[Callable[[PeerSize, int, int, int], _Built], int]] = {
    "vilt": (_vilt, 32),
    "blip": (_blip, 16),
    "clip": (_clip, 16),
}  # how to build it, and the patch size of its publication


def _stack(size: PeerSize) -> dict[str, int]:
    """Sizes of a stack of layers under the names that all configurations share."""
    return {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.intermediate_size,
    }


def _fused(model_class: type[PreTrainedModel], config: Any, **kwargs: Any) -> PreTrainedModel:
    """Random weights, attention fused if the class can."""
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    return model_class._from_config(config, attn_implementation=implementation, **kwargs)


def transformers_pair(model: TripsModel, image_size: int | None = None, text_length: int = 40) -> Peer:
    """transformers' ViT, BERT encoder and BERT decoder with cross-attention, with the weights of a model of trips.

    Computes what the model does without selection; nothing of its code runs but for the mask that lets words see those
    behind them, so its time tells what trips adds to transformers.

    Args:
        model: whose sizes, weights, device and precision are taken.
        image_size: pixels of a side; None: the tower's own.
        text_length: L of `Peer.inputs`.
    Raises:
        ConfigError: text and vision of unlike width, which transformers' parts cannot join; a text longer than the
            model's table of positions.
    """
    config, weight = model.config, next(model.parameters())
    if config.text_config.hidden_size != config.vision_config.hidden_size:
        raise ConfigError(
            "text width unlike vision width",
            item="model",
            found=config.text_config.hidden_size,
            expected=config.vision_config.hidden_size,
        )
    if not 1 <= text_length <= (most := config.text_config.max_position_embeddings):
        raise ConfigError("no such text", item="text_length", found=text_length, expected=f"1 to {most}")
    with torch.random.fork_rng(devices=[]):
        pair = _TransformersPair(model).to(weight.device, weight.dtype).eval()
    pair.vision.load_state_dict(model.vision.tower.state_dict())
    pair.text.load_state_dict(model.text.state_dict())
    pair.fusion.load_state_dict(model.fusion.state_dict())
    side = config.vision_config.image_size if image_size is None else image_size
    return Peer("transformers", pair, pair.__call__, side, text_length, config.text_config.vocab_size)


class _TransformersPair(nn.Module):
    """The parts of transformers, joined; its configuration is that of the BERT decoder."""

    def __init__(self, model: TripsModel) -> None:
        super().__init__()
        config = model.config
        self.vision = build_tower(config.vision_config)
        self.text = BertModel._from_config(bert_variant(config.text_config), add_pooling_layer=False)
        self.config = bert_variant(config.fusion_encoder_config)
        self.config._attn_implementation = "sdpa"
        self.fusion = BertEncoder(self.config)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """(B, 3, H, W), (B, L) -> (B, L, D) fused states."""
        mask = torch.ones_like(input_ids)
        text = self.text(input_ids=input_ids, attention_mask=mask).last_hidden_state
        reader = TowerReader(self.vision)
        kwargs = {"interpolate_pos_encoding": True} if reader.family.interpolation_flag else {}
        image = self.vision(pixel_values=pixel_values, **kwargs).last_hidden_state
        if self.vision.config.model_type == "clip_vision_model":
            image = reader.final_norm(image)  # which CLIP itself applies to its [CLS] alone
        return self.fusion(
            text,
            attention_mask=bidirectional_mask(mask, text.dtype),
            encoder_hidden_states=image,
            use_cache=False,
        ).last_hidden_state
