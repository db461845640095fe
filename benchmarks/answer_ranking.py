"""Time of ranking candidate answers with keys and values taken again, against projecting them for every candidate.

    python benchmarks/answer_ranking.py              # BERT-base decoder of 6 layers, 20 question tokens, 3129 answers
    python benchmarks/answer_ranking.py --quick      # a small decoder and few rounds, to see that it runs

Both take turns on one model with random weights, the same questions and the same candidates. The baseline is what
ALBEF does: the question's states are repeated for every candidate, and the decoder reads all candidates from [CLS] on,
padded to the longest; only places that predict a token are projected on the vocabulary there too. On a GPU time is by
the clock and everything in bfloat16; on a CPU time is that of the processor, in float32.

Answers are as long as those of VQA 2.0 are for the most part, in word pieces: see `LENGTHS`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from trips.config import bert_variant
from trips.environment import describe_environment
from trips.fusion import bidirectional_mask
from trips.losses import answer_log_likelihood
from trips.tasks.answers import rank_answers
from trips.tasks.vqa import predicted_tokens

CLS, SEP = 101, 102
LENGTHS = {1: 0.76, 2: 0.17, 3: 0.05, 4: 0.01, 5: 0.01}  # share of the answers of so many pieces


def rank_repeated(
    decoder: BertLMHeadModel, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The baseline: every candidate is read whole, with its own copy of the question's states."""
    batch = states.shape[0]
    closed = bidirectional_mask(mask, states.dtype)[:, :, :1]
    hidden = decoder.bert(
        input_ids=answer_ids[:1, :1].expand(batch, 1),
        encoder_hidden_states=states,
        encoder_attention_mask=closed,
        use_cache=False,
    ).last_hidden_state
    first = torch.log_softmax(decoder.cls(hidden[:, 0]).float(), dim=-1)[:, answer_ids[:, 1]]
    candidates = first.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    rows = torch.arange(batch, device=states.device).repeat_interleave(top_k)
    chosen = candidates.flatten()
    longest = int(answer_mask[chosen].sum(dim=1).max())
    ids, places = answer_ids[chosen, :longest], predicted_tokens(answer_mask[chosen, :longest])
    hidden = decoder.bert(
        input_ids=ids[:, :-1],
        encoder_hidden_states=states[rows],
        encoder_attention_mask=closed[rows],
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    logits, targets = decoder.cls(hidden[places]), ids[:, 1:].flatten()[places]
    likelihood = answer_log_likelihood(logits, targets, places // (longest - 1), len(chosen)).view(batch, top_k)
    order = likelihood.sort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order.indices), order.values


def make_answers(count: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(C, T) ids and mask."""
    pieces = torch.tensor(list(LENGTHS))
    drawn = torch.multinomial(torch.tensor(list(LENGTHS.values())), count, replacement=True, generator=generator)
    lengths = pieces[drawn] + 2
    places = torch.arange(int(lengths.max()))
    mask = (places < lengths[:, None]).long()
    ids = torch.randint(SEP + 1, vocabulary, mask.shape, generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(count), lengths - 1] = SEP
    return ids * mask, mask


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--batch", type=int, help="questions; else 32 on a GPU and 1 on a CPU")
    parser.add_argument("--answers", type=int, default=3129)
    parser.add_argument("--top_k", type=int, default=128)
    parser.add_argument("--length", type=int, default=20, help="tokens of a question")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = args.batch or (32 if device.type == "cuda" else 1)
    config = BertConfig(num_hidden_layers=6)
    if args.quick:
        args.answers, args.top_k, args.rounds = 200, 16, 2
        config = BertConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2)
    torch.manual_seed(0)
    decoder = BertLMHeadModel._from_config(bert_variant(config, is_decoder=True, add_cross_attention=True))
    decoder = decoder.eval().to(device, dtype)
    ids, mask = make_answers(args.answers, config.vocab_size, torch.Generator().manual_seed(0))
    states = torch.randn(batch, args.length, config.hidden_size).to(device, dtype)
    inputs = states, torch.ones(batch, args.length, dtype=torch.long, device=device), ids.to(device), mask.to(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    ways = {"repeated": rank_repeated, "reused": rank_answers}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    likelihoods, peaks = {}, {}
    for round_number in range(args.rounds + 1):
        for name, rank in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = now()
            _, likelihoods[name] = rank(decoder, *inputs, args.top_k)
            taken = now() - start
            if device.type == "cuda":
                peaks[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            if round_number:  # the first round warms up
                seconds[name].append(taken)
    ratios = [old / new for old, new in zip(*seconds.values(), strict=True)]
    result = {
        "environment": describe_environment(),
        "precision": str(dtype).removeprefix("torch."),
        "clock": "wall" if device.type == "cuda" else "processor",
        "batch": batch,
        "question_tokens": args.length,
        "answers": args.answers,
        "top_k": args.top_k,
        "pieces_of_answers": LENGTHS,
        "rounds": args.rounds,
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "speedup": round(statistics.median(ratios), 2),
        "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "largest_difference": float((likelihoods["repeated"] - likelihoods["reused"]).abs().max()),
        "peak_mib": peaks or None,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
