"""Markdown tables of docs/results.md from stored results.

python benchmarks/tables.py quickstart runs/quickstart/results.json
python benchmarks/tables.py seeds benchmarks/results/quickstart_seeds.json
python benchmarks/tables.py scores benchmarks/results/score_forms.json
python benchmarks/tables.py pretraining benchmarks/results/pretraining_step.json
python benchmarks/tables.py ablation benchmarks/results/ablation_scenes.json
python benchmarks/tables.py speed benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

KINDS = ("overall", "object", "background", "relation", "existence", "counting")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quickstart(results: dict) -> str:
    rows = []
    for row in results["rows"]:
        last = list(row["relevance_recall"])[-1]
        rows.append(
            [
                row["guide"],
                " x ".join(f"{rate:g}" for rate in row["keep_rates"]),
                *(f"{100 * row['accuracy'][kind]:.1f}" for kind in KINDS),
                f"{row['relevance_recall'][last]:.2f}",
                f"{row['relevance_gain'][last]:+.2f}",
                f"{row['relevance_gain_by_type'].get('object', 0):+.2f}",
                f"{row['flops_g']:.4f}",
                f"{row['throughput']:.0f}",
            ]
        )
    return markdown(["guide", "keep", *KINDS, "recall", "gain", "gain, objects", "GFLOPs", "pairs/s"], rows)


def seeds(results: dict) -> str:
    def cell(figures: dict, key: str, scale: float = 1, digits: int = 2) -> str:
        value = figures.get(key)
        return "-" if value is None else f"{scale * value['mean']:.{digits}f} ± {scale * value['sd']:.{digits}f}"

    rows = [
        [
            name,
            *(cell(figures, f"accuracy_{kind}", 100, 1) for kind in KINDS),
            cell(figures, "relevance_recall"),
            cell(figures, "relevance_gain"),
            cell(figures, "relevance_gain_object"),
        ]
        for name, figures in results["summary"].items()
    ]
    return markdown(["guide", *KINDS, "recall", "gain", "gain, objects"], rows)


def scores(results: dict) -> str:
    keys = list(results["rows"][0])
    return markdown(keys, [[str(row[key]) for key in keys] for row in results["rows"]])


def pretraining(results: dict) -> str:
    header = ["setting", "checkpointing", "seconds", "to ALBEF-C", "range", "exact", "GFLOP/pair", "GFLOP/s", "MiB"]
    rows = [
        [
            row["setting"],
            "yes" if row["gradient_checkpointing"] else "no",
            f"{row['seconds']:.3g}",
            f"{row['measured_ratio']:.2f}",
            " to ".join(f"{ratio:.2f}" for ratio in row["measured_range"]),
            f"{row['exact_ratio']:.2f}",
            f"{row['gflops_per_pair']:.0f}",
            f"{row['gflops_per_second']:.0f}",
            f"{row['mib']:.0f}",
        ]
        for row in results["rows"]
    ]
    return markdown(header, rows)


def ablation(results: dict) -> str:
    def cell(figures: dict, key: str, digits: int = 1) -> str:
        value = figures.get(key)
        if value is None:
            return "-"
        spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{spread}"

    rows = [
        [
            name,
            str(figures["seeds"]),
            cell(figures, "accuracy"),
            *(cell(figures, f"accuracy_{kind}") for kind in ("object", "background")),
            cell(figures, "gain_object", 2),
            f"{figures['flops_g']['mean']:.4f}",
            f"{figures['seconds']['mean']:.0f}",
        ]
        for name, figures in results["summary"].items()
    ]
    return markdown(["setting", "seeds", "overall", "object", "background", "gain, objects", "GFLOPs", "s"], rows)


def speed(results: dict) -> str:
    header = [
        "part",
        "mode",
        "px",
        "setting",
        "batch",
        "none, ms",
        "with, ms",
        "measured",
        "10 to 90 %",
        "exact",
        "MiB",
    ]
    rows = [
        [
            row["part"],
            row["mode"],
            str(row["px"]),
            f"{row['locations']} x {row['keep_rates'][0]:g}",
            str(row["batch"]),
            f"{row['baseline_ms']:.0f}",
            f"{row['subject_ms']:.0f}",
            f"{row['measured_ratio']:.3f}",
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
            f"{row['exact_ratio']:.3f}",
            f"{row['subject_peak_mib']:.0f} of {row['baseline_peak_mib']:.0f}",
        ]
        for part in results["parts"]
        for row in part["rows"]
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("quickstart", "seeds", "scores", "pretraining", "ablation", "speed"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    print(globals()[arguments.table](json.loads(arguments.file.read_text())))
