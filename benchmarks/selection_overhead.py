"""Cost of the selection itself, and the speed-up of [5, 10] x 0.7 over no selection, in one process.

    python benchmarks/selection_overhead.py             # ViT-B/16, 384 px, batch 8, 40 text tokens
    python benchmarks/selection_overhead.py --quick     # 224 px, batch 2, few rounds

Baseline and subject are interleaved on rotating inputs, weights are random and shared, attention is fused on both
sides. The overhead is the time spent in scoring, top-k, gather and fusing, measured inside the running forward pass;
speed-ups are medians of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import trips.vision as vision_module
from trips.bench.flops import count_flops
from trips.bench.subjects import POOL, build_subject, make_inputs, random_model
from trips.bench.timing import device_clock, interleave, ratio
from trips.config import SelectionConfig
from trips.environment import describe_environment

SETTINGS = {"none": SelectionConfig(guide="none"), "text [5,10] x 0.7": SelectionConfig()}
PARTS = {"model": "forward", "vision": "vision"}
TEXT_LENGTH = 40


class Stopwatch:
    """Adds up the time spent in functions that it wraps."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.now = 0.0, device_clock(device)

    def wrap(self, function):
        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds += self.now() - start
            return result

        return timed

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--pixels", type=int, default=384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.quick:
        args.pixels, args.batch, args.rounds = 224, 2, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = random_model().to(device)
    watch = Stopwatch(device)
    model.vision._logits = watch.wrap(model.vision._logits)
    vision_module.select_patches = watch.wrap(vision_module.select_patches)
    inputs = make_inputs(model, args.pixels, args.batch, TEXT_LENGTH)
    subjects = {
        (part, name): build_subject(model, selection, inputs, part=kind)
        for name, selection in SETTINGS.items()
        for part, kind in PARTS.items()
    }
    none, text = SETTINGS
    whole, inside = subjects["model", text], []

    def watched(number: int) -> None:
        watch.lap()
        whole(number)
        inside.append(watch.lap())

    subjects["model", text] = watched
    timings = interleave(subjects, args.rounds, pool=POOL, now=device_clock(device))
    shares = [
        spent / taken for spent, taken in zip(inside[-args.rounds :], timings["model", text].seconds, strict=True)
    ]
    grid = (args.pixels // 16, args.pixels // 16)
    base, subject = (count_flops(model.config, grid, TEXT_LENGTH, selection) for selection in SETTINGS.values())
    speedups = {part: ratio(timings[part, none], timings[part, text]).median for part in PARTS}
    result = {
        "environment": describe_environment(device),
        "pixels": args.pixels,
        "batch": args.batch,
        "rounds": args.rounds,
        "seconds": {f"{part}, {name}": round(found.median, 4) for (part, name), found in timings.items()},
        "selection_share_of_forward": round(statistics.median(shares), 5),
        "measured_speedup": {part: round(value, 3) for part, value in speedups.items()},
        "exact_ratio": {
            "model": round(base.total / subject.total, 3),
            "vision": round(base.vision / subject.vision, 3),
        },
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
