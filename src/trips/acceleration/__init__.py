"""Text-relevant patch selection inside a model of transformers that the user already has (section 3.2, untrained).

    fast = trips.accelerate(blip, layers=(5, 10), keep_rate=0.7)   # the same object, the same calls, fewer tokens
    trips.explain_last(fast)                                       # what the last call kept
    trips.restore(fast)                                            # bitwise the original

Weights, their names and the classes stay as they are; `hooks` explains how. Because hooks reach a model only between
its layers, the selection of layer j takes place at the entry of the layer, not between its attention and its FFN as in
the paper: layer j's attention is shortened too, and its scores have not seen it. In the vision tower the linear parts
of (5, 10) x 0.7 then cost 1 / 1.338 of the whole, against 1 / 1.313 in the paper's order.

The guides have not been trained to guide. What they cost in accuracy has to be measured on the task at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from trips.acceleration.hooks import ATTRIBUTE, CONFIG_KEY, Accelerator
from trips.acceleration.hosts import Host, TowerParts, host_of
from trips.acceleration.settings import AccelerationConfig, AccelerationGuide, AccelerationScore, Fallback
from trips.errors import ConfigError, ShapeError
from trips.options import Inattentive
from trips.selection import Selection

__all__ = ["AccelerationConfig", "accelerate", "explain_last", "guided_by", "restore"]

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
_TEXT = ("input_ids", "attention_mask", "token_type_ids")  # what a tokenizer gives


def accelerate(
    model: ModelT,
    layers: Sequence[int] | None = None,
    keep_rate: float | Sequence[float] | None = None,
    guide: AccelerationGuide | None = None,
    *,
    score: AccelerationScore | None = None,
    inattentive: Inattentive | None = None,
    fallback: Fallback | None = None,
) -> ModelT:
    """Select patches inside a loaded model of transformers; the same object comes back (section 3.2).

    For BlipForQuestionAnswering, BlipForImageTextRetrieval, BlipForConditionalGeneration, CLIPModel, SiglipModel,
    ViTModel and Dinov2Model. What is not given is read from ``model.config.trips_selection``, where an earlier call
    left it and `save_pretrained` stores it: after loading, ``accelerate(model)`` sets the model up as it was. Without
    such an entry it is the paper's: layers (5, 10), rate 0.7, the text as guide where the model reads text along with
    the image (captioning and plain towers: the image).

    CLIP and SigLIP score all images against all texts. When the text guides, every image is selected for the text of
    its own row: only the diagonal of the scores is meant, and other than equal numbers are an error. The same pairing
    makes their contrastive loss too easy: train them with another guide.

    Args:
        model: on any device, in any floating type; before it is compiled or wrapped.
        layers: 1-based vision layers; tokens are selected at their entry.
        keep_rate: share r of the patches kept at each of them, k = ceil(r n); 1 changes nothing.
        guide: "text", "image" (its [CLS]; not SigLIP), "keys_mean" or "random".
        score: what the guide meets; by default what the model offers for the guide, see `AccelerationConfig`.
        inattentive: "fuse" the other tokens into one, "renormalise" its weights too, or "drop" them.
        fallback: the guide of calls without text, such as get_image_features, while the text guides; "none" makes
            such a call a `ConfigError`. `guided_by` gives them a text.
    Returns:
        The model that was given.
    Raises:
        UnsupportedModelError: not one of these classes.
        ConfigError: accelerated, compiled or wrapped already; a location beyond the last layer; a rate that removes
            nothing at the resolution of the model; a guide, score or fallback that this model cannot take.
    """
    host = host_of(model)
    tower = TowerParts(model, host).tower
    if ATTRIBUTE in model.__dict__ or ATTRIBUTE in tower.__dict__:  # the tower may be that of another model too
        raise ConfigError("accelerated already", item=type(model).__name__, hint="trips.restore(model) first")
    if not isinstance(tower, PreTrainedModel) or any(
        module._compiled_call_impl is not None for module in (model, *tower.modules())
    ):
        raise ConfigError(
            "compiled or wrapped already: that would not meet new hooks",
            item=type(model).__name__,
            found=type(tower).__name__,
            hint="accelerate first, then compile or wrap",
        )
    asked = {
        "layers": layers,
        "keep_rate": keep_rate,
        "guide": guide,
        "score": score,
        "inattentive": inattentive,
        "fallback": fallback,
    }
    stored = getattr(model.config, CONFIG_KEY, None) or {}
    if not isinstance(stored, Mapping):
        raise ConfigError("must be a mapping", item=CONFIG_KEY, found=stored)
    values = dict(stored)
    if guide is not None and guide != values.get("guide"):
        values.pop("score", None)  # a stored score belongs to the stored guide, and so does what stands in for it
        values.pop("fallback", None)
    values.update({name: value for name, value in asked.items() if value is not None})
    accelerator = Accelerator(model, host, _settings(model, host, values))
    accelerator.settings.check_acts(len(accelerator.parts.layers), accelerator.parts.num_patches)
    accelerator.attach()
    return model


def restore(model: ModelT) -> ModelT:
    """Undo `accelerate`: the original model, bitwise, with no hook and no attribute left; the same object comes back.

    Raises:
        ConfigError: the model is not accelerated.
    """
    _accelerator(model).detach()
    return model


def explain_last(model: PreTrainedModel) -> list[Selection]:
    """What the last call kept: one `Selection` per location, in order; the positions are those of the patch grid.

    Of several threads each is told of its own last call.

    Raises:
        ConfigError: the model is not accelerated, or no call has passed the hooks (none was made, it failed, or the
            model was compiled before it was accelerated).
    """
    records = _accelerator(model).records
    if not records:
        raise ConfigError(
            "no call has been recorded",
            item=type(model).__name__,
            hint="call the model first; accelerate before torch.compile, not after",
        )
    return list(records)


@contextmanager
def guided_by(model: PreTrainedModel, **text: Any) -> Iterator[None]:
    """Let a text guide every call inside, whatever text these bring themselves, or none.

    Args:
        model: accelerated with ``guide="text"``.
        text: input_ids (B, L) and attention_mask (B, L), one row per image, as the processor gives them. It is read
            once, on entering: in training, enter anew for every step.
    Raises:
        ConfigError: the model is not accelerated, its guide is not the text, no input_ids are given, or what is none
            of a text. ShapeError: other than a tensor (B, L).
    """
    accelerator = _accelerator(model)
    if accelerator.settings.guide != "text":
        raise ConfigError("does not listen to text", item="guide", found=accelerator.settings.guide, expected="text")
    if unknown := sorted(set(text) - set(_TEXT)):
        raise ConfigError("not of a text", item=unknown[0], expected=" | ".join(_TEXT))
    ids = text.get("input_ids")
    if ids is None:
        raise ConfigError("no text to be guided by", item="input_ids", expected="(B, L)")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ShapeError("not a batch of texts", item="input_ids", found=getattr(ids, "shape", ids), expected="(B, L)")
    with accelerator.held(accelerator.text_guide(text)):
        yield


def _accelerator(model: PreTrainedModel) -> Accelerator:
    accelerator = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if accelerator is None:
        raise ConfigError(
            "not accelerated",
            item=type(model).__name__,
            hint="trips.accelerate(model) first; of a compiled or wrapped model give the one inside",
        )
    return accelerator


def _settings(model: PreTrainedModel, host: Host, values: dict[str, Any]) -> AccelerationConfig:
    """Fill in what the model decides, and refuse what it cannot do."""
    values.setdefault("guide", host.guides[0])
    name = type(model).__name__
    for key, allowed in (("guide", host.guides), ("fallback", ("none", *host.free_guides))):
        if key in values and values[key] not in allowed:
            raise ConfigError(f"not for {name}", item=key, found=values[key], expected=" | ".join(allowed))
    scores = host.scores(values["guide"])
    if values.setdefault("score", scores[0]) not in scores:
        raise ConfigError(
            f"not for {name} with guide {values['guide']!r}",
            item="score",
            found=values["score"],
            expected=" | ".join(scores),
        )
    settings = AccelerationConfig.from_dict(values)
    if settings.guide == "text" and settings.score != "shared":
        text, vision = model.config.text_config.hidden_size, model.config.vision_config.hidden_size
        if text != vision:
            raise ConfigError(
                f"text width {text} unlike vision width {vision}: W_q of the vision layer cannot take the text",
                item="guide",
                found="text",
                expected=" | ".join(host.free_guides),
            )
    if settings.fallback != "none" and settings.guide != "text":
        raise ConfigError("only a text guide needs one", item="fallback", found=settings.fallback, expected="none")
    return settings
