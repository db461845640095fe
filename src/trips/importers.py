"""Build a TRIPS model from public towers: CLIP, DINOv2 or ViT for vision, BERT for text (section 3.1, 4.1).

The towers are read by transformers, from a local folder or by hub name. Every tensor of the result is accounted for
in an `ImportReport`; a missing or unexpected key is an error that names it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertModel, PreTrainedConfig, PreTrainedModel

from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig, TripsConfig, bert_variant
from trips.errors import CheckpointError, ConfigError, TripsError, UnsupportedModelError
from trips.fusion import FusionEncoder
from trips.model import TripsModel, TripsPreTrainedModel
from trips.towers import family_of

logger = logging.getLogger("trips")

ModelT = TypeVar("ModelT", bound=TripsPreTrainedModel)

# Parts of public checkpoints that a tower has no place for, by prefix: named in the report, not an error.
_IGNORED_VISION = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "pooler.", "classifier.",
                   "vit.pooler.", "embeddings.mask_token", "mask_token")  # fmt: skip
_IGNORED_TEXT = ("pooler.", "bert.pooler.", "cls.", "embeddings.position_ids", "bert.embeddings.position_ids")


@dataclass
class ImportReport:
    """What became of every tensor.

    Attributes:
        loaded: names in the new model that hold public weights; cross-attention those of its layer's self-attention.
        initialised: names in the new model that no public tower has; they start at random.
        ignored: names in the checkpoints that this model has no place for, as "vision: name" or "text: name".
    """

    loaded: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.loaded)} tensors loaded, {len(self.initialised)} initialised, {len(self.ignored)} ignored"


def read_config(name_or_path: str | Path) -> PreTrainedConfig:
    """Configuration of a tower; `CheckpointError` names a folder without one or a name that cannot be reached."""
    if isinstance(name_or_path, Path) and not name_or_path.is_dir():
        raise CheckpointError("no such folder", item=str(name_or_path))
    try:
        return AutoConfig.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no configuration to be read ({str(error).splitlines()[0]})", item=str(name_or_path)
        ) from error


def load_vision_tower(name_or_path: str | Path, report: ImportReport | None = None) -> PreTrainedModel:
    """A CLIP, ViT or DINOv2 tower in float32, every weight read.

    Args:
        name_or_path: local folder or hub name; a full CLIP model gives its vision half.
        report: receives what was ignored.
    Raises:
        CheckpointError: unreadable, or keys missing or unexpected. UnsupportedModelError: another family.
    """
    config = read_config(name_or_path)
    config = config.vision_config if config.model_type == "clip" else config
    family = family_of(config)
    return _load(family.model_class, config, name_or_path, dict(family.model_kwargs), _IGNORED_VISION, report)


def load_text_tower(name_or_path: str | Path, report: ImportReport | None = None) -> BertModel:
    """A BERT text tower in float32, all its layers; errors as `load_vision_tower`."""
    config = read_config(name_or_path)
    if not isinstance(config, BertConfig):
        raise UnsupportedModelError(
            "not a BERT text tower", item=str(name_or_path), found=config.model_type, expected="bert"
        )
    return _load(BertModel, config, name_or_path, {"add_pooling_layer": False}, _IGNORED_TEXT, report)


def _load(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    name_or_path: str | Path,
    kwargs: dict,
    ignored: tuple[str, ...],
    report: ImportReport | None,
) -> PreTrainedModel:
    try:
        model, info = model_class.from_pretrained(
            str(name_or_path),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, so that the error below can name the key
            **kwargs,
        )
    except TripsError:
        raise
    except Exception as error:  # transformers, safetensors and the hub client raise what they like here
        raise CheckpointError(
            f"weights cannot be read ({str(error).splitlines()[0]})", item=str(name_or_path)
        ) from error
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(ignored)]
    for problem, keys in (
        ("missing keys", info["missing_keys"]),
        ("keys of another shape", info.get("mismatched_keys", ())),
        ("unexpected keys", unexpected),
    ):
        if keys:
            raise CheckpointError(problem, item=str(name_or_path), found=_first(keys))
    if report is not None:
        part = "text" if model_class is BertModel else "vision"  # both may have a "pooler.dense.weight"
        report.ignored += [f"{part}: {key}" for key in sorted(set(info["unexpected_keys"]) - set(unexpected))]
    return model


def _first(keys: Iterable[object], limit: int = 8) -> list[str]:
    names = sorted(str(key) for key in keys)
    return names if len(names) <= limit else [*names[:limit], f"... {len(names) - limit} more"]


def build_model_from_towers(
    vision: str | Path,
    text: str | Path,
    task: type[ModelT] = TripsModel,
    *,
    num_text_layers: int = 6,
    num_fusion_layers: int = 6,
    num_decoder_layers: int | None = None,
    selection: SelectionConfig | None = None,
    pretraining: PretrainingConfig | None = None,
    reasoning: ReasoningConfig | None = None,
    dropout: float | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> tuple[ModelT, ImportReport]:
    """A TRIPS model from a vision tower and a BERT: first layers to the text encoder, last to the fusion encoder.

    Where text and fusion layers together exceed the tower's, the last ones are used twice (a copy). Cross-attention
    has no public counterpart and starts as a copy of its layer's self-attention. A decoder copies the fusion encoder
    and the word embeddings (after ALBEF).
    The head for masked tokens is the BERT's own where its checkpoint has one; a momentum teacher starts as the model.

    Args:
        vision, text: local folders or hub names.
        task: the model class.
        num_text_layers: n of the first layers. num_fusion_layers: n of the last layers.
        num_decoder_layers: of the answer decoder, as many as fusion layers unless given.
        selection: default setting of the model.
        pretraining: objectives and teacher, for `TripsForPreTraining`.
        reasoning: images and their fusion, for `TripsForVisualReasoning`.
        dropout: replaces the text tower's dropout where given.
        bos_token_id, eos_token_id: the tokenizer's [CLS] and [SEP], for a decoder.
    Returns:
        the model in float32 and the account of its tensors.
    Raises:
        CheckpointError, UnsupportedModelError: see `load_vision_tower`. ConfigError: more layers asked for than there.
    """
    if num_decoder_layers is None:
        num_decoder_layers = num_fusion_layers
    report = ImportReport()
    vision_tower, text_tower = load_vision_tower(vision, report), load_text_tower(text, report)
    total = text_tower.config.num_hidden_layers
    for name, count in (("num_text_layers", num_text_layers), ("num_fusion_layers", num_fusion_layers),
                        ("num_decoder_layers", num_decoder_layers)):  # fmt: skip
        if not 1 <= count <= total:
            raise ConfigError("the text tower has not so many layers", item=name, found=count, expected=f"1 to {total}")
    shared = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    shared |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    crossed = {"is_decoder": True, "add_cross_attention": True}
    config = TripsConfig(
        vision_config=vision_tower.config,
        text_config=bert_variant(text_tower.config, num_hidden_layers=num_text_layers, **shared),
        fusion_encoder_config=bert_variant(text_tower.config, num_hidden_layers=num_fusion_layers, **crossed, **shared),
        decoder_config=bert_variant(text_tower.config, num_hidden_layers=num_decoder_layers, **crossed, **shared),
        selection=selection,
        pretraining=pretraining,
        reasoning=reasoning,
    )
    model = task(config)
    trips = model if isinstance(model, TripsModel) else model.trips
    trips.vision.tower.load_state_dict(vision_tower.state_dict())
    trips.text.embeddings.load_state_dict(text_tower.embeddings.state_dict())
    layers = text_tower.encoder.layer
    _copy_layers(layers[:num_text_layers], trips.text.encoder.layer)
    _copy_fusion(layers[total - num_fusion_layers :], trips.fusion)
    if (decoder := getattr(model, "decoder", None)) is not None:
        decoder.bert.embeddings.load_state_dict(text_tower.embeddings.state_dict())
        _copy_layers(layers[total - len(decoder.bert.encoder.layer) :], decoder.bert.encoder.layer)
    if (head := getattr(model, "mlm_head", None)) is not None:
        _load_mlm_head(head, text, report)
    _account(model, report)
    if (reset := getattr(model, "reset_momentum", None)) is not None:
        reset()
    logger.info("imported %s and %s: %s", vision, text, report)
    return model, report


_MLM_HEAD = "cls.predictions."


def _load_mlm_head(head: nn.Module, text: str | Path, report: ImportReport) -> None:
    """The head for masked tokens of a BERT's checkpoint, noted as loaded; without one it stays as it is."""
    found = [name for name in report.ignored if name.startswith(f"text: {_MLM_HEAD}")]
    if not any(".transform." in name for name in found):
        return
    bert, info = BertForMaskedLM.from_pretrained(
        str(text), config=read_config(text), dtype=torch.float32, output_loading_info=True
    )
    if missing := [f"{_MLM_HEAD}{key}" for key in head.state_dict() if f"{_MLM_HEAD}{key}" in info["missing_keys"]]:
        raise CheckpointError("missing keys", item=str(text), found=_first(missing))
    head.load_state_dict(
        {key: value for key, value in bert.cls.predictions.state_dict().items() if not key.startswith("decoder.")}
    )
    report.ignored = [name for name in report.ignored if name not in found]
    report.loaded += [f"mlm_head.{key}" for key in head.state_dict()]


def _copy_layers(source: Iterable[nn.Module], target: Iterable[nn.Module]) -> None:
    """Copy BERT layers; what the source lacks may only be cross-attention, which starts as the self-attention.

    From small random weights it adds next to nothing at first, and a short run may learn to do without the image
    (docs/results.md, DAQUAR).
    """
    for public, ours in zip(source, target, strict=True):
        missing, unexpected = ours.load_state_dict(public.state_dict(), strict=False)
        missing = [key for key in missing if not key.startswith("crossattention.")]
        if missing or unexpected:
            raise CheckpointError("layers do not correspond", item="text tower", found=_first([*missing, *unexpected]))
        if (cross := getattr(ours, "crossattention", None)) is not None:
            cross.load_state_dict(ours.attention.state_dict())


def _copy_fusion(source: Iterable[nn.Module], fusion: FusionEncoder) -> None:
    """Copy BERT layers into a fusion encoder, cross-attention from self-attention as in `_copy_layers`.

    Where the text has several images, each image's path is such a copy.
    """
    state: dict[str, torch.Tensor] = {}
    for number, public in enumerate(source):
        for name, value in public.state_dict().items():
            state[f"layer.{number}.{name}"] = value
            if name.startswith("attention."):
                state[f"layer.{number}.cross{name}"] = value
    missing, unexpected = fusion.load_state_dict(fusion.state_from_single(state), strict=False)
    missing = [key for key in missing if not key.startswith("image_projection.")]
    if missing or unexpected:
        raise CheckpointError("layers do not correspond", item="text tower", found=_first([*missing, *unexpected]))


def _account(model: nn.Module, report: ImportReport) -> None:
    """Sort every tensor of the new model into loaded and initialised; a momentum copy is what its original is."""
    new = ("decoder.cls.", "fusion.image_projection.", "vision.guide_map")
    heads = ("image_projection.", "text_projection.", "itm_head.", "mlm_head.", "reasoning_head.", "temperature",
             "queue.")  # fmt: skip
    tied = "decoder.cls.predictions.decoder.weight"  # the word embeddings under a second name
    known = set(report.loaded)
    for name in model.state_dict():
        original = name.removeprefix("momentum.")
        is_new = name != tied and (any(part in name for part in new) or original.startswith(heads))
        if name not in known:
            (report.initialised if is_new and original not in known else report.loaded).append(name)
