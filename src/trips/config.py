"""Configuration of the model: no tensors, no weights in memory.

`TripsConfig` joins the configurations of the three towers with the options of `trips.options`, which this module hands
on, as it does the arithmetic of `trips.token_counts` that follows from them.
"""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import AutoConfig, BertConfig, CLIPVisionConfig, PreTrainedConfig

from trips.architecture import check_architecture, check_single_stream
from trips.errors import ConfigError
from trips.options import (
    Architecture,
    Guide,
    Heads,
    Inattentive,
    ItcGuide,
    ItmGuide,
    Learning,
    MlmGuide,
    Negatives,
    Options,
    PretrainingConfig,
    QueryNorm,
    ReasoningConfig,
    Score,
    SelectionConfig,
    WidthMap,
)
from trips.token_counts import check_locations, merging_rounds, num_kept, selection_placement, token_counts

__all__ = [
    "Architecture",
    "Guide",
    "Heads",
    "Inattentive",
    "ItcGuide",
    "ItmGuide",
    "Learning",
    "MlmGuide",
    "Negatives",
    "PretrainingConfig",
    "QueryNorm",
    "ReasoningConfig",
    "Score",
    "SelectionConfig",
    "TripsConfig",
    "WidthMap",
    "bert_variant",
    "check_locations",
    "merging_rounds",
    "num_kept",
    "selection_placement",
    "token_counts",
]

OptionsT = TypeVar("OptionsT", bound=Options)


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


def _as_options(value: Any, kind: type[OptionsT]) -> OptionsT:
    if value is None:
        return kind()
    return value if isinstance(value, kind) else kind.from_dict(value)


class TripsConfig(PreTrainedConfig):
    """Configuration of the dual-stream model (Figure 2a), or of TRIPS-S.

    Attributes:
        architecture: "dual" is the model of Figure 2, "single" TRIPS-S: the vision tower is the joint stack, of
            `text_config` only the embeddings are built and nothing of `fusion_encoder_config`.
        vision_config: CLIPVisionConfig, ViTConfig or Dinov2Config; default CLIP ViT-B/16 at 256 px.
        text_config: BertConfig of the text encoder; default the first 6 layers of BERT-base.
        fusion_encoder_config: BertConfig with cross-attention; default as the text encoder, 6 layers. (transformers
            keeps the shorter name fusion_config for itself.)
        decoder_config: BertConfig of the causal answer decoder; default as the fusion encoder.
        selection: `SelectionConfig` or its fields as a mapping.
        pretraining: `PretrainingConfig` or its fields as a mapping.
        reasoning: `ReasoningConfig` or its fields as a mapping.
        initializer_range: standard deviation of new weights of the fusion encoder and heads; default the text
            encoder's.
        calibrated_layers: 1-based vision layers that hold a fitted map from t_cls to the guide's query, which
            ``selection.guide_query="calibrated"`` uses; `trips.calibrate` makes them.

    Raises:
        ConfigError: locations beyond the last layer; text and fusion widths differ; text width unlike vision width
            while ``selection.width_map`` is "equal" or in TRIPS-S; what `trips.architecture` refuses.
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
    pretraining: Any = None
    reasoning: Any = None
    initializer_range: float | None = None
    architecture: Architecture = "dual"
    calibrated_layers: Any = ()

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
        self.selection = _as_options(self.selection, SelectionConfig)
        self.pretraining = _as_options(self.pretraining, PretrainingConfig)
        self.reasoning = _as_options(self.reasoning, ReasoningConfig)
        self._check_families()
        if self.initializer_range is None:
            self.initializer_range = self.text_config.initializer_range
        check_locations(self.selection, self.vision_config.num_hidden_layers)
        self._check_widths()
        self._check_calibration()
        self._check_architecture()
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

    def _check_calibration(self) -> None:
        self.calibrated_layers = SelectionConfig(layers=self.calibrated_layers).layers  # the same rules
        check_locations(SelectionConfig(layers=self.calibrated_layers), self.vision_config.num_hidden_layers)
        if self.calibrated_layers and self.architecture == "single":
            raise ConfigError(
                "a single-stream model has no text guide to calibrate",
                item="calibrated_layers",
                found=self.calibrated_layers,
                expected="none",
            )
        selection = self.selection
        if selection.guide_query == "calibrated" and selection.guide == "text":
            if missing := sorted(set(selection.layers) - set(self.calibrated_layers)):
                raise ConfigError(
                    "these layers hold no calibrated query",
                    item="selection.layers",
                    found=missing,
                    expected=self.calibrated_layers,
                    hint='trips.calibrate, or selection.guide_query="layer"',
                )

    def _check_architecture(self) -> None:
        check_architecture(self.architecture)
        if self.architecture == "dual":
            return
        check_single_stream(self.selection, self.pretraining, self.reasoning)
        if (text := self.text_config.hidden_size) != self.vision_config.hidden_size:
            raise ConfigError(
                "words and patches of a single-stream model share one width",
                item="text_config.hidden_size",
                found=text,
                expected=self.vision_config.hidden_size,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON needs them."""
        values = super().to_dict()
        for name in ("selection", "pretraining", "reasoning"):
            values[name] = getattr(self, name).to_dict()
        return values


def bert_variant(config: BertConfig, **changes: Any) -> BertConfig:
    """A copy of a BERT configuration with some values changed."""
    values = config.to_dict()
    values.pop("architectures", None)
    return BertConfig(**{**values, **changes})
