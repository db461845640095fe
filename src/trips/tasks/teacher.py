"""The momentum teacher of contrast and masked words, and the head for these that it copies (3.3, after ALBEF).

The teacher's text guides its own vision tower, by the same `VisionPlan` as the model's.

Dimensions: B rows, L text tokens, D width, P projection width, M masked places, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from trips.model import TripsModel
from trips.single_stream import TripsSingleStreamModel
from trips.tasks.joint import JointPasses
from trips.tasks.passes import VisionPlan


class MlmHead(nn.Module):
    """BERT's head for masked tokens; its output weights are the word embeddings, handed in at the call.

    Not a tied parameter: so a copy of the head and of the text encoder are each complete, and none is averaged twice.

    Args:
        config: BertConfig of the text encoder.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """(M, D) fused states and (V, D) embeddings -> (M, V) logits."""
        return F.linear(self.transform(states), word_embeddings, self.bias)


def project(projection: nn.Linear, states: Tensor) -> Tensor:
    """(B, n, D) states -> (B, P) feature of their [CLS], of unit length, in float32."""
    return F.normalize(projection(states[:, 0]).float(), dim=-1)


def masked_states(fused: Tensor, positions: Tensor) -> Tensor:
    """(B, L, D) fused states -> (M, D) at the flat row-major places of the masked tokens."""
    return fused.flatten(0, 1).index_select(0, positions)


@dataclass(frozen=True)
class MaskedText:
    """The texts of a batch with words hidden.

    Attributes:
        input_ids: (B, L) with masks.
        positions: (M,) flat row-major places in (B, L) of the hidden tokens.
    """

    input_ids: Tensor
    positions: Tensor


@dataclass
class TeacherOutput:
    """What the teacher says about a batch, without gradient.

    Attributes:
        image_features, text_features: (B, P) normalised, float32.
        mlm_logits: (M, V) at the masked places, if asked for.
    """

    image_features: Tensor
    text_features: Tensor
    mlm_logits: Tensor | None = None


class MomentumTeacher(nn.Module):
    """Moving-average copies of towers, fusion encoder, both projections and any MLM head (after ALBEF).

    Its parameters have the names of the model's own. It has no gradient, and the mode of the model: dropout is active
    in training, as in ALBEF.

    Args:
        trips, image_projection, text_projection, mlm_head: the model's own, copied here.
    """

    def __init__(
        self,
        trips: TripsModel | TripsSingleStreamModel,
        image_projection: nn.Linear,
        text_projection: nn.Linear,
        mlm_head: MlmHead | None = None,
    ) -> None:
        super().__init__()
        self.trips = copy.deepcopy(trips)
        self.image_projection = copy.deepcopy(image_projection)
        self.text_projection = copy.deepcopy(text_projection)
        if mlm_head is not None:
            self.mlm_head = copy.deepcopy(mlm_head)
        self.requires_grad_(False)

    def copy_from(self, online: nn.Module) -> None:
        """Take the weights of the model, which has parts of the same names."""
        for name, part in self.named_children():
            part.load_state_dict(getattr(online, name).state_dict())
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        masked_text: MaskedText | None,
        plan: VisionPlan,
        generator: torch.Generator | None = None,
    ) -> TeacherOutput:
        """Features of the pairs and, where a masked text is given, its predictions.

        Args:
            pixel_values: (B, 3, H, W). input_ids, attention_mask: (B, L).
            masked_text: what to predict the words of, or None.
            plan: of the model's own step.
            generator: noise of the random guide.
        """
        if isinstance(self.trips, TripsSingleStreamModel):
            return self._read(pixel_values, input_ids, attention_mask, masked_text, plan, generator)
        vision, pairs = self.trips.vision, plan.unobserved()
        text, text_mask = input_ids, attention_mask
        if masked_text is not None:
            text, text_mask = torch.cat([input_ids, masked_text.input_ids]), attention_mask.repeat(2, 1)
        text, *masked = self.trips.encode_text(text, text_mask).split(input_ids.shape[0])
        prefix = self.trips.encode_prefix(pixel_values, pairs)
        image = vision.suffix(
            prefix, None if plan.contrast else text[:, 0], plan.contrast or pairs, generator=generator
        ).last_hidden_state
        output = TeacherOutput(project(self.image_projection, image), project(self.text_projection, text))
        if masked_text is not None:
            if plan.contrast is not None or plan.masked:
                guide = masked[0] if plan.masked else text
                image = vision.suffix(prefix, guide[:, 0], pairs, generator=generator).last_hidden_state
            fused, _ = self.trips.fusion(masked[0], attention_mask, image)
            output.mlm_logits = self._predict(fused, masked_text)
        return output

    def _read(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        masked_text: MaskedText | None,
        plan: VisionPlan,
        generator: torch.Generator | None,
    ) -> TeacherOutput:
        """`forward` of a single-stream teacher."""
        masked_ids = None if masked_text is None else masked_text.input_ids
        passes = JointPasses(self.trips, plan, pixel_values, input_ids, attention_mask, masked_ids, generator)
        output = TeacherOutput(project(self.image_projection, passes.image), project(self.text_projection, passes.text))
        if masked_text is not None:
            output.mlm_logits = self._predict(passes.read_masked(), masked_text)
        return output

    def _predict(self, fused: Tensor, masked_text: MaskedText) -> Tensor:
        """(B, L, D) fused states -> (M, V) logits of the hidden words."""
        embeddings = self.trips.get_input_embeddings().weight
        return self.mlm_head(masked_states(fused, masked_text.positions), embeddings)
