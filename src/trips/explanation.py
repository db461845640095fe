"""Which patches a text keeps, as a record and as a picture (section 3.2; the columns of Figure 3).

The record is that of the model's own selection, one sample of it, with every patch named by its place in the grid of
the photo. Dimensions: T texts, N patches in a grid of (down, across).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trips.config import SelectionConfig
from trips.drawing import Box, SelectionRow
from trips.errors import ConfigError
from trips.images import FileSlice, ImageSource, load_image
from trips.model import TripsModel, TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.selection import FUSED, Selection
from trips.sheets import check_path, draw_selection
from trips.single_stream import TripsSingleStreamModel

Fate = Literal["fused", "dropped", "merged"]


@dataclass(frozen=True)
class Location:
    """What became of the patches at one location.

    Attributes:
        layer: 1-based.
        kept: places of patches that went on as they were, rising.
        removed: places of those that did not, rising; patches that were gone before are in neither.
        scores: (N,) a_cls over the candidates of this location, NaN for patches that were gone before.
        fused_tokens: of the locations before, which are candidates like any patch: the a_cls of each, and whether it
            was kept.
    """

    layer: int
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    scores: np.ndarray
    fused_tokens: tuple[tuple[float, bool], ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What one text keeps of one photo.

    Attributes:
        image: the photo, upright and in full.
        name: of the photo.
        text: the text that chose, or was asked beside another guide.
        guide: who chose, as in `SelectionConfig`.
        grid: patches (down, across).
        fate: what happens to patches that are not kept.
        locations: in their order.
        said: what the model says to the text, best first; of models that answer.
    """

    image: Image.Image = field(repr=False)
    name: str
    text: str
    guide: str
    grid: tuple[int, int]
    fate: Fate
    locations: tuple[Location, ...] = field(repr=False)
    said: tuple[str, ...] = ()

    def mask(self, location: int = -1) -> np.ndarray:
        """(N,) bool: what was kept at a location, the last unless another is named by its number from 0."""
        mask = np.zeros(self.grid[0] * self.grid[1], dtype=bool)
        mask[list(self.locations[location].kept)] = True
        return mask

    def row(self, text: str | None = None, *, heat: bool = False, boxes: Sequence[Box] = ()) -> SelectionRow:
        """As a row of a figure.

        Args:
            text: what the row says; by default the text.
            heat: with maps of the scores.
            boxes: to outline, in pixels of the photo.
        """
        return SelectionRow(
            self.text if text is None else text,
            np.asarray(self.image),
            tuple(self.mask(i) for i in range(len(self.locations))),
            tuple(location.layer for location in self.locations),
            tuple(location.scores for location in self.locations) if heat else (),
            tuple(boxes),
        )

    def save(self, path: str | Path, *, heat: bool = False, boxes: Sequence[Box] = ()) -> Path:
        """Draw it: the photo, and what is left of it behind every location.

        Args:
            path: file to write; .png, .svg, .pdf.
            heat, boxes: as of `row`.
        Returns:
            `path`.
        Raises:
            ConfigError: no format of this suffix. MissingDependencyError: matplotlib is not installed.
        """
        path = check_path(path)
        return draw_selection([self.row(heat=heat, boxes=boxes)], self.grid, path)

    def record(self) -> dict[str, Any]:
        """All of it but the photo, as JSON can hold it: places count row by row from 0, scores are None where NaN."""
        locations = []
        for one in self.locations:
            removed: dict[str, list[int]] = {"fused": [], "dropped": [], "merged": []}
            removed[self.fate] = list(one.removed)
            scores = [None if np.isnan(score) else float(score) for score in one.scores]
            tokens = [{"score": score, "kept": kept} for score, kept in one.fused_tokens]
            places = {"layer": one.layer, "kept": list(one.kept), **removed}
            locations.append({**places, "scores": scores, "earlier_fused_tokens": tokens})
        return {
            "image": self.name,
            "image_size": list(self.image.size),
            "text": self.text,
            "guide": self.guide,
            "grid": list(self.grid),
            "said": list(self.said),
            "locations": locations,
        }


def write_record(record: dict[str, Any], path: str | Path) -> Path:
    """Write a record as a JSON file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def check_explainable(selection: SelectionConfig, item: object = "selection") -> None:
    """Raise `ConfigError` where nothing is ever removed, so that there is nothing to show."""
    if not selection.active or set(selection.rates) == {1}:
        found = f"guide {selection.guide}, layers {list(selection.layers)}, keep rate {selection.keep_rate}"
        hint = "choose a guide, such as text, layers and a keep rate below 1"
        raise ConfigError("keeps every patch: there is nothing to draw", item=item, found=found, hint=hint)


@torch.no_grad()
def explain_texts(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    image: ImageSource,
    texts: Sequence[str],
    selection: SelectionConfig | None = None,
    *,
    name: str | None = None,
    batch_size: int = 32,
) -> list[Explanation]:
    """What each of T texts keeps of one photo; they share its prefix.

    Args:
        model: of a class of `trips.tasks`. Of a model that reads several images the photo is one of them: each is
            selected from on its own.
        processor: that of the model.
        image: what `trips.images.load_image` reads.
        texts: T.
        selection: in place of the model's own.
        name: how records and messages call the photo.
        batch_size: texts that are computed at once.
    Raises:
        ConfigError: a selection that keeps everything, or that the model does not know. DataError: an image that
            cannot be read, a blank text.
    """
    encoder, selection = model.trips, selection or model.config.selection
    check_explainable(selection)
    name = name if name is not None else _name(image)
    photo = load_image(image, name=name)
    # As in training where large JPEG files are decoded at a fraction; a stream has been read to its end by now.
    source = image if processor.jpeg_draft and not hasattr(image, "read") else photo
    pixels = processor.normalise([processor.resize(source, name)]).to(model.device, model.dtype)
    grid = encoder.vision.grid_of(pixels)
    prefix = encoder.encode_prefix(pixels, selection)
    encoded = processor(text=list(texts)).to(model.device)
    parts = encoded["input_ids"].split(batch_size), encoded["attention_mask"].split(batch_size)
    found: list[Explanation] = []
    for ids, mask in zip(*parts):
        rows = prefix.take(torch.zeros_like(ids[:, 0]))
        states = encoder.encode_text(ids, mask)
        if isinstance(encoder, TripsModel):  # the fusion encoder comes later, and has no part in it
            records = encoder.vision.suffix(rows, states[:, 0], selection).selections
        else:
            records = _joint_records(encoder, mask, rows, states, selection)
        for row in range(len(ids)):
            found.append(explain_records(records, photo, texts[len(found)], selection, grid, row=row, name=name))
    if not all(one.locations for one in found):  # so few patches that a rate below 1 keeps them all
        check_explainable(selection.replace(keep_rate=1.0))
    return found


def explain_records(
    records: Sequence[Selection],
    photo: Image.Image,
    text: str,
    selection: SelectionConfig,
    grid: tuple[int, int],
    *,
    row: int = 0,
    name: str = "image",
) -> Explanation:
    """What a pass that has been made kept: one sample of its records, without a pass of its own.

    Args:
        records: one per location, of any task's output; without any the explanation has no locations.
        photo: upright and in full. text: of the sample.
        selection: of the pass.
        grid: patches (down, across).
        row: number of the sample. name: of the photo.
    """
    fate: Fate = "merged" if selection.guide == "similarity" else "fused" if selection.fuses else "dropped"
    return Explanation(photo, name, text, selection.guide, grid, fate, _locations(records, row, grid[0] * grid[1]))


def _joint_records(encoder: Any, mask: Tensor, rows: Any, states: Tensor, selection: SelectionConfig) -> Any:
    """Records of a single-stream model: one pass of the stack for each text."""
    # By its class: the one for several images wants all of them at once.
    output = TripsSingleStreamModel.forward(encoder, None, mask, prefix=rows, text_states=states, selection=selection)
    return output.selections


def _locations(records: Sequence[Selection], row: int, num_patches: int) -> tuple[Location, ...]:
    """One sample of the records, with every patch by its place in the grid."""
    found = []
    for record in records:
        places, index = record.candidates[row].cpu().numpy(), record.index[row].cpu().numpy()
        weights = record.scores[row].float().cpu().numpy()
        stays = np.zeros(len(places), dtype=bool)
        stays[index] = True
        patch = places != FUSED
        scores = np.full(num_patches, np.nan, dtype=np.float32)
        scores[places[patch]] = weights[patch]
        kept, removed = (tuple(np.sort(places[patch & chosen]).tolist()) for chosen in (stays, ~stays))
        tokens = tuple(zip(weights[~patch].tolist(), stays[~patch].tolist(), strict=True))
        found.append(Location(record.layer, kept, removed, scores, tokens))
    return tuple(found)


def _name(image: ImageSource) -> str:
    if isinstance(image, FileSlice):
        return str(image.path)
    return str(image) if isinstance(image, (str, Path)) else "image"
