"""What a table shows, as a picture: accuracy against operations, and measured against counted speed-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trips.errors import MissingDependencyError
from trips.paper.tables import TableResult, TableRow

_PAPER, _OURS = "tab:gray", "tab:blue"
_PLACES = ((5, 4), (-12, -10), (5, -10), (-12, 4), (12, -3))  # of a number beside its point, in points of type
_Point = tuple[float, float, TableRow, int]


def draw_table(result: TableResult, folder: str | Path) -> list[Path]:
    """Write table_N.png and table_N.svg: one panel per comparison that the rows have figures for.

    Panels: the paper's operations against its accuracy on VQA; exact operations against our accuracy, mean and
    standard deviation over the seeds; exact speed-up against the speed-up that the paper and this machine measured.

    Args:
        result: tables 1 and 2 have nothing to draw.
        folder: of the files, made if it does not exist.
    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    rows = [row for row in result.rows if row.setting is not None]
    panels = []
    if any(row.paper.get("vqa_test_dev") is not None for row in rows):
        panels.append(_paper_panel)
    if any("accuracy" in row.ours for row in rows):
        panels.append(_accuracy_panel)
    if rows:
        panels.append(_speed_panel)
    if not panels:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "is not installed", item="matplotlib", hint='pip install "trips-vlm[figures]"'
        ) from error
    figure = Figure(figsize=(5.0 * len(panels) + 1.8, 4.6), layout="constrained")
    *axes, names = figure.subplots(1, len(panels) + 1, width_ratios=[1.0] * len(panels) + [0.4])
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, rows, result)
        axis.grid(alpha=0.3)
    names.axis("off")
    lines = (f"{number}  {row.name}" for number, row in enumerate(rows, start=1))
    names.text(0, 1, "\n".join(lines), va="top", fontsize=9, transform=names.transAxes)
    figure.suptitle(f"Table {result.number}. {result.title.split(';')[0]}", fontsize=11)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table_{result.number}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths


def _paper_panel(axis: Any, rows: list[TableRow], _: TableResult) -> None:
    points = [
        (row.paper["flops_g"], row.paper["vqa_test_dev"], row, number)
        for number, row in enumerate(rows, start=1)
        if row.paper.get("vqa_test_dev") is not None
    ]
    _scatter(axis, points, _PAPER)
    axis.set_xlabel("operations as printed, G")
    axis.set_ylabel("VQA test-dev, %")
    axis.set_title("the paper")


def _accuracy_panel(axis: Any, rows: list[TableRow], result: TableResult) -> None:
    points = [
        (row.ours["exact_g"], row.ours["accuracy"], row, number)
        for number, row in enumerate(rows, start=1)
        if "accuracy" in row.ours
    ]
    _scatter(axis, points, _OURS)
    for *_, row, _ in points:
        if row.ours["accuracy_sd"] is not None:
            axis.errorbar(row.ours["exact_g"], row.ours["accuracy"], row.ours["accuracy_sd"], color=_OURS, capsize=3)
    axis.set_xlabel("exact operations of the paper's model, G")
    axis.set_ylabel(result.accuracy)
    axis.set_title("ours, mean and standard deviation over seeds")


def _speed_panel(axis: Any, rows: list[TableRow], _: TableResult) -> None:
    counted = [row.ours["exact_speedup"] for row in rows]
    printed = [row.paper["throughput_ratio"] for row in rows]
    points = [(*point, number) for number, point in enumerate(zip(counted, printed, rows, strict=True), start=1)]
    _scatter(axis, points, _PAPER, "the paper, largest batch, V100")
    timed = [row for row in rows if "throughput_ratio" in row.ours]
    if timed:
        ours = [row.ours["throughput_ratio"] for row in timed]
        axis.scatter([row.ours["exact_speedup"] for row in timed], ours, color=_OURS, label="ours, this machine")
        printed += ours
    ends = [min(counted + printed), max(counted + printed)]
    axis.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="as counted")
    axis.set_xlabel("speed-up by exact operations")
    axis.set_ylabel("speed-up by throughput")
    axis.set_title("counted and measured")
    axis.legend(loc="best", fontsize=8)


def _scatter(axis: Any, points: list[_Point], colour: str, label: str | None = None) -> None:
    """Points with the numbers of their rows; hollow where nothing is selected."""
    for x, y, row, _ in points:
        face = colour if row.setting.selection.active else "white"
        axis.scatter(x, y, s=28, facecolors=face, edgecolors=colour, zorder=3, label=label)
        label = None
    widths = [(max(values) - min(values)) or 1.0 for values in zip(*((x, y) for x, y, *_ in points), strict=True)]
    for i, (x, y, _, number) in enumerate(points):
        before = sum(
            abs(x - other[0]) < 0.05 * widths[0] and abs(y - other[1]) < 0.05 * widths[1] for other in points[:i]
        )
        axis.annotate(
            str(number), (x, y), xytext=_PLACES[before % len(_PLACES)], textcoords="offset points", fontsize=8
        )
    axis.margins(x=0.1, y=0.1)
