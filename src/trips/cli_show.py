"""How results of the command line look: tables for people, one JSON object for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_NUM_NAMED = 20  # bad samples in a table; --json names all


def show(verb: str, result: Any, as_json: bool, render: Callable[[str, Any], RenderableType] | None = None) -> None:
    """Print what a verb has found to stdout; `render` makes its tables, where it has some of its own."""
    if render is not None and not as_json:
        _wide_console().print(render(verb, result))
        return
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = dataclasses.asdict(result)
    if as_json:
        print(json.dumps(result, default=_jsonable, ensure_ascii=False))
    elif verb == "quickstart":
        _show_quickstart(result)
    elif isinstance(result, Mapping):
        if not result:
            return
        table = Table(title=f"trips {verb}", title_justify="left")
        table.add_column("name")
        table.add_column("value", overflow="fold")
        for name, value in result.items():
            table.add_row(str(name), _text(value))
        Console().print(table)
    elif result is not None:
        print(result)


def named_table(title: str, found: Mapping[str, str]) -> Table:
    """The first of some bad samples by name, each with the reason."""
    table = Table(title=title, title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    for name, reason in list(found.items())[:_NUM_NAMED]:
        table.add_row(Text(name), Text(reason))  # brackets in a name are no markup
    if len(found) > _NUM_NAMED:
        table.add_row(f"and {len(found) - _NUM_NAMED} more", "--json names all")
    return table


def _wide_console() -> Console:
    """A console of at least 140 columns: a table broken over lines helps nobody."""
    return Console(width=max(Console().width, 140))


def _show_quickstart(results: Mapping[str, Any]) -> None:
    from trips.quickstart.report import results_table

    console = _wide_console()
    console.print(results_table(results["rows"]))
    for line in results["findings"]:
        console.print(f"- {line}", highlight=False)
    console.print(f"{results['seconds']:.0f} s; written to {results['out']}: report.html, results.json, model/")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (Mapping, Namespace)):
        return ", ".join(f"{key} {_text(item)}" for key, item in dict(value).items())
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dict(value) if isinstance(value, Mapping) else repr(value)
