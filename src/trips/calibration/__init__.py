"""A text guide for a model that was never trained to select, from its own images and texts (beyond the paper).

    found = trips.calibrate("runs/vqa", "questions.jsonl", "runs/vqa_fast", layers=(5, 10), keep_rate=0.5)
    print(found.guides["literal"].teacher_mass, found.guides["calibrated"].teacher_mass)

No labels are needed. The teacher is the model itself: where its fusion encoder looks when it has all patches. What is
fitted is one affine map from t_cls to the query of Eq. 2 for each location, in place of the layer's own W_q, as
buffers. No parameter changes, so that without selection (keep rate 1, guide "none"), for text-free features and for
other guides the model's outputs are bitwise what they were. What the guide costs in accuracy at the chosen keep rate
still has to be measured on the task.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trips.calibration.fit import Observed, fit_query, observe
from trips.calibration.measure import GuideFigures, measure, teachers_own
from trips.calibration.pairs import Entry, Pair, TextGroup, read_groups
from trips.config import SelectionConfig, check_locations, num_kept
from trips.data.loading import AnswerList
from trips.data.records import BadSamples
from trips.errors import ConfigError, DataError, UnsupportedModelError
from trips.guide_query import CalibratedQueries
from trips.model import TripsPreTrainedModel
from trips.options import is_number
from trips.pipeline import TripsPipeline
from trips.processor import TripsProcessor
from trips.processor_checks import positive_int
from trips.saved import ANSWERS_FILE, open_saved
from trips.vision import VisionEncoder

__all__ = ["Calibration", "GuideFigures", "calibrate"]

logger = logging.getLogger("trips")

LEAST_TEXTS = 32  # of each part: fewer say nothing


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` has made, and how it compares on held-out images.

    Attributes:
        pipeline: the calibrated model, ready for use.
        selection: what it now selects with.
        num_images, num_texts: what was fitted to. num_held_out: texts behind the figures, about other images.
        ridges: of the fit of each location.
        guides: figures of "literal" (the model before), "calibrated", "image" and "random", at equal keep rates.
        teachers_own: teacher mass of the best k patches at each location, which bounds that of the guides.
        chance: share of the patches left behind each location.
        bad_samples: what could not be read, and why.
        seconds: wall time. written_to: folder, or None.
    """

    pipeline: TripsPipeline = field(repr=False)
    selection: SelectionConfig
    num_images: int
    num_texts: int
    num_held_out: int
    ridges: tuple[float, ...]
    guides: dict[str, GuideFigures]
    teachers_own: tuple[float, ...]
    chance: tuple[float, ...]
    bad_samples: dict[str, str]
    seconds: float
    written_to: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the model."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "pipeline"}
        guides = {name: dataclasses.asdict(figures) for name, figures in self.guides.items()}
        return {**values, "selection": self.selection.to_dict(), "guides": guides}


def calibrate(
    model: str | Path | TripsPipeline,
    data: Entry | Sequence[Entry] | Sequence[Pair],
    out: str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    keep_rate: float | Sequence[float] | None = None,
    images: Sequence[Entry] = (),
    columns: Mapping[str, str] | None = None,
    pairs: int = 2000,
    held_out: float = 0.2,
    minutes: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Calibration:
    """Teach a model what a text asks for, from images and texts alone; minutes on a CPU.

    Args:
        model: folder or name, as `trips.load` takes it, or a pipeline, which is calibrated in place.
        data: entries as a recipe's data has them (questions for a model that answers, else captions; answers are not
            looked at), or a list of (image, text); for a model of several images, of ([image, ...], text).
        out: new folder for the calibrated model.
        layers, keep_rate: where and how much to select; the model's own if not given.
        images, columns: folders of images and names of fields, for entries that are lists.
        pairs: texts to use at most, with their images.
        held_out: share of the images that the figures come from; as many again choose the ridge.
        minutes: no pass over further images begins after this time; they are then fewer. None: no limit.
        batch_size: texts at a time.
        seed: of the draw, of the parts, and of the random guide.
        device: where to compute a model that is opened here.
    Raises:
        UnsupportedModelError: no text guide or no fusion encoder: a single-stream model, one of transformers.
        ConfigError: no location, a keep rate that removes nothing, a folder in use, a number out of range.
        DataError: no texts, too few of them, too many bad samples. CheckpointError: see `trips.load`.
    """
    began = time.monotonic()
    _check(pairs, held_out, minutes, batch_size, out)
    answers = None
    if isinstance(model, TripsPipeline):
        pipeline = model
        answers = None if pipeline.answers is None else AnswerList(pipeline.answers)
    elif isinstance(model, (str, Path)):
        saved = open_saved(model, device)
        pipeline, answers = TripsPipeline(saved.model, saved.processor, saved.answers), saved.answers
    else:
        raise UnsupportedModelError(
            "cannot be calibrated", item=type(model).__name__, expected="a folder, a name or a TripsPipeline"
        )
    trips_model, processor = pipeline.model.eval(), pipeline.processor
    literal = _selection(trips_model, layers, keep_rate)
    bad_samples = BadSamples()
    groups = read_groups(
        data,
        processor,
        pairs,
        bad_samples,
        questions="ask" in pipeline.verbs,
        num_images=_num_images(trips_model),
        images=images,
        columns=columns,
        seed=seed,
    )
    deadline = None if minutes is None else began + 60 * minutes
    parts = _observe_parts(trips_model, processor, groups, literal, held_out, batch_size, deadline)
    (train_groups, train), (_, validation), (test_groups, test) = parts
    before = measure(trips_model, processor, test_groups, test, literal, batch_size)
    heads = trips_model.trips.vision.config.num_attention_heads if literal.heads == "per_head" else 1
    fits = [fit_query(train, validation, layer, heads, literal.distill_temperature) for layer in literal.layers]
    calibrated = literal.replace(guide_query="calibrated")
    _install(trips_model, calibrated, fits)
    guides = {"literal": before}
    for name, selection in (
        ("calibrated", calibrated),
        ("image", literal.replace(guide="image", learning="literal")),
        ("random", literal.replace(guide="random", learning="literal")),
    ):
        guides[name] = measure(trips_model, processor, test_groups, test, selection, batch_size, seed)
    best = max(guides, key=lambda name: guides[name].teacher_mass[-1])
    if best != "calibrated":
        logger.warning("%s keeps more of the fusion encoder's attention than the calibrated guide", best)
    total = test.teacher.shape[1]
    counts = _patches_left(total, calibrated)
    if out is not None:
        _write(trips_model, processor, answers, Path(out))
    return Calibration(
        pipeline=pipeline,
        selection=calibrated,
        num_images=sum(len(group.images) for group in train_groups),
        num_texts=len(train.fused_cls),
        num_held_out=len(test.fused_cls),
        ridges=tuple(ridge for _, _, ridge in fits),
        guides=guides,
        teachers_own=teachers_own(test, counts),
        chance=tuple(count / total for count in counts),
        bad_samples=dict(bad_samples.errors),
        seconds=time.monotonic() - began,
        written_to=None if out is None else str(out),
    )


def _check(pairs: int, held_out: float, minutes: float | None, batch_size: int, out: str | Path | None) -> None:
    positive_int(pairs, "pairs")
    positive_int(batch_size, "batch_size")
    if not is_number(held_out) or not 0 < held_out <= 0.4:
        raise ConfigError(
            "not a share that leaves enough", item="held_out", found=held_out, expected="0 < share <= 0.4"
        )
    if minutes is not None and (not is_number(minutes) or minutes <= 0):
        raise ConfigError("must be positive", item="minutes", found=minutes)
    if out is not None and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError("is in use", item=str(out), expected="a new or empty folder")


def _selection(
    model: TripsPreTrainedModel, layers: Sequence[int] | None, keep_rate: float | Sequence[float] | None
) -> SelectionConfig:
    """The literal text guide at the places asked for."""
    if model.config.architecture != "dual":
        raise UnsupportedModelError(
            "a single-stream model has no text guide and no fusion encoder to teach it",
            item=type(model).__name__,
            expected="a dual-stream model",
        )
    changes = {"layers": layers, "keep_rate": keep_rate}
    changes = {name: value for name, value in changes.items() if value is not None}
    selection = model.config.selection.replace(guide="text", guide_query="layer", **changes)
    check_locations(selection, model.config.vision_config.num_hidden_layers)
    if not selection.layers:
        raise ConfigError("nothing to calibrate without a location", item="selection.layers", found=selection.layers)
    if min(selection.rates) == 1:
        raise ConfigError(
            "keeps all patches", item="selection.keep_rate", found=selection.keep_rate, expected="below 1"
        )
    return selection


def _num_images(model: TripsPreTrainedModel) -> int:
    return getattr(model.trips.fusion, "num_images", 1)


def _observe_parts(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    groups: Sequence[TextGroup],
    selection: SelectionConfig,
    held_out: float,
    batch_size: int,
    deadline: float | None,
) -> list[tuple[Sequence[TextGroup], Observed]]:
    """Groups of different images for training, validation and figures, and what their full-patch passes show.

    The time is shared out like the groups, so that a limit makes all parts smaller.
    """
    count = max(1, round(held_out * len(groups)))
    cuts = [slice(2 * count, None), slice(count, 2 * count), slice(0, count)]
    start, parts, done = time.monotonic(), [], 0
    for cut in cuts:
        chosen = groups[cut]
        if sum(len(group.texts) for group in chosen) < LEAST_TEXTS:
            raise DataError(
                "too few texts about different images",
                item="data",
                found=sum(len(group.texts) for group in groups),
                expected=f"{LEAST_TEXTS} in each of three parts (held_out={held_out})",
            )
        done += len(chosen)
        limit = None if deadline is None else start + (deadline - start) * done / len(groups)
        observed, seen = observe(model, processor, chosen, selection, batch_size, limit)
        parts.append((chosen[:seen], observed))
    return parts


def _install(model: TripsPreTrainedModel, selection: SelectionConfig, fits: Sequence[tuple[Any, Any, float]]) -> None:
    """The fitted queries into the model, and into its momentum teacher, and the setting into its configuration."""
    vision = model.trips.vision
    queries = CalibratedQueries(selection.layers, fits[0][0].shape[0], fits[0][0].shape[1]).to(vision.tower.dtype)
    for layer, (weight, bias, _) in zip(selection.layers, fits, strict=True):
        queries.set(layer, weight, bias)
    places: list[nn.Module] = [module for module in model.modules() if isinstance(module, VisionEncoder)]
    for place in places:
        place.calibration = copy.deepcopy(queries).to(model.device)
    model.config.calibrated_layers = selection.layers
    model.config.selection = selection


def _patches_left(num_patches: int, selection: SelectionConfig) -> list[int]:
    """Tokens kept at each location; a fused one may be among those of the second and later ones."""
    n, counts = num_patches, []
    for rate in selection.rates:
        k = num_kept(n, rate)
        counts.append(k)
        n = k + (k < n and selection.fuses)
    return counts


def _write(model: TripsPreTrainedModel, processor: TripsProcessor, answers: AnswerList | None, out: Path) -> None:
    model.save_pretrained(out)
    processor.save_pretrained(out)
    if answers is not None:
        answers.save(out / ANSWERS_FILE)
