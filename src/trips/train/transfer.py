"""Fine-tuning starts from a pre-trained model: which of its parts go where (section 5.1, after ALBEF)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from trips.config import TripsConfig
from trips.errors import CheckpointError, TripsError
from trips.guide_query import CalibratedQueries
from trips.model import TripsPreTrainedModel
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.train.checkpoint import state_problems

logger = logging.getLogger("trips")


def start_from(model: TripsPreTrainedModel, folder: Path) -> None:
    """Give a new model the weights of a pre-trained one, in place.

    Text encoder, vision tower and fusion encoder are taken as they are. A pre-training or retrieval model also takes
    projections, temperature and heads; an answer decoder starts from the fusion encoder, the word embeddings and the
    head for masked tokens (which a retrieval model does not have: its part of the decoder then stays as it was built),
    as far as it has no more layers than the fusion encoder. Where a text has several images, each image's path through
    the fusion encoder starts as a copy of it and the classifier at random; such a model may also start from one of its
    own class, and then takes the classifier too, without the last layer if that learnt another objective. TRIPS-S has
    no fusion encoder that a decoder could start from. The fitted guide of a calibrated model is taken by a model that
    has room for it, which one has whose recipe says ``guide_query: calibrated``; others leave it behind.

    Args:
        model: of any task, of the same towers.
        folder: of `TripsForPreTraining`, or, but for a pre-training model, of `TripsForImageTextRetrieval`; that of
            `TripsForVisualReasoning` for its like.
    Raises:
        CheckpointError: no such model, or another architecture; names the first parameters that do not fit.
    """
    if isinstance(model, TripsForImageTextRetrieval):
        source = _read(folder, model, type(model))  # a retrieval model leaves the head for masked tokens where it is
        for name in ("trips", *(head for head in model.heads if head != "temperature")):
            _copy(getattr(source, name), getattr(model, name), folder)
        model.temperature.data.copy_(source.temperature.data)
        model.reset_momentum()
        logger.info("started from %s", folder)
        return
    reasons = isinstance(model, TripsForVisualReasoning)
    kinds = (TripsForPreTraining, TripsForImageTextRetrieval)
    source = _read(folder, model, *kinds, *([TripsForVisualReasoning] if reasons else []))
    if reasons:
        _start_reasoning(source, model, folder)
        logger.info("started from %s", folder)
        return
    _copy(source.trips, model.trips, folder)
    if (decoder := getattr(model, "decoder", None)) is not None:
        layers = decoder.bert.encoder.layer
        if source.config.architecture == "single":
            logger.info("%s has no fusion encoder: layers of the decoder stay as they were built", folder)
        elif len(layers) > len(source.trips.fusion.layer):
            raise CheckpointError(
                "has fewer fusion layers than the decoder needs",
                item=folder,
                found=len(source.trips.fusion.layer),
                expected=len(layers),
            )
        else:
            for theirs, ours in zip(list(source.trips.fusion.layer)[-len(layers) :], layers, strict=True):
                _copy(theirs, ours, folder)
        _copy(source.trips.text.embeddings, decoder.bert.embeddings, folder)
        if isinstance(source, TripsForPreTraining):
            _copy(source.mlm_head.transform, decoder.cls.predictions.transform, folder)
            decoder.cls.predictions.bias.data.copy_(source.mlm_head.bias.data)
        else:
            logger.info("%s has no head for masked tokens: that of the decoder stays as it was built", folder)
    logger.info("started from %s", folder)


def saved_config(folder: Path) -> TripsConfig:
    """The configuration of a saved model; `CheckpointError` if there is none, or it cannot be read."""
    if not (folder / "config.json").is_file():
        hint = f"a run keeps it in {folder / 'model'}" if (folder / "model").is_dir() else None
        expected = "config.json and model.safetensors in it"
        raise CheckpointError("is not a saved model", item=folder, expected=expected, hint=hint)
    with _reading(folder):
        return TripsConfig.from_pretrained(folder)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except TripsError:
        raise
    except Exception as error:  # transformers and safetensors raise many types for damaged files
        raise CheckpointError(f"model cannot be read ({str(error).splitlines()[0]})", item=folder) from error


def _read(folder: Path, model: TripsPreTrainedModel, *kinds: type[TripsPreTrainedModel]) -> TripsPreTrainedModel:
    """The saved model, of the class that wrote it if that is among `kinds`, else of the first of them.

    Without the fitted guide for which the new `model` has no room.
    """
    written = saved_config(folder).architectures or ()
    kind = next((kind for kind in kinds if kind.__name__ in written), kinds[0])
    with _reading(folder):
        source, info = kind.from_pretrained(folder, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):  # they would be random here, without a word
        tasks = "pretrain" if kinds == (TripsForPreTraining,) else "pretrain or retrieval"
        raise CheckpointError(
            "is not a pre-trained model",
            item=folder,
            found=f"{missing[0]} and {len(missing) - 1} more parameters missing",
            expected=f"the model folder of a run whose task is {tasks}",
        )
    if source.config.calibrated_layers and not model.config.calibrated_layers:
        logger.info('%s: its fitted guide is left behind; model.selection.guide_query="calibrated" takes it', folder)
        source.trips.vision.calibration = CalibratedQueries((), 0, 0)
    return source


def _start_reasoning(source: TripsPreTrainedModel, model: TripsForVisualReasoning, folder: Path) -> None:
    if model.config.architecture == "single" and not isinstance(source, TripsForVisualReasoning):
        _copy(source.trips, model.trips, folder)
        return
    if not isinstance(source, TripsForVisualReasoning):
        for part in ("text", "vision"):
            _copy(getattr(source.trips, part), getattr(model.trips, part), folder)
        fusion = model.trips.fusion
        _copy(fusion.state_from_single(source.trips.fusion.state_dict()), fusion, folder)
        return
    _copy(source.trips, model.trips, folder)
    same = source.config.reasoning.objective == model.config.reasoning.objective
    end = None if same else -1
    _copy(source.reasoning_head[:end], model.reasoning_head[:end], folder)


def _copy(source: nn.Module | Mapping[str, Tensor], target: nn.Module, folder: Path) -> None:
    theirs = source.state_dict() if isinstance(source, nn.Module) else source
    if wrong := state_problems(target.state_dict(), theirs):
        raise CheckpointError(
            "is of another architecture",
            item=folder,
            found="; ".join(wrong[:3]),
            hint="the recipe's towers and numbers of layers (and of images) must be those of the earlier run",
        )
    target.load_state_dict(theirs)
