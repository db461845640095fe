"""ViT-TRIPS: a vision tower with patch selection between attention and FFN (section 3.2, Figure 2b, 2c).

The tower is cut at its first selection: `prefix` (every layer before it and that layer's self-attention) has seen no
text and can be shared by many texts; `suffix` selects and goes on.

Dimensions: I images, B texts (rows), N patches, D width, E image tokens that come out ([CLS] included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from trips.config import SelectionConfig, check_locations, num_kept
from trips.errors import ConfigError, ShapeError
from trips.guide_query import CalibratedQueries
from trips.merging import merge_patches
from trips.prefix_cache import PrefixCache
from trips.selection import Selection, relevance_logits, select_patches, semi_orthogonal, straight_through_gate
from trips.towers import TowerReader, build_tower


@dataclass
class VisionPrefix:
    """The text-free part of a vision pass: cache it, and pay for it once per image.

    Attributes:
        states: (I, 1 + N, D) after the self-attention of the first selecting layer; after all layers if none does.
        grid: patches (down, across).
        layer: 1-based first selecting layer, None without selection.
        hidden_states: what entered each layer so far, if asked for.
    """

    states: Tensor
    grid: tuple[int, int]
    layer: int | None
    hidden_states: tuple[Tensor, ...] = ()

    def take(self, image_index: Tensor) -> VisionPrefix:
        """One row per text: (B,) image numbers -> a prefix of B rows."""
        return VisionPrefix(
            self.states.index_select(0, image_index),
            self.grid,
            self.layer,
            tuple(states.index_select(0, image_index) for states in self.hidden_states),
        )


@dataclass
class VisionOutput:
    """V = {v_cls, v_1 .. v_e} and the record of every selection.

    Attributes:
        last_hidden_state: (B, E, D) after the tower's final norm.
        selections: one record per location, in order.
        positions: (B, E - 1) original grid position of every image token behind [CLS], -1 for a fused token.
        grid: patches (down, across).
        hidden_states: embeddings and the output of every layer, before the final norm, if asked for.
    """

    last_hidden_state: Tensor
    selections: tuple[Selection, ...]
    positions: Tensor
    grid: tuple[int, int]
    hidden_states: tuple[Tensor, ...] = ()


class VisionEncoder(nn.Module):
    """ViT-TRIPS around a tower of transformers (CLIP, ViT/DeiT, DINOv2).

    Adds no parameters. State-dict keys are ``tower.`` and the tower's own.

    Args:
        config: configuration of the tower.
        selection: the default setting; every call can take another.
        guide_width: width of the text [CLS]; other than the tower's only with ``selection.width_map="orthogonal"``.
        calibrated_layers: 1-based layers with a calibrated query.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        selection: SelectionConfig,
        guide_width: int | None = None,
        calibrated_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.tower = build_tower(config)
        self.selection = selection
        self.config = config
        self.prefix_cache: PrefixCache | None = None
        if guide_width is not None and guide_width != config.hidden_size:
            self.register_buffer("guide_map", semi_orthogonal(guide_width, config.hidden_size))
        else:
            self.guide_map = None
        self.calibration = CalibratedQueries(calibrated_layers, guide_width or config.hidden_size, config.hidden_size)

    @property
    def reader(self) -> TowerReader:
        """The parts of the tower by their role."""
        return TowerReader(self.tower)

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches (down, across) of a batch of images; `ShapeError` if they hold none or are no images."""
        patch = self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ShapeError(
                "not a batch of images", item="pixel_values", found=tuple(pixel_values.shape), expected="(I, 3, H, W)"
            )
        grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
        if 0 in grid:
            raise ShapeError(
                "image smaller than a patch",
                item="pixel_values",
                found=tuple(pixel_values.shape[2:]),
                expected=f"at least {patch} x {patch}",
            )
        return grid

    def prefix(
        self, pixel_values: Tensor, selection: SelectionConfig | None = None, output_hidden_states: bool = False
    ) -> VisionPrefix:
        """Every layer before the first selection, and that layer's self-attention; no text in it.

        Args:
            pixel_values: (I, 3, H, W); any resolution, sides cut to multiples of the patch size.
            selection: setting of this call; only its first location matters here.
            output_hidden_states: keep what enters each layer.
        Raises:
            ShapeError: not images. ConfigError: a location beyond the last layer.
        """
        selection = selection or self.selection
        reader, grid = self.reader, self.grid_of(pixel_values)
        check_locations(selection, len(reader.layers))
        first = selection.layers[0] if selection.active else None
        if self.prefix_cache is not None and not output_hidden_states:
            states = self.prefix_cache.states(pixel_values, first, lambda images: self._prefix_states(images, first))
            return VisionPrefix(states, grid, first)
        history = [] if output_hidden_states else None
        return VisionPrefix(self._prefix_states(pixel_values, first, history), grid, first, tuple(history or ()))

    def _prefix_states(self, pixel_values: Tensor, first: int | None, history: list[Tensor] | None = None) -> Tensor:
        """States at the first location; what enters each layer goes into the history."""
        reader, states = self.reader, self.reader.embed(pixel_values)
        for index in range(len(reader.layers) if first is None else first - 1):
            if history is not None:
                history.append(states)
            states = reader.layer(index, states)
        if first is not None:
            if history is not None:
                history.append(states)
            states = reader.attend(first - 1, states)
        return states

    def suffix(
        self,
        prefix: VisionPrefix,
        text_cls: Tensor | None = None,
        selection: SelectionConfig | None = None,
        *,
        observe: bool = False,
        output_hidden_states: bool = False,
        generator: torch.Generator | None = None,
    ) -> VisionOutput:
        """Select at the prefix's layer and go on through the rest of the tower.

        Args:
            prefix: B rows, see `VisionPrefix.take`.
            text_cls: (B, D_text) t_cls; needed when the text guides.
            selection: setting of this call; must select first where the prefix stopped.
            observe: score at every location but keep all tokens: the full-patch step of distillation.
            output_hidden_states: return embeddings and all layer outputs.
            generator: source of the random guide's noise.
        Raises:
            ConfigError: the prefix was made for another first location; nothing to observe, since similarity merges.
            ShapeError: text and image rows differ.
        """
        selection = selection or self.selection
        reader, states = self.reader, prefix.states
        merges = selection.guide == "similarity"
        if observe and merges:
            raise ConfigError("no guide scores the patches", item="observe", found=selection.guide)
        if (selection.layers[0] if selection.active else None) != prefix.layer:
            raise ConfigError(
                "prefix was made for another first location",
                item="selection.layers",
                found=selection.layers,
                expected=prefix.layer,
            )
        rates = dict(zip(selection.layers, selection.rates, strict=True)) if selection.active else {}
        positions = torch.arange(states.shape[1] - 1, device=states.device).expand(states.shape[0], -1)
        history, records = list(prefix.hidden_states), []
        gates: Tensor | None = None
        sizes: Tensor | None = None  # patches behind each token, where similarity merges
        for index in range(len(reader.layers) if prefix.layer is None else prefix.layer - 1, len(reader.layers)):
            layer = index + 1
            if output_hidden_states and layer != prefix.layer:
                history.append(states)
            if layer not in rates:
                states = reader.layer(index, states)
                continue
            if layer != prefix.layer:
                states = reader.attend(index, states)
            n = states.shape[1] - 1
            k = n if observe else num_kept(n, rates[layer])
            if k < n and merges:
                keys = reader.keys(index, states[:, 1:].detach())
                states, positions, sizes, record = merge_patches(
                    states, keys, k, positions, sizes, layer=layer, num_heads=self.config.num_attention_heads
                )
                records.append(record)
            elif k < n or observe:
                states, positions, record = select_patches(
                    states,
                    self._logits(index, states, text_cls, selection, generator),
                    k,
                    positions,
                    layer=layer,
                    inattentive=selection.inattentive,
                )
                records.append(record)
                if selection.learning == "gate" and selection.can_learn and k < n:
                    gates = self.follow(gates, record, positions.shape[1], selection.gate_temperature)
            states = reader.feed_forward(index, states)
        if output_hidden_states:
            history.append(states)
        states = reader.final_norm(states)
        if gates is not None:
            states = states * torch.cat([torch.ones_like(gates[:, :1]), gates], dim=1).unsqueeze(-1).to(states.dtype)
        return VisionOutput(states, tuple(records), positions, prefix.grid, tuple(history))

    @staticmethod
    def follow(gates: Tensor | None, record: Selection, num_tokens: int, temperature: float) -> Tensor:
        """(B, n') the straight-through gate of every token behind a location, times those of earlier locations.

        The gate follows its token to the end of the tower and acts there: inside, the next norm would take a change
        of scale back, and with it the gradient.
        """
        gate = straight_through_gate(record.logits, record.index, temperature)
        if gates is not None:
            gate = gate * gates.gather(1, record.index)
        fused = gate.new_ones(gate.shape[0], num_tokens - gate.shape[1])
        return torch.cat([gate, fused], dim=1)

    def forward(
        self,
        pixel_values: Tensor,
        text_cls: Tensor | None = None,
        selection: SelectionConfig | None = None,
        *,
        image_index: Tensor | None = None,
        observe: bool = False,
        output_hidden_states: bool = False,
        generator: torch.Generator | None = None,
    ) -> VisionOutput:
        """`prefix`, then `suffix`, with one row per text where `image_index` (B,) says which image it is about."""
        prefix = self.prefix(pixel_values, selection, output_hidden_states)
        return self.suffix(
            prefix if image_index is None else prefix.take(image_index),
            text_cls,
            selection,
            observe=observe,
            output_hidden_states=output_hidden_states,
            generator=generator,
        )

    def _logits(
        self,
        index: int,
        states: Tensor,
        text_cls: Tensor | None,
        selection: SelectionConfig,
        generator: torch.Generator | None,
    ) -> Tensor:
        """(B, n) logits of the guide over the candidates of one layer; one query row, no attention map."""
        if selection.guide == "random":
            shape = (states.shape[0], states.shape[1] - 1)
            return torch.randn(shape, generator=generator, device=states.device, dtype=torch.float32)
        query = self._query(index, states, text_cls, selection)
        heads = self.config.num_attention_heads if selection.heads == "per_head" else 1
        return relevance_logits(query, self.scored(index, states, selection), heads)

    def scored(self, index: int, states: Tensor, selection: SelectionConfig) -> Tensor:
        """(B, n, D) what a guide's query meets at a layer (0-based), from (B, 1 + n, D) behind its self-attention."""
        patches = states[:, 1:]
        if selection.score == "states":
            return self.reader.normed(index, patches)
        return self.reader.keys(index, patches) if selection.score == "keys" else patches

    def _query(self, index: int, states: Tensor, text_cls: Tensor | None, selection: SelectionConfig) -> Tensor:
        """(B, D) the query of who asks: the text [CLS], or the image [CLS] of the same sequence."""
        if selection.guide == "image":
            return self.reader.query(index, states[:, 0], through_norm=selection.query_norm == "layer")
        self._check_text(states, text_cls)
        return self.text_query(index, text_cls, selection)

    def text_query(self, index: int, text_cls: Tensor, selection: SelectionConfig) -> Tensor:
        """(B, D) the query of a text at a layer (0-based): t_cls through W_q, or through its calibrated map."""
        if selection.guide_query == "calibrated":
            return self.calibration(index + 1, text_cls)
        if self.guide_map is not None:
            text_cls = text_cls @ self.guide_map.to(text_cls.dtype)
        if (width := self.config.hidden_size) != text_cls.shape[1]:
            raise ShapeError("text width unlike vision width", item="text_cls", found=text_cls.shape[1], expected=width)
        return self.reader.query(index, text_cls, through_norm=selection.query_norm == "layer")

    @staticmethod
    def _check_text(states: Tensor, text_cls: Tensor | None) -> None:
        if text_cls is None:
            raise ConfigError("the text guides, but no text [CLS] was given", item="text_cls", expected="(B, D)")
        if text_cls.ndim != 2 or text_cls.shape[0] != states.shape[0]:
            raise ShapeError(
                "one text [CLS] per image row is needed",
                item="text_cls",
                found=tuple(text_cls.shape),
                expected=f"({states.shape[0]}, D)",
            )
