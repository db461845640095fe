"""Tables 1 to 7 as printed in the paper, typed, and the setting that each row of tables 3 to 7 stands for.

What is printed stands in paper_tables.json, which also says which locations reproduce a figure of operations in the
paper's convention: some rows are those of layers 6 and 10, printed as 5 and 10.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.paper.settings import Setting

NUMBERS = range(1, 8)
TEXT_LENGTH = 40
"""Text tokens of tables 3 to 7, by their captions."""

_SMALL_SIDE, _SIDE = 224, 384  # pixels of table 3, and of the others unless a row says so
_MAIN = (5, 10), 0.7
# What describes a row; everything else in it is a figure.
_DESCRIPTION = ("model", "locations", "keep_rate", "image_size", "guide", "fuse", "fit", "convention_locations",
                "convention_g", "true_g")  # fmt: skip


@dataclass(frozen=True)
class PublishedRow:
    """A row as printed.

    Attributes:
        name: of the model, or what the row chooses.
        figures: by their keys, nested ones joined by dots (``flickr30k_1k.TR.R@1``); None or absent: not reported.
            Operations in units of 1e9, throughput in pairs per second on one V100, accuracies and recalls in per cent.
        setting: what it stands for; None for models of others and in tables 1 and 2.
        convention_locations: locations that reproduce its operations in the paper's convention, None: none do.
        explained: whether those operations are reproduced within 0.02; None where there is no setting.
    """

    name: str
    figures: dict[str, float | None]
    setting: Setting | None = None
    convention_locations: tuple[int, ...] | None = None
    explained: bool | None = None


@dataclass(frozen=True)
class PublishedTable:
    """A table as printed.

    Attributes:
        number: 1 to 7. title: what it shows. rows: in the order of the paper.
    """

    number: int
    title: str
    rows: tuple[PublishedRow, ...]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those of the rows that have one."""
        return tuple(row.setting for row in self.rows if row.setting is not None)


def published_table(number: int) -> PublishedTable:
    """One of tables 1 to 7.

    Raises:
        ConfigError: no such table.
    """
    if isinstance(number, bool) or number not in NUMBERS:
        raise ConfigError("no such table", item="table", found=number, expected="1 to 7")
    printed = _file()[f"table{number}"]
    rows = tuple(_row(number, printed, values) for values in printed["rows"])
    return PublishedTable(number, printed["title"], rows)


def baseline_of(table: PublishedTable, row: PublishedRow) -> PublishedRow:
    """The row that a row's speed-up is against: without selection, of the same architecture.

    Table 7 has none; the paper compares it with that of Table 4.
    """
    for other in table.rows:
        if other.setting and not other.setting.selection.active:
            if row.setting is None or other.setting.architecture == row.setting.architecture:
                return other
    return published_table(4).rows[0]


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads((resources.files("trips.paper") / "paper_tables.json").read_text(encoding="utf-8"))


def _row(number: int, printed: Mapping[str, Any], values: Mapping[str, Any]) -> PublishedRow:
    figures = _flat({key: value for key, value in values.items() if key not in _DESCRIPTION})
    if "fit" not in values:
        return PublishedRow(values["model"], figures)
    setting = _setting(number, printed, values)
    fitting = values["convention_locations"]
    explained = values["fit"] == "within 0.02 G"
    return PublishedRow(setting.name, figures, setting, None if fitting is None else tuple(fitting), explained)


def _setting(number: int, printed: Mapping[str, Any], values: Mapping[str, Any]) -> Setting:
    name, locations, rate = values.get("model"), values.get("locations"), values.get("keep_rate")
    if number == 3:  # by its text
        locations, rate = ((), None) if name == "ALBEF-C" else _MAIN
    side = values.get("image_size", _SMALL_SIDE if number == 3 else printed.get("image_size", _SIDE))
    if name is None:
        name = f"[{', '.join(map(str, locations))}] x {rate:g}" if locations else "no selection"
        name += f", {side} px" if number == 5 else ""
    selection = SelectionConfig(guide="none")
    if locations:
        selection = SelectionConfig(
            layers=tuple(locations),
            keep_rate=rate,
            guide=values.get("guide", "text"),
            inattentive="fuse" if values.get("fuse", True) else "drop",
        )
    return Setting(name, selection, side, architecture="single" if name.startswith("TRIPS-S") else "dual")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    flat: dict[str, float | None] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
