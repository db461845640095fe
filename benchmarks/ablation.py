"""The ablation on the embedded corpus: who chooses, what becomes of the rest, how much is kept; several seeds.

    python benchmarks/ablation.py --out benchmarks/results/ablation_scenes.json

All settings of a seed fine-tune copies of one warmed-up model for the same number of steps. Beside the selections stand
two controls that remove tokens without looking at the text: merging patches that are alike, and making the image
smaller, to the grid whose operations come closest to those of the text-guided selection at the same keep rate. A
finished cell is stored at once and an interrupted run goes on; fused settings come first, for all seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path

from trips.bench.flops import count_flops
from trips.config import SelectionConfig
from trips.environment import describe_environment
from trips.paper.settings import Setting
from trips.quickstart.plan import QuickstartPlan
from trips.quickstart.sweep import SceneAccuracy

RATES = (0.7, 0.5, 0.3)
TEXT_GUIDES = {f"text {learning}": {"learning": learning} for learning in ("literal", "gate", "distill")}
GUIDES = {**TEXT_GUIDES, "image [CLS]": {"guide": "image"}, "random": {"guide": "random"}}
TEXT_LENGTH = 10  # tokens of a typical question


def settings(source: SceneAccuracy, config) -> tuple[list[Setting], list[Setting]]:
    """All cells of the table: fused ones and controls, then those that drop."""
    fused = [Setting("none", SelectionConfig(guide="none"))]
    for rate in RATES:
        fused += [
            Setting(f"{name}, fused, {rate:g}", SelectionConfig(keep_rate=rate, **changes))
            for name, changes in GUIDES.items()
        ]
        fused.append(Setting(f"merging, {rate:g}", SelectionConfig(keep_rate=rate, guide="similarity")))
        if (smaller := downscaled(source, config, rate)) not in fused:  # a small grid has few sizes
            fused.append(smaller)
    dropped = [
        Setting(f"{name}, dropped, {rate:g}", SelectionConfig(keep_rate=rate, inattentive="drop", **changes))
        for rate in reversed(RATES)
        for name, changes in GUIDES.items()
    ]
    return fused, dropped


def downscaled(source: SceneAccuracy, config, rate: float) -> Setting:
    """No selection, on the grid whose operations are nearest to those of the text-guided selection."""
    patch, full = config.vision_config.patch_size, config.vision_config.image_size
    grid = full // patch
    guided = source.selection(Setting("", SelectionConfig(keep_rate=rate)))
    target = count_flops(config, (grid, grid), TEXT_LENGTH, guided).total
    none = guided.replace(guide="none")
    best = min(
        range(1, grid + 1), key=lambda side: abs(count_flops(config, (side, side), TEXT_LENGTH, none).total - target)
    )
    return Setting(
        f"down-scaling to {best} x {best} of {grid} x {grid}", SelectionConfig(guide="none"), scale=best / grid
    )


def summarise(seeds: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Mean, standard deviation and number of seeds of each figure of each cell."""
    summary: dict[str, dict] = {}
    for name in dict.fromkeys(name for rows in seeds.values() for name in rows):
        rows = [rows[name] for rows in seeds.values() if name in rows]
        summary[name] = {"seeds": len(rows)}
        for key in rows[0]:
            values = [row[key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[name][key] = {"mean": round(statistics.mean(values), 4), "sd": spread and round(spread, 4)}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", choices=("full", "smoke"), default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/sweep/warm"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    source = SceneAccuracy(args.work, QuickstartPlan.of(args.scale))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"seeds": {}}
    for part in settings(source, source.warmed_up(args.seeds[0])[0].config):
        for seed in args.seeds:
            rows = results["seeds"].setdefault(str(seed), {})
            for setting in part:
                if setting.name in rows:
                    continue
                rows[setting.name] = source.measure(setting, seed)
                results |= {"environment": describe_environment(), "summary": summarise(results["seeds"])}
                written = args.out.with_suffix(".part")
                written.write_text(json.dumps(results, indent=1) + "\n")
                written.replace(args.out)
    for name, figures in results["summary"].items():
        accuracy = figures["accuracy"]
        print(f"{name:26s} {accuracy['mean']:.1f} ± {accuracy['sd'] or 0:.1f} %  {figures['flops_g']['mean']:.4f} G")


if __name__ == "__main__":
    main()
