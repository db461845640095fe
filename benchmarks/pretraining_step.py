"""Cost of a pre-training step with and without selection, literal and free of leaks, in one process (section 4.1).

    python benchmarks/pretraining_step.py               # ViT-B/16 at 256 px, BERT-base 6 + 6, 25 text tokens
    python benchmarks/pretraining_step.py --quick       # a small model and few rounds, to see that it runs

Rows take turns on one model with random weights: forward, backward, moving average, AdamW. The learning rate is 0, so
that every row meets the same weights. On a GPU time is by the clock and products are in bfloat16; on a CPU time is that
of the processor, so that a busy machine does not blur it, and everything is float32. The update costs the same in all
rows and is next to nothing at the paper's batch, but not at that of a CPU: ratios are of forward and backward.

Operations are counted by torch while a step runs, those that checkpointing repeats included (it need not repeat the
last product of a vision layer), and in closed form beside.

Memory is what tensors hold at the peak of forward and backward beyond weights, gradients, teacher and moments: what is
kept for the backward pass, and what passes through. It is torch's own count, on a CPU from the profiler's record of
every allocation, and depends neither on the allocator nor on what ran before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import BertConfig, CLIPVisionConfig

from trips.bench.counter import counted_flops
from trips.bench.flops import count_pretraining_flops
from trips.bench.memory import peak_bytes
from trips.config import PretrainingConfig, SelectionConfig, TripsConfig
from trips.environment import describe_environment
from trips.tasks.pretraining import TripsForPreTraining
from trips.train.optim import build_adamw, parameter_groups
from trips.train.parallel import checkpoint_layers

TEXT_LENGTH, MASKED = 25, 4
LITERAL = {"itc_guide": "text", "itm_guide": "reuse", "mlm_guide": "full"}
LEAK_FREE = {"itc_guide": "image", "itm_guide": "anew", "mlm_guide": "masked"}
ROWS: dict[str, tuple[SelectionConfig, dict[str, str]]] = {
    "ALBEF-C, no selection": (SelectionConfig(guide="none"), LITERAL),
    "literal: text, reuse, full": (SelectionConfig(), LITERAL),
    "leak-free: image, anew, masked": (SelectionConfig(), LEAK_FREE),
    "leak-free: none, anew, masked": (SelectionConfig(), LEAK_FREE | {"itc_guide": "none"}),
}
BASELINE = next(iter(ROWS))


class Trainer:
    """One model and its optimizer; a step under the options of any row."""

    def __init__(self, config: TripsConfig, pixels: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.config = device, config
        self.model = TripsForPreTraining(config).to(device).train()
        self.optimizer = build_adamw(parameter_groups(self.model, 0.0, 0.0, 0.01))
        ids = torch.randint(1000, 2000, (batch, TEXT_LENGTH))
        places = torch.cat([torch.randperm(TEXT_LENGTH - 1)[:MASKED] + 1 + TEXT_LENGTH * row for row in range(batch)])
        made = {
            "pixel_values": torch.randn(batch, 3, pixels, pixels),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mlm_input_ids": ids.flatten().index_fill(0, places, 103).view_as(ids),
            "mlm_positions": places,
            "mlm_labels": ids.flatten()[places],
            "image_ids": torch.arange(batch),
            "caption_ids": torch.arange(batch),
        }
        self.batch = {name: tensor.to(device) for name, tensor in made.items()}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def choose(self, name: str, checkpointing: bool) -> SelectionConfig:
        selection, options = ROWS[name]
        self.config.pretraining = self.config.pretraining.replace(**options)
        checkpoint_layers(self.model, checkpointing)  # what run.gradient_checkpointing does
        return selection

    def passes(self, selection: SelectionConfig) -> None:
        half = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with half:
            loss = self.model(**self.batch, selection=selection).loss
        loss.backward()

    def step(self, selection: SelectionConfig) -> tuple[float, float]:
        """Seconds of forward and backward, and of the update."""
        start = self.now()
        self.model.start_step(1)
        began = self.now()
        self.passes(selection)
        ended = self.now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return ended - began, self.now() - ended + began - start

    def state_bytes(self) -> int:
        moments = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, help="pairs; else 64 on a GPU and 4 on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--queue", type=int, default=1024, help="candidates; few, so that they do not matter")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or (64 if device.type == "cuda" else 4)
    config = TripsConfig(pretraining=PretrainingConfig(queue_size=args.queue))
    if args.quick:
        args.pixels, args.rounds = 64, 2
        small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = TripsConfig(
            vision_config=CLIPVisionConfig(**small, num_hidden_layers=12, patch_size=16, image_size=64),
            text_config=BertConfig(**small, num_hidden_layers=2),
            pretraining=config.pretraining,
        )
    trainer = Trainer(config, args.pixels, batch, device)
    variants = [(name, checkpointing) for checkpointing in (False, True) for name in ROWS]
    passes: dict[tuple[str, bool], list[float]] = {variant: [] for variant in variants}
    updates: list[float] = []
    peaks, operations = {}, {}
    for variant in variants:  # warms up, and makes gradients and the moments of the optimizer
        selection = trainer.choose(*variant)
        operations[variant] = counted_flops(trainer.passes, selection) / batch
        peaks[variant] = peak_bytes(lambda chosen=selection: trainer.passes(chosen), device)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    for round_number in range(1, args.rounds + 1):
        for variant in variants:
            seconds, update = trainer.step(trainer.choose(*variant))
            passes[variant].append(seconds)
            updates.append(update)
            print(round_number, *variant, f"{seconds:.3f} s", flush=True)
    grid = (args.pixels // 16, args.pixels // 16)
    counts = {
        name: count_pretraining_flops(
            config, grid, TEXT_LENGTH, selection, config.pretraining.replace(**options), MASKED, batch_size=batch
        )
        for name, (selection, options) in ROWS.items()
    }
    rows = []
    for name, checkpointing in variants:
        variant, base = (name, checkpointing), (BASELINE, checkpointing)
        ratios = [mine / other for mine, other in zip(passes[variant], passes[base], strict=True)]
        rows.append(
            {
                "setting": name,
                "gradient_checkpointing": checkpointing,
                "seconds": round(statistics.median(passes[variant]), 4),
                "measured_ratio": round(statistics.median(ratios), 3),
                "measured_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "exact_ratio": round(operations[variant] / operations[base], 3),
                "mib": round(peaks[variant] / 2**20, 1),
                "gflops_per_pair": round(operations[variant], 2),
                "gflops_per_second": round(batch * operations[variant] / statistics.median(passes[variant]), 1),
            }
        )
    result = {
        "environment": describe_environment(),
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "clock": "wall" if device.type == "cuda" else "processor",
        "pixels": args.pixels,
        "batch": batch,
        "text_length": TEXT_LENGTH,
        "masked_tokens": MASKED,
        "queue": args.queue,
        "rounds": args.rounds,
        "update_seconds": round(statistics.median(updates), 4),
        "state_mib": round(trainer.state_bytes() / 2**20, 1),
        "gradients_mib": round(sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad) / 2**20, 1),
        "closed_form_gflops_per_pair": {
            name: {
                **{part: round(value, 3) for part, value in vars(count).items()},
                "forward": round(count.forward, 3),
                "training": round(count.training, 3),
            }
            for name, count in counts.items()
        },
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
