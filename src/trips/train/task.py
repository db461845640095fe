"""What a task gives to a run: its model, its data, and how both are measured.

`trips.train.run` knows no task; it asks `task_module` for the module of the recipe's task, whose ``build`` and ``load``
return `TaskParts`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from trips.data.records import BadSamples
from trips.errors import CheckpointError, TripsError
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.saved import MODEL_FOLDER
from trips.train.settings import TrainingData
from trips.train.speed import FlopsPerSample

_MODULES = {
    "vqa": "trips.train.vqa",
    "pretrain": "trips.train.pretraining",
    "retrieval": "trips.train.retrieval",
    "nlvr2": "trips.train.reasoning",
}


@dataclass
class TaskParts:
    """A task's share of a run.

    Attributes:
        model: in training mode when new.
        processor: saved beside the model.
        bad_samples: the count that all readers of the run share.
        measure: figures of the model as it is now on the recipe's test data.
        write_measured: writes what the last measurement found, beside its figures, into a folder.
        num_samples: images of one epoch, 0 for a loaded model.
        data: training batches, None for a loaded model.
        write_files: writes what the task needs beside the model into the run's folder.
        facts: what results.json says of the data beside the measured figures.
        measure_untrained: measure before the first step too, where that is a figure to compare with.
        flops_per_sample: operations of training on one text where every part learns, for the share of the device's
            peak; see `trips.train.speed.Speedometer`.
    """

    model: TripsPreTrainedModel
    processor: TripsProcessor
    bad_samples: BadSamples
    measure: Callable[[], dict[str, Any]]
    write_measured: Callable[[Path], None] = lambda folder: None
    num_samples: int = 0
    data: TrainingData | None = None
    write_files: Callable[[Path], None] = lambda folder: None
    facts: dict[str, Any] | None = None
    measure_untrained: bool = False
    flops_per_sample: FlopsPerSample | None = None


def task_module(task: str) -> ModuleType:
    """Module of a recipe's ``task``, with ``build(recipe)`` and ``load(recipe, run_dir)``."""
    return importlib.import_module(_MODULES[task])


def load_trained(model_class: type[TripsPreTrainedModel], run_dir: Path) -> tuple[TripsPreTrainedModel, TripsProcessor]:
    """Model and processor of a finished run, on the GPU where there is one.

    Raises:
        CheckpointError: the folder is not that of a finished run, or damaged.
    """
    folder = run_dir / MODEL_FOLDER
    if not folder.is_dir():
        raise CheckpointError("is not the folder of a finished run", item=run_dir, expected=f"{MODEL_FOLDER} in it")
    processor = TripsProcessor.from_pretrained(folder)
    try:
        model = model_class.from_pretrained(folder)
    except TripsError:
        raise
    except Exception as error:  # transformers and safetensors raise many types for damaged files
        raise CheckpointError(f"model cannot be read ({str(error).splitlines()[0]})", item=folder) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor
