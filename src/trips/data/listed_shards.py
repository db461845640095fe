"""Pairs straight from what people have: an annotation file, or a dataset of Hugging Face, in the place of a shard.

Feeds pre-training (4.1) and retrieval (5.1.3: COCO and Flickr30K in Karpathy's splits). `ListedShard` and
`DatasetShard` answer what `trips.data.shards.Shard` answers, so that order, resumption and the replacement of bad
samples are the same for all; an image is looked for and read when its turn comes. `open_shards` tells entries of a
recipe apart.

Legend: S samples of a shard: an image with all its captions each.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trips.data.annotation_rows import split_entry
from trips.data.hf import DatasetRows, is_dataset, picture
from trips.data.listing_rows import FIELDS, captions_of, check_columns, not_captions, peek, rename
from trips.data.listings import LISTS, ListedImage, find_list, image_folders, read_listing
from trips.data.records import BadSamples
from trips.data.remote import ShardCache, expand_patterns, is_remote, locate_samples
from trips.data.shards import Members, Shard
from trips.errors import ConfigError, DataError

logger = logging.getLogger("trips")

_LIST_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class ListedShard:
    """The images of one list.

    Attributes:
        location: path of the list.
        folders: where its images are looked for, in turn.
        rows: JSON of one sample after the other, as ``trips data pack`` writes it, with ``image``: one block of bytes,
            so that forked workers share it.
        ends: (S,) int64, where in `rows` each ends.
        rejected: rows of the list that cannot be used, and why.
    """

    location: str
    folders: tuple[str, ...]
    rows: bytes = field(repr=False)
    ends: np.ndarray = field(repr=False)
    rejected: dict[str, str] = field(repr=False)

    @classmethod
    def of(
        cls, location: str, folders: Sequence[str], listed: Sequence[ListedImage], rejected: dict[str, str]
    ) -> ListedShard:
        """From what `read_listing` gives."""
        rows = [
            json.dumps({"image": one.image, "image_id": one.image_id, "captions": one.captions}).encode()
            for one in listed
        ]
        return cls(location, tuple(folders), b"".join(rows), np.cumsum([0, *map(len, rows)])[1:], rejected)

    def __len__(self) -> int:
        return len(self.ends)

    def _row(self, sample: int) -> bytes:
        return self.rows[int(self.ends[sample - 1]) if sample else 0 : int(self.ends[sample])]

    def source(self, sample: int) -> str:
        """How messages call a sample: "captions.csv:IMAGE"."""
        return f"{os.path.basename(self.location)}:{json.loads(self._row(sample))['image']}"

    def read(self, sample: int, stream: BinaryIO | None = None, whole: bool = True) -> Members:
        """Captions of one sample, and where its image lies; nothing is raised for an image that does not exist.

        Args:
            sample: 0 to S - 1.
            stream, whole: as of `Shard.read`; of no use here.
        """
        row = self._row(sample)
        return _members(json.loads(row)["image"], row, self.folders)


@dataclass(frozen=True)
class DatasetShard:
    """A dataset of Hugging Face: each row an image with one or several captions.

    Attributes:
        location: the entry, "hf:NAME#SPLIT".
        rows: as the dataset holds them.
        columns: other names of fields.
        folders: where image paths start, where the dataset holds no pictures.
    """

    location: str
    rows: DatasetRows = field(repr=False)
    columns: Mapping[str, str]
    folders: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, sample: int) -> str:
        """How messages call a sample: "NAME#SPLIT row 3"."""
        return self.rows.place(sample)

    def read(self, sample: int, stream: BinaryIO | None = None, whole: bool = True) -> Members:
        """Captions of one sample and its image; see `ListedShard.read`.

        Raises:
            DataError: the dataset cannot be read.
        """
        row = rename(self.rows[sample], self.columns)
        meta = {"captions": [text for text in captions_of(row) if isinstance(text, str)]}
        image_id = next((row[key] for key in FIELDS["image_id"] if row.get(key) is not None), None)
        annotation = json.dumps(meta if image_id is None else {**meta, "image_id": str(image_id)}).encode()
        try:
            image = picture(next((row[key] for key in FIELDS["image"] if row.get(key)), None))
        except DataError as error:
            return Members(None, annotation, None, 0, str(error))
        return (
            Members(image, annotation, None, 1)
            if isinstance(image, bytes)
            else _members(image, annotation, self.folders)
        )


PairShard = Shard | ListedShard | DatasetShard


def _members(image: str, annotation: bytes, folders: Sequence[str]) -> Members:
    """With the path of an image in the first folder that has it."""
    for folder in folders:
        if os.path.isfile(path := os.path.join(folder, image)):
            return Members(Path(path), annotation, None, 1)
    return Members(None, annotation, None, 0, f"image file does not exist in {' or '.join(folders)}")


def open_shards(
    patterns: str | Path | Sequence[str | Path],
    name: str,
    cache: ShardCache,
    *,
    images: Sequence[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    write_indexes: bool = False,
) -> list[PairShard]:
    """Shards of tars, lists and datasets; no image is opened.

    Args:
        patterns: one or several entries: tars as `expand_patterns` takes them, lists as `read_listing` does, with
            ``#SPLIT+SPLIT`` behind those that hold several, or ``hf:NAME#SPLIT`` (`trips.data.hf`). Tars come last.
        name: how messages call them.
        cache: local copies of remote tars.
        images, columns: of lists and datasets; see `read_listing`.
        write_indexes: as in `locate_samples`.
    Raises:
        DataError: a tar or list that is missing, cannot be read, or holds no image with a caption.
        ConfigError: see `expand_patterns` and `read_listing`. MissingDependencyError: see `DatasetRows`.
    """
    shards: list[PairShard] = []
    tars: list[str] = []
    for entry in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        if is_dataset(str(entry)):
            shards.append(_open_dataset(str(entry), images, columns or {}))
            continue
        path, splits = split_entry(str(entry))
        if _is_list(path):
            shards.append(_open_list(path, splits, images, columns))
        else:
            tars.append(str(entry))
    if tars or not shards:
        shards += [Shard(place, locate_samples(place, cache, write_indexes)) for place in expand_patterns(tars, name)]
    return shards


@contextmanager
def reading(shard: PairShard, cache: ShardCache) -> Iterator[BinaryIO | None]:
    """The stream that `read` of a shard wants: the opened tar, None for a list.

    Raises:
        DataError: the tar cannot be opened or fetched.
    """
    if not isinstance(shard, Shard):
        yield None
        return
    with cache.open(shard.location, shard.index.size if is_remote(shard.location) else None) as stream:
        yield stream


def report_problems(shards: Sequence[PairShard], bad_samples: BadSamples | None) -> None:
    """Count damaged tars and the rows of lists that cannot be used.

    Raises:
        DataError: there is one, and `bad_samples` is None; there are too many.
    """
    # Rows of a list were all seen when it was read: a share is of them.
    rows = sum(
        len(shard) + len(shard.rejected) for shard in shards if isinstance(shard, ListedShard) and shard.rejected
    )
    if bad_samples is not None and rows:
        bad_samples.saw_number(rows)
    for shard in shards:
        problems = shard.rejected if isinstance(shard, ListedShard) else {}
        if isinstance(shard, Shard) and shard.index.damage is not None:
            problems = {shard.location: f"{shard.index.damage}; {len(shard)} samples before it are used"}
        for number, (item, reason) in enumerate(problems.items()):
            if bad_samples is None:
                raise DataError(reason, item=item)
            if number == 0:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                logger.warning("%s: %s%s", item, reason, more)
            bad_samples.record(item, reason)


def _is_list(path: str) -> bool:
    return os.path.isdir(path) or os.path.splitext(path.partition("?")[0])[1].lower() in _LIST_SUFFIXES


def _open_list(
    path: str, splits: Sequence[str], images: Sequence[str | Path], columns: Mapping[str, str] | None
) -> ListedShard:
    if is_remote(path):
        raise ConfigError("lists are read from local files", item=path, hint="download it first")
    listed, rejected = read_listing(path, list(images) or None, splits, columns)
    found = find_list(path)
    if not listed:
        if found.is_dir() and any(found.glob("*.tar")):
            raise DataError("holds tars and no list of images", item=path, hint=f"name the tars: {found / '*.tar'}")
        reason = next((f"{item}: {why}" for item, why in rejected.items()), "an empty list")
        expected = f"one of {', '.join(LISTS)}, or KEY.txt beside KEY.jpg" if found.is_dir() else None
        raise not_captions("holds no image with a caption", path, peek(found), found=reason, expected=expected)
    folders = image_folders(found, list(images))
    if not images and os.path.isdir(inner := os.path.join(folders[0], "images")):
        folders.append(inner)
    return ListedShard.of(str(found), folders, listed, rejected)


def _open_dataset(entry: str, images: Sequence[str | Path], columns: Mapping[str, str]) -> DatasetShard:
    check_columns(columns)
    rows = DatasetRows(entry)
    names = rename(dict.fromkeys(rows.columns), columns)
    for name in ("image", "caption"):
        if not names.keys() & set(FIELDS[name]):
            raise not_captions(
                f"has no column with the {name}",
                entry,
                [names],
                found=rows.columns,
                expected=" or ".join(FIELDS[name]),
                hint=f"data.columns: {{{name}: COLUMN}}",
            )
    return DatasetShard(entry, rows, dict(columns), tuple(image_folders(Path(), list(images))))
