"""Settings as frozen dataclasses: each choice that the paper makes, or leaves open, is one field.

`SelectionConfig` holds those of section 3.2, `PretrainingConfig` those of section 3.3, `ReasoningConfig` those of
several images under one statement (5.1.2). They know neither tensors nor
transformers; `trips.config` joins them with the towers. Every error names the field as ``section.field``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from trips.errors import ConfigError

Guide = Literal["text", "image", "random", "similarity", "none"]
Score = Literal["states", "raw_states", "keys"]
QueryNorm = Literal["layer", "none"]
GuideQuery = Literal["layer", "calibrated"]
Heads = Literal["full", "per_head"]
Inattentive = Literal["fuse", "renormalise", "drop"]
Learning = Literal["literal", "gate", "distill"]
WidthMap = Literal["equal", "orthogonal"]
Architecture = Literal["dual", "single"]
FlopTask = Literal["pair", "vqa", "retrieval", "nlvr2", "pretraining"]  # what `trips flops` counts
ItcGuide = Literal["image", "none", "text"]
ItmGuide = Literal["anew", "reuse"]
MlmGuide = Literal["masked", "full"]
Negatives = Literal["local", "global"]
RankBy = Literal["both", "match"]  # what the second stage of a search goes by
ReasoningFusion = Literal["merge", "stacked"]
ReasoningObjective = Literal["truth", "assignment"]

TEMPERATURE_RANGE = (0.001, 0.5)  # where the learnt temperature is kept (ALBEF)


@dataclasses.dataclass(frozen=True)  # jsonargparse explains the fields only of dataclasses all the way down
class Options:
    """What a section of settings shares: copies with changes, reading from a mapping, the check of its literals."""

    section: ClassVar[str]

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names raise `ConfigError`."""
        return self.from_dict({**dataclasses.asdict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON needs them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain mapping; unknown keys raise `ConfigError` that names them."""
        if not isinstance(values, Mapping):
            raise ConfigError("must be a mapping", item=cls.section, found=values)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError("unknown key", item=f"{cls.section}.{unknown[0]}", expected=" | ".join(sorted(known)))
        return cls(**values)

    def _check_literals(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise ConfigError(
                    "unknown value",
                    item=f"{self.section}.{name}",
                    found=getattr(self, name),
                    expected=" | ".join(allowed),
                )


@dataclasses.dataclass(frozen=True)
class SelectionConfig(Options):
    """Where, how many and by whose guidance patches are kept (section 3.2).

    Attributes:
        layers: 1-based vision layers that select between their attention and their FFN; empty: no selection.
        keep_rate: share r of the candidates kept, in (0, 1]; one for all locations or one per location.
        guide: "text" is TD-ATT; "image" lets the image [CLS] ask (the paper's "w/o TD-ATT"); "random" scores by
            noise; "similarity" merges patches that are alike into one instead of choosing among them (ToMe's way),
            and so has no use for score, query_norm, heads, inattentive and learning; "none" is the ALBEF-C baseline.
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
        guide_query: "layer" sends the text through the layer's own W_q; "calibrated" makes its query by the map that
            `trips.calibrate` has fitted for the layer (beyond the paper). Of no effect on other guides.

    Raises:
        ConfigError: a value outside its range; the error names the field.
    """

    section: ClassVar[str] = "selection"

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
    guide_query: GuideQuery = "layer"

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise ConfigError("must be a list of layer numbers", item="selection.layers", found=self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.keep_rate, Sequence) and not isinstance(self.keep_rate, str):
            object.__setattr__(self, "keep_rate", tuple(self.keep_rate))
        self._check_literals()
        self._check_layers()
        self._check_rates()
        for name in ("gate_temperature", "distill_weight", "distill_temperature"):
            value = getattr(self, name)
            if not is_number(value) or not value > 0:
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
            if not is_number(rate) or not 0 < rate <= 1:
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
    def can_learn(self) -> bool:
        """Whether there is a guide that training could teach: noise and likeness have none."""
        return self.active and self.guide in ("text", "image")

    @property
    def fuses(self) -> bool:
        """Whether a location that removes tokens appends a fused one."""
        return self.active and self.guide != "similarity" and self.inattentive != "drop"

    @property
    def rates(self) -> tuple[float, ...]:
        """One keep rate per location."""
        return self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,) * len(self.layers)


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(Options):
    """The three objectives and their teacher (section 3.3; ALBEF's rules where it only names them).

    Whose selection an image feature or state has seen is the paper's open question: each guide below is free of leaks
    by default, and the value that reads the paper literally (one text-guided pass for everything) is the cheapest.

    Attributes:
        projection_dim: P, width of the contrastive features.
        queue_size: Q, teacher features of earlier steps that serve as candidates; 0: no queue, the candidates are the
            batch's own features over all processes, with gradient.
        momentum: decay of the teacher, m <- momentum m + (1 - momentum) p at every step.
        temperature: where the learnt temperature starts.
        alpha: weight of the teacher's soft targets in ITC and MLM; 0 turns them off.
        alpha_ramp_steps: steps in which alpha rises from 0 to its value.
        itc_guide: who selects for the contrastive image feature. "image": the image [CLS], at the same locations and
            rates; "none": nothing is removed; "text": the caption itself (literal), which leaks the pairing.
        itm_guide: the image of a negative pair. "anew": selected by the text it is paired with, as at test time;
            "reuse": as its own caption selected it (literal).
        mlm_guide: the image that masked tokens are predicted from. "masked": selected by the masked caption; "full":
            by the whole one (literal), which tells a little about the masked words.
        negatives: where hard negatives come from: the "local" batch of a process, or "global", that of all.

    Raises:
        ConfigError: a value outside its range; the error names the field.
    """

    section: ClassVar[str] = "pretraining"

    projection_dim: int = 256
    queue_size: int = 65536
    momentum: float = 0.995
    temperature: float = 0.07
    alpha: float = 0.4
    alpha_ramp_steps: int = 0
    itc_guide: ItcGuide = "image"
    itm_guide: ItmGuide = "anew"
    mlm_guide: MlmGuide = "masked"
    negatives: Negatives = "local"

    def __post_init__(self) -> None:
        self._check_literals()
        for name, least in (("projection_dim", 1), ("queue_size", 0), ("alpha_ramp_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError("not a count", item=f"{self.section}.{name}", found=value, expected=f">= {least}")
        for name, (low, high) in (("momentum", (0, 1)), ("alpha", (0, 1)), ("temperature", TEMPERATURE_RANGE)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise ConfigError(
                    "out of range", item=f"{self.section}.{name}", found=value, expected=f"{low} to {high}"
                )

    @property
    def has_teacher(self) -> bool:
        """Whether anything needs the momentum copies: features for the queue, or soft targets."""
        return self.queue_size > 0 or self.alpha > 0

    def alpha_at(self, step: int) -> float:
        """Weight of the soft targets at a 0-based optimizer step."""
        return self.alpha * min(1.0, step / self.alpha_ramp_steps) if self.alpha_ramp_steps else self.alpha


@dataclasses.dataclass(frozen=True)
class ReasoningConfig(Options):
    """Several images and a statement about them (section 5.1.2; ALBEF's and BLIP's forms).

    Attributes:
        num_images: images of a statement; 2 in NLVR2, the three boxes of a picture in NLVR v1.
        fusion: how the paths of the images meet in the fusion encoder. "merge": one block, a cross-attention for each
            image, keys and values tied, the mean of their outputs goes into the FFN; "stacked": one block after the
            other, one for each image, keys and values tied (ALBEF's form).
        objective: "truth": is the statement true of the images; "assignment": which of the images does the text
            belong to, or none of them: ALBEF's step between pre-training and fine-tuning, on images with captions.

    Raises:
        ConfigError: a value outside its range; the error names the field.
    """

    section: ClassVar[str] = "reasoning"

    num_images: int = 2
    fusion: ReasoningFusion = "merge"
    objective: ReasoningObjective = "truth"

    def __post_init__(self) -> None:
        self._check_literals()
        if not isinstance(self.num_images, int) or isinstance(self.num_images, bool) or self.num_images < 1:
            raise ConfigError("not a count", item="reasoning.num_images", found=self.num_images, expected=">= 1")

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier: false and true, or one for each image and one for none."""
        return 2 if self.objective == "truth" else self.num_images + 1


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
