"""trips: text-relevant image patch selection for vision-language models (TRIPS, EMNLP 2022).

The public names, imported when they are first used: ``import trips`` alone loads neither torch nor transformers. What
is not listed in ``__all__`` may change without notice.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trips.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ShapeError,
    TripsError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from trips.acceleration import accelerate, explain_last, restore
    from trips.bench.speed import benchmark
    from trips.calibration import calibrate
    from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig, TripsConfig
    from trips.export import export_model
    from trips.importers import build_model_from_towers, import_checkpoint
    from trips.model import TripsModel
    from trips.pipeline import TripsPipeline, load
    from trips.processor import TripsProcessor
    from trips.search.index import ImageIndex
    from trips.single_stream import TripsSingleStreamModel
    from trips.tasks.nlvr2 import TripsForVisualReasoning
    from trips.tasks.pretraining import TripsForPreTraining
    from trips.tasks.retrieval import TripsForImageTextRetrieval
    from trips.tasks.vqa import TripsForQuestionAnswering

    __version__: str

_LAZY = {
    "ImageIndex": "trips.search.index",
    "PretrainingConfig": "trips.config",
    "ReasoningConfig": "trips.config",
    "SelectionConfig": "trips.config",
    "TripsConfig": "trips.config",
    "TripsForImageTextRetrieval": "trips.tasks.retrieval",
    "TripsForPreTraining": "trips.tasks.pretraining",
    "TripsForQuestionAnswering": "trips.tasks.vqa",
    "TripsForVisualReasoning": "trips.tasks.nlvr2",
    "TripsModel": "trips.model",
    "TripsPipeline": "trips.pipeline",
    "TripsProcessor": "trips.processor",
    "TripsSingleStreamModel": "trips.single_stream",
    "accelerate": "trips.acceleration",
    "benchmark": "trips.bench.speed",
    "build_model_from_towers": "trips.importers",
    "calibrate": "trips.calibration",
    "explain_last": "trips.acceleration",
    "export_model": "trips.export",
    "import_checkpoint": "trips.importers",
    "load": "trips.pipeline",
    "restore": "trips.acceleration",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ImageIndex",
    "MissingDependencyError",
    "PretrainingConfig",
    "ReasoningConfig",
    "SelectionConfig",
    "ShapeError",
    "TripsConfig",
    "TripsError",
    "TripsForImageTextRetrieval",
    "TripsForPreTraining",
    "TripsForQuestionAnswering",
    "TripsForVisualReasoning",
    "TripsModel",
    "TripsPipeline",
    "TripsProcessor",
    "TripsSingleStreamModel",
    "UnsupportedModelError",
    "__version__",
    "accelerate",
    "benchmark",
    "build_model_from_towers",
    "calibrate",
    "explain_last",
    "export_model",
    "import_checkpoint",
    "load",
    "restore",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use; see PEP 562."""
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'trips' has no attribute {name!r}")
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Version of the installed distribution; a checkout that is only on the path has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("trips-vlm")
    except PackageNotFoundError:
        return "0+unknown"
