"""Several images under one text: the fusion encoder with a path for each image (NLVR2, section 5.1.2).

The text is encoded once and every image is selected on its own under the same t_cls. The paper merges the outputs of
two cross-attentions before the FFN: `MergedFusionEncoder`. ALBEF, from which it takes everything else, stacks two whole
blocks: `StackedFusionEncoder`. In both the paths of a layer share one key and one value projection, which is one module
here, so that no parameter has two names.

Dimensions: B texts, n images of each, L text tokens, E image tokens that come out ([CLS] first), D width. Rows B n lie
text by text: row b n + i is image i of text b.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention, BertLayer

from trips.config import SelectionConfig, TripsConfig
from trips.encoder_inputs import check_images_of_texts
from trips.fusion import FusionEncoder, cross_attention_map, image_attention, own_attention
from trips.model import TripsModel, TripsOutput
from trips.vision import VisionPrefix

_CROSS = re.compile(r"layer\.(\d+)\.crossattention\.(.+)")


class PerImage(nn.ModuleList):
    """The same part once for each image, with weights of its own: rows (B n, ...) -> rows, image i through part i."""

    def __init__(self, part: nn.Module, num_images: int) -> None:
        super().__init__([part, *(copy.deepcopy(part) for _ in range(num_images - 1))])

    def forward(self, *tensors: Tensor) -> Tensor:
        by_image = [tensor.unflatten(0, (-1, len(self))) for tensor in tensors]
        outputs = [part(*(tensor[:, i] for tensor in by_image)) for i, part in enumerate(self)]
        return torch.stack(outputs, dim=1).flatten(0, 1)


class MergedCrossAttention(BertAttention):
    """Cross-attention to n images at once, the mean of their outputs.

    Query and output projection are each image's own; one key and one value projection serves all. The images are rows
    of a single fused attention.
    """

    def __init__(self, config: BertConfig, num_images: int, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx=layer_idx, is_cross_attention=True)
        self.self.query = PerImage(self.self.query, num_images)
        self.output = PerImage(self.output, num_images)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) text states and (B, n, E, D) image tokens -> (B, L, D)."""
        n = encoder_hidden_states.shape[1]
        rows = hidden_states.repeat_interleave(n, dim=0)
        seen, weights = super().forward(rows, attention_mask, encoder_hidden_states.flatten(0, 1), *args, **kwargs)
        return seen.unflatten(0, (-1, n)).mean(dim=1), weights


class MultiImageFusionEncoder(FusionEncoder, ABC):
    """What both forms share; `forward` takes (B, n, E, D) image tokens, its teacher has a row for each image.

    Args:
        config, image_width: see `FusionEncoder`.
        num_images: n.
    """

    def __init__(
        self, config: BertConfig, image_width: int | None = None, *, num_images: int, blocks_per_layer: int = 1
    ) -> None:
        super().__init__(config, image_width, blocks_per_layer=blocks_per_layer)
        self.num_images = num_images

    def teacher(self, maps: list[Tensor], attention_mask: Tensor) -> Tensor:
        """(B n, E - 1) what the encoder looks at in each image; see `image_attention`.

        Args:
            maps: per layer (B n, L, E).
        """
        return image_attention(maps, attention_mask.repeat_interleave(self.num_images, dim=0))

    @abstractmethod
    def paths_of(self, name: str) -> list[str]:
        """Names, here, of the parameter that an encoder of one image calls `name`: one, or one for each image."""

    def state_from_single(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This encoder's state dictionary from that of a `FusionEncoder` of one image, whose copies all paths are."""
        return {ours: value for name, value in state.items() for ours in self.paths_of(name)}


class MergedFusionEncoder(MultiImageFusionEncoder):
    """Self-attention of the text, a cross-attention for each image, their mean, FFN (the default)."""

    def __init__(self, config: BertConfig, image_width: int | None = None, *, num_images: int) -> None:
        super().__init__(config, image_width, num_images=num_images)
        for i, layer in enumerate(self.layer):
            layer.crossattention = MergedCrossAttention(config, num_images, layer_idx=i)

    def attention_rows(self, layer: BertLayer, states: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
        """(B n, L, E) cross-attention of one layer to each image."""
        rows = own_attention(layer, states, mask).repeat_interleave(self.num_images, dim=0)
        return cross_attention_map(layer.crossattention, rows, memory.flatten(0, 1))

    def paths_of(self, name: str) -> list[str]:
        match = _CROSS.fullmatch(name)
        if match is None or match[2].startswith(("self.key.", "self.value.")):
            return [name]
        part = "output" if match[2].startswith("output.") else "self.query"
        head, tail = name[: match.start(2)] + part, match[2].removeprefix(part)
        return [f"{head}.{i}{tail}" for i in range(self.num_images)]


class KeysAndValues(nn.Module):
    """The key and value projections that the stacked blocks of a layer share, applied once: (..., D) -> (..., 2 D)."""

    def __init__(self, key: nn.Linear, value: nn.Linear) -> None:
        super().__init__()
        self.key, self.value = key, value

    def forward(self, image_states: Tensor) -> Tensor:
        return torch.cat([self.key(image_states), self.value(image_states)], dim=-1)


class _Half(nn.Module):
    """Stands in a block where its key or value projection would: takes its half of `KeysAndValues`."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, keys_and_values: Tensor) -> Tensor:
        return keys_and_values.chunk(2, dim=-1)[self.place]


class StackedFusionEncoder(MultiImageFusionEncoder):
    """One whole block after the other for each image (ALBEF's form): block l n + i of layer l attends to image i."""

    def __init__(self, config: BertConfig, image_width: int | None = None, *, num_images: int) -> None:
        super().__init__(config, image_width, num_images=num_images, blocks_per_layer=num_images)
        first = [layer.crossattention.self for layer in self.layer[::num_images]]
        self.keys_and_values = nn.ModuleList([KeysAndValues(attention.key, attention.value) for attention in first])
        for layer in self.layer:
            layer.crossattention.self.key, layer.crossattention.self.value = _Half(0), _Half(1)

    def memories(self, image_states: Tensor) -> Iterator[Tensor]:
        """(B, E, 2 D) keys and values of image i for block l n + i."""
        for shared in self.keys_and_values:
            yield from shared(image_states).unbind(dim=1)

    def teacher(self, maps: list[Tensor], attention_mask: Tensor) -> Tensor:
        """As for all; `maps` holds (B, L, E) of each block here."""
        layers = [maps[start : start + self.num_images] for start in range(0, len(maps), self.num_images)]
        return super().teacher([torch.stack(blocks, dim=1).flatten(0, 1) for blocks in layers], attention_mask)

    def paths_of(self, name: str) -> list[str]:
        if (match := _CROSS.fullmatch(name)) and match[2].startswith(("self.key.", "self.value.")):
            return [f"keys_and_values.{match[1]}.{match[2].removeprefix('self.')}"]
        if not name.startswith("layer."):
            return [name]
        _, layer, rest = name.split(".", 2)
        return [f"layer.{int(layer) * self.num_images + i}.{rest}" for i in range(self.num_images)]


_FUSIONS = {"merge": MergedFusionEncoder, "stacked": StackedFusionEncoder}


class MultiImageModel(TripsModel):
    """`TripsModel` for texts about ``config.reasoning.num_images`` images each."""

    @staticmethod
    def _build_fusion(config: TripsConfig) -> MultiImageFusionEncoder:
        options = config.reasoning
        width = config.vision_config.hidden_size
        return _FUSIONS[options.fusion](config.fusion_encoder_config, width, num_images=options.num_images)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        prefix: VisionPrefix | None = None,
        selection: SelectionConfig | None = None,
        observe: bool = False,
        generator: torch.Generator | None = None,
    ) -> TripsOutput:
        """Encode the text, select and encode its images, fuse.

        Args:
            input_ids: (B, L). attention_mask: (B, L), all ones if not given.
            pixel_values: (B, n, 3, H, W).
            prefix: B n rows from `encode_prefix`, in place of pixel_values; see `VisionPrefix.take` for images that
                several texts share.
            selection, observe, generator: see `TripsModel`.
        Returns:
            as `TripsModel`, but what comes from the images (states, selections, positions, attention) has B n rows.
        Raises:
            ConfigError: neither images nor prefix, or both. ShapeError: another number of images.
        """
        selection, n = selection or self.config.selection, self.config.reasoning.num_images
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text_states = self.encode_text(input_ids, attention_mask)
        batch = text_states.shape[0]
        check_images_of_texts(pixel_values, prefix, batch, n)
        if prefix is None:
            if not observe and selection.active and min(selection.rates) == 1:
                selection = selection.replace(guide="none")  # nothing is removed: as in `TripsModel`
            prefix = self.encode_prefix(pixel_values.flatten(0, 1), selection)
        guide = text_states[:, 0].repeat_interleave(n, dim=0)
        image = self.vision.suffix(prefix, guide, selection, observe=observe, generator=generator)
        states = image.last_hidden_state.unflatten(0, (batch, n))
        fused, attention = self.fusion(text_states, attention_mask, states, observe)
        return TripsOutput(
            last_hidden_state=fused,
            text_states=text_states,
            image_states=image.last_hidden_state,
            selections=image.selections,
            image_positions=image.positions,
            image_attention=attention,
        )
