"""The dual-stream model: text encoder, ViT-TRIPS, fusion encoder (section 3.1, Figure 2a).

Text goes first, since its [CLS] guides the image. The ALBEF-C baseline is this model with ``guide="none"``.

Dimensions: I images, B texts, L text tokens, E image tokens that come out, D width.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, BertModel, PreTrainedModel
from transformers.utils import ModelOutput

from trips.config import SelectionConfig, TripsConfig
from trips.encoder_inputs import check_ids, check_one_source, check_rows, text_and_mask
from trips.errors import ConfigError
from trips.fusion import FusionEncoder, bidirectional_mask
from trips.processor import TripsProcessor
from trips.selection import Selection
from trips.vision import VisionEncoder, VisionPrefix

_PUSH_ARGUMENTS = ("repo_id", "private", "commit_message", "commit_description", "revision", "create_pr")


@dataclass
class TripsOutput(ModelOutput):
    """Output of `TripsModel`.

    Attributes:
        last_hidden_state: (B, L, D) fused text states; [:, 0] is the fused [CLS].
        text_states: (B, L, D) of the text encoder; [:, 0] is t_cls.
        image_states: (B, E, D) of ViT-TRIPS.
        selections: one `Selection` per location.
        image_positions: (B, E - 1) grid position of every image token behind [CLS], -1 for a fused token.
        image_attention: (B, E - 1) the fusion encoder's mean attention, if asked for.
    """

    last_hidden_state: Tensor | None = None
    text_states: Tensor | None = None
    image_states: Tensor | None = None
    selections: tuple[Selection, ...] | None = None
    image_positions: Tensor | None = None
    image_attention: Tensor | None = None


class TripsPreTrainedModel(PreTrainedModel):
    """What all models share: configuration, initialisation, saving and loading by transformers."""

    config: TripsConfig
    config_class = TripsConfig
    base_model_prefix = "trips"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["BertLayer", "CLIPEncoderLayer", "ViTLayer", "Dinov2Layer"]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As transformers' own; a model card (README.md) is left beside the weights where there is none."""
        push = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs} if push_to_hub else {}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process:
            _cards().write_model_card(save_directory, self.config, type(self).__name__)
        if push_to_hub and is_main_process:
            self.push_to_hub(push.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **push)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = "50GB",
        **commit: Any,
    ) -> str:
        """Upload the model with its card, which is that of the folder it was loaded from where there is one.

        transformers would put a card of its own in its place.

        Args:
            repo_id: name on the hub. private, token: as in transformers.
            commit: ``commit_message``, ``commit_description``, ``revision``, ``create_pr``.
        Returns:
            Address of the commit.
        """
        cards = _cards()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            cards.take_card(self.name_or_path, folder)
            return cards.push_folder(folder, repo_id, private=private, token=token, **commit)


def _cards() -> ModuleType:
    """`trips.model_card`, which knows costs and so stands above the models; imported when something is saved."""
    return importlib.import_module("trips.model_card")


class TripsModel(TripsPreTrainedModel):
    """Text encoder, vision encoder with patch selection, fusion encoder.

    Args:
        config: see `TripsConfig`. `config.selection` is the default; every call can take another.
    """

    def __init__(self, config: TripsConfig) -> None:
        super().__init__(config)
        if config.architecture != "dual":
            raise ConfigError(
                "not a dual-stream model",
                item="architecture",
                found=config.architecture,
                hint="trips.single_stream.TripsSingleStreamModel",
            )
        self.text = BertModel._from_config(config.text_config, add_pooling_layer=False)
        self.vision = VisionEncoder(
            config.vision_config, config.selection, config.text_config.hidden_size, config.calibrated_layers
        )
        self.fusion = self._build_fusion(config)
        self.post_init()

    @staticmethod
    def _build_fusion(config: TripsConfig) -> FusionEncoder:
        """The fusion encoder; a model of several images has another."""
        return FusionEncoder(config.fusion_encoder_config, config.vision_config.hidden_size)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Word embeddings of the text encoder."""
        return self.text.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the word embeddings of the text encoder."""
        self.text.set_input_embeddings(value)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """T = {t_cls, t_1 .. t_m}: (B, L) -> (B, L, D)."""
        check_ids(input_ids, attention_mask, self.config.text_config.max_position_embeddings)
        # A ready-made mask: from a plain one transformers would first ask the device whether anything is padded.
        mask = bidirectional_mask(attention_mask, self.text.dtype)
        return self.text(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def encode_prefix(self, pixel_values: Tensor, selection: SelectionConfig | None = None) -> VisionPrefix:
        """The text-free part of the vision pass, (I, 3, H, W); hand it to `forward` with as many texts as you like."""
        return self.vision.prefix(pixel_values, selection or self.config.selection)

    def text_alone(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States of a text that has met no image, for the contrastive feature: (B, L) -> (B, L, D)."""
        return self.encode_text(input_ids, attention_mask)

    def image_alone(
        self, prefix: VisionPrefix, selection: SelectionConfig, generator: torch.Generator | None = None
    ) -> Tensor:
        """States (I, E, D) of an image that has met no text, for the same; a guide of the selection must not be it."""
        return self.vision.suffix(prefix, None, selection, generator=generator).last_hidden_state

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        prefix: VisionPrefix | None = None,
        text_states: Tensor | None = None,
        selection: SelectionConfig | None = None,
        observe: bool = False,
        generator: torch.Generator | None = None,
    ) -> TripsOutput:
        """Encode text, select and encode the image, fuse.

        Args:
            input_ids: (B, L). attention_mask: (B, L), all ones if not given.
            pixel_values: (I, 3, H, W); I = B unless `image_index` is given.
            image_index: (B,) number of the image that each text is about; texts of one image share its prefix.
            prefix: from `encode_prefix`, in place of pixel_values.
            text_states: (B, L, D) from `encode_text`, so that nothing is encoded twice.
            selection: setting of this call, else `config.selection`.
            observe: full-patch step: score at every location, keep everything, return the fusion's attention.
            generator: noise of the random guide.
        Raises:
            ConfigError: neither image nor prefix, neither ids nor text states. ShapeError: rows do not fit.
        """
        selection = selection or self.config.selection
        check_one_source(pixel_values, prefix)
        text_states, attention_mask = text_and_mask(self.encode_text, input_ids, attention_mask, text_states)
        if prefix is None:
            if not observe and selection.active and min(selection.rates) == 1:
                selection = selection.replace(guide="none")  # nothing is removed: the whole tower, once per image
            prefix = self.encode_prefix(pixel_values, selection)
        if image_index is not None:
            prefix = prefix.take(image_index)
        check_rows(prefix.states, text_states)
        image = self.vision.suffix(prefix, text_states[:, 0], selection, observe=observe, generator=generator)
        fused, attention = self.fusion(text_states, attention_mask, image.last_hidden_state, observe)
        return TripsOutput(
            last_hidden_state=fused,
            text_states=text_states,
            image_states=image.last_hidden_state,
            selections=image.selections,
            image_positions=image.positions,
            image_attention=attention,
        )


AutoConfig.register(TripsConfig.model_type, TripsConfig, exist_ok=True)
AutoModel.register(TripsConfig, TripsModel, exist_ok=True)
AutoProcessor.register(TripsConfig, TripsProcessor, exist_ok=True)
