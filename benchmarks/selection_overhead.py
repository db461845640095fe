"""Cost of the selection itself, and the speed-up of [5, 10] x 0.7 over no selection, in one process.

    python benchmarks/selection_overhead.py             # ViT-B/16, 384 px, batch 8, 40 text tokens
    python benchmarks/selection_overhead.py --quick     # 224 px, batch 2, few rounds

Baseline and subject are interleaved, weights are random and shared, attention is fused on both sides. The overhead is
the time spent in scoring, top-k, gather and fusing, measured inside the running forward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import trips.vision as vision_module
from trips.bench.flops import count_flops
from trips.config import SelectionConfig, TripsConfig
from trips.environment import describe_environment
from trips.model import TripsModel


class Stopwatch:
    """Adds up the time spent in functions that it wraps."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.device = 0.0, device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, function):
        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds += self.now() - start
            return result

        return timed


@torch.no_grad()
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
    config = TripsConfig()
    model = TripsModel(config).eval().to(device)
    settings = {"none": SelectionConfig(guide="none"), "text [5,10] x 0.7": SelectionConfig()}
    pixels = torch.randn(args.batch, 3, args.pixels, args.pixels, device=device)
    ids = torch.randint(1000, 2000, (args.batch, 40), device=device)
    text = model.encode_text(ids, torch.ones_like(ids))[:, 0]
    watch = Stopwatch(device)
    encoder = model.vision
    encoder._logits = watch.wrap(encoder._logits)
    vision_module.select_patches = watch.wrap(vision_module.select_patches)
    times = {(part, name): [] for part in ("model", "vision") for name in settings}
    shares = []
    for round_number in range(args.rounds + 1):
        for name, selection in settings.items():
            for part in ("model", "vision"):
                watch.seconds, start = 0.0, watch.now()
                if part == "model":
                    model(ids, None, pixels, selection=selection)
                else:
                    encoder(pixels, text, selection)
                taken = watch.now() - start
                if round_number:  # the first round warms up
                    times[part, name].append(taken)
                    if selection.active and part == "model":
                        shares.append(watch.seconds / taken)
    grid = (args.pixels // 16, args.pixels // 16)
    counts = {name: count_flops(config, grid, 40, selection) for name, selection in settings.items()}
    base, subject = counts.values()
    median = {key: statistics.median(values) for key, values in times.items()}
    names = list(settings)
    result = {
        "environment": describe_environment(),
        "pixels": args.pixels,
        "batch": args.batch,
        "rounds": args.rounds,
        "seconds": {f"{part}, {name}": round(value, 4) for (part, name), value in median.items()},
        "selection_share_of_forward": round(statistics.median(shares), 5),
        "measured_speedup": {p: round(median[p, names[0]] / median[p, names[1]], 3) for p in ("model", "vision")},
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
