"""Pre-training: image-text contrast, matching with hard negatives, masked language modelling (section 3.3).

Contrast and matching are those of `trips.tasks.retrieval`, which says what a batch has to be; this adds the masked
words. The three losses are summed.

Data contract of a batch, beside that of retrieval: ``mlm_input_ids`` (B, L), ``mlm_positions`` and ``mlm_labels`` (M,).

Dimensions: B pairs of this process, L text tokens, M masked places, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from trips.config import SelectionConfig, TripsConfig
from trips.losses import mlm_loss
from trips.tasks.retrieval import TripsForImageTextRetrieval, check_shapes
from trips.tasks.teacher import MaskedText, MlmHead, masked_states


@dataclass
class PretrainingOutput(ModelOutput):
    """Output of `TripsForPreTraining`: the sum that training minimises, and its parts, detached.

    Attributes:
        loss: ITC + ITM + MLM, unweighted; in a distillation step also the weighted guidance distillation.
        loss_itc, loss_itm, loss_mlm: the three objectives.
        loss_distill: guidance distillation before its weight, only in a distillation step.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_distill: Tensor | None = None


class TripsForPreTraining(TripsForImageTextRetrieval):
    """TRIPS with the heads of its three objectives, momentum teacher and feature queue.

    Teacher and queue are training state, as in `TripsForImageTextRetrieval`.

    Args:
        config: see `TripsConfig`; ``config.pretraining`` holds the choices of this class.
    """

    heads = ("image_projection", "text_projection", "itm_head", "mlm_head", "temperature")
    taught_parts = (*TripsForImageTextRetrieval.taught_parts, "mlm_head")
    _keys_to_ignore_on_load_unexpected = None

    def _add_heads(self, config: TripsConfig) -> None:
        self.mlm_head = MlmHead(config.text_config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MlmHead):
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        mlm_input_ids: Tensor,
        mlm_positions: Tensor,
        mlm_labels: Tensor,
        image_ids: Tensor,
        caption_ids: Tensor,
        *,
        negatives: tuple[Tensor, Tensor] | None = None,
        selection: SelectionConfig | None = None,
        distill: bool = False,
        generator: torch.Generator | None = None,
    ) -> PretrainingOutput:
        """The three losses of a batch; in training mode the queue takes its features.

        Args:
            pixel_values: (B, 3, H, W). input_ids, attention_mask: (B, L).
            mlm_input_ids: (B, L) the ids with masks. mlm_positions: (M,) flat row-major places in (B, L) to predict.
            mlm_labels: (M,) the ids that stood there.
            image_ids, caption_ids: (B,) at least 0; equal ids are never each other's negatives, and captions of one
                image share the mass of its positives.
            negatives: (image_index, text_index), both (B,), in place of drawn ones: the negative image of every text
                and the negative text of every image; rows of this process, or of all with ``negatives="global"``.
            selection: setting of this call, else `config.selection`.
            distill: a full-patch step whose loss holds the guidance distillation of the positive pairs.
            generator: of the negatives and of the random guide.
        Raises:
            ConfigError: distillation without a guide that can learn. ShapeError: rows do not fit.
        """
        selection = selection or self.config.selection
        check_shapes(
            ("mlm_input_ids", mlm_input_ids.shape, input_ids.shape),
            ("mlm_positions", mlm_positions.shape, (mlm_positions.numel(),)),
            ("mlm_labels", mlm_labels.shape, mlm_positions.shape),
        )
        masked_text = MaskedText(mlm_input_ids, mlm_positions)
        losses = self.pair_losses(
            pixel_values, input_ids, attention_mask, image_ids, caption_ids, masked_text, negatives, selection, distill,
            generator,
        )  # fmt: skip
        logits = self.mlm_head(masked_states(losses.masked, mlm_positions), self.get_input_embeddings().weight)
        taught = None if losses.taught is None else losses.taught.mlm_logits
        loss_mlm = mlm_loss(logits, mlm_labels, taught, self.alpha)

        loss, loss_distill = losses.itc + losses.itm + loss_mlm, losses.distill
        if loss_distill is not None:
            loss, loss_distill = loss + selection.distill_weight * loss_distill, loss_distill.detach()
        return PretrainingOutput(loss, losses.itc.detach(), losses.itm.detach(), loss_mlm.detach(), loss_distill)
