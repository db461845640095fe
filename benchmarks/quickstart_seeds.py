"""The quick-start's comparison over several seeds, with the paper's keep rate beside the harsh one.

    python benchmarks/quickstart_seeds.py --out benchmarks/results/quickstart_seeds.json

Every seed has its own scenes, weights and warm-up; all guides of a seed fine-tune copies of the same warmed-up model.
A finished seed is stored at once, so that an interrupted run goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path

from trips.environment import describe_environment
from trips.quickstart.plan import GUIDES, QuickstartPlan
from trips.quickstart.run import compare_guides

PAPER_RATE = 0.7


def summarise(seeds: dict[str, list[dict]], last: str) -> dict[str, dict]:
    """Mean and standard deviation over seeds of each row's figures."""
    names = [row["guide"] for row in next(iter(seeds.values()))]
    summary = {}
    for i, name in enumerate(names):
        rows = [rows[i] for rows in seeds.values()]
        figures = {f"accuracy_{kind}": [row["accuracy"].get(kind) for row in rows] for kind in rows[0]["accuracy"]}
        figures["relevance_recall"] = [row["relevance_recall"][last] for row in rows]
        figures["relevance_gain"] = [row["relevance_gain"][last] for row in rows]
        for kind in rows[0]["relevance_gain_by_type"]:
            figures[f"relevance_gain_{kind}"] = [row["relevance_gain_by_type"].get(kind) for row in rows]
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
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_seeds.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan = QuickstartPlan.of(args.scale)
    selections = {guide: plan.selection(guide) for guide in GUIDES}
    selections |= {f"text_distill x {PAPER_RATE}": plan.selection("text_distill", PAPER_RATE)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"seeds": {}}
    for seed in args.seeds:
        if str(seed) in results["seeds"]:
            continue
        results["seeds"][str(seed)], _, _ = compare_guides(plan, seed, selections)
        results["environment"] = describe_environment()
        results["plan"] = {key: getattr(plan, key) for key in plan.__dataclass_fields__}
        results["summary"] = summarise(results["seeds"], str(plan.layers[-1]))
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, figures in results["summary"].items():
        line = "  ".join(f"{key} {value['mean']:.3f}±{value['sd'] or 0:.3f}" for key, value in figures.items())
        print(f"{name:22s} {line}")


if __name__ == "__main__":
    main()
