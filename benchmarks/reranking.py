"""Second stage of retrieval: what the shared prefix saves, and a whole evaluation at the size of COCO's test part.

    python benchmarks/reranking.py --out benchmarks/results/reranking.json
    python benchmarks/reranking.py --quick              # small and few, to see that it runs

The first part measures: images with 20 texts each on a ViT of DINOv2-small's size with random weights, 224 px. Ways of
scoring the same pairs take turns: each pair from pixels and words; the prefix shared by the texts of an image; the
image [CLS] as the guide, everything of an image shared; the baseline without selection. Beside the measured ratio
stands that of operations counted in closed form, exact for batches as they are here. On a CPU time is that of the
processor, so that a busy machine does not blur it.

The second part runs: `evaluate_two_stage` on 5,000 pictures with 25,000 captions, made up while they are read, by a
tiny model. It says how much the process's peak of resident memory grew, beside what the parts that grow with images,
texts or pairs, the chunk of similarities and the states kept (`--memory-gb`) may take together; what a batch needs
while it is computed comes on top, and the allocator's slack.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, Dinov2Config

from trips.bench.retrieval_flops import count_reranking_flops
from trips.config import PretrainingConfig, SelectionConfig, TripsConfig
from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples
from trips.environment import describe_environment
from trips.tasks.reranking import Reranker, TextTable
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.tasks.shortlists import CHUNK
from trips.train.recipe import DataSection, ModelSection
from trips.train.reranking import evaluate_two_stage
from trips.train.towers import build_model, build_processor

TEXT_LENGTH, TEXTS_PER_IMAGE, BATCH = 12, 20, 8
SCRATCH = "each pair from scratch"


class Speedup:
    """The same pairs in several ways, on one model with random weights."""

    def __init__(self, images: int, quick: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        pixels, layers, width = (56, 4, 48) if quick else (224, 12, 384)
        vision = Dinov2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=6, image_size=pixels, patch_size=14
        )
        text = BertConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers // 2, num_attention_heads=12
        )
        config = TripsConfig(
            vision_config=vision,
            text_config=text,
            selection=SelectionConfig(layers=(2, 3) if quick else (5, 10), keep_rate=0.7),
            pretraining=PretrainingConfig(queue_size=0, alpha=0.0),
        )
        self.model, self.device = TripsForImageTextRetrieval(config).eval().to(device), device
        self.grid, self.num_images = (pixels // 14, pixels // 14), images
        self.pixels = torch.randn(images, 3, pixels, pixels)
        count = images * TEXTS_PER_IMAGE
        self.texts = TextTable.of(torch.randint(1000, 2000, (count, TEXT_LENGTH)).tolist())
        self.pairs = torch.arange(images).repeat_interleave(TEXTS_PER_IMAGE), torch.arange(count)
        off = SelectionConfig(guide="none")
        self.ways: dict[str, Callable[[], torch.Tensor]] = {
            SCRATCH: self.scratch,
            "prefix shared, the text guides": lambda: self.shared("text", config.selection),
            "image shared, the image guides": lambda: self.shared("image", config.selection),
            "image shared, no selection": lambda: self.shared("text", off),
        }
        text_guided, image_guided, none = (
            count_reranking_flops(config, self.grid, TEXT_LENGTH, selection, guide)
            for selection, guide in ((None, "text"), (None, "image"), (off, "text"))
        )
        self.gflops = {
            name: flops.image / share + flops.text + flops.pair
            for name, flops, share in zip(
                self.ways, (text_guided, text_guided, image_guided, none), (1, *[TEXTS_PER_IMAGE] * 3)
            )
        }

    @torch.no_grad()
    def scratch(self) -> torch.Tensor:
        scores = []
        for images, texts in zip(*(part.split(4 * BATCH) for part in self.pairs)):
            ids, mask = (tensor.to(self.device) for tensor in self.texts.batch(texts))
            prefix = self.model.trips.encode_prefix(self.pixels[images].to(self.device))
            scores.append(self.model.match(prefix, torch.arange(len(ids), device=self.device), ids, mask))
        return torch.cat(scores).cpu()

    def shared(self, guide: Any, selection: SelectionConfig) -> torch.Tensor:
        patches = self.grid[0] * self.grid[1]
        options = {"guide": guide, "batch_size": BATCH, "selection": selection}
        reranker = Reranker(self.model, self.texts, lambda numbers: self.pixels[numbers], patches, **options)
        blocks = reranker.blocks(self.pairs[0])
        return torch.cat([reranker.score(*(part[block] for part in self.pairs)) for block in blocks]).cpu()

    def measure(self, rounds: int) -> dict[str, Any]:
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        found = {name: way() for name, way in self.ways.items()}  # warms up
        difference = (found[SCRATCH] - found["prefix shared, the text guides"]).abs().max().item()
        seconds: dict[str, list[float]] = {name: [] for name in self.ways}
        for number in range(1, rounds + 1):
            for name, way in self.ways.items():
                begun = clock()
                way()
                seconds[name].append(clock() - begun)
                print(number, name, f"{seconds[name][-1]:.2f} s", flush=True)
        rows = []
        for name in self.ways:
            ratios = [scratch / mine for scratch, mine in zip(seconds[SCRATCH], seconds[name], strict=True)]
            rows.append(
                {
                    "way": name,
                    "pairs_per_second": round(len(self.pairs[0]) / statistics.median(seconds[name]), 2),
                    "measured_speedup": round(statistics.median(ratios), 3),
                    "measured_range": [round(min(ratios), 3), round(max(ratios), 3)],
                    "counted_speedup": round(self.gflops[SCRATCH] / self.gflops[name], 3),
                    "gflops_per_pair": round(self.gflops[name], 4),
                }
            )
        return {
            "pixels": self.pixels.shape[-1],
            "images": self.num_images,
            "texts_per_image": TEXTS_PER_IMAGE,
            "text_length": TEXT_LENGTH,
            "clock": "wall" if self.device.type == "cuda" else "processor",
            "rounds": rounds,
            "largest_difference": difference,
            "rows": rows,
        }


class Synthetic(Sequence):
    """Pictures of 64 x 64 pixels with five captions each, made when they are asked for."""

    WORDS = [f"word{number}" for number in range(500)]

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PairRecord:
        if number >= self.count:
            raise IndexError(number)
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        texts = tuple(" ".join(random.choice(self.WORDS, length)) for length in random.integers(6, 16, 5))
        return PairRecord(pixels, texts, str(number), f"picture {number}")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def evaluate(images: int, shortlist: int, memory_gb: float, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    section = ModelSection(
        vision="tiny",
        text="tiny",
        num_text_layers=2,
        num_fusion_layers=2,
        selection=SelectionConfig(layers=(2, 3)),
        pretraining=PretrainingConfig(queue_size=0, alpha=0.0),
    )
    processor = build_processor(section, DataSection(image_size=64), Synthetic.WORDS)
    model = build_model(section, processor, TripsForImageTextRetrieval).to(device)
    options = {"shortlist": shortlist, "guides": ("text", "image"), "batch_size": 32, "memory_gb": memory_gb}
    evaluate_two_stage(model, Synthetic(40), processor, BadSamples(), **{**options, "shortlist": 10})  # loads all code
    before, start = peak_mib(), time.perf_counter()
    found = evaluate_two_stage(model, Synthetic(images), processor, BadSamples(), **options)
    seconds, texts, mib = time.perf_counter() - start, found["num_texts"], 2**20
    bound = {
        "features": 4 * model.config.pretraining.projection_dim * (images + 3 * texts) / mib,
        "tokens of the texts": 3 * 4 * 17 * texts / mib,
        "chunk of similarities": (3 * 4 + 3) * CHUNK / mib,
        "shortlists": 8 * 8 * shortlist * (images + texts) / mib,
        "pairs": 6 * 8 * found["pairs"] / mib,
        "states kept": memory_gb * 1e9 / mib,
    }
    return {
        **found,
        "memory_gb": memory_gb,
        "total_seconds": round(seconds, 1),
        "peak_mib": round(peak_mib(), 1),
        "peak_growth_mib": round(peak_mib() - before, 1),
        "bound_mib": {name: round(value, 1) for name, value in bound.items()},
        "bound_total_mib": round(sum(bound.values()), 1),
        "matrix_of_all_similarities_mib": round(4 * images * texts / mib, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--part", choices=("speedup", "evaluation", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000, help="of the evaluation; five times as many texts")
    parser.add_argument("--shortlist", type=int, default=16)
    parser.add_argument("--memory-gb", type=float, default=0.1, help="states kept in the evaluation")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.quick:
        args.rounds, args.images = 2, 200
    result: dict[str, Any] = {"environment": describe_environment()}
    # First the evaluation: its memory is the growth of the process's peak.
    if args.part != "speedup":
        result["evaluation"] = evaluate(args.images, args.shortlist, args.memory_gb, device)
    if args.part != "evaluation":
        result["speedup"] = Speedup(2 if args.quick else 4, args.quick, device).measure(args.rounds)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
