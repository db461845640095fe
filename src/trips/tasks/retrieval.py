"""Image-text retrieval: contrast and matching with hard negatives, without masked words (sections 3.3 and 5.1.3).

The class is also what pre-training is built on: `trips.tasks.pretraining` adds masked language modelling to it. The
losses are summed. Paper and ALBEF do not say whose selection an image has seen where it meets another text than its
own; `PretrainingConfig` has an option for each place, and by default nothing leaks.

Search has two stages: `encode_image` and `encode_texts` give features that know of no pair, `match` scores a pair.

Data contract of a batch: ``pixel_values`` (B, 3, H, W), ``input_ids`` and ``attention_mask`` (B, L), ``image_ids`` and
``caption_ids`` (B,). A pair of the batch without any other image and caption in it has no hard negative:
`trips.losses.check_negatives` refuses it where batches are made. Over several processes all have the same B, and with
``negatives="global"`` the same L.

Dimensions: B pairs of this process, I images, L text tokens, E image tokens, D width, P projection width, Q queue
length, M masked places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from trips.config import SelectionConfig, TripsConfig
from trips.errors import ConfigError, ShapeError
from trips.losses import itm_loss, selection_distillation_loss
from trips.model import TripsPreTrainedModel
from trips.momentum import FeatureQueue, update_momentum
from trips.options import TEMPERATURE_RANGE
from trips.single_stream import build_encoder
from trips.tasks.contrast import Candidates, contrastive_loss, draw_negatives
from trips.tasks.joint import start_passes
from trips.tasks.passes import VisionPlan
from trips.tasks.teacher import MaskedText, MomentumTeacher, TeacherOutput, project
from trips.vision import VisionPrefix


@dataclass
class RetrievalOutput(ModelOutput):
    """Output of `TripsForImageTextRetrieval`: the sum that training minimises, and its parts, detached.

    Attributes:
        loss: ITC + ITM, unweighted; in a distillation step also the weighted guidance distillation.
        loss_itc, loss_itm: the two objectives.
        loss_distill: guidance distillation before its weight, only in a distillation step.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_distill: Tensor | None = None


@dataclass
class PairLosses:
    """What a step over pairs gives: the losses with their gradient, and what masked words are predicted from.

    Attributes:
        itc, itm: scalars.
        distill: guidance distillation before its weight, None in an ordinary step.
        masked: (B, L, D) fused states of the masked texts, None where there are none.
        taught: what the teacher says, None without one.
    """

    itc: Tensor
    itm: Tensor
    distill: Tensor | None
    masked: Tensor | None
    taught: TeacherOutput | None


class TripsForImageTextRetrieval(TripsPreTrainedModel):
    """TRIPS with the heads of contrast and matching, momentum teacher and feature queue.

    Its parameters have the names of `TripsForPreTraining`, whose folders `from_pretrained` takes; the head for masked
    words is left out. Teacher and queue are training state: `state_dict` holds them, `save_pretrained` leaves them
    out, and `from_pretrained` starts them anew from the weights.

    Args:
        config: see `TripsConfig`; ``config.pretraining`` holds the choices of this class.
    """

    heads: tuple[str, ...] = ("image_projection", "text_projection", "itm_head", "temperature")  # start at random
    taught_parts: tuple[str, ...] = ("trips", "image_projection", "text_projection")  # what the teacher copies
    contrastive = True  # the loss depends on how many pairs meet in one forward pass
    _keys_to_ignore_on_load_missing = [r"^momentum\.", r"^queue\."]
    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\."]

    def __init__(self, config: TripsConfig) -> None:
        super().__init__(config)
        options, width = config.pretraining, config.text_config.hidden_size
        self.trips = build_encoder(config)
        self.image_projection = nn.Linear(config.vision_config.hidden_size, options.projection_dim)
        self.text_projection = nn.Linear(width, options.projection_dim)
        self.itm_head = nn.Linear(width, 2)
        self._add_heads(config)
        # One element and not none: FSDP cannot shard a scalar.
        self.temperature = nn.Parameter(torch.full((1,), options.temperature))
        # A tensor, so that a ramp neither recompiles a compiled step nor is copied to the device anew.
        self.register_buffer("alpha", torch.tensor(options.alpha_at(0)), persistent=False)
        self.post_init()
        parts = {name: getattr(self, name) for name in self.taught_parts}
        self.momentum = MomentumTeacher(**parts) if options.has_teacher else None
        self.queue = FeatureQueue(options.queue_size, options.projection_dim) if options.queue_size else None
        self._keys_to_ignore_on_save = {name for name in self.state_dict() if name.startswith(("momentum.", "queue."))}

    def _add_heads(self, config: TripsConfig) -> None:
        """Heads of a subclass, before the weights get their values and the teacher copies them."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.temperature, self.config.pretraining.temperature)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As transformers' own; teacher and queue then start anew from the loaded weights."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).reset_momentum()
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text encoder; also the output weights of any head for masked words."""
        return self.trips.get_input_embeddings()

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Start the training state anew: copies equal to the weights, an empty queue, alpha of step 0."""
        if self.momentum is not None:
            self.momentum.copy_from(self)
        if self.queue is not None:
            self.queue.reset()
        self.alpha.fill_(self.config.pretraining.alpha_at(0))

    @torch.no_grad()
    def encode_image(
        self,
        pixel_values: Tensor | None = None,
        *,
        prefix: VisionPrefix | None = None,
        selection: SelectionConfig | None = None,
    ) -> Tensor:
        """Contrastive image features, free of any text: (I, 3, H, W) -> (I, P), normalised, float32.

        A model trained with ``itc_guide="text"`` has no such feature; here its image [CLS] guides.

        Args:
            prefix: from `trips.encode_prefix`, in place of pixel_values.
            selection: setting of this call, else `config.selection`.
        """
        selection, options = selection or self.config.selection, self.config.pretraining
        if (pixel_values is None) == (prefix is None):
            raise ConfigError("give either pixel_values or prefix", item="encode_image")
        prefix = prefix or self.trips.encode_prefix(pixel_values, selection)
        free = options if options.itc_guide != "text" else options.replace(itc_guide="image")
        selection = VisionPlan.of(selection, free).contrast or selection
        return project(self.image_projection, self.trips.image_alone(prefix, selection))

    @torch.no_grad()
    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Contrastive text features: (B, L) -> (B, P), normalised, float32."""
        return project(self.text_projection, self.trips.text_alone(input_ids, attention_mask))

    @torch.no_grad()
    def match(
        self,
        prefix: VisionPrefix,
        image_index: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        text_states: Tensor | None = None,
        selection: SelectionConfig | None = None,
    ) -> Tensor:
        """ITM logit of "match" for each pair, the image selected by the text it is paired with: (B,).

        Args:
            prefix: I rows, from `trips.encode_prefix`. image_index: (B,) the image of each text.
            input_ids, attention_mask: (B, L).
            text_states: (B, L, D) from `trips.encode_text`, in place of input_ids.
            selection: setting of this call, else `config.selection`.
        """
        output = self.trips(
            input_ids,
            attention_mask,
            image_index=image_index,
            prefix=prefix,
            text_states=text_states,
            selection=selection,
        )
        return self.itm_head(output.last_hidden_state[:, 0])[:, 1]

    @torch.no_grad()
    def start_step(self, step: int) -> None:
        """What happens once before every optimizer step: moving average, alpha, temperature bounds (after ALBEF).

        Args:
            step: 0-based. At step 0 the copies take the weights as they are, however these came into the model.
        """
        options = self.config.pretraining
        self.temperature.clamp_(*TEMPERATURE_RANGE)
        self.alpha.fill_(options.alpha_at(step))
        if self.momentum is not None:
            update_momentum(self.momentum, self, options.momentum if step else 0.0)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        caption_ids: Tensor,
        *,
        negatives: tuple[Tensor, Tensor] | None = None,
        selection: SelectionConfig | None = None,
        distill: bool = False,
        generator: torch.Generator | None = None,
    ) -> RetrievalOutput:
        """The two losses of a batch; in training mode the queue takes its features.

        Args:
            pixel_values: (B, 3, H, W). input_ids, attention_mask: (B, L).
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
        losses = self.pair_losses(
            pixel_values, input_ids, attention_mask, image_ids, caption_ids, None, negatives, selection, distill,
            generator,
        )  # fmt: skip
        loss, loss_distill = losses.itc + losses.itm, losses.distill
        if loss_distill is not None:
            loss, loss_distill = loss + selection.distill_weight * loss_distill, loss_distill.detach()
        return RetrievalOutput(loss, losses.itc.detach(), losses.itm.detach(), loss_distill)

    def pair_losses(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        caption_ids: Tensor,
        masked_text: MaskedText | None,
        negatives: tuple[Tensor, Tensor] | None,
        selection: SelectionConfig,
        distill: bool,
        generator: torch.Generator | None,
    ) -> PairLosses:
        """Contrast and matching of a batch, with a masked text running along where there is one; see `forward`."""
        options = self.config.pretraining
        if distill and not selection.can_learn:
            raise ConfigError("there is no guide to teach", item="distill", found=selection.guide)
        rows = input_ids.shape[:1]
        check_shapes(
            ("pixel_values", pixel_values.shape[:1], rows),
            ("attention_mask", attention_mask.shape, input_ids.shape),
            ("image_ids", image_ids.shape, rows),
            ("caption_ids", caption_ids.shape, rows),
        )
        plan = VisionPlan.of(selection, options, distill, mlm=masked_text is not None)

        masked_ids = None if masked_text is None else masked_text.input_ids
        passes = start_passes(self.trips, plan, pixel_values, input_ids, attention_mask, masked_ids, generator)
        image_features = project(self.image_projection, passes.image)
        text_features = project(self.text_projection, passes.text)

        taught = None
        if self.momentum is not None:
            asked = masked_text if options.alpha > 0 else None
            taught = self.momentum(pixel_values, input_ids, attention_mask, asked, plan, generator)
        candidates = Candidates.gather(image_features, text_features, image_ids, taught, self.queue)
        features = image_features, text_features, image_ids
        soft = taught if options.alpha > 0 else None
        loss_itc = contrastive_loss(*features, candidates, self.temperature, soft, self.alpha)
        if negatives is None:
            negatives = draw_negatives(*features, caption_ids, candidates, self.temperature, plan.everywhere, generator)
        if self.queue is not None and self.training:
            now = slice(candidates.num_now)
            self.queue.enqueue(candidates.image[now], candidates.text[now], candidates.ids[now])
        fused, attention = passes.fuse(negatives)
        blocks = fused.split(input_ids.shape[0])
        matching = self.itm_head(torch.cat([states[:, 0] for states in blocks[:3]]))
        loss_itm = itm_loss(matching, (torch.arange(len(matching), device=matching.device) < len(input_ids)).long())
        loss_distill = None
        if distill:
            logits = [record.logits for record in passes.selections]
            loss_distill = selection_distillation_loss(logits, attention, selection.distill_temperature)
        return PairLosses(loss_itc, loss_itm, loss_distill, blocks[3] if masked_text else None, taught)


def check_shapes(*checks: tuple[str, tuple[int, ...], tuple[int, ...]]) -> None:
    """Refuse a tensor of a batch whose shape does not fit the others: its name, its shape, the expected one."""
    for name, found, expected in checks:
        if tuple(found) != tuple(expected):
            raise ShapeError("does not fit the batch", item=name, found=tuple(found), expected=tuple(expected))
