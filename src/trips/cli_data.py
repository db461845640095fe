"""Pack images and captions into shards (trips data pack), and look at every sample of shards (trips data check)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trips.cli_show import named_table

if TYPE_CHECKING:
    from trips.data.check import CheckReport
    from trips.data.pack import PackReport


def pack(
    source: str,
    out: str,
    *,
    images: str | None = None,
    splits: str | None = None,
    shard_size: int = 1000,
    max_side: int | None = None,
    quality: int = 90,
    workers: int = 0,
    overwrite: bool = False,
    as_json: bool = False,
) -> PackReport:
    """Write images with captions as shards for pre-training and retrieval.

    What is bad is left out and named in OUT/rejects.jsonl.

    Args:
        source: .json, .jsonl, .csv, .tsv or .txt list of images and captions, or a folder of images with their texts.
        out: folder to make.
        images: folder that the paths of the list are relative to; by default that of the list.
        splits: parts of the list to take, by its field "split", joined by commas: --splits=train,restval.
        shard_size: samples per shard.
        max_side: largest width or height in pixels; larger images are reduced.
        quality: of JPEGs that are written anew, 1 to 95; others are copied as they are.
        workers: processes that decode; 0 decodes in this one.
        overwrite: replace the folder of an earlier pack.
        as_json: print one JSON object for machines.
    """
    from trips.data.pack import pack as write

    with _bar("images") as progress:
        return write(
            source,
            out,
            images=images,
            splits=splits.split(",") if splits else (),
            shard_size=shard_size,
            max_side=max_side,
            quality=quality,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )


def check(patterns: list[str], *, workers: int = 0, as_json: bool = False) -> CheckReport:
    """Read every sample of local tars and name what is damaged, bad or suspicious.

    The exit code is 1 if anything is damaged or bad.

    Args:
        patterns: tars.
        workers: processes, each of which takes a shard at a time; 0 reads in this one.
        as_json: print one JSON object for machines.
    """
    from trips.data.check import check as read

    with _bar("shards") as progress:
        return read(patterns, workers=workers, progress=progress)


VERBS: dict[str, Callable[..., Any]] = {"pack": pack, "check": check}


def add_verbs(group: ArgumentParser) -> None:
    """Add the parsers of `VERBS` to that of ``trips data``, which its own parent must know already."""
    commands = group.add_subcommands(dest="verb", required=True)
    for name, function in VERBS.items():
        summary = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()
        command = ArgumentParser(description=summary, exit_on_error=False)
        skip = {"as_json", "patterns"}
        command.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
        if name == "check":  # as many as a shell makes of an unquoted glob
            words = "paths or globs of tars, or ranges: 'data/pairs-{000000..000127}.tar'"
            command.add_argument("patterns", nargs="+", help=words)
        command.add_argument("--json", action="store_true", help="print one JSON object for machines")
        commands.add_subcommand(name, command, help=summary.splitlines()[0])


def render(name: str, report: PackReport | CheckReport) -> RenderableType:
    """A report of one of the verbs as tables for people."""
    counts = Table(title=f"trips {name}", title_justify="left", show_header=False)
    if hasattr(report, "written"):
        rows = {"samples written": report.written, "captions": report.captions, "shards": len(report.shards)}
        rows |= {"in": report.shards[0].rsplit("/", 1)[0], "left out": len(report.rejected)}
        findings = {"left out": report.rejected}
    else:
        rows = {"shards": report.shards, "samples": report.samples, "texts": report.texts}
        rows["images"] = ", ".join(f"{count} {name}" for name, count in report.formats.items()) or "none"
        for name in ("width", "height"):
            if (spread := getattr(report, name)) is not None:
                rows[name] = f"{spread.smallest} to {spread.largest} px, median {spread.median:g}"
        findings = {"damaged": report.damaged, "bad": report.bad, "suspicious": report.suspicious}
        rows |= {name: len(found) for name, found in findings.items()}
    for row, value in rows.items():
        counts.add_row(row, str(value))
    return Group(counts, *(named_table(name, found) for name, found in findings.items() if found))


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal
    ) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
