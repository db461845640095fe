"""Rows of a dataset of Hugging Face: ``hf:NAME#SPLIT`` in a recipe. Its images stay encoded.

``NAME`` is a folder that `Dataset.save_to_disk` wrote, or what `datasets.load_dataset` takes: a dataset of the hub, a
folder of files. ``NAME:CONFIGURATION`` chooses one of several configurations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trips.data.annotation_rows import Row, split_entry
from trips.errors import ConfigError, DataError, MissingDependencyError, TripsError

_PREFIX = "hf:"
_BATCH = 64  # rows read at a time


def is_dataset(entry: str) -> bool:
    """Whether an entry of a recipe names a dataset of Hugging Face."""
    return entry.startswith(_PREFIX)


class DatasetRows:
    """Rows of one entry, read as they are asked for: images may stand in them, too many to hold.

    A picture is a dictionary of its ``bytes`` and ``path``, as the dataset holds it; a class is its name.

    Args:
        entry: ``hf:NAME``, ``hf:NAME#SPLIT+SPLIT`` or ``hf:NAME:CONFIGURATION#SPLIT``.
    Raises:
        DataError: the dataset cannot be loaded, is empty, or has several splits and none is chosen.
        ConfigError: no name, or a split that is not there.
        MissingDependencyError: datasets is not installed.
    """

    def __init__(self, entry: str) -> None:
        self.name, splits = split_entry(entry.removeprefix(_PREFIX))
        if not self.name:
            raise ConfigError("names no dataset", item=entry, expected="hf:NAME or hf:NAME#SPLIT")
        self._parts = _load(self.name, splits)
        if not len(self):
            raise DataError("dataset has no rows", item=entry)

    def __len__(self) -> int:
        return sum(part.num_rows for part in self._parts.values())

    @property
    def columns(self) -> list[str]:
        """Names of the fields that every row has."""
        return list(next(iter(self._parts.values())).column_names)

    def __iter__(self) -> Iterator[Row]:
        for split, part in self._parts.items():
            place = f"{self.name}#{split}" if split else self.name
            try:
                # Arrow's own rows: the library would decode every picture.
                batches = part.with_format("arrow").iter(batch_size=_BATCH)
                for i, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                    yield f"{place} row {i}", _with_classes(row, part)
            except TripsError:
                raise
            except Exception as error:  # a damaged file; pyarrow raises many types
                raise DataError(f"dataset cannot be read: {_reason(error)}", item=place) from error

    def place(self, index: int) -> str:
        """What messages call a row, by its number over all splits."""
        split, _, row = self._find(index)
        return f"{self.name}#{split} row {row}" if split else f"{self.name} row {row}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row, by its number over all splits.

        Raises:
            DataError: the dataset cannot be read there.
        """
        _, part, row = self._find(index)
        try:
            return _with_classes(part.with_format("arrow")[row : row + 1].to_pylist()[0], part)
        except Exception as error:  # a damaged file; pyarrow raises many types
            raise DataError(f"dataset cannot be read: {_reason(error)}", item=self.place(index)) from error

    def _find(self, index: int) -> tuple[str, Any, int]:
        """Split, its dataset and the row there."""
        for split, part in self._parts.items():
            if index < part.num_rows:
                return split, part, index
            index -= part.num_rows
        raise IndexError(index)


def _with_classes(row: dict[str, Any], part: Any) -> dict[str, Any]:
    """A row with the names of its classes in place of their numbers."""
    for name, kind in part.features.items():
        if hasattr(kind, "int2str") and row[name] is not None and 0 <= row[name] < kind.num_classes:
            row[name] = kind.int2str(row[name])
    return row


def picture(value: object) -> bytes | Path | str:
    """A picture as a dataset holds it.

    Args:
        value: field of a row: a dictionary of ``bytes`` and ``path``, bytes, or the path of a file.
    Returns:
        encoded bytes; the path that the dataset loads it from; or text, which says no folder.
    Raises:
        DataError: none of them.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or (value.get("path") and Path(value["path"]))
    if isinstance(value, (bytes, Path, str)) and value:
        return value
    raise DataError("has no image", found=type(value).__name__, expected="encoded bytes or a path")


def _load(name: str, splits: tuple[str, ...]) -> dict[str, Any]:
    """Split to dataset; the split of a dataset that was saved alone is "" if it does not tell."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"needed to read {_PREFIX}{name}", item="datasets", hint='pip install "trips-vlm[train]"'
        ) from error
    try:
        if os.path.isdir(name) and any(
            os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
        ):
            loaded = datasets.load_from_disk(name)
        else:
            path, _, configuration = (name, "", "") if os.path.exists(name) else name.partition(":")
            loaded = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # everything from a missing folder to the network; all mean the same
        raise DataError(f"dataset cannot be loaded: {_reason(error)}", item=f"{_PREFIX}{name}") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or ""): loaded}
    for split in splits:
        if split not in parts:
            raise ConfigError("is not in the dataset", item=f"{_PREFIX}{name}#{split}", found=list(parts))
    if not splits and len(parts) > 1:
        # Together, test questions would end in the training data, and nobody would notice.
        hint = f"choose: {_PREFIX}{name}#{min(parts)}"
        raise DataError("holds several splits", item=f"{_PREFIX}{name}", found=list(parts), hint=hint)
    return {split: parts[split] for split in splits or parts}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
