"""Which model and which index the page shows: those named, else the quick-start's, else the one that made the index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trips.demo.comparison import check_shown
from trips.errors import CheckpointError, ConfigError, MissingDependencyError
from trips.pipeline import TripsPipeline, load

if TYPE_CHECKING:
    from trips.quickstart.plan import Scale
    from trips.search.index import ImageIndex

QUICKSTART = Path("runs/quickstart")


@dataclass(frozen=True)
class Shown:
    """What the page is about.

    Attributes:
        name: of the model, as it was given.
        pipeline: the model.
        index: to search, None where there is none; it may be another model's.
    """

    name: str
    pipeline: TripsPipeline
    index: ImageIndex | None = None


def open_shown(
    model: str | Path | None = None,
    index: str | Path | None = None,
    *,
    train: bool = False,
    quickstart: str | Path = QUICKSTART,
    scale: Scale = "full",
) -> Shown:
    """Open model and index.

    Args:
        model: what `trips.load` opens; without it the model of the index, else that of the quick-start.
        index: folder of an index, or one that was indexed.
        train: train the quick-start's model where there is none yet.
        quickstart: its folder. scale: of its training.
    Raises:
        CheckpointError: no model, also none of the quick-start yet: the message has the command that trains it; no
            index, or one of another model. ConfigError: to train and a model. UnsupportedModelError: a model of
            several images. MissingDependencyError: what training needs is not installed.
    """
    if train and (model is not None or index is not None):
        raise ConfigError("trains the quick-start's model", item="--train", expected="no --model and no --index")
    if model is None:
        model = _made_by(index) if index is not None else _quickstart_model(Path(quickstart), train, scale)
    pipeline = load(model)
    check_shown(pipeline)
    if index is None:
        return Shown(str(model), pipeline)
    from trips.search.index import ImageIndex

    searching = pipeline if "index" in pipeline.verbs else load(_made_by(index))
    return Shown(str(model), pipeline, ImageIndex.open(index, searching))


def _quickstart_model(folder: Path, train: bool, scale: Scale) -> Path:
    model = folder / "model"
    if (model / "config.json").is_file():
        return model
    if not train:
        raise CheckpointError(
            "there is no model yet",
            item=str(model),
            hint='"trips demo --train" trains a small one in minutes; "trips demo --model MODEL" shows yours',
        )
    try:
        from trips.quickstart import run_quickstart
    except ImportError as error:
        hint = 'pip install "trips-vlm[demo,train,figures]"'
        raise MissingDependencyError("is not installed", item=str(error.name).partition(".")[0], hint=hint) from error

    run_quickstart(folder, scale=scale)
    return model


def _made_by(index: str | Path) -> str:
    from trips.search.run import model_of

    name = model_of(index)
    if name is None:
        raise CheckpointError("does not say which model made it", item=str(index), hint="name it: --model=MODEL")
    return name
