"""The quick-start's comparison over several seeds, with the paper's keep rate beside the harsh one.

    python benchmarks/quickstart_seeds.py --out benchmarks/results/quickstart_seeds.json

Every seed has its own scenes, weights and warm-up; all guides of a seed fine-tune copies of the same warmed-up model
for the same number of steps. A finished row is stored at once and warmed-up models are kept in `--work`, so that an
interrupted run goes on; the rows at the harsh rate come first, for all seeds. `--part validation` measures on the
scenes that settings are chosen on instead of those that figures are reported on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
from pathlib import Path

from trips.environment import describe_environment
from trips.quickstart.plan import GUIDES, VALIDATION_START, QuickstartPlan
from trips.quickstart.report import answerable_gain
from trips.quickstart.run import measured_row
from trips.quickstart.sweep import SceneAccuracy

PAPER_RATE = 0.7
PAPER_GUIDES = ("text_distill", "text_gate", "image_cls", "random")  # "none" is the same row at any rate


def summarise(seeds: dict[str, dict[str, dict]], last: str) -> dict[str, dict]:
    """Mean and standard deviation over seeds of each row's figures; a row that some seed lacks is left out."""
    by_seed = list(seeds.values())
    summary = {}
    for name in (name for name in by_seed[0] if all(name in rows for rows in by_seed)):
        rows = [rows[name] for rows in by_seed]
        figures = {f"accuracy_{kind}": [row["accuracy"][kind] for row in rows] for kind in rows[0]["accuracy"]}
        figures["accuracy_behind_none"] = [
            own["none"]["accuracy"]["overall"] - row["accuracy"]["overall"]
            for own, row in zip(by_seed, rows, strict=True)
        ]
        figures["relevance_recall"] = [row["relevance_recall"][last] for row in rows]
        figures["relevance_gain"] = [row["relevance_gain"][last] for row in rows]
        figures["relevance_gain_answerable"] = [
            answerable_gain(row, own["none"]) for own, row in zip(by_seed, rows, strict=True)
        ]
        for kind in rows[0]["relevance_gain_by_type"]:
            figures[f"relevance_gain_{kind}"] = [row["relevance_gain_by_type"][kind] for row in rows]
        summary[name] = {
            key: {
                "mean": round(statistics.mean(values), 4),
                "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            }
            for key, values in figures.items()
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", choices=("full", "smoke"), default="full")
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_seeds.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/quickstart_seeds"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan = QuickstartPlan.of(args.scale)
    if args.part == "validation":
        plan = dataclasses.replace(plan, first_scene=VALIDATION_START)
    harsh = {guide: plan.selection(guide) for guide in GUIDES}
    mild = {f"{guide} x {PAPER_RATE}": plan.selection(guide, PAPER_RATE) for guide in PAPER_GUIDES}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    source = SceneAccuracy(args.work, plan)
    written = json.loads(json.dumps(dataclasses.asdict(plan)))
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"plan": written, "seeds": {}}
    if results["plan"] != written:
        parser.error(f"{args.out} holds rows of another plan: give another --out")
    for selections in (harsh, mild):
        for seed in args.seeds:
            rows = results["seeds"].setdefault(str(seed), {})
            missing = [name for name in selections if name not in rows]
            warm, batcher = source.warmed_up(seed) if missing else (None, None)
            for name in missing:
                rows[name], _ = measured_row(name, warm, batcher, plan, selections[name], seed)
                results["environment"] = describe_environment()
                results["summary"] = summarise(results["seeds"], str(plan.layers[-1]))
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, figures in results["summary"].items():
        line = "  ".join(f"{key} {value['mean']:.3f}±{value['sd'] or 0:.3f}" for key, value in figures.items())
        print(f"{name:22s} {line}")


if __name__ == "__main__":
    main()
