"""What a trained model looked at, from the command line's point of view: a model's folder, photos or data, a picture.

Opens the model, finds the photos, draws one of the figures of `trips.paper.figures` and writes the record behind it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trips.data.question_files import read_questions
from trips.data.records import BadSamples, VqaRecord
from trips.data.remote import ShardCache
from trips.drawing import Box
from trips.errors import ConfigError, DataError
from trips.explanation import write_record
from trips.images import load_image
from trips.options import Guide
from trips.paper.figures import FIGURES, Photo, draw_selection, pair_up
from trips.pipeline import TripsPipeline, load
from trips.sheets import check_path
from trips.train.pretraining import read_pairs
from trips.train.recipe_io import Overrides, load_recipe
from trips.train.run import RECIPE_FILE
from trips.train.vqa import read_records

Boxes = Mapping[str, Sequence[Box]]


def draw_figure(
    number: int,
    model: str | Path | TripsPipeline,
    out: str | Path,
    *,
    images: Sequence[str] = (),
    texts: Sequence[str] = (),
    data: str | None = None,
    count: int = 5,
    guide: Guide | None = None,
    layers: Sequence[int] | None = None,
    keep_rate: Sequence[float] | None = None,
    heat: bool = False,
    boxes: str | Path | Boxes | None = None,
    record: str | Path | None = None,
) -> dict[str, Any]:
    """Draw figure 1, 3 or 4 of the paper with one's own model and photos.

    Args:
        number: of the figure.
        model: what `trips.load` opens, or what it gave.
        out: picture to write; its suffix decides the format.
        images, texts: see `pair_up`; figure 4 takes one photo. Texts beside `data` take the place of its own.
        data: entry of a recipe's data (questions for a model that answers, else images with captions), in place of
            images.
        count: photos to take from it, the first ones; figure 4 takes one.
        guide, layers, keep_rate: in place of the model's own; one keep rate for all layers, or one for each.
        heat: with maps of the scores.
        boxes: to outline: file for `read_boxes`, or what it gives.
        record: JSON file to write beside the picture.
    Returns:
        what was chosen: `PaperFigure.record` with "written to", the picture.
    Raises:
        ConfigError: no such figure, neither images nor data or both, a selection that keeps everything, a bad option.
        CheckpointError: see `trips.load`. DataError: an image, a text or data that cannot be used.
        MissingDependencyError: matplotlib is not installed.
    """
    if number not in FIGURES:
        raise ConfigError("has no such figure", item="the paper", found=number, expected="1, 3 or 4")
    if bool(images) == (data is not None):
        raise ConfigError("give either photos or data", item=f"figure {number}", found=f"{len(images)} photos")
    path = check_path(out)
    outlines = boxes if isinstance(boxes, Mapping) else {} if boxes is None else read_boxes(boxes)
    pipeline = model if isinstance(model, TripsPipeline) else load(model)
    changes: dict[str, Any] = {"guide": guide, "layers": layers}
    if keep_rate:
        changes["keep_rate"] = keep_rate[0] if len(keep_rate) == 1 else tuple(keep_rate)
    changes = {name: value for name, value in changes.items() if value is not None}
    selection = pipeline.model.config.selection.replace(**changes)
    if data is None:
        photos = [dataclasses.replace(photo, name=str(photo.image)) for photo in pair_up(images, texts)]
    else:
        photos = _photos_of(data, 1 if number == 4 else count, texts, pipeline)
    photos = [dataclasses.replace(photo, boxes=_boxes_of(photo.name, outlines)) for photo in photos]
    figure = FIGURES[number](pipeline, photos, selection=selection, heat=heat)
    figure.save(path)
    found = figure.record()
    if record is not None:
        write_record(found, record)
    return {"written to": str(path), **found}


def read_boxes(path: str | Path) -> dict[str, list[Box]]:
    """Boxes to outline: a JSON object of lists, ``{"street.jpg": [[left, top, right, bottom], ...]}`` in pixels.

    A photo is known by its path, the name of its file with or without suffix, or its key in a tar.

    Raises:
        DataError: the file is missing, or does not hold that; names the photo.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"boxes cannot be read: {error}", item=str(path)) from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", item=str(path), found=type(content).__name__, expected="{PHOTO: BOXES}")
    return {name: [_box(box, f"{path}: {name}") for box in _list(boxes, path, name)] for name, boxes in content.items()}


def explain_run(
    run_dir: str | Path,
    out: str | Path,
    overrides: Overrides = (),
    count: int = 6,
    *,
    heat: bool = False,
    boxes: str | Path | Boxes | None = None,
    record: str | Path | None = None,
) -> Path:
    """Draw what a finished question answering run keeps on the first photos of its test data.

    Args:
        run_dir: output folder of "trips train".
        out: picture to write; its suffix decides the format.
        overrides: as for `evaluate_run`; ``data.test`` and ``model.selection.*`` have an effect.
        count: photos; the first question of each is asked.
        heat, boxes, record: as of `draw_figure`.
    Returns:
        `out`.
    Raises:
        ConfigError: a run without selection or of another task, or a count below 1. CheckpointError, DataError: see
            `evaluate_run`.
    """
    run_dir, out = Path(run_dir), check_path(out)
    recipe = load_recipe(run_dir / RECIPE_FILE, overrides)
    selection = recipe.model.selection
    if recipe.task != "vqa" or not selection.active or count < 1:
        raise ConfigError(
            "has nothing to draw",
            item=run_dir,
            found=f"task {recipe.task}, guide {selection.guide}, {count} photos",
            expected="a question answering run with selection, and at least one photo",
        )
    bad_samples = BadSamples(recipe.data.max_bad_share)
    outlines = boxes if isinstance(boxes, Mapping) else {} if boxes is None else read_boxes(boxes)
    pipeline = load(run_dir)
    rows, found = [], []
    for photo in islice(_asked(read_records(recipe.data, "test", bad_samples), bad_samples), count):
        said = tuple(answer.text for answer in pipeline.ask(photo.image, photo.text, 3, selection=selection))
        one = pipeline.explain(photo.image, photo.text, selection=selection)
        found.append(dataclasses.replace(one, name=photo.name, said=said))
        words = f"{photo.text}\nsaid: {said[0]}\ntrue: {photo.truth or 'not known'}"
        rows.append(one.row(words, heat=heat, boxes=_boxes_of(photo.name, outlines)))
    if not rows:
        raise DataError("no photo can be read", item="data.test", found=bad_samples.summary())
    rates = ", ".join(f"{rate:g}" for rate in selection.rates)
    title = f"{selection.guide} guide, keep rates {rates} at layers {', '.join(map(str, selection.layers))}"
    draw_selection(rows, found[0].grid, out, title)
    if record is not None:
        write_record({"title": title, "rows": [one.record() for one in found]}, record)
    return out


def explain_photos(
    model: str | Path,
    images: Sequence[str],
    texts: Sequence[str],
    out: str | Path,
    overrides: Overrides = (),
    **options: Any,
) -> dict[str, Any]:
    """Figure 3 of one's own photos: `draw_figure` with the selection that a run's overrides ask for.

    Args:
        model, images, texts, out: as of `draw_figure`.
        overrides: of a run's recipe; ``model.selection.*`` has an effect.
        options: heat, boxes, record of `draw_figure`.
    Raises:
        ConfigError: overrides for a model that is not a run; what `draw_figure` raises, as all else.
    """
    changes: dict[str, Any] = {}
    if overrides:
        if not (Path(model) / RECIPE_FILE).is_file():
            raise ConfigError("has no recipe whose keys could be replaced", item=model, found=overrides[0])
        own = load_recipe(Path(model) / RECIPE_FILE, overrides).model.selection
        changes = {"guide": own.guide, "layers": own.layers, "keep_rate": own.rates}
    return draw_figure(3, model, out, images=images, texts=texts, **changes, **options)


def _photos_of(entry: str, count: int, texts: Sequence[str], pipeline: TripsPipeline) -> list[Photo]:
    """The first photos of data that can be read; those that cannot are counted and left out."""
    if count < 1:
        raise ConfigError("must be positive", item="count", found=count)
    bad_samples = BadSamples()
    if "ask" in pipeline.verbs:
        photos = _asked(read_questions(entry, bad_samples=bad_samples), bad_samples)
    else:
        photos = _captioned(entry, bad_samples)
    found = list(islice(photos, count))
    if not found:
        raise DataError("no photo can be read", item=entry, found=bad_samples.summary())
    if not texts:
        return found
    paired = pair_up([photo.image for photo in found], texts)
    names = [photo.name for photo in found] * (len(paired) // len(found))
    return [dataclasses.replace(one, name=name) for one, name in zip(paired, names, strict=True)]


def _asked(records: Sequence[VqaRecord], bad_samples: BadSamples) -> Iterator[Photo]:
    """The first question about each image."""
    for record in records:
        question = record.questions[0]
        with bad_samples.guard(record.source):
            load_image(record.image, name=record.source)
            truth = question.answers[0] if question.answers else None
            yield Photo(record.image, question.text, record.source, truth)


def _captioned(entry: str, bad_samples: BadSamples) -> Iterator[Photo]:
    """The first caption of each image."""
    for record in read_pairs([entry], ShardCache(), bad_samples):
        with bad_samples.guard(record.source):
            load_image(record.image, name=record.source)
            yield Photo(record.image, record.texts[0], record.source)


def _boxes_of(name: str | None, boxes: Boxes) -> tuple[Box, ...]:
    """Those of a photo by one of the names that `read_boxes` tells."""
    name = name or ""
    file = os.path.basename(name)
    for known in (name, file, os.path.splitext(file)[0], name.rpartition(":")[2]):
        if known in boxes:
            return tuple(boxes[known])
    return ()


def _list(boxes: object, path: str | Path, name: str) -> list[Any]:
    if not isinstance(boxes, list):
        raise DataError("not a list of boxes", item=f"{path}: {name}", found=boxes)
    return boxes


def _box(box: object, item: str) -> Box:
    numbers = isinstance(box, list) and len(box) == 4 and all(
        isinstance(side, (int, float)) and not isinstance(side, bool) and math.isfinite(side) for side in box
    )  # fmt: skip
    if not numbers or not (box[0] < box[2] and box[1] < box[3]):
        raise DataError("not a box", item=item, found=box, expected="[left, top, right, bottom] in pixels")
    return tuple(float(side) for side in box)
