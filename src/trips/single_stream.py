"""TRIPS-S, the single-stream model: one stack reads words and patches together (end of section 3.2, Table 6).

The paper tells only that the [CLS] of the joint encoder takes the part of the guide. Here the stack is a ViT of
transformers with its own weights and names, and words enter it as BERT embeddings beside the patches (ViLT's way). The
multimodal [CLS] is the tower's own, which has learnt to look at patches, and stands where a text's [CLS] would. Text
tokens are never removed.

What has seen only one of the two is shared as in the dual-stream model, but it is little: a text's embeddings, an
image's patch embeddings. Every pair costs a whole pass.

Dimensions: I images, B texts (rows), L text tokens ([CLS] first), N patches, E image tokens that come out ([CLS]
included), n candidates, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertModel

from trips.architecture import check_single_stream
from trips.config import SelectionConfig, TripsConfig, bert_variant, check_locations, num_kept
from trips.encoder_inputs import check_ids, check_images_of_texts, check_one_source, check_rows, text_and_mask
from trips.errors import ConfigError
from trips.merging import merge_patches
from trips.model import TripsModel, TripsOutput, TripsPreTrainedModel
from trips.selection import Selection, relevance_logits, select_patches
from trips.vision import VisionEncoder, VisionPrefix

_TEXT, _IMAGE = 0, 1  # rows of the modality embeddings


class TripsSingleStreamModel(TripsPreTrainedModel):
    """One ViT over [multimodal CLS; text; patches], with selection between its attention and its FFN.

    The guide is the row of the multimodal [CLS] in the attention of the selecting layer: softmax over the image tokens
    alone, mean over the heads. So ``guide="text"`` means this [CLS], and ``score``, ``query_norm`` and ``heads``, which
    describe a query from outside, have no effect.

    Args:
        config: see `TripsConfig`, with ``architecture="single"``. Of ``text_config`` only the embeddings are built; the
            vision tower is the stack, so that its learning rate is the vision tower's.
    Raises:
        ConfigError: another architecture, or a setting that has no meaning here (`trips.architecture`).
    """

    def __init__(self, config: TripsConfig) -> None:
        super().__init__(config)
        if config.architecture != "single":
            raise ConfigError("not a single-stream model", item="architecture", found=config.architecture)
        # Without layers, so that embeddings have the names that they have in the dual-stream model.
        self.text = BertModel._from_config(
            bert_variant(config.text_config, num_hidden_layers=0), add_pooling_layer=False
        )
        self.vision = VisionEncoder(config.vision_config, config.selection)
        self.modality_embeddings = nn.Embedding(2, config.vision_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings."""
        return self.text.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.text.set_input_embeddings(value)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What enters the stack of a text, the multimodal [CLS] in the place of its own: (B, L) -> (B, L, D)."""
        check_ids(input_ids, attention_mask, self.config.text_config.max_position_embeddings)
        words = self.text.embeddings(input_ids=input_ids)[:, 1:] + self.modality_embeddings.weight[_TEXT]
        return torch.cat([self.vision.reader.cls().to(words.dtype).expand(words.shape[0], -1, -1), words], dim=1)

    def encode_prefix(self, pixel_values: Tensor, selection: SelectionConfig | None = None) -> VisionPrefix:
        """What enters the stack of an image, [CLS] first: (I, 3, H, W) -> (I, 1 + N, D).

        Args:
            pixel_values: any resolution, sides cut to multiples of the patch size.
            selection: without effect; nothing is selected before the stack.
        """
        grid = self.vision.grid_of(pixel_values)
        states = self.vision.reader.embed(pixel_values)
        states = torch.cat([states[:, :1], states[:, 1:] + self.modality_embeddings.weight[_IMAGE]], dim=1)
        return VisionPrefix(states, grid, None)

    def text_alone(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A text through the stack without an image, for the contrastive feature: (B, L) -> (B, L, D)."""
        return self._read(self.encode_text(input_ids, attention_mask), attention_mask)[0]

    def image_alone(
        self, prefix: VisionPrefix, selection: SelectionConfig, generator: torch.Generator | None = None
    ) -> Tensor:
        """An image through the stack without a text, its [CLS] the guide: (I, E, D); nothing of any text is in it."""
        cls, patches = prefix.states[:, :1], prefix.states[:, 1:]
        return self._read(cls, None, patches, selection, generator)[0]

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
        """Read texts and their images together; arguments as in `TripsModel`.

        Args:
            prefix, text_states: from `encode_prefix` and `encode_text`: embeddings. Sharing them saves next to nothing.
        Returns:
            the joint states of the text's places as ``last_hidden_state``, [:, 0] the multimodal [CLS]; what entered
            as ``text_states``; the same [CLS] and the image tokens as ``image_states``.
        Raises:
            ConfigError: neither image nor prefix, neither ids nor text states, a setting without a meaning here,
                or ``observe``: there is no fusion encoder to teach the guide. ShapeError: rows do not fit.
        """
        selection = selection or self.config.selection
        check_single_stream(selection)
        if observe:
            raise ConfigError("a single-stream model has no fusion encoder that could teach the guide", item="observe")
        check_one_source(pixel_values, prefix)
        text_states, attention_mask = text_and_mask(self.encode_text, input_ids, attention_mask, text_states)
        patches = (self.encode_prefix(pixel_values) if prefix is None else prefix).states[:, 1:]
        if image_index is not None:
            patches = patches.index_select(0, image_index)
        check_rows(patches, text_states)
        states, records, positions = self._read(text_states, attention_mask, patches, selection, generator)
        length = text_states.shape[1]
        return TripsOutput(
            last_hidden_state=states[:, :length],
            text_states=text_states,
            image_states=torch.cat([states[:, :1], states[:, length:]], dim=1),
            selections=records,
            image_positions=positions,
        )

    def _read(
        self,
        text: Tensor,
        attention_mask: Tensor | None,
        patches: Tensor | None = None,
        selection: SelectionConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[Selection, ...], Tensor]:
        """The stack.

        Args:
            text: (B, L, D) tokens that stay, [CLS] first. attention_mask: (B, L), None where nothing is padded.
            patches: (B, N, D).
        Returns:
            (B, L + n, D) states after the final norm, the records, (B, n) grid positions of the image tokens.
        """
        reader, length = self.vision.reader, text.shape[1]
        rates: dict[int, float] = {}
        if selection is not None:
            check_locations(selection, len(reader.layers))
            rates = dict(zip(selection.layers, selection.rates, strict=True)) if selection.active else {}
        states = text if patches is None else torch.cat([text, patches.to(text.dtype)], dim=1)
        positions = torch.arange(states.shape[1] - length, device=states.device).expand(states.shape[0], -1)
        bias = _padding_bias(attention_mask, states)
        records: list[Selection] = []
        gates = sizes = None
        for index in range(len(reader.layers)):
            seen = None if bias is None else bias[..., : states.shape[1]]
            n = states.shape[1] - length
            k = num_kept(n, rates[index + 1]) if index + 1 in rates and n else n
            if k == n:
                states = reader.layer(index, states, seen)
                continue
            entered, states = states, reader.attend(index, states, seen)
            image = torch.cat([states[:, :1], states[:, length:]], dim=1)
            if selection.guide == "similarity":
                keys, heads = reader.keys(index, image[:, 1:].detach()), self.vision.config.num_attention_heads
                image, positions, sizes, record = merge_patches(
                    image, keys, k, positions, sizes, layer=index + 1, num_heads=heads
                )
            else:
                logits = self._logits(index, entered[:, 0], entered[:, length:], selection, generator)
                image, positions, record = select_patches(
                    image, logits, k, positions, layer=index + 1, inattentive=selection.inattentive
                )
            records.append(record)
            states = torch.cat([states[:, :length], image[:, 1:]], dim=1)
            if selection.learning == "gate" and selection.can_learn:
                gates = VisionEncoder.follow(gates, record, positions.shape[1], selection.gate_temperature)
                bias = _gated_bias(bias, gates, length, states)
            states = reader.feed_forward(index, states)
        return reader.final_norm(states), tuple(records), positions

    def _logits(
        self,
        index: int,
        cls: Tensor,
        patches: Tensor,
        selection: SelectionConfig,
        generator: torch.Generator | None,
    ) -> Tensor:
        """(B, n) logits of the guide: the row of [CLS] in the layer's attention, cut to the image tokens.

        One row beside the fused attention, whose map never exists.

        Args:
            cls: (B, D) and patches: (B, n, D), as they enter the layer.
        """
        if selection.guide == "random":
            return torch.randn(patches.shape[:2], generator=generator, device=patches.device, dtype=torch.float32)
        reader = self.vision.reader
        query = reader.query(index, cls, through_norm=True)
        return relevance_logits(query, reader.keys(index, patches), self.vision.config.num_attention_heads)


class SingleStreamMultiImageModel(TripsSingleStreamModel):
    """`TripsSingleStreamModel` for texts about ``config.reasoning.num_images`` images each: a pass for each image."""

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
        """Read a text with each of its m images, and lay the joint states side by side.

        Args:
            input_ids: (B, L). attention_mask: (B, L), all ones if not given.
            pixel_values: (B, m, 3, H, W). prefix: B m rows from `encode_prefix`, text by text, in its place.
            selection, observe, generator: see `TripsSingleStreamModel`.
        Returns:
            ``last_hidden_state`` (B, L, m D); what comes from the images has B m rows.
        Raises:
            ConfigError: neither images nor prefix, or both. ShapeError: another number of images.
        """
        m = self.config.reasoning.num_images
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text_states = self.encode_text(input_ids, attention_mask)
        batch = text_states.shape[0]
        check_images_of_texts(pixel_values, prefix, batch, m)
        output = super().forward(
            None,
            attention_mask.repeat_interleave(m, dim=0),
            None if pixel_values is None else pixel_values.flatten(0, 1),
            prefix=prefix,
            text_states=text_states.repeat_interleave(m, dim=0),
            selection=selection,
            observe=observe,
            generator=generator,
        )
        joint = output.last_hidden_state.unflatten(0, (batch, m))  # (B, m, L, D)
        output.last_hidden_state = joint.transpose(1, 2).flatten(2)
        return output


def build_encoder(config: TripsConfig) -> TripsModel | TripsSingleStreamModel:
    """The model that a task stands on, by ``config.architecture``."""
    return TripsSingleStreamModel(config) if config.architecture == "single" else TripsModel(config)


def _padding_bias(attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
    """(B, 1, 1, S) for the attention: 0 for a token that may be read, the minimum for padding."""
    if attention_mask is None:
        return None
    closed = (1 - attention_mask.to(states.dtype)) * torch.finfo(states.dtype).min
    closed = torch.nn.functional.pad(closed, (0, states.shape[1] - closed.shape[1]))  # images have no padding
    return closed[:, None, None]


def _gated_bias(bias: Tensor | None, gates: Tensor, length: int, states: Tensor) -> Tensor:
    """(B, 1, 1, L + n) the bias with the logarithm of each image token's gate: exactly 0, but with gradient.

    A pre-norm layer takes a token's scale back before it reads it, so the gate weighs the token where it is read.
    """
    text = states.new_zeros(states.shape[0], 1, 1, length) if bias is None else bias[..., :length]
    return torch.cat([text, gates.log().to(states.dtype)[:, None, None]], dim=-1)


AutoModel.register(TripsConfig, (TripsModel, TripsSingleStreamModel), exist_ok=True)
