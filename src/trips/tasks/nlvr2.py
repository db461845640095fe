"""Reasoning over several images: is a statement true of them (NLVR2, section 5.1.2).

The fused [CLS] goes through Linear-ReLU-Linear. With ``objective="assignment"`` the same model learns ALBEF's step
between pre-training and fine-tuning: which of the images a text belongs to, or none of them.

Data contract of a batch: ``pixel_values`` (B, n, 3, H, W), ``input_ids`` and ``attention_mask`` (B, L), ``labels``
(B,): 1 true, 0 false; of an assignment the number of the image from 0, n for none. n is
``config.reasoning.num_images``; C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from trips.config import SelectionConfig, TripsConfig
from trips.errors import ConfigError, ShapeError
from trips.losses import selection_distillation_loss
from trips.model import TripsPreTrainedModel
from trips.multi_image import MultiImageModel
from trips.selection import Selection
from trips.single_stream import SingleStreamMultiImageModel
from trips.vision import VisionPrefix


@dataclass
class ReasoningOutput(ModelOutput):
    """Output of `TripsForVisualReasoning`. Row b n + i of what has B n rows is image i of text b.

    Attributes:
        loss: what training minimises, None without labels.
        loss_task: the cross-entropy, detached.
        loss_distill: guidance distillation before its weight, detached; only in a distillation step.
        logits: (B, C) float32; [:, 1] is "true" with the objective "truth".
        selections: one `Selection` of B n rows per location.
        image_positions: (B n, E - 1) grid position of every image token behind [CLS], -1 for a fused token.
    """

    loss: Tensor | None = None
    loss_task: Tensor | None = None
    loss_distill: Tensor | None = None
    logits: Tensor | None = None
    selections: tuple[Selection, ...] | None = None
    image_positions: Tensor | None = None


class TripsForVisualReasoning(TripsPreTrainedModel):
    """TRIPS with a path of the fusion encoder for each image, in TRIPS-S a pass for each, and a classifier.

    Args:
        config: see `TripsConfig`; ``config.reasoning`` holds the choices of this class.
    """

    heads = ("reasoning_head",)  # starts at random

    def __init__(self, config: TripsConfig) -> None:
        super().__init__(config)
        width = joint = config.text_config.hidden_size
        if config.architecture == "single":
            # The joint [CLS]s of its images side by side (ViLT's way): there is no fusion encoder to merge them in.
            self.trips, joint = SingleStreamMultiImageModel(config), config.reasoning.num_images * width
        else:
            self.trips = MultiImageModel(config)
        self.reasoning_head = nn.Sequential(
            nn.Linear(joint, width), nn.ReLU(), nn.Linear(width, config.reasoning.num_classes)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text encoder."""
        return self.trips.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        prefix: VisionPrefix | None = None,
        selection: SelectionConfig | None = None,
        distill: bool = False,
        generator: torch.Generator | None = None,
    ) -> ReasoningOutput:
        """Judge statements about their images and, where labels are given, compute the loss.

        Args:
            pixel_values, input_ids, attention_mask, prefix, selection, generator: see `MultiImageModel`.
            labels: (B,) integers from 0 to C - 1; the range is only checked where reading them waits for no device.
            distill: a full-patch step whose loss holds the guidance distillation, over all images.
        Raises:
            ConfigError: no text, no images, distillation without a guide that can learn, labels out of range.
            ShapeError: images or labels do not fit the texts.
        """
        selection = selection or self.config.selection
        if distill and not selection.can_learn:
            raise ConfigError("there is no guide to teach", item="distill", found=selection.guide)
        if input_ids is None:
            raise ConfigError("give input_ids", item="forward")
        if labels is not None:
            self._check_labels(labels, input_ids.shape[0])
        output = self.trips(
            input_ids,
            attention_mask,
            pixel_values,
            prefix=prefix,
            selection=selection,
            observe=distill,
            generator=generator,
        )
        logits = self.reasoning_head(output.last_hidden_state[:, 0]).float()
        result = ReasoningOutput(logits=logits, selections=output.selections, image_positions=output.image_positions)
        if labels is None:
            return result
        result.loss = F.cross_entropy(logits, labels.long())
        result.loss_task = result.loss.detach()
        if distill:
            guides = [record.logits for record in output.selections]
            loss_distill = selection_distillation_loss(guides, output.image_attention, selection.distill_temperature)
            result.loss = result.loss + selection.distill_weight * loss_distill
            result.loss_distill = loss_distill.detach()
        return result

    @torch.no_grad()
    def verify(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        prefix: VisionPrefix | None = None,
        selection: SelectionConfig | None = None,
    ) -> Tensor:
        """Probability that each statement is true of its images: (B,) float32; arguments as in `forward`.

        Raises:
            ConfigError: a model that assigns texts to images; its classes are other ones.
        """
        if self.config.reasoning.objective != "truth":
            raise ConfigError(
                "the model assigns texts to images",
                item="reasoning.objective",
                found=self.config.reasoning.objective,
                expected="truth",
            )
        output = self(pixel_values, input_ids, attention_mask, prefix=prefix, selection=selection)
        return torch.softmax(output.logits, dim=-1)[:, 1]

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        if labels.shape != (batch,) or labels.is_floating_point():
            raise ShapeError(
                "one class number for each statement is needed",
                item="labels",
                found=f"{tuple(labels.shape)} of {labels.dtype}",
                expected=f"({batch},) of integers",
            )
        if labels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        classes = self.config.reasoning.num_classes
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise ConfigError("no such class", item="labels", found=labels.tolist(), expected=f"0 to {classes - 1}")
