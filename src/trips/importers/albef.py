"""Models from ALBEF's own checkpoints (section 4.1: the paper's training, data and heads are ALBEF's).

Their vision tower is a ViT in timm's form, their texts end without [SEP] and their images have CLIP's mean and
deviation, which are this library's defaults. The selection has no weights, so that any setting serves.

Dimensions: Q queue length, P projection width.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig, TripsConfig, bert_variant
from trips.errors import CheckpointError, UnsupportedModelError
from trips.importers.albef_names import VISION, AlbefModel, Kind, is_albef, sort_albef
from trips.importers.files import TensorFile, read_tensors
from trips.importers.originals import read_original
from trips.importers.report import ImportReport, first_names
from trips.importers.towers import bert_config, load_state, resize_tower
from trips.model import TripsPreTrainedModel
from trips.momentum import NO_IMAGE
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.tasks.vqa import TripsForQuestionAnswering

logger = logging.getLogger("trips")

TASKS: dict[Kind, type[TripsPreTrainedModel]] = {
    "albef": TripsForPreTraining,
    "albef_retrieval": TripsForImageTextRetrieval,
    "albef_vqa": TripsForQuestionAnswering,
    "albef_nlvr": TripsForVisualReasoning,
}
_BERT_VOCABULARY, _CLS, _SEP = 30522, 101, 102  # BERT's own vocabulary, which ALBEF uses
_TOWER = "trips.vision.tower."


def load_albef(
    path: str | Path | TensorFile,
    *,
    selection: SelectionConfig | None = None,
    pretraining: PretrainingConfig | None = None,
    dropout: float | None = None,
    image_size: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pickled: bool = False,
) -> tuple[TripsPreTrainedModel, ImportReport]:
    """A model of this library from a checkpoint in ALBEF's original layout.

    A pre-training checkpoint gives `TripsForPreTraining`, one of retrieval `TripsForImageTextRetrieval`, both with
    ALBEF's momentum copies and, where the sizes agree, its queue; one of VQA gives `TripsForQuestionAnswering`, one of
    NLVR2 (or of text assignment, whose classifier is left out) `TripsForVisualReasoning` with stacked blocks.

    Args:
        path: .safetensors, or with `pickled` a .pth file; or what `read_tensors` has read.
        selection: default setting of the model.
        pretraining: objectives and teacher; its projection width is the file's. By default the queue is as long as the
            file's.
        dropout: replaces BERT's dropout where given.
        image_size: pixels of the square that the position table shall be of; as stored by default.
        bos_token_id, eos_token_id: the tokenizer's [CLS] and [SEP]; BERT's own where the vocabulary is BERT's.
    Returns:
        the model in float32, in evaluation mode, and the account of its tensors and of the file's.
    Raises:
        CheckpointError: unreadable; a key missing, unexpected or of another shape, by its name in the file.
        UnsupportedModelError: BLIP's form, another classifier, towers of unlike width.
    """
    file = path if isinstance(path, TensorFile) else read_tensors(path, pickled=pickled)
    if not is_albef(file.tensors):
        raise CheckpointError(
            "not a checkpoint of ALBEF",
            item=file.path,
            found=first_names(file.tensors),
            expected="visual_encoder.* and text_encoder.*",
        )
    source, report = sort_albef(file), ImportReport()
    tower = _tower(source, file, report, image_size, VISION)
    if tower.config.hidden_size != _text_width(source, file):
        raise UnsupportedModelError(
            "vision and text are of unlike width, and the cross-attention takes the one to the other",
            item=file.path,
            found=(tower.config.hidden_size, _text_width(source, file)),
        )
    if bos_token_id is None and len(source.state["trips.text.embeddings.word_embeddings.weight"]) == _BERT_VOCABULARY:
        bos_token_id, eos_token_id = _CLS, _SEP
    shared = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    shared |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    config = _config(source, file, tower, selection, pretraining, shared)
    model = TASKS[source.kind](config).eval()
    state = {**source.state, **{_TOWER + name: value for name, value in tower.state_dict().items()}}
    new = ("reasoning_head.",) if not any(name.startswith("reasoning_head.") for name in state) else ()
    _fill(model, state, source, file, new)
    report.ignored += [f"file: {name}" for name in source.ignored]
    if not _load_training_state(model, source, file, report, image_size):
        new = (*new, "queue.")
    _account(model, new, report)
    logger.info("imported %s as %s: %s", file.path, type(model).__name__, report)
    return model, report


def _tower(
    source: AlbefModel, file: TensorFile, report: ImportReport, image_size: int | None, prefix: str
) -> PreTrainedModel:
    """The ViT, from tensors under timm's names; messages name them with their prefix."""
    named = TensorFile(file.path, {prefix + name: value for name, value in source.vision.items()})
    original = read_original(named, known=("timm", prefix))
    report.ignored += [f"file: {name}" for name in original.ignored]
    tower = load_state(original.config, original.state, file.path)
    return tower if image_size is None else resize_tower(tower, image_size, report)


def _text_width(source: AlbefModel, file: TensorFile) -> int:
    name = "trips.text.embeddings.word_embeddings.weight"
    if name not in source.state:
        raise CheckpointError("missing keys", item=file.path, found=[source.name_in_file(name)])
    return source.state[name].shape[1]


def _config(
    source: AlbefModel,
    file: TensorFile,
    tower: PreTrainedModel,
    selection: SelectionConfig | None,
    pretraining: PretrainingConfig | None,
    shared: dict[str, object],
) -> TripsConfig:
    root = "trips.text."
    encoder = {name.removeprefix(root): value for name, value in source.state.items() if name.startswith(root)}
    text = bert_config(encoder, file, **shared)
    images = 2 if source.kind == "albef_nlvr" else 1
    crossed = {"is_decoder": True, "add_cross_attention": True}
    fusion: BertConfig = bert_variant(text, num_hidden_layers=source.num_blocks // images, **crossed)
    layers = {int(name.split(".")[4]) for name in source.state if name.startswith("decoder.bert.encoder.layer.")}
    decoder = bert_variant(fusion, num_hidden_layers=max(layers) + 1) if layers else fusion
    if (projection := source.state.get("image_projection.weight")) is not None:
        length = source.queue["image_features"].shape[1] if "image_features" in source.queue else None
        if pretraining is None:
            pretraining = PretrainingConfig() if length is None else PretrainingConfig(queue_size=length)
        pretraining = pretraining.replace(projection_dim=projection.shape[0])
    return TripsConfig(
        vision_config=tower.config,
        text_config=text,
        fusion_encoder_config=fusion,
        decoder_config=decoder,
        selection=selection,
        pretraining=pretraining,
        reasoning=ReasoningConfig(num_images=2, fusion="stacked") if images == 2 else None,
    )


def _fill(
    model: nn.Module, state: dict[str, Tensor], source: AlbefModel, file: TensorFile, new: tuple[str, ...]
) -> None:
    """Load what has to be complete: all of the model but its training state, what is tied, and what is new."""
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(("momentum.", "queue."))}
    tied = ("decoder.cls.predictions.decoder.",)
    wanted = {name: value for name, value in wanted.items() if not name.startswith((*tied, *new))}
    _compare(wanted, state, source, file)
    if "temperature" in state:
        state = {**state, "temperature": state["temperature"].reshape(1)}
    model.load_state_dict(state, strict=False)


def _compare(wanted: dict[str, Tensor], state: dict[str, Tensor], source: AlbefModel, file: TensorFile) -> None:
    missing = [source.name_in_file(name) for name in wanted if name not in state]
    unexpected = [source.source.get(name, name) for name in state if name not in wanted]
    wrong = [
        f"{source.source.get(name, name)} of shape {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape and (name != "temperature" or state[name].numel() != 1)
    ]
    for problem, names in (
        ("missing keys", missing),
        ("keys of another shape", wrong),
        ("unexpected keys", unexpected),
    ):
        if names:
            raise CheckpointError(problem, item=file.path, found=first_names(names))


def _load_training_state(
    model: nn.Module, source: AlbefModel, file: TensorFile, report: ImportReport, image_size: int | None
) -> bool:
    """Momentum copies and queue, where the class has a place for them; named as ignored where it has not.

    Returns:
        whether the queue is the file's.
    """
    teacher, copies = getattr(model, "momentum", None), source.momentum
    if getattr(model, "reset_momentum", None) is not None:
        model.reset_momentum()
    if copies is not None:
        names = [*copies.names, *copies.ignored, *(f"visual_encoder_m.{name}" for name in copies.vision)]
        if teacher is None:
            report.ignored += [f"file: {name}" for name in sorted(names)]
        else:
            report.ignored += [f"file: {name}" for name in copies.ignored]
            tower = _tower(copies, file, ImportReport(), image_size, "visual_encoder_m.")
            state = {**copies.state, **{_TOWER + name: value for name, value in tower.state_dict().items()}}
            _compare(teacher.state_dict(), state, copies, file)
            teacher.load_state_dict(state)
    queue = getattr(model, "queue", None)
    images = source.queue.get("image_features")
    if queue is None or images is None or images.shape != queue.image_features.T.shape:
        theirs = {"image_features": "image_queue", "text_features": "text_queue", "image_ids": "idx_queue",
                  "pointer": "queue_ptr"}  # fmt: skip
        report.ignored += [f"file: {theirs[name]}" for name in source.queue]
        return False
    _load_queue(queue, source.queue, file)
    return True


@torch.no_grad()
def _load_queue(queue: nn.Module, theirs: dict[str, Tensor], file: TensorFile) -> None:
    """ALBEF's (P, Q) columns become rows; its rows without an image have the id -100, and none have one without ids."""
    text, ids, pointer = theirs.get("text_features"), theirs.get("image_ids"), theirs.get("pointer")
    if text is None or text.shape != queue.text_features.T.shape:
        raise CheckpointError(
            "queues do not fit each other",
            item=f"{file.path}: text_queue",
            found=None if text is None else tuple(text.shape),
            expected=tuple(queue.text_features.T.shape),
        )
    queue.image_features.copy_(theirs["image_features"].T)
    queue.text_features.copy_(text.T)
    queue.image_ids.fill_(NO_IMAGE)
    if ids is not None:
        if ids.numel() != len(queue.image_ids):
            raise CheckpointError("does not fit the queue", item=f"{file.path}: idx_queue", found=tuple(ids.shape))
        queue.image_ids.copy_(ids.reshape(-1).long().clamp(min=NO_IMAGE))
    if pointer is not None:
        queue.pointer.fill_(int(pointer.reshape(-1)[0]) % len(queue.image_ids))


def _account(model: nn.Module, new: tuple[str, ...], report: ImportReport) -> None:
    resized = tuple(f"vision.tower.{name}" for name in report.resized)
    report.resized = []
    for name in model.state_dict():
        if new and name.startswith(new):
            report.initialised.append(name)
        elif resized and name.endswith(resized):
            report.resized.append(name)
        else:
            report.loaded.append(name)
