"""Speed of ViT-B/16 with and without selection on this machine, at the settings of the paper's Tables 4 and 5.

    python benchmarks/speed.py                          # on 2 threads of a CPU about 15 minutes
    python benchmarks/speed.py --quick                  # small and few, to see that it runs
    python benchmarks/speed.py --device cuda --precision bf16

Parts: inference of a pair at 224, 384 and 456 px, eager; the vision pass alone and compiled inference at 384 px. A GPU
adds CUDA graphs and a training step, and every batch size up to the largest that fits. `trips speed` does one of these
at a time, with other methods and models beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path

import torch

from trips.bench.plan import SpeedPlan
from trips.bench.speed import measure_speed
from trips.bench.subjects import DTYPES, random_model
from trips.config import SelectionConfig
from trips.environment import choose_device, describe_environment

SELECTIONS = (SelectionConfig(), SelectionConfig(layers=(4, 8)))


def plans(gpu: bool, quick: bool, shared: dict[str, object]) -> list[SpeedPlan]:
    """What is measured, the most important first."""
    sizes, middle = ((96, 64), 64) if quick else ((224, 384, 456), 384)
    batches = (1, 2) if quick else (1, 2, 4, 8, *(("max",) if gpu else ()))
    ends = (batches[0], batches[-1])
    pair = SpeedPlan(SELECTIONS, sizes, batch_sizes=batches, modes=("eager", "graphs") if gpu else ("eager",), **shared)
    one = dataclasses.replace(pair, image_sizes=(middle,), batch_sizes=ends, modes=("eager",))
    found = [
        pair,
        dataclasses.replace(one, part="vision"),
        dataclasses.replace(one, selections=SELECTIONS[:1], batch_sizes=ends[: 1 if quick else 2], modes=("compiled",)),
    ]
    return found + ([dataclasses.replace(one, part="train", batch_sizes=(32,))] if gpu else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument(
        "--precision", choices=tuple(DTYPES), default="fp32", help="of weights, in training of products"
    )
    parser.add_argument("--rounds", type=int, help="else 20 on a GPU and 5 on a CPU")
    parser.add_argument("--device", help="else the GPU where there is one")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    gpu = device.type == "cuda"
    rounds = args.rounds or (2 if args.quick else 20 if gpu else 5)
    reports = []
    for plan in plans(gpu, args.quick, {"precision": args.precision, "rounds": rounds}):
        dtype = torch.float32 if plan.part == "train" else DTYPES[args.precision]
        torch.manual_seed(0)
        model = random_model("small" if args.quick else "paper").to(device, dtype)
        reports.append(measure_speed(model, plan))
        print(reports[-1].table())
        if args.out:  # after every part: what has been measured is kept
            args.out.parent.mkdir(parents=True, exist_ok=True)
            kept = [{"model": one.model, "plan": one.plan, "rows": one.rows} for one in reports]
            values = {"environment": describe_environment(), "parts": kept}
            args.out.write_text(json.dumps(values, indent=2, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()
