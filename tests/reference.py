"""Slow, plain versions of what the library computes fast: loops over Python numbers, no tensor arithmetic.

Tests compare against these; they share no code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor, nn

Vector = list[float]


def softmax(row: Vector) -> Vector:
    """Closed form, shifted by the maximum."""
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def dot(a: Vector, b: Vector) -> float:
    """Sum of products, exactly rounded once."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def relevance(query: Vector, patches: list[Vector], heads: int = 1) -> Vector:
    """a_cls of one row: one softmax per head over all patches, then the mean of the heads."""
    size = len(query) // heads
    weights = [0.0] * len(patches)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = softmax([dot(query[part], patch[part]) / math.sqrt(size) for patch in patches])
        weights = [w + s / heads for w, s in zip(weights, scores, strict=True)]
    return weights


def num_kept(num_candidates: int, keep_rate: float) -> int:
    """Smallest whole number that is at least r n, in decimal arithmetic."""
    product = Decimal(repr(float(keep_rate))) * num_candidates
    return max(1, int(product.to_integral_value(ROUND_CEILING)))


def best(scores: Vector, k: int) -> list[int]:
    """The k best places, ties to the lower one, in rising order."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:k])


def fuse(patches: list[Vector], weights: Vector, kept: list[int], renormalise: bool = False) -> Vector:
    """The weighted sum of what was not kept."""
    rest = [place for place in range(len(patches)) if place not in kept]
    total = math.fsum(weights[place] for place in rest) if renormalise else 1.0
    return [math.fsum(weights[p] / total * patches[p][d] for p in rest) for d in range(len(patches[0]))]


def select(
    tokens: list[Vector], logits: Vector, k: int, candidates: list[int], inattentive: str
) -> tuple[list[Vector], list[int]]:
    """One row of a selection: tokens with [CLS] first, and the grid positions of those behind it."""
    cls, patches = tokens[0], tokens[1:]
    if k == len(patches):
        return tokens, candidates
    kept = best(logits, k)
    out, positions = [cls, *(patches[place] for place in kept)], [candidates[place] for place in kept]
    if inattentive != "drop":
        out.append(fuse(patches, softmax(logits), kept, inattentive == "renormalise"))
        positions.append(-1)
    return out, positions


def kl_divergence(logits: list[Vector], teacher: list[Vector]) -> float:
    """Mean over rows of sum p log(p / q), in nats."""
    rows = []
    for row, target in zip(logits, teacher, strict=True):
        rows.append(math.fsum(p * math.log(p / q) for p, q in zip(target, softmax(row), strict=True) if p > 0))
    return math.fsum(rows) / len(rows)


def gates(logits: Vector, kept: list[int], threshold: float, temperature: float) -> Vector:
    """What the straight-through gate takes its gradient from: a sigmoid of log a_cls above a threshold."""
    logs = [math.log(weight) for weight in softmax(logits)]
    return [1 / (1 + math.exp(-(logs[place] - threshold) / temperature)) for place in kept]


def gate_gradient(logits: Vector, kept: list[int], worth: Vector, temperature: float) -> Vector:
    """Derivative of sum worth[i] gate[i] over the kept places by every logit, the threshold standing still."""
    logs = [math.log(weight) for weight in softmax(logits)]
    threshold = min(logs[place] for place in kept)
    return slopes(lambda row: dot(worth, gates(row, kept, threshold, temperature)), logits)


def slopes(function: Callable[[Vector], float], row: Vector, step: float = 1e-5) -> Vector:
    """Derivative by every place, as a central difference."""
    out = []
    for place, value in enumerate(row):
        up, down = ([*row[:place], value + change, *row[place + 1 :]] for change in (step, -step))
        out.append((function(up) - function(down)) / (2 * step))
    return out


def answer_log_likelihood(decoder: nn.Module, states: Tensor, mask: Tensor, answer: list[int]) -> float:
    """One answer, one token after the other: the decoder is run on each beginning anew, without padding or cache.

    Args:
        states: (L, D) of the question. mask: (L,).
    """
    total = 0.0
    for place in range(1, len(answer)):
        logits = decoder(
            input_ids=torch.tensor([answer[:place]]),
            encoder_hidden_states=states.unsqueeze(0),
            encoder_attention_mask=mask.unsqueeze(0),
            use_cache=False,
        ).logits[0, -1]
        total += float(torch.log_softmax(logits, dim=0)[answer[place]])
    return total


# A vision layer of every family written out by hand, with transformers' modules by their role. `attention_output` is
# the layer's own attention over all tokens, caught where it enters the second norm.


def first_half(layer: nn.Module, states: Tensor) -> Tensor:
    """x' of a layer: what its second norm is given when the whole layer runs."""
    caught: list[Tensor] = []
    hook = second_norm(layer).register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        layer(states, None)
    except TypeError:  # a release whose layers take no mask
        caught.clear()
        layer(states)
    finally:
        hook.remove()
    return caught[0]


def first_norm(layer: nn.Module) -> nn.Module:
    """The norm before the attention."""
    return _one_of(layer, "layer_norm1", "layernorm_before", "norm1")


def second_norm(layer: nn.Module) -> nn.Module:
    """The norm before the FFN."""
    return _one_of(layer, "layer_norm2", "layernorm_after", "norm2")


def second_half(layer: nn.Module, states: Tensor) -> Tensor:
    """y = x' + FFN(norm(x'))."""
    branch = layer.mlp(second_norm(layer)(states))
    return states + (layer.layer_scale2(branch) if hasattr(layer, "layer_scale2") else branch)


def projection(layer: nn.Module, kind: str) -> nn.Linear:
    """W_q or W_k ("q", "k") of a layer."""
    ends = {"q": ("q_proj", "query"), "k": ("k_proj", "key")}[kind]
    (found,) = [module for name, module in layer.named_modules() if name.endswith(ends)]
    return found


def layers_of(tower: nn.Module) -> list[nn.Module]:
    """The layers of a tower: the longest list of modules in it."""
    return list(max((m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len))


def _one_of(layer: nn.Module, *names: str) -> nn.Module:
    (found,) = [getattr(layer, name) for name in names if hasattr(layer, name)]
    return found


def vision_suffix(
    tower: nn.Module,
    embedded: Tensor,
    text_cls: Tensor,
    rates: dict[int, float],
    *,
    guide: str = "text",
    score: str = "states",
    query_norm: str = "layer",
    heads: int = 1,
    inattentive: str = "fuse",
) -> tuple[Tensor, Tensor]:
    """All layers of a tower with selections, token by token and row by row; before the final norm.

    Args:
        tower: transformers' vision model.
        embedded: (B, 1 + N, D) what enters its first layer.
        text_cls: (B, D).
        rates: keep rate by 1-based layer.
    Returns:
        (B, E, D) states and (B, E - 1) grid positions.
    """
    rows, positions = [], []
    for b in range(embedded.shape[0]):
        states, places = embedded[b : b + 1], list(range(embedded.shape[1] - 1))
        for number, layer in enumerate(layers_of(tower), start=1):
            states = first_half(layer, states)
            if number in rates:
                asks = states[:, 0] if guide == "image" else text_cls[b : b + 1]
                if query_norm == "layer":
                    asks = first_norm(layer)(asks)
                query = projection(layer, "q")(asks)[0].tolist()
                seen = states[0, 1:]
                if score == "states":
                    seen = second_norm(layer)(seen)
                elif score == "keys":
                    seen = projection(layer, "k")(first_norm(layer)(seen))
                weights = relevance(query, seen.tolist(), heads)
                # the library decides in float32; the logarithm gives back the softmax
                logits = torch.tensor([math.log(w) for w in weights], dtype=torch.float32).tolist()
                k = num_kept(len(places), rates[number])
                tokens, places = select(states[0].tolist(), logits, k, places, inattentive)
                states = torch.tensor([tokens], dtype=embedded.dtype)
            states = second_half(layer, states)
        rows.append(states[0])
        positions.append(places)
    return torch.stack(rows), torch.tensor(positions)
