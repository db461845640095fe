"""Speed of models of transformers before and after `trips.accelerate`, beside the ratio of their exact operations.

    python benchmarks/acceleration.py             # BLIP VQA (ViT-B/16, 384 px) and CLIP ViT-L/14 at 336 px
    python benchmarks/acceleration.py --quick     # two layers of each, few rounds, to see that it runs

Weights are random and the same on both sides: original and accelerated model are two objects around one set of
parameters, called in turn in one process. Latency is that of batch 1, throughput that of the larger batch. The text's
own pass, which the guide costs, is in both the times and the operations of the accelerated model. BLIP answers by
`generate` with a fixed number of words; in BLIP transformers does not fuse the attention of vision, in CLIP it does.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForQuestionAnswering, CLIPConfig, CLIPModel, PreTrainedModel

import trips
from trips.bench.counter import counted_flops
from trips.bench.timing import device_clock, interleave, ratio
from trips.environment import describe_environment

ANSWER_WORDS = 3


def blip(quick: bool) -> tuple[PreTrainedModel, int]:
    """BLIP for VQA as published (base), and its image size."""
    vision = {"image_size": 384, "num_hidden_layers": 12}
    text = {}
    if quick:
        vision, text = {"image_size": 64, "num_hidden_layers": 2}, {"num_hidden_layers": 2}
    return BlipForQuestionAnswering(BlipConfig(vision_config=vision, text_config=text)), vision["image_size"]


def clip(quick: bool) -> tuple[PreTrainedModel, int]:
    """CLIP ViT-L/14 at 336 px as published, and its image size."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "eos_token_id": 49407,
    }
    if quick:
        vision |= {"num_hidden_layers": 2, "image_size": 56}
        text |= {"num_hidden_layers": 2}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)), vision["image_size"]


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second object around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def call_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[int], Any]:
    """What is timed: the answers of BLIP, the scores of CLIP."""
    if isinstance(model, CLIPModel):
        return lambda number: model(**inputs)
    words = {"max_new_tokens": ANSWER_WORDS, "min_new_tokens": ANSWER_WORDS, "num_beams": 1}
    return lambda number: model.generate(**inputs, **words)


def measure(
    name: str, built: tuple[PreTrainedModel, int], settings: dict[str, dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """Times, ratios and operations of one model under several settings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, size = built
    model = model.eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    models = {"original": model}
    for label, setting in settings.items():
        models[label] = trips.accelerate(twin_of(model), **setting)
    rows = []
    for batch in (1, args.batch):
        ids = torch.randint(1000, 2000, (batch, args.text), device=device)
        ids[:, -1] = 49407 if isinstance(model, CLIPModel) else model.config.text_config.sep_token_id
        pixels = torch.randn(batch, 3, size, size, device=device, dtype=model.dtype)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        calls = {label: call_of(each, inputs) for label, each in models.items()}
        counts = {label: counted_flops(call, 0) / batch for label, call in calls.items()}
        times = interleave(calls, args.rounds, now=device_clock(device))
        for label in models:
            faster = ratio(times["original"], times[label])
            rows.append(
                {
                    "setting": label,
                    "batch": batch,
                    "milliseconds": round(1e3 * times[label].median, 2),
                    "images_per_second": round(batch / times[label].median, 3),
                    "gflops_per_image": round(counts[label], 2),
                    "speedup": [round(value, 3) for value in (faster.median, faster.low, faster.high)],
                    "exact_ratio": round(counts["original"] / counts[label], 3),
                }
            )
    return {"model": name, "pixels": size, "text_tokens": args.text, "dtype": str(model.dtype), "rows": rows}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--text", type=int, default=16, help="tokens of the question or caption")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds = 2, 2
    torch.manual_seed(0)
    base = (2,) if args.quick else (5, 10)
    large = (2,) if args.quick else (9, 17)  # of 24 layers, j = i s + 1 of the paper
    results = []
    for name, build, layers in (("BLIP VQA base", blip, base), ("CLIP ViT-L/14", clip, large)):
        settings = {
            f"{guide} {list(layers)} x 0.7": {"layers": layers, "keep_rate": 0.7, "guide": guide}
            for guide in ("text", "image")
        }
        results.append(measure(name, build(args.quick), settings, args))
    result = {"environment": describe_environment(), "rounds": args.rounds, "models": results}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
