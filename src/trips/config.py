"""Configuration of the model and the arithmetic that follows from it: no tensors, no weights in memory.

`SelectionConfig` holds every choice of section 3.2 of the paper, each as one literal. `TripsConfig` joins it with
the configurations of the three towers. Layer numbers are 1-based, as in the paper; N is the number of image patches
without [CLS], r a keep rate, k = ceil(r n) the number of tokens kept of n candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

from transformers import AutoConfig, BertConfig, CLIPVisionConfig, PreTrainedConfig

from trips.errors import ConfigError

Guide = Literal["text", "image", "random", "none"]
Score = Literal["states", "raw_states", "keys"]
QueryNorm = Literal["layer", "none"]
Heads = Literal["full", "per_head"]
Inattentive = Literal["fuse", "renormalise", "drop"]
Learning = Literal["literal", "gate", "distill"]
WidthMap = Literal["equal", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Where, how many and by whose guidance patches are kept (section 3.2).

    Attributes:
        layers: 1-based vision layers that select between their attention and their FFN; empty: no selection.
        keep_rate: share r of the candidates kept, in (0, 1]; one for all locations or one per location.
        guide: "text" is TD-ATT; "image" lets the image [CLS] ask (the paper's "w/o TD-ATT"); "random" scores by
            noise; "none" is the ALBEF-C baseline.
        score: what the query of Eq. 2 meets: "states" after the layer's second norm, "raw_states" as printed,
            "keys" the states through the layer's own key projection.
        query_norm: "layer" sends t_cls through the layer's input norm before W_q, "none" sends it raw.
        heads: "full" one product over the whole width, "per_head" one per head, softmaxes averaged.
        inattentive: "fuse" is Eq. 3 as printed, "renormalise" divides its weights by their sum, "drop" is "w/o ITF".
        learning: how the guide learns. "literal": only the fused token carries gradient (the paper); "gate": a
            straight-through gate on the kept tokens; "distill": the scores are taught by the fusion encoder's
            attention in occasional full-patch steps. The last two go beyond the paper.
        gate_temperature: divides the score inside the gate's sigmoid.
        distill_weight: weight of the distillation loss beside the task's.
        distill_temperature: below 1 it sharpens the teacher, attention ** (1 / temperature): an attention spread over
            layers, heads and words says clearly which patches matter most, but puts little weight on them.
        width_map: text width unlike vision width: "equal" is an error, "orthogonal" a fixed seeded
            semi-orthogonal map, a buffer without parameters.

    Raises:
        ConfigError: a value outside its range; the error names the field.
    """

    layers: tuple[int, ...] = (5, 10)
    keep_rate: float | tuple[float, ...] = 0.7
    guide: Guide = "text"
    score: Score = "states"
    query_norm: QueryNorm = "layer"
    heads: Heads = "full"
    inattentive: Inattentive = "fuse"
    learning: Learning = "literal"
    gate_temperature: float = 1.0
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    width_map: WidthMap = "equal"

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise ConfigError("must be a list of layer numbers", item="selection.layers", found=self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.keep_rate, Sequence) and not isinstance(self.keep_rate, str):
            object.__setattr__(self, "keep_rate", tuple(self.keep_rate))
        for name, allowed in _LITERALS.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    "unknown value", item=f"selection.{name}", found=getattr(self, name), expected=" | ".join(allowed)
                )
        self._check_layers()
        self._check_rates()
        for name in ("gate_temperature", "distill_weight", "distill_temperature"):
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                raise ConfigError("must be positive", item=f"selection.{name}", found=value)

    def _check_layers(self) -> None:
        for layer in self.layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
                raise ConfigError(
                    "not a layer number",
                    item="selection.layers",
                    found=layer,
                    expected="integers from 1 (the first layer) upwards",
                )
        if any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ConfigError("must rise", item="selection.layers", found=self.layers)

    def _check_rates(self) -> None:
        for rate in self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,):
            if not _is_number(rate) or not 0 < rate <= 1:
                raise ConfigError(
                    "not a keep rate", item="selection.keep_rate", found=rate, expected="a share r with 0 < r <= 1"
                )
        if isinstance(self.keep_rate, tuple) and len(self.keep_rate) != len(self.layers):
            raise ConfigError(
                "one keep rate per location is needed",
                item="selection.keep_rate",
                found=self.keep_rate,
                expected=f"{len(self.layers)} rates for layers {self.layers}",
            )

    @property
    def active(self) -> bool:
        """Whether any token is ever removed."""
        return self.guide != "none" and bool(self.layers)

    @property
    def rates(self) -> tuple[float, ...]:
        """One keep rate per location."""
        return self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,) * len(self.layers)

    def replace(self, **changes: Any) -> SelectionConfig:
        """A copy with some fields changed; unknown names raise `ConfigError`."""
        return self.from_dict({**dataclasses.asdict(self), **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SelectionConfig:
        """Build from a plain mapping; unknown keys raise `ConfigError` that names them."""
        if not isinstance(values, Mapping):
            raise ConfigError("must be a mapping", item="selection", found=values)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError("unknown key", item=f"selection.{unknown[0]}", expected=" | ".join(sorted(known)))
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_LITERALS: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(SelectionConfig).items() if get_args(hint)
}
for _name in ("layers", "keep_rate"):
    _LITERALS.pop(_name)


def num_kept(num_candidates: int, keep_rate: float) -> int:
    """k = ceil(r n), at least 1, free of float error (section 3.2, step 4).

    The product is taken on the decimal that the user wrote: 0.55 of 100 is 55, not the 56 of a float product. Plain
    integers, so that torch.compile can follow.
    """
    digits, _, exponent = repr(float(keep_rate)).partition("e")
    whole, _, decimals = digits.partition(".")
    denominator = 10 ** (len(decimals) - int(exponent or 0))
    return max(1, min(num_candidates, -(-int(whole + decimals) * num_candidates // denominator)))


def selection_placement(num_layers: int, num_locations: int) -> tuple[int, ...]:
    """1-based locations j = i s + 1 with s = L / (t + 1) (section 3.2).

    The paper's own main setting (5, 10) does not follow it: L = 12, t = 2 gives (5, 9).

    Raises:
        ConfigError: L is not divisible by t + 1.
    """
    step, rest = divmod(num_layers, max(num_locations, 0) + 1)
    if rest or num_locations < 1:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {num_locations + 1} equal parts",
            item="num_locations",
            found=num_locations,
            expected="t with L divisible by t + 1",
        )
    return tuple(i * step + 1 for i in range(1, num_locations + 1))


def token_counts(num_patches: int, num_layers: int, selection: SelectionConfig) -> list[tuple[int, int]]:
    """Tokens ([CLS] included) that enter attention and FFN of every vision layer.

    The fused token is a candidate at the next location (k of 576 + 0, then of 404 + 1 tokens).

    Args:
        num_patches: N, patches without [CLS].
        num_layers: L, vision layers.
        selection: the setting; one that is not active leaves N + 1 everywhere.
    Returns:
        L pairs (tokens in attention, tokens in FFN).
    Raises:
        ConfigError: a location lies beyond the last layer.
    """
    check_locations(selection, num_layers)
    rates = dict(zip(selection.layers, selection.rates, strict=True)) if selection.active else {}
    fused = selection.inattentive != "drop"
    counts, n = [], num_patches
    for layer in range(1, num_layers + 1):
        before = n
        if layer in rates and (k := num_kept(n, rates[layer])) < n:
            n = k + fused
        counts.append((before + 1, n + 1))
    return counts


def check_locations(selection: SelectionConfig, num_layers: int) -> None:
    """Raise `ConfigError` if a location of an active selection lies beyond the last of `num_layers` layers."""
    if beyond := [layer for layer in selection.layers if selection.active and layer > num_layers]:
        raise ConfigError(
            "location beyond the last layer",
            item="selection.layers",
            found=beyond[0],
            expected=f"1 to {num_layers}",
        )


def _as_config(value: Any, default: PreTrainedConfig, name: str) -> PreTrainedConfig:
    if value is None:
        return default
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict) or "model_type" not in value:
        raise ConfigError("needs a model_type", item=name, found=value)
    try:
        return AutoConfig.for_model(**value)
    except Exception as error:  # an unknown model_type, or a value that the family's own checks refuse
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"no such configuration ({reason})", item=name, found=value["model_type"]) from error


class TripsConfig(PreTrainedConfig):
    """Configuration of the dual-stream model (Figure 2a).

    Attributes:
        vision_config: CLIPVisionConfig, ViTConfig or Dinov2Config; default CLIP ViT-B/16 at 256 px.
        text_config: BertConfig of the text encoder; default the first 6 layers of BERT-base.
        fusion_encoder_config: BertConfig with cross-attention; default as the text encoder, 6 layers. (transformers
            keeps the shorter name fusion_config for itself.)
        decoder_config: BertConfig of the causal answer decoder; default as the fusion encoder.
        selection: `SelectionConfig` or its fields as a mapping.
        initializer_range: standard deviation of new weights of the fusion encoder and heads; default the text
            encoder's.

    Raises:
        ConfigError: locations beyond the last layer; text and fusion widths differ; text width unlike vision width
            while ``selection.width_map`` is "equal".
    """

    model_type = "trips"
    sub_configs = {
        "vision_config": AutoConfig,
        "text_config": BertConfig,
        "fusion_encoder_config": BertConfig,
        "decoder_config": BertConfig,
    }

    vision_config: Any = None
    text_config: Any = None
    fusion_encoder_config: Any = None
    decoder_config: Any = None
    selection: Any = None
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        clip_base = CLIPVisionConfig(patch_size=16, image_size=256)
        self.vision_config = _as_config(self.vision_config, clip_base, "vision_config")
        self.text_config = _as_config(self.text_config, BertConfig(num_hidden_layers=6), "text_config")
        self.fusion_encoder_config = _as_config(
            self.fusion_encoder_config, None, "fusion_encoder_config"
        ) or bert_variant(self.text_config, is_decoder=True, add_cross_attention=True)
        self.decoder_config = _as_config(self.decoder_config, None, "decoder_config") or bert_variant(
            self.fusion_encoder_config
        )
        if self.selection is None:
            self.selection = SelectionConfig()
        elif not isinstance(self.selection, SelectionConfig):
            self.selection = SelectionConfig.from_dict(self.selection)
        self._check_families()
        if self.initializer_range is None:
            self.initializer_range = self.text_config.initializer_range
        check_locations(self.selection, self.vision_config.num_hidden_layers)
        self._check_widths()
        super().__post_init__(**kwargs)

    def _check_families(self) -> None:
        for name in ("hidden_size", "num_hidden_layers"):
            if not isinstance(getattr(self.vision_config, name, None), int):
                raise ConfigError(
                    f"no ViT: it has no {name}", item="vision_config", found=type(self.vision_config).__name__
                )
        for name in ("text_config", "fusion_encoder_config", "decoder_config"):
            if getattr(self, name).model_type != "bert":
                raise ConfigError("not a BERT", item=name, found=getattr(self, name).model_type, expected="bert")

    def _check_widths(self) -> None:
        text, vision = self.text_config.hidden_size, self.vision_config.hidden_size
        for name in ("fusion_encoder_config", "decoder_config"):
            if getattr(self, name).hidden_size != text:
                raise ConfigError(
                    "width differs from the text encoder's",
                    item=name,
                    found=getattr(self, name).hidden_size,
                    expected=text,
                )
        if text != vision and self.selection.width_map == "equal":
            raise ConfigError(
                f"text width {text} unlike vision width {vision}: W_q of the vision layer cannot take the text [CLS]",
                item="text_config.hidden_size",
                found=text,
                expected=vision,
                hint='set selection.width_map="orthogonal" for a fixed map',
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON needs them."""
        values = super().to_dict()
        values["selection"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.selection).items()
        }
        return values


def bert_variant(config: BertConfig, **changes: Any) -> BertConfig:
    """A copy of a BERT configuration with some values changed."""
    values = config.to_dict()
    values.pop("architectures", None)
    return BertConfig(**{**values, **changes})
