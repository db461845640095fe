"""Ranking of candidate answers by the answer decoder (section 5.1.1, after ALBEF).

The decoder starts every answer alike, with [CLS]: one step for each question gives the probability of every
candidate's first token. Only the rest of the best ones is read, and from what that step left behind: the keys and
values of the question and of [CLS] are taken again for each candidate and not projected again.

Dimensions: B questions, L question tokens, D width, C candidates, T tokens of the longest, k candidates kept, R rows
(a question and one of its candidates), V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertLMHeadModel, DynamicCache, EncoderDecoderCache

from trips.errors import ConfigError, ShapeError
from trips.fusion import bidirectional_mask

# Repeated keys and values, and logits, of the rows that are read at once: half a GiB in float32.
_MOST_NUMBERS = 2**27


@torch.no_grad()
def rank_answers(
    decoder: BertLMHeadModel,
    question_states: Tensor,
    attention_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    top_k: int = 128,
    double_first_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """Best `top_k` candidates by their first token, then ordered by the log-likelihood of the whole answer.

    Candidates of one length are read together, so that nobody pays for the longest; which lengths there are is asked
    of the device, once for a batch of questions.

    Args:
        decoder: causal, with cross-attention.
        question_states: (B, L, D). attention_mask: (B, L).
        answer_ids: (C, T) as [CLS] pieces [SEP] padding. answer_mask: (C, T).
        top_k: candidates that are read to their end; all if it is at least C.
        double_first_token: count the first token's log-probability twice, as ALBEF's published figures do.
    Returns:
        (B, k) candidate numbers, best first, equals in the order of the list, and their float32 log-likelihoods: sums
        over all tokens behind [CLS], [SEP] included.
    Raises:
        ConfigError: `top_k` below 1. ShapeError: no candidates, or tensors that do not fit.
    """
    _check(question_states, attention_mask, answer_ids, answer_mask, top_k)
    batch, k = question_states.shape[0], min(top_k, answer_ids.shape[0])
    mask = bidirectional_mask(attention_mask, question_states.dtype)[:, :, :1]  # (B, 1, 1, L)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    hidden = decoder.bert(
        input_ids=answer_ids[:1, :1].expand(batch, 1),
        encoder_hidden_states=question_states,
        encoder_attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    first = torch.log_softmax(decoder.cls(hidden[:, 0]).float(), dim=-1)[:, answer_ids[:, 1]]  # (B, C)
    # A stable sort: answers that share their first token tie, and topk leaves the order of ties open.
    best = first.sort(dim=1, descending=True, stable=True)
    candidates, scores = best.indices[:, :k], best.values[:, :k]
    scores = (2 * scores if double_first_token else scores).flatten()

    chosen = candidates.flatten()
    lengths = answer_mask[:, 2:].sum(dim=1)[chosen]  # (B k,) tokens behind the first
    config = decoder.config
    repeated = 2 * config.num_hidden_layers * question_states.shape[1] * config.hidden_size
    for length in lengths.unique().tolist():
        if not length:
            continue  # an end right behind the start: the first token is all there is
        at_once = max(1, _MOST_NUMBERS // (repeated + 2 * length * config.vocab_size))
        for rows in (lengths == length).nonzero().squeeze(1).split(at_once):
            question, ids = rows // k, answer_ids[chosen[rows], 1 : length + 2]
            # The states only say that there is a question: its keys and values are in the cache.
            hidden = decoder.bert(
                input_ids=ids[:, :-1],
                encoder_hidden_states=question_states,
                encoder_attention_mask=mask[question],
                past_key_values=_of_rows(cache, question),
                use_cache=True,
            ).last_hidden_state  # (R, length, D)
            logits = decoder.cls(hidden).float().flatten(0, 1)
            losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(ids[:, 1:].shape)
            scores.index_add_(0, rows, -losses.sum(dim=1))
    order = scores.view(batch, k).sort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order.indices), order.values


def _of_rows(cache: EncoderDecoderCache, rows: Tensor) -> EncoderDecoderCache:
    """The keys and values of some rows, repeated as asked; the cache itself stays as it is."""
    parts = []
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        taken = copy.copy(part)
        taken.layers = [copy.copy(layer) for layer in part.layers]
        taken.batch_select_indices(rows)
        parts.append(taken)
    return EncoderDecoderCache(*parts)


def _check(states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ConfigError("not a number of candidates", item="top_k", found=top_k, expected=">= 1")
    if answer_ids.ndim != 2 or answer_ids.shape[0] < 1 or answer_ids.shape[1] < 2:
        raise ShapeError("no candidates", item="answer_ids", found=tuple(answer_ids.shape), expected="(C, T), T >= 2")
    if states.ndim != 3:
        raise ShapeError("not states", item="question_states", found=tuple(states.shape), expected="(B, L, D)")
    for name, found, expected in (
        ("answer_mask", answer_mask.shape, answer_ids.shape),
        ("attention_mask", mask.shape, states.shape[:2]),
    ):
        if found != expected:
            raise ShapeError("does not fit", item=name, found=tuple(found), expected=tuple(expected))
