"""What an exported file computes: one module of tensors in and named tensors out for each kind of model.

Dimensions: B pairs, n images of a statement, L text tokens, C answers, k kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trips.acceleration import explain_last
from trips.acceleration.hooks import ATTRIBUTE
from trips.config import SelectionConfig
from trips.data.loading import AnswerList
from trips.errors import ConfigError, ShapeError, UnsupportedModelError
from trips.fusion import bidirectional_mask
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.processor_checks import positive_int, string_list
from trips.selection import Selection

Part = Literal["question_states", "answers", "match", "features", "classes", "fused", "output"]

_TEXT_LENGTH = 40
# Parts of each class, the default first; by name, so that no class is imported that is not used.
_PARTS: dict[str, tuple[Part, ...]] = {
    "TripsForQuestionAnswering": ("question_states", "answers"),
    "TripsForImageTextRetrieval": ("match", "features"),  # that for pre-training is one of these
    "TripsForVisualReasoning": ("classes",),
    "TripsModel": ("fused",),
}


class PairGraph(nn.Module):
    """Tensors of a batch to named tensors, at one setting.

    Attributes:
        model: the model, not a copy. part: what is computed.
        inputs: shape of each input behind the batch.
        layers, rates: locations and keep rates; empty without selection.
        answers: candidates in their order, None where there are none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        part: Part,
        selection: SelectionConfig | None,
        inputs: dict[str, tuple[int, ...]],
        vocabulary: int,
        answers: list[str] | None = None,
        encoded: Any = None,
    ) -> None:
        super().__init__()
        self.model, self.part, self.selection, self.inputs = model, part, selection, inputs
        self.vocabulary, self.answers = vocabulary, answers
        setting = model.__dict__[ATTRIBUTE].settings if selection is None else selection
        active = selection is None or selection.active
        self.layers: tuple[int, ...] = tuple(setting.layers) if active else ()
        self.rates: tuple[float, ...] = (
            tuple(setting.rates[layer] for layer in self.layers)
            if selection is None
            else (tuple(setting.rates) if active else ())
        )
        if encoded is not None:
            self.register_buffer("answer_ids", encoded["input_ids"], persistent=False)
            self.register_buffer("answer_mask", encoded["attention_mask"], persistent=False)

    def draw(self, size: int, seed: int) -> dict[str, Tensor]:
        """A random batch: noise for pixels, texts of random length with padding behind them."""
        generator = torch.Generator().manual_seed(seed)
        batch = {"pixel_values": torch.randn(size, *self.inputs["pixel_values"], generator=generator)}
        if "input_ids" in self.inputs:
            length = self.inputs["input_ids"][0]
            lengths = torch.randint(min(2, length), length + 1, (size, 1), generator=generator)
            mask = (torch.arange(length) < lengths).long()
            ids = torch.randint(1, self.vocabulary, (size, length), generator=generator)
            batch |= {"input_ids": ids * mask, "attention_mask": mask}
        return batch

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The part's tensors, and ``kept_layer_J`` for every location."""
        model, selection = self.model, self.selection
        if self.part == "features":
            return {
                "image_features": model.encode_image(pixel_values, selection=selection),
                "text_features": model.encode_texts(input_ids, attention_mask),
            }
        if self.part == "output":
            return self._output_of_host(pixel_values, input_ids, attention_mask)
        if self.part == "classes":
            output = model(pixel_values, input_ids, attention_mask, selection=selection)
            found = {"class_probabilities": torch.softmax(output.logits, dim=-1)}
        elif self.part in ("question_states", "answers"):
            output = model(pixel_values, input_ids, attention_mask, selection=selection)
            found = {"question_states": output.question_states}
            if self.part == "answers":
                found = {"answer_log_likelihoods": self._likelihoods(output.question_states, attention_mask)}
        else:
            trips = model.trips if self.part == "match" else model
            output = trips(input_ids, attention_mask, pixel_values, selection=selection)
            states = output.last_hidden_state
            found = {"fused_states": states}
            if self.part == "match":
                found = {"match_probability": torch.softmax(model.itm_head(states[:, 0]).float(), dim=-1)[:, 1]}
        return {**found, **_kept(output.selections)}

    def _likelihoods(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, C): every candidate read to its end by the decoder; no shortlist, whose lengths a graph cannot follow."""
        batch, (count, length) = states.shape[0], self.answer_ids.shape

        def each(tensor: Tensor) -> Tensor:  # (B, ...) -> (B C, ...), a row for each candidate of each question
            return tensor.unsqueeze(1).expand(-1, count, *tensor.shape[1:]).flatten(0, 1)

        ids = self.answer_ids.repeat(batch, 1)
        hidden = self.model.decoder.bert(
            input_ids=ids[:, :-1],
            encoder_hidden_states=each(states),
            encoder_attention_mask=bidirectional_mask(each(mask), states.dtype)[:, :, :1],
            use_cache=False,
        ).last_hidden_state
        tokens = torch.log_softmax(self.model.decoder.cls(hidden).float(), dim=-1)
        tokens = tokens.gather(2, ids[:, 1:].unsqueeze(2)).view(batch, count, length - 1)
        return (tokens * self.answer_mask[:, 1:]).sum(dim=2)

    def _output_of_host(
        self, pixel_values: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        text = {} if input_ids is None else {"input_ids": input_ids, "attention_mask": attention_mask}
        output = self.model(pixel_values=pixel_values, **text, return_dict=True)
        found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        return {**found, **_kept(explain_last(self.model))}

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Leave the record of an accelerated model as it was: tracing would put tensors without values there."""
        accelerator = self.model.__dict__.get(ATTRIBUTE)
        records = None if accelerator is None else accelerator.records
        try:
            yield
        finally:
            if accelerator is not None:
                accelerator.records = records


def pair_graph(
    model: PreTrainedModel,
    part: Part | None,
    *,
    image_size: int | tuple[int, int] | None,
    text_length: int | None,
    selection: SelectionConfig | None,
    answers: Sequence[str] | None,
    processor: TripsProcessor | None,
) -> PairGraph:
    """The graph of a model; arguments and errors as those of `trips.export.export_model`."""
    parts = _parts_of(model)
    part = part or parts[0]
    if part not in parts:
        raise ConfigError(f"not of {type(model).__name__}", item="part", found=part, expected=" | ".join(parts))
    if (part == "answers") != (answers is not None):
        raise ConfigError("candidates and the part 'answers' belong together", item="answers", found=part)
    ours = isinstance(model, TripsPreTrainedModel)
    if ours:
        selection = selection or model.config.selection
        if selection.active and selection.guide == "random":
            raise ConfigError("draws anew at every call", item="selection.guide", found="random")
    elif selection is not None:
        raise ConfigError("an accelerated model has its own setting", item="selection", hint="trips.accelerate")
    elif model.__dict__[ATTRIBUTE].settings.guide == "random":
        raise ConfigError("draws anew at every call", item="guide", found="random")

    vision = getattr(model.config, "vision_config", model.config)
    size = image_size or (processor.image_size if processor is not None else vision.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < vision.patch_size:
        raise ShapeError("image smaller than a patch", item="image_size", found=(height, width))
    images: tuple[int, ...] = (vision.num_channels, height, width)
    if part == "classes":
        images = (model.config.reasoning.num_images, *images)
    inputs: dict[str, tuple[int, ...]] = {"pixel_values": images}
    text = getattr(model.config, "text_config", None)
    if text is not None and "input_ids" in inspect.signature(model.forward).parameters:
        longest = text.max_position_embeddings
        length = text_length or (processor.max_text_length if processor is not None else min(_TEXT_LENGTH, longest))
        if positive_int(length, "text_length") > longest:
            raise ConfigError("longer than the model's texts", item="text_length", found=length, expected=longest)
        inputs |= {"input_ids": (length,), "attention_mask": (length,)}
    texts, encoded = None, None
    if answers is not None:
        if processor is None:
            raise ConfigError("needs the processor", item="answers", expected="processor=")
        texts = list(answers) if isinstance(answers, AnswerList) else string_list(answers, "answers")
        encoded = processor.encode_answers(list(AnswerList(texts)))
    return PairGraph(model, part, selection, inputs, text.vocab_size if text is not None else 0, texts, encoded)


def _parts_of(model: PreTrainedModel) -> tuple[Part, ...]:
    """The parts of a model's class; `UnsupportedModelError` for a model that has none."""
    for base in type(model).__mro__:
        if base.__name__ in _PARTS and isinstance(model, TripsPreTrainedModel):
            return _PARTS[base.__name__]
    if ATTRIBUTE in getattr(model, "__dict__", {}):
        return ("output",)
    raise UnsupportedModelError(
        "not a model that is exported",
        item=type(model).__name__,
        expected=f"{', '.join(_PARTS)}, or an accelerated model of transformers",
    )


def _kept(selections: Sequence[Selection] | None) -> dict[str, Tensor]:
    # A copy: an output that is also an input of the rest of the graph may not be one and the same tensor.
    return {f"kept_layer_{record.layer}": record.kept.clone() for record in selections or ()}
