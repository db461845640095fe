"""What has been measured, as rows for machines, a table and a picture for people."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trips.bench.methods import KeptTokens
from trips.errors import ConfigError, MissingDependencyError


@dataclass(frozen=True)
class SpeedRow:
    """A subject beside its baseline, which is no selection unless the caller said otherwise.

    Attributes:
        px: pixels of a side.
        method: text, image, random, similarity, downscale; or the name of another model.
        locations, keep_rates: of the subject's selection, empty without.
        scale: factor on the sides of the image before it was cut into patches.
        equal: what a method has in common with the text-guided one: "tokens" or measured "time".
        precision, mode, part: see `trips.bench.plan.SpeedPlan`.
        batch: pairs at once. largest: it is the largest that fits.
        rounds: calls that count.
        baseline_ms, subject_ms: median of a call. Those with p95: what 95 % of calls stay under.
        baseline_pairs_per_second, subject_pairs_per_second: batch over median.
        measured_ratio: median over rounds of baseline over subject. ratio_low, ratio_high: 10 % and 90 % quantiles.
        baseline_gflops, subject_gflops: exact operations of a pair. exact_ratio: theirs.
        baseline_peak_mib, subject_peak_mib: most that tensors held beyond weights and inputs; None under CUDA graphs.
        image_tokens: patches that enter the first layer.
        tokens: what every location keeps.
    """

    px: int
    method: str
    locations: tuple[int, ...]
    keep_rates: tuple[float, ...]
    scale: float
    equal: str
    precision: str
    mode: str
    part: str
    batch: int
    largest: bool
    rounds: int
    baseline_ms: float
    baseline_p95_ms: float
    subject_ms: float
    subject_p95_ms: float
    baseline_pairs_per_second: float
    subject_pairs_per_second: float
    measured_ratio: float
    ratio_low: float
    ratio_high: float
    baseline_gflops: float
    subject_gflops: float
    exact_ratio: float
    baseline_peak_mib: float | None
    subject_peak_mib: float | None
    image_tokens: int
    tokens: tuple[KeptTokens, ...]

    @property
    def setting(self) -> str:
        """Locations and rates, or the scale, in a few letters."""
        if self.locations:
            rates = dict.fromkeys(self.keep_rates) if len(set(self.keep_rates)) == 1 else self.keep_rates
            return f"[{','.join(map(str, self.locations))}] x {','.join(f'{rate:g}' for rate in rates)}"
        return f"scale {self.scale:.3g}" if self.scale != 1 else "-"

    @property
    def line(self) -> str:
        """The result in one line of a log."""
        what, times = (
            f"{self.px} px, {self.method} {self.setting}",
            f"{self.baseline_ms:.4g} -> {self.subject_ms:.4g} ms",
        )
        return f"{what}: {times}, {self.measured_ratio:.3f} x as fast (exact {self.exact_ratio:.3f})"

    @property
    def tokens_line(self) -> str:
        """Patch tokens that went in and were kept at each location, for people."""
        parts = [f"{self.image_tokens} patches"]
        for place in self.tokens:
            fused = " + 1 fused" if place.left > place.kept else ""
            parts.append(f"layer {place.layer}: {place.entered} in, {place.kept} kept{fused}")
        return "; ".join(parts)


@dataclass(frozen=True)
class SpeedReport:
    """Everything that a measurement found.

    Attributes:
        environment: hardware, versions, commit, time.
        commit: of the checkout, None for an installed package.
        model: what was timed: class, sizes, parameters.
        baseline: what it was timed against, in words.
        plan: the settings, see `trips.bench.plan.SpeedPlan`.
        rows: a subject beside its baseline each.
    """

    environment: dict[str, Any]
    commit: str | None
    model: dict[str, Any]
    baseline: str
    plan: dict[str, Any]
    rows: tuple[SpeedRow, ...]

    def table(self) -> str:
        """The rows as text, for ``print``."""
        stream = io.StringIO()
        Console(file=stream, width=200).print(self.rich_table())
        lines = dict.fromkeys(f"{row.px} px, {row.method} {row.setting}: {row.tokens_line}" for row in self.rows)
        return stream.getvalue() + "\n".join(lines) + "\n"

    def rich_table(self) -> Table:
        """The rows for a terminal."""
        words = f"{self.environment.get('device')}, {self.plan.get('precision')}, {self.plan.get('part')}"
        table = Table(title=f"{words}; times are medians (95 %), base is {self.baseline}", title_justify="left")
        for name in ("px", "method", "setting", "mode", "batch"):
            table.add_column(name)
        for name in ("base, ms", "ms", "pairs/s", "measured", "exact", "peak MiB"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                str(row.px),
                row.method + (", equal time" if row.equal == "time" else ""),
                row.setting,
                row.mode,
                f"{row.batch}{' (largest)' if row.largest else ''}",
                f"{row.baseline_ms:.4g} ({row.baseline_p95_ms:.4g})",
                f"{row.subject_ms:.4g} ({row.subject_p95_ms:.4g})",
                f"{row.subject_pairs_per_second:.4g}",
                f"{row.measured_ratio:.3f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
                f"{row.exact_ratio:.3f}",
                f"{_mib(row.baseline_peak_mib)} -> {_mib(row.subject_peak_mib)}",
            )
        return table

    def plot(self, path: str | Path) -> None:
        """Draw throughput over the share of patches kept, and measured over exact ratio.

        Raises:
            MissingDependencyError, ConfigError: see `check_picture`.
        """
        check_picture(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        throughput, ratios = figure.subplots(1, 2)
        lines: dict[tuple[Any, ...], list[SpeedRow]] = {}
        for row in self.rows:
            lines.setdefault((row.px, row.method, row.locations, row.mode, row.batch), []).append(row)
        for (px, method, layers, mode, batch), rows in lines.items():
            label = f"{px} px, {method} {list(layers) or ''}, {mode}, batch {batch}"
            rows = sorted(rows, key=_share)
            marks = throughput.plot(
                [*map(_share, rows), 1.0],
                [*(row.subject_pairs_per_second for row in rows), rows[-1].baseline_pairs_per_second],
                marker="o",
                label=label,
            )
            ratios.scatter(
                [row.exact_ratio for row in rows], [row.measured_ratio for row in rows], color=marks[0].get_color()
            )
        most = max((max(row.exact_ratio, row.measured_ratio) for row in self.rows), default=1.0)
        ratios.plot([1, most], [1, most], color="grey", linewidth=1)
        throughput.set(xlabel="share of patches that leaves the last location", ylabel="pairs per second")
        ratios.set(xlabel="exact ratio of operations", ylabel="measured ratio of time")
        throughput.legend(fontsize=6)
        figure.savefig(path, dpi=150)


def check_picture(path: str | Path) -> None:
    """Whether a picture can be drawn there, before a long measurement for it.

    Raises:
        MissingDependencyError: matplotlib is not installed. ConfigError: no such folder or kind of picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib", item="plot", hint='pip install "trips-vlm[figures]"'
        ) from error
    if not Path(path).parent.is_dir():
        raise ConfigError("no such folder", item="plot", found=str(Path(path).parent))
    if (kind := Path(path).suffix.lstrip(".").lower()) not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise ConfigError("no such kind of picture", item="plot", found=kind, expected=" | ".join(known))


def _share(row: SpeedRow) -> float:
    """Of the patches: what is left behind the last location, or by down-scaling."""
    return math.prod(row.keep_rates) * row.scale**2


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
