"""Visual question answering by an answer decoder (section 5.1.1, after ALBEF).

The fused question is read by a causal decoder that writes the answer: [CLS] pieces [SEP]. Inference generates
freely or ranks a list of answers.

Data contract of a batch (`trips.data.loading.VqaCollator` makes it): ``pixel_values`` (I, 3, H, W), ``image_index``
(B,), ``input_ids`` and ``attention_mask`` (B, L), ``answer_ids`` and ``answer_mask`` (A, T), ``answer_index`` (A,)
the question each answer belongs to, ``answer_weights`` (A,), ``answer_tokens`` (M,) the places that predict a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BertLMHeadModel, DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from trips.config import SelectionConfig, TripsConfig
from trips.errors import ConfigError, ShapeError
from trips.fusion import bidirectional_mask
from trips.losses import IGNORED, answer_log_likelihood, answer_loss, selection_distillation_loss
from trips.model import TripsPreTrainedModel
from trips.selection import Selection
from trips.single_stream import build_encoder
from trips.tasks.answers import rank_answers
from trips.vision import VisionPrefix


@dataclass
class VqaOutput(ModelOutput):
    """Output of `TripsForQuestionAnswering`.

    Attributes:
        loss: what training minimises, None without answers.
        loss_answer: the weighted answer loss, detached.
        loss_distill: guidance distillation before its weight, detached; only in a distillation step.
        question_states: (B, L, D) fused states that the decoder reads.
        selections: one `Selection` per location.
        image_positions: (B, E - 1) grid position of every image token behind [CLS], -1 for a fused token.
    """

    loss: Tensor | None = None
    loss_answer: Tensor | None = None
    loss_distill: Tensor | None = None
    question_states: Tensor | None = None
    selections: tuple[Selection, ...] | None = None
    image_positions: Tensor | None = None


class TripsForQuestionAnswering(TripsPreTrainedModel):
    """TRIPS with an answer decoder.

    Args:
        config: see `TripsConfig`; ``decoder_config`` describes the decoder, its ``bos_token_id`` and
            ``eos_token_id`` are the tokenizer's [CLS] and [SEP].
    """

    _tied_weights_keys = {
        "decoder.cls.predictions.decoder.weight": "decoder.bert.embeddings.word_embeddings.weight",
        "decoder.cls.predictions.decoder.bias": "decoder.cls.predictions.bias",
    }

    def __init__(self, config: TripsConfig) -> None:
        super().__init__(config)
        if not (config.decoder_config.is_decoder and config.decoder_config.add_cross_attention):
            # transformers would silently build a decoder that never sees the question
            raise ConfigError("needs is_decoder and add_cross_attention", item="decoder_config")
        self.trips = build_encoder(config)
        self.decoder = BertLMHeadModel._from_config(config.decoder_config)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """Word embeddings of the text encoder."""
        return self.trips.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        answer_ids: Tensor | None = None,
        answer_mask: Tensor | None = None,
        answer_index: Tensor | None = None,
        answer_weights: Tensor | None = None,
        *,
        answer_tokens: Tensor | None = None,
        image_index: Tensor | None = None,
        prefix: VisionPrefix | None = None,
        selection: SelectionConfig | None = None,
        distill: bool = False,
        generator: torch.Generator | None = None,
    ) -> VqaOutput:
        """Fuse questions with their images and, where answers are given, compute the loss.

        Args:
            pixel_values, input_ids, attention_mask, image_index, prefix, selection, generator: see `TripsModel`.
            answer_ids: (A, T) [CLS] pieces [SEP] padding. answer_mask: (A, T).
            answer_index: (A,) question of each answer; one answer per question in order if not given.
            answer_weights: (A,); ones if not given.
            answer_tokens: from `predicted_tokens`, made where the batch is made; spares the vocabulary logits of the
                padding without asking the device what is padding.
            distill: a full-patch step whose loss holds the guidance distillation term.
        Raises:
            ConfigError: distillation without a guide that can learn. ShapeError: answers do not fit the questions.
        """
        selection = selection or self.config.selection
        if distill and not selection.can_learn:
            raise ConfigError("there is no guide to teach", item="distill", found=selection.guide)
        output = self.trips(
            input_ids,
            attention_mask,
            pixel_values,
            image_index=image_index,
            prefix=prefix,
            selection=selection,
            observe=distill,
            generator=generator,
        )
        states = output.last_hidden_state
        result = VqaOutput(question_states=states, selections=output.selections, image_positions=output.image_positions)
        if answer_ids is None:
            return result
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        for name, tensor, shape in (
            ("answer_mask", answer_mask, answer_ids.shape),
            ("answer_index", answer_index, answer_ids.shape[:1]),
            ("answer_weights", answer_weights, answer_ids.shape[:1]),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ShapeError("does not fit answer_ids", item=name, found=tuple(tensor.shape), expected=tuple(shape))
        if answer_ids.ndim != 2 or 0 in answer_ids.shape or answer_ids.shape[1] < 2:
            raise ShapeError("no answers", item="answer_ids", found=tuple(answer_ids.shape), expected="(A, T), T >= 2")
        if answer_tokens is not None and (answer_tokens.ndim != 1 or answer_tokens.is_floating_point()):
            raise ShapeError("not places", item="answer_tokens", found=tuple(answer_tokens.shape), expected="(M,) int")
        if answer_index is None:
            if answer_ids.shape[0] != states.shape[0]:
                raise ShapeError(
                    "one answer per question is needed, or an answer_index",
                    item="answer_ids",
                    found=answer_ids.shape[0],
                    expected=states.shape[0],
                )
            answer_index = torch.arange(states.shape[0], device=states.device)
        likelihood = self._log_likelihood(
            states.index_select(0, answer_index),
            attention_mask.index_select(0, answer_index),
            answer_ids,
            answer_mask,
            answer_tokens,
        )
        weights = torch.ones_like(likelihood) if answer_weights is None else answer_weights
        result.loss = answer_loss(likelihood, weights, states.shape[0])
        result.loss_answer = result.loss.detach()
        if distill:
            logits = [record.logits for record in output.selections]
            loss_distill = selection_distillation_loss(logits, output.image_attention, selection.distill_temperature)
            result.loss = result.loss + selection.distill_weight * loss_distill
            result.loss_distill = loss_distill.detach()
        return result

    def _log_likelihood(
        self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor | None, tokens: Tensor | None
    ) -> Tensor:
        """(A,) log-likelihood of each answer under its own row of question states."""
        count, length = answer_ids.shape[0], answer_ids.shape[1] - 1
        # Padding stands behind the answer, where a causal decoder never looks, so the answers need no mask; the
        # question's is ready-made. From plain masks transformers would first ask the device what is padded.
        hidden = self.decoder.bert(
            input_ids=answer_ids[:, :-1],
            encoder_hidden_states=states,
            encoder_attention_mask=bidirectional_mask(mask, states.dtype)[:, :, :1],
            use_cache=False,
        ).last_hidden_state
        hidden, targets = hidden.flatten(0, 1), answer_ids[:, 1:].flatten()
        rows = torch.arange(count * length, device=answer_ids.device) if tokens is None else tokens
        # The vocabulary is the widest thing here: only places that predict a token of an answer are projected on it.
        logits = self.decoder.cls(hidden.index_select(0, rows))
        targets = targets.index_select(0, rows)
        if answer_mask is not None and tokens is None:
            targets = targets.masked_fill(answer_mask[:, 1:].flatten() == 0, IGNORED)
        return answer_log_likelihood(logits, targets, rows // length, count)

    def rank_answers(
        self,
        question_states: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        top_k: int = 128,
        *,
        double_first_token: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Rank a list of answers: best `top_k` by their first token, then by the exact full likelihood (after ALBEF).

        Args:
            question_states: (B, L, D) from `forward`. attention_mask: (B, L).
            answer_ids: (C, T) candidates as [CLS] pieces [SEP] padding. answer_mask: (C, T).
            top_k: candidates that get the full likelihood; all if it is at least C.
            double_first_token: count the first token's log-probability twice, as ALBEF's published figures do.
        Returns:
            (B, k) candidate numbers, best first, and their log-likelihoods.
        Raises:
            ConfigError, ShapeError: see `trips.tasks.answers.rank_answers`, which does the work.
        """
        return rank_answers(
            self.decoder, question_states, attention_mask, answer_ids, answer_mask, top_k, double_first_token
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        prefix: VisionPrefix | None = None,
        selection: SelectionConfig | None = None,
        max_new_tokens: int = 10,
        **kwargs: Any,
    ) -> Tensor:
        """Write answers freely, greedy unless told otherwise.

        Args:
            pixel_values, input_ids, attention_mask, image_index, prefix, selection: as in `forward`.
            kwargs: handed to transformers' ``generate`` (``num_beams`` and so on).
        Returns:
            (B, T) answer ids, [CLS] first.
        """
        states = self(
            pixel_values, input_ids, attention_mask, image_index=image_index, prefix=prefix, selection=selection
        ).question_states
        decoder = self.config.decoder_config
        if decoder.bos_token_id is None or decoder.eos_token_id is None:
            raise ConfigError(
                "the tokenizer's [CLS] and [SEP] ids are needed", item="decoder_config.bos_token_id, eos_token_id"
            )
        start = torch.full((states.shape[0], 1), decoder.bos_token_id, dtype=torch.long, device=states.device)
        return self.decoder.generate(
            input_ids=start,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            bos_token_id=decoder.bos_token_id,
            eos_token_id=decoder.eos_token_id,
            pad_token_id=decoder.pad_token_id,
            max_new_tokens=max_new_tokens,
            # A cache of both kinds: left to itself, generate makes one without a place for cross-attention.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            **kwargs,
        )


def predicted_tokens(answer_mask: Tensor) -> Tensor:
    """(M,) places of (A, T - 1), row-major, whose following token belongs to an answer; waits for the device."""
    return answer_mask[:, 1:].flatten().nonzero().squeeze(1)
