"""The five largest costs of inference and of training steps, by operation, from torch's profiler.

    python benchmarks/largest_costs.py                  # ViT-B/16 at 224 px, BERT-base 6 + 6 (+ 6), batch 2
    python benchmarks/largest_costs.py --quick          # a small model, to see that it runs
    python benchmarks/largest_costs.py --json           # for machines

Weights are random. A share is what an operation takes by itself of the time of all, on the GPU where there is one.
Beside it stand the seconds of a pass (on a CPU those of the processor, which a busy machine blurs less) and how many
operations it launches (those that only look at a tensor in another shape launch nothing), which is what a GPU pays for
however few the tokens are.

Not called profile.py: that name belongs to a module of Python's own, which torch imports.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, CLIPVisionConfig

from trips.config import PretrainingConfig, SelectionConfig, TripsConfig
from trips.environment import describe_environment
from trips.model import TripsModel
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.vqa import TripsForQuestionAnswering, predicted_tokens
from trips.train.optim import build_adamw, parameter_groups

QUESTION, CAPTION, MASKED, ANSWERS, ANSWER = 16, 25, 4, 2, 4  # tokens, tokens, words, answers a question, tokens


class Launches(TorchDispatchMode):
    """Counts the operations that compute or copy something; views and empty tensors do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        looks = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        self.count += not (looks or "empty" in schema.name or schema.name in ("aten::detach", "aten::_unsafe_view"))
        return func(*args, **(kwargs or {}))


def passes(
    config: TripsConfig, pixels: int, batch: int, selection: SelectionConfig, device: torch.device
) -> dict[str, Callable[[], None]]:
    """What is measured, by name; each can be called again and again."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device)

    def tokens(rows: int, length: int) -> torch.Tensor:
        return torch.randint(1000, 2000, (rows, length), generator=generator).to(device)

    def inference() -> Callable[[], None]:
        model, ids = TripsModel(config).to(device).eval(), tokens(batch, QUESTION)

        @torch.inference_mode()
        def run() -> None:
            model(ids, torch.ones_like(ids), images, selection=selection)

        return run

    def training(model: torch.nn.Module, **given: torch.Tensor) -> Callable[[], None]:
        model = model.to(device).train()
        optimizer = build_adamw(parameter_groups(model, 0.0, 0.0, 0.01))

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(pixel_values=images, **given, selection=selection).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(model, "start_step"):
                model.start_step(1)

        return run

    def vqa() -> Callable[[], None]:
        ids, answers = tokens(batch, QUESTION), tokens(ANSWERS * batch, ANSWER)
        return training(
            TripsForQuestionAnswering(config),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            answer_ids=answers,
            answer_mask=torch.ones_like(answers),
            answer_index=torch.arange(batch, device=device).repeat_interleave(ANSWERS),
            answer_tokens=predicted_tokens(torch.ones_like(answers)),
        )

    def pretraining() -> Callable[[], None]:
        ids, rows = tokens(batch, CAPTION), torch.arange(batch, device=device)
        places = (rows[:, None] * CAPTION + torch.arange(1, 1 + MASKED, device=device)).flatten()
        return training(
            TripsForPreTraining(config),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mlm_input_ids=ids.flatten().index_fill(0, places, 103).view_as(ids),
            mlm_positions=places,
            mlm_labels=ids.flatten()[places],
            image_ids=rows,
            caption_ids=rows,
        )

    # Made one after the other: three models with gradients and moments need not stand side by side.
    return {"inference": inference, "VQA training step": vqa, "pre-training step": pretraining}


def costs(run: Callable[[], None], device: torch.device, top: int) -> dict[str, Any]:
    """Launches, seconds and the largest operations of one call."""
    run()  # warms up, and makes the moments of the optimizer
    with Launches() as launches:
        run()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=list({ProfilerActivity.CPU, kind})) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [
        event for event in profiler.key_averages() if device.type != "cuda" or event.key.startswith(("aten::", "Optim"))
    ]
    total = sum(getattr(event, field) for event in events)
    largest = sorted(events, key=lambda event: -getattr(event, field))[:top]
    return {
        "launches": launches.count,
        "seconds": round(total / 1e6 if device.type == "cuda" else seconds, 4),
        "largest": [
            {"operation": e.key, "calls": e.count, "share": round(getattr(e, field) / total, 4)} for e in largest
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", help="one of the passes, by the beginning of its name")
    parser.add_argument("--no-selection", action="store_true", help="of the baseline")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = PretrainingConfig(queue_size=1024)  # few candidates, so that they do not matter
    config = TripsConfig(pretraining=options)
    if args.quick:
        args.pixels = 64
        small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = TripsConfig(
            vision_config=CLIPVisionConfig(**small, num_hidden_layers=12, patch_size=16, image_size=64),
            text_config=BertConfig(**small, num_hidden_layers=2),
            pretraining=options,
        )
    selection = SelectionConfig(guide="none") if args.no_selection else config.selection
    found = {
        name: costs(build(), device, args.top)
        for name, build in passes(config, args.pixels, args.batch, selection, device).items()
        if name.startswith(args.only or "")
    }
    if args.json:
        shape = {"pixels": args.pixels, "batch": args.batch, "selection": not args.no_selection}
        print(json.dumps({"environment": describe_environment(), **shape, "passes": found}, indent=2))
        return
    for name, cost in found.items():
        print(f"{name}: {cost['seconds']} s, {cost['launches']} operations launched")
        for row in cost["largest"]:
            print(f"  {100 * row['share']:5.1f} %  {row['calls']:5d} x  {row['operation']}")


if __name__ == "__main__":
    main()
