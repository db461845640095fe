"""A table for people: one list of columns, for a terminal and for Markdown, and the files of a result's folder.

Columns that no row has anything in are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trips.errors import ConfigError
from trips.paper.tables import TableResult, TableRow

_MARK, _NOTHING = "†", "-"
_RECALLS = tuple(f"{side}.R@{k}" for side in ("TR", "IR") for k in (1, 5, 10))
_DATA = {"flickr30k_1k": "Flickr30K", "mscoco_5k": "COCO", "own_data": "own data"}
_TESTS = {
    "vqa_test_dev": "VQA\ntest-dev",
    "vqa_test_std": "VQA\ntest-std",
    "nlvr2_dev": "NLVR2\ndev",
    "nlvr2_test_p": "NLVR2\nTest-P",
    "own_data.vqa_official": "own data\nVQA official",
    "own_data.vqa_exact": "own data\nVQA exact",
    "own_data.nlvr2": "own data\nNLVR2",
}
_LEGEND = (
    "paper G: operations as printed, in 1e9; our G: the same convention, for the layers that fit; exact G: everything "
    "counted, 40 text tokens, printed layers; x: times as fast as the row without selection, by exact count or measured"
)


@dataclass(frozen=True)
class Column:
    """A column: its title, where "\\n" may be broken, and the text of each row's cell, "-" for nothing."""

    title: str
    cells: tuple[str, ...]


def columns_of(result: TableResult) -> list[Column]:
    """The columns of a table, the name of the row first."""
    if result.number <= 2:
        return _own_columns(result)
    first = Column("model" if result.number in (3, 6, 7) else "setting", tuple(row.name for row in result.rows))
    made = (Column(title, tuple(cell(row) for row in result.rows)) for title, cell in _counted_columns(result))
    return [first, *(column for column in made if set(column.cells) != {_NOTHING})]


def footnotes(result: TableResult) -> list[str]:
    """Sentences under a table: what its columns are, what is not explained, what does not agree, what failed."""
    lines = [_LEGEND] if result.number > 2 else []
    if result.speed:
        lines.append(f"our pairs/s and ms: {result.speed}")
    if result.accuracy:
        lines.append(f"ours: {result.accuracy}, ± standard deviation (seeds)")
    lines += [f"{_MARK} {row.name}: {row.unexplained}" for row in result.rows if row.unexplained]
    if len(result.measured_on) > 1:
        lines.append(f"our figures were measured under different conditions: {'; '.join(result.measured_on)}")
    return [*lines, *result.remarks, *(f"FAILED {name}: {error}" for name, error in result.failures.items())]


def rich_table(result: TableResult) -> RenderableType:
    """A table for a terminal, its footnotes below."""
    table = Table(title=f"Table {result.number}. {result.title}", title_justify="left")
    columns = columns_of(result)
    for i, column in enumerate(columns):
        table.add_column(Text(column.title), justify="right" if i else "left", no_wrap=not i)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return Group(table, *(Text(f"- {line}") for line in footnotes(result)))


def markdown(result: TableResult) -> str:
    """A table as Markdown, with footnotes and what it was measured on."""
    columns = columns_of(result)
    heads = [column.title.replace("\n", " ") for column in columns]
    lines = [f"# Table {result.number}. {result.title}", "", _line(heads)]
    lines.append(_line(["---", *["---:"] * (len(columns) - 1)]))
    lines += [_line(cells) for cells in zip(*(column.cells for column in columns), strict=True)]
    lines += ["", *(f"- {line}" for line in footnotes(result))]
    told = ", ".join(f"{name} {value}" for name, value in result.environment.items() if value is not None)
    measured = [f"Measured on: {'; '.join(result.measured_on)}.", ""] if result.measured_on else []
    return "\n".join([*lines, "", *measured, f"Written by: {told}.", ""])


def write_table(result: TableResult, folder: str | Path) -> list[Path]:
    """Write table.md and rows.json, which holds everything, into a folder.

    Raises:
        ConfigError: they cannot be written there.
    """
    folder, rows = Path(folder), json.dumps(dataclasses.asdict(result), indent=1, ensure_ascii=False) + "\n"
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("table.md", markdown(result)), ("rows.json", rows)):
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, folder / name)
            paths.append(folder / name)
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror or error})", item=folder) from error
    return paths


def _own_columns(result: TableResult) -> list[Column]:
    """Tables 1 and 2: a row for the paper's figures, below it one for ours where the model is ours to train."""
    titles = _TESTS
    if result.number == 1:
        titles = {
            f"{data}.{key}": f"{name}\n{key.replace('.', ' ')}" for data, name in _DATA.items() for key in _RECALLS
        }
    rows: list[tuple[str, dict[str, float | None]]] = []
    for row in result.rows:
        if row.paper:
            rows.append((row.name, row.paper))
        if row.ours or row.name in ("TRIPS", "ALBEF-C"):
            rows.append((f"{row.name}, ours" if row.paper else row.name, row.ours))
    columns = [Column("model", tuple(name for name, _ in rows))]
    for key, title in titles.items():
        column = Column(title, tuple(_number(figures.get(key), 2 if result.number == 2 else 1) for _, figures in rows))
        if set(column.cells) != {_NOTHING}:
            columns.append(column)
    return columns


def _counted_columns(result: TableResult) -> Iterator[tuple[str, Callable[[TableRow], str]]]:
    """Titles of tables 3 to 7, each with its cell of a row."""

    def paper(key: str, digits: int = 2) -> Callable[[TableRow], str]:
        return lambda row: _number(row.paper.get(key), digits)

    def ours(key: str, digits: int = 2) -> Callable[[TableRow], str]:
        return lambda row: _number(row.ours.get(key), digits)

    yield "kept\n%", lambda row: _number(100 * row.paper["overall_keep_rate"], 0) if _keeps(row) else _NOTHING
    yield "paper\nG", paper("flops_g")
    yield "our\nG", ours("convention_g")
    yield "fits\nlayers", _fitting
    yield "exact\nG", ours("exact_g")
    yield "exact\nx", ours("exact_speedup")
    yield "paper\npairs/s", paper("throughput")
    yield "paper\nx", paper("throughput_ratio")
    yield "our\npairs/s", ours("throughput")
    yield "our\nx", ours("throughput_ratio")
    yield "paper\nms", paper("latency_ms", 0)
    yield "our\nms", ours("latency_ms", 1)
    yield "our\nms, x", ours("latency_ratio")
    for key, title in list(_TESTS.items())[:4]:
        yield f"paper\n{title.replace(chr(10), ' ')}", paper(key)
    yield "ours", _accuracy


def _keeps(row: TableRow) -> bool:
    return row.paper.get("overall_keep_rate") is not None


def _fitting(row: TableRow) -> str:
    """Which locations reproduce the printed operations: the location note."""
    if row.setting is None:
        return _NOTHING
    if row.unexplained:
        near = row.ours.get("convention_layers")
        return f"no: {_layers(near)} {_MARK}" if near and near != list(row.setting.selection.layers) else f"no {_MARK}"
    printed = list(row.setting.selection.layers) if row.setting.selection.active else []
    fitting = row.ours["convention_layers"]
    return "as printed" if fitting == printed else f"{_layers(fitting)}, not {_layers(printed)}"


def _layers(layers: list[int]) -> str:
    return f"[{', '.join(map(str, layers))}]"


def _accuracy(row: TableRow) -> str:
    if "accuracy" not in row.ours:
        return _NOTHING
    spread, count = row.ours["accuracy_sd"], len(row.ours["accuracy_by_seed"])
    return f"{row.ours['accuracy']:.2f}" + ("" if spread is None else f" ± {spread:.2f} ({count})")


def _number(value: Any, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
