"""A TRIPS model from a vision tower and a BERT (section 3.1, 4.1): which layers go where."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import BertForMaskedLM

from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig, TripsConfig, bert_variant
from trips.errors import CheckpointError, ConfigError
from trips.fusion import FusionEncoder
from trips.importers.files import TensorFile
from trips.importers.originals import Activation
from trips.importers.report import ImportReport, first_names
from trips.importers.towers import Source, find_tensors, load_text_tower, load_vision_tower, read_config
from trips.model import TripsModel, TripsPreTrainedModel
from trips.options import Architecture
from trips.single_stream import build_encoder

logger = logging.getLogger("trips")

ModelT = TypeVar("ModelT", bound=TripsPreTrainedModel)


def build_model_from_towers(
    vision: Source,
    text: Source,
    task: type[ModelT] = TripsModel,
    *,
    architecture: Architecture = "dual",
    num_text_layers: int = 6,
    num_fusion_layers: int = 6,
    num_decoder_layers: int | None = None,
    selection: SelectionConfig | None = None,
    pretraining: PretrainingConfig | None = None,
    reasoning: ReasoningConfig | None = None,
    calibrated_layers: Sequence[int] = (),
    dropout: float | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pickled: bool = False,
) -> tuple[ModelT, ImportReport]:
    """A TRIPS model from a vision tower and a BERT: first layers to the text encoder, last to the fusion encoder.

    Where text and fusion layers together exceed the tower's, the last ones are used twice (a copy). Cross-attention
    has no public counterpart and starts as a copy of its layer's self-attention. A decoder copies the fusion encoder
    and the word embeddings (after ALBEF).
    The head for masked tokens is the BERT's own where its checkpoint has one; a momentum teacher starts as the model.

    Args:
        vision, text: local folders, hub names or .safetensors files.
        task: the model class.
        architecture: "single" makes TRIPS-S: the vision tower becomes the joint stack, of the text tower it takes the
            embeddings, and its layers only for a decoder.
        num_text_layers: n of the first layers. num_fusion_layers: n of the last layers. Both of a dual-stream model.
        num_decoder_layers: of the answer decoder, as many as fusion layers unless given.
        selection: default setting of the model.
        pretraining: objectives and teacher, for `TripsForPreTraining`.
        reasoning: images and their fusion, for `TripsForVisualReasoning`.
        calibrated_layers: vision layers that get room for a fitted guide (zeros); see `trips.calibrate`.
        dropout: replaces the text tower's dropout where given.
        bos_token_id, eos_token_id: the tokenizer's [CLS] and [SEP], for a decoder.
        image_size, num_heads, activation: of the vision tower, see `load_vision_tower`.
        pickled: whether towers may be files of `torch.save`.
    Returns:
        the model in float32 and the account of its tensors.
    Raises:
        CheckpointError, UnsupportedModelError: see `load_vision_tower`. ConfigError: more layers asked for than there.
    """
    if num_decoder_layers is None:
        num_decoder_layers = num_fusion_layers
    report = ImportReport()
    vision_tower = load_vision_tower(
        vision, report, image_size=image_size, num_heads=num_heads, activation=activation, pickled=pickled
    )
    text_tower = load_text_tower(text, report, pickled=pickled)
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
        architecture=architecture,
        calibrated_layers=tuple(calibrated_layers),
    )
    model = build_encoder(config) if task is TripsModel else task(config)
    trips = getattr(model, "trips", model)
    trips.vision.tower.load_state_dict(vision_tower.state_dict())
    trips.text.embeddings.load_state_dict(text_tower.embeddings.state_dict())
    layers = text_tower.encoder.layer
    if architecture == "dual":
        _copy_layers(layers[:num_text_layers], trips.text.encoder.layer)
        _copy_fusion(layers[total - num_fusion_layers :], trips.fusion)
    if (decoder := getattr(model, "decoder", None)) is not None:
        decoder.bert.embeddings.load_state_dict(text_tower.embeddings.state_dict())
        _copy_layers(layers[total - len(decoder.bert.encoder.layer) :], decoder.bert.encoder.layer)
    if (head := getattr(model, "mlm_head", None)) is not None:
        _load_mlm_head(head, text, report, pickled)
    _account(model, report)
    if (reset := getattr(model, "reset_momentum", None)) is not None:
        reset()
    logger.info("imported %s and %s: %s", _name(vision), _name(text), report)
    return model, report


def _name(source: Source) -> str:
    return str(source.path if isinstance(source, TensorFile) else source)


_MLM_HEAD = "cls.predictions."


def _load_mlm_head(head: nn.Module, text: Source, report: ImportReport, pickled: bool) -> None:
    """The head for masked tokens of a BERT's checkpoint, noted as loaded; without one it stays as it is."""
    found = [name for name in report.ignored if name.startswith(f"text: {_MLM_HEAD}")]
    if not any(".transform." in name for name in found):
        return
    if (file := find_tensors(text, pickled=pickled)) is not None:
        state = {name: value for name, value in file.tensors.items() if name.startswith(_MLM_HEAD)}
        state = {name.removeprefix(_MLM_HEAD): value for name, value in state.items()}
        state = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): value for name, value in state.items()}
        missing = set(head.state_dict()) - set(state)
    else:
        bert, info = BertForMaskedLM.from_pretrained(
            str(text), config=read_config(text), dtype=torch.float32, output_loading_info=True
        )
        state = bert.cls.predictions.state_dict()
        missing = {name for name in head.state_dict() if _MLM_HEAD + name in info["missing_keys"]}
    if missing:
        raise CheckpointError("missing keys", item=_name(text), found=first_names(_MLM_HEAD + name for name in missing))
    head.load_state_dict({name: value for name, value in state.items() if not name.startswith("decoder.")})
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
            raise CheckpointError(
                "layers do not correspond", item="text tower", found=first_names([*missing, *unexpected])
            )
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
        raise CheckpointError("layers do not correspond", item="text tower", found=first_names([*missing, *unexpected]))


def _account(model: nn.Module, report: ImportReport) -> None:
    """Sort every tensor of the new model into loaded and initialised; a momentum copy is what its original is."""
    new = ("decoder.cls.", "fusion.image_projection.", "vision.guide_map", "modality_embeddings.")
    heads = ("image_projection.", "text_projection.", "itm_head.", "mlm_head.", "reasoning_head.", "temperature",
             "queue.")  # fmt: skip
    tied = "decoder.cls.predictions.decoder.weight"  # the word embeddings under a second name
    known, resized = set(report.loaded), tuple(f"vision.tower.{name}" for name in report.resized)
    report.resized = []
    for name in model.state_dict():
        original = name.removeprefix("momentum.")
        is_new = name != tied and (any(part in name for part in new) or original.startswith(heads))
        if resized and name.endswith(resized):
            report.resized.append(name)
        elif name not in known:
            (report.initialised if is_new and original not in known else report.loaded).append(name)
