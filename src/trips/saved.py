"""What training leaves behind, opened for use: model, processor and the list of answers, from a folder or the hub.

Not part of the paper. Nothing of `trips.train` is needed to use what it wrote.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import cached_file

from trips.config import TripsConfig
from trips.data.loading import AnswerList
from trips.environment import choose_device
from trips.errors import CheckpointError, TripsError
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor

MODEL_FOLDER, ANSWERS_FILE = "model", "answers.json"  # in the folder of a run
_CONFIG_FILE = "config.json"
# Classes that can be opened, and the modules that hold them.
_MODULES = {
    "TripsForQuestionAnswering": "trips.tasks.vqa",
    "TripsForPreTraining": "trips.tasks.pretraining",
    "TripsForImageTextRetrieval": "trips.tasks.retrieval",
    "TripsForVisualReasoning": "trips.tasks.nlvr2",
}


@dataclass(frozen=True)
class SavedModel:
    """A trained model with what belongs to it.

    Attributes:
        model: of a class of `trips.tasks`, in evaluation mode.
        processor: that of its training.
        answers: the candidates of a question answering run, None where there are none.
    """

    model: TripsPreTrainedModel
    processor: TripsProcessor
    answers: AnswerList | None


@dataclass(frozen=True)
class SavedSettings:
    """A trained model without its weights.

    Attributes:
        config: of the model. processor, answers: see `SavedModel`.
    """

    config: TripsConfig
    processor: TripsProcessor
    answers: AnswerList | None


def open_saved(path: str | Path, device: str | torch.device | None = None) -> SavedModel:
    """Open the folder of a finished run, a saved model's folder, or a name on the Hugging Face hub.

    Args:
        path: the folder or name; the class of the model is the one that its configuration names.
        device: where to compute; the GPU where there is one.
    Raises:
        CheckpointError: no such model, one that is damaged or of another library, or without weights of its own for
            some part. ConfigError: no such device.
    """
    device = choose_device(device)
    source = _source_of(path)
    processor = TripsProcessor.from_pretrained(source)
    model = _load_model(str(source)).to(device)
    return SavedModel(model, processor, _load_answers(Path(path), source))


def open_settings(path: str | Path) -> SavedSettings:
    """What `open_saved` opens, without the weights: for questions that the sizes alone answer.

    Raises:
        CheckpointError: no such model, one that is damaged or of another library.
    """
    source = _source_of(path)
    processor = TripsProcessor.from_pretrained(source)
    with _reading("configuration", str(source)):
        _class_name(str(source))
        config = TripsConfig.from_pretrained(source)
    return SavedSettings(config, processor, _load_answers(Path(path), source))


def _source_of(path: str | Path) -> Path:
    """The model's folder of a run, or what was given: a model's folder or a name on the hub."""
    folder = Path(path)
    if (folder / MODEL_FOLDER).is_dir():
        return folder / MODEL_FOLDER
    if folder.is_dir() and not (folder / _CONFIG_FILE).is_file():
        raise CheckpointError(
            "neither the folder of a finished run nor a saved model",
            item=path,
            expected=f"{MODEL_FOLDER} or {_CONFIG_FILE} in it",
        )
    return folder


def _load_model(source: str) -> TripsPreTrainedModel:
    with _reading("model", source):
        name = _class_name(source)
        model_class = getattr(importlib.import_module(_MODULES[name]), name)
        model, report = model_class.from_pretrained(source, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise CheckpointError("weights are missing", item=source, found=missing[:3], expected=f"all {name} has")
    return model


def _class_name(source: str) -> str:
    """The class that a configuration names, if it is one of `_MODULES`."""
    values, _ = TripsConfig.get_config_dict(source)
    names = values.get("architectures") or []
    if values.get("model_type") != TripsConfig.model_type or not names or names[0] not in _MODULES:
        raise CheckpointError(
            "not a trained model of trips", item=source, found=names, expected=f"one of {', '.join(_MODULES)}"
        )
    return names[0]


@contextmanager
def _reading(what: str, source: str) -> Iterator[None]:
    """transformers and safetensors raise many types for damaged files: make one of them."""
    try:
        yield
    except TripsError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} cannot be read ({reason})", item=source) from error


def _load_answers(folder: Path, source: Path) -> AnswerList | None:
    """Of a run or a model's folder, or of the run that the folder of a model belongs to."""
    places = [folder, source, *([source.parent] if source.name == MODEL_FOLDER else [])]
    if folder.is_dir():
        found = [place / ANSWERS_FILE for place in places if (place / ANSWERS_FILE).is_file()]
        return AnswerList.load(found[0]) if found else None
    try:
        return AnswerList.load(cached_file(str(source), ANSWERS_FILE))
    except OSError:  # a model on the hub that has none
        return None
