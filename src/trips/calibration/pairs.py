"""Images and texts to calibrate with: read from any format of the tasks, or given as they are.

Answers and labels are not looked at. What cannot be read is counted and left out.

Dimensions: T texts, n images of each, H, W pixels of the model's input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trips.data.listed_shards import open_shards, reading, report_problems
from trips.data.listings import text_problem
from trips.data.pair_records import parse_pair
from trips.data.question_files import read_questions
from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.errors import ConfigError, DataError
from trips.images import ImageSource
from trips.processor import TripsProcessor

logger = logging.getLogger("trips")

TEXTS_PER_IMAGE = 8  # more of one image teach less than another image
Entry = str | Path
Pair = tuple[ImageSource | Sequence[ImageSource], str]


@dataclass(frozen=True)
class TextGroup:
    """What is asked about one image, or about n images together.

    Attributes:
        images: n arrays (H, W, 3) uint8. texts: at least one.
    """

    images: tuple[np.ndarray, ...]
    texts: tuple[str, ...]


def read_groups(
    data: Entry | Sequence[Entry] | Sequence[Pair],
    processor: TripsProcessor,
    num_texts: int,
    bad_samples: BadSamples,
    *,
    questions: bool = False,
    num_images: int = 1,
    images: Sequence[Entry] = (),
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[TextGroup]:
    """Draw images with their texts until `num_texts` are found.

    Args:
        data: entries as a recipe's data has them, or (image, text) pairs; of a model of several images, (images, text).
        processor: resizes the images, and says whether anything is left of a text.
        num_texts: about how many texts to draw, at most `TEXTS_PER_IMAGE` of an image.
        bad_samples: counts what cannot be used.
        questions: entries hold questions, as `trips.data.question_files.read_questions` reads them, else captions.
        num_images: n.
        images, columns: of entries that are lists.
        seed: of the draw.
    Returns:
        Groups in an order drawn at random, no image in two of them unless the data name it twice.
    Raises:
        DataError: nothing can be used, or too many bad samples; see the readers. ConfigError: neither form.
    """
    entries = [data] if isinstance(data, (str, Path)) else list(data)
    rng = np.random.default_rng(seed)
    if all(isinstance(entry, (str, Path)) for entry in entries):
        if num_images > 1:
            raise ConfigError(
                f"entries name one image for each text, the model takes {num_images}",
                item="data",
                found=[str(entry) for entry in entries],
                expected="a list of ([image, ...], text), from Python",
            )
        read = _questions if questions else _captions
        found = read(entries, images, columns, bad_samples, rng)
    else:
        found = _given(entries, num_images, rng)
    groups, count = [], 0
    for source, pictures, texts in found:
        if count >= num_texts:
            break
        with bad_samples.guard(source):
            usable = [text for text in texts if text_problem(text) is None]
            if not usable:
                raise DataError("has no usable text", item=source)
            chosen = [usable[i] for i in sorted(rng.permutation(len(usable))[:TEXTS_PER_IMAGE])]
            processor.token_ids(chosen)
            arrays = tuple(processor.resize(one, source) for one in pictures)
            groups.append(TextGroup(arrays, tuple(chosen)))
            count += len(chosen)
    if len(bad_samples):
        logger.warning("%s", bad_samples.summary())
    if not groups:
        raise DataError("holds no image with a text that can be used", item="data", found=_first_reason(bad_samples))
    return groups


_Found = Iterator[tuple[str, Sequence[Any], Sequence[Any]]]  # source, images, texts


def _captions(
    entries: Sequence[Entry],
    images: Sequence[Entry],
    columns: Mapping[str, str] | None,
    bad_samples: BadSamples,
    rng: np.random.Generator,
) -> _Found:
    cache = ShardCache()
    shards = open_shards([str(entry) for entry in entries], "data", cache, images=images, columns=columns)
    report_problems(shards, bad_samples)
    places = [(shard, sample) for shard in shards for sample in range(len(shard))]
    for i in rng.permutation(len(places)):
        shard, sample = places[i]
        source = shard.source(sample)
        try:
            with reading(shard, cache) as stream:
                record = parse_pair(shard.read(sample, stream), source)
        except DataError as error:
            bad_samples.saw(source)
            bad_samples.record(source, error)
            continue
        yield source, [record.image], record.texts


def _questions(
    entries: Sequence[Entry],
    images: Sequence[Entry],
    columns: Mapping[str, str] | None,
    bad_samples: BadSamples,
    rng: np.random.Generator,
) -> _Found:
    records = [record for entry in entries for record in read_questions(entry, images, columns, bad_samples)]
    for i in rng.permutation(len(records)):
        record = records[i]
        yield record.source, [record.image], [question.text for question in record.questions]


def _given(pairs: Sequence[Any], num_images: int, rng: np.random.Generator) -> _Found:
    groups: dict[Any, tuple[str, Sequence[Any], list[Any]]] = {}
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(
                "neither an entry nor an (image, text) pair", item=f"data[{i}]", found=type(pair).__name__
            )
        pictures, text = pair
        pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        if len(pictures) != num_images:
            raise ConfigError(
                "the model takes another number of images",
                item=f"data[{i}]",
                found=len(pictures),
                expected=num_images,
            )
        key = tuple(str(one) if isinstance(one, (str, Path)) else id(one) for one in pictures)
        groups.setdefault(key, (f"data[{i}]", pictures, []))[2].append(text)
    listed = list(groups.values())
    for i in rng.permutation(len(listed)):
        yield listed[i]


def _first_reason(bad_samples: BadSamples) -> str:
    return next((f"{item}: {why}" for item, why in bad_samples.errors.items()), "no samples")
