"""Measurements of the quick-start: accuracy per question type, relevance, operations, throughput.

Dimensions: B questions, N patches.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trips.bench.flops import count_flops
from trips.config import SelectionConfig
from trips.data.scene_batches import TEST_START, SceneBatcher
from trips.data.scenes import QUESTION_TYPES, SceneText
from trips.metrics import relevance_recall
from trips.tasks.vqa import TripsForQuestionAnswering

_SCENES_A_BATCH = 32


@dataclass
class _Tally:
    """Rows gathered over batches."""

    types: list[str]
    correct: list[Tensor]
    own: dict[int, list[Tensor]]
    other: dict[int, list[Tensor]]


@torch.no_grad()
def evaluate_guide(
    model: TripsForQuestionAnswering,
    batcher: SceneBatcher,
    selection: SelectionConfig,
    num_scenes: int,
    num_questions: int,
    seed: int = 0,
    blank: bool = False,
    first_scene: int = TEST_START,
) -> dict[str, Any]:
    """Answer by ranking all answers, and score what was kept.

    Args:
        model: in any mode; left in evaluation mode.
        batcher: of the corpus.
        selection: setting.
        num_scenes: scenes. num_questions: about each.
        seed: of the random guide.
        blank: replace the images by zeros (an image-blind control).
        first_scene: number of the first scene; from `TEST_START` on training never saw it.
    Returns:
        ``accuracy`` overall and per type; ``relevance_recall`` and ``relevance_gain`` per layer, means over questions;
        ``relevance_gain_by_type`` at the last location.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    tally = _Tally([], [], {}, {})
    for start in range(0, num_scenes, _SCENES_A_BATCH):
        batch = batcher.batch(first_scene + start, min(_SCENES_A_BATCH, num_scenes - start), num_questions)
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items() if "answer" not in name}
        if blank:
            tensors["pixel_values"] = torch.zeros_like(tensors["pixel_values"])
        output = model(**tensors, selection=selection, generator=generator)
        best, _ = model.rank_answers(
            output.question_states,
            tensors["attention_mask"],
            batcher.answer_ids.to(device),
            batcher.answer_mask.to(device),
            top_k=4,
        )
        tally.types += [question.type for question in batch.questions]
        tally.correct.append((best[:, 0].cpu() == batch.answers).float())
        _score_selection(model, tally, tensors, output.selections, selection, batch.questions, batcher, generator)
    return _summary(tally, selection)


def _score_selection(
    model: TripsForQuestionAnswering,
    tally: _Tally,
    tensors: dict[str, Tensor],
    selections: tuple,
    selection: SelectionConfig,
    questions: tuple[SceneText, ...],
    batcher: SceneBatcher,
    generator: torch.Generator,
) -> None:
    """Recall of each question's patches under its own text and under one of the same type about another image."""
    if not selections:
        return
    relevant = batcher.relevant(questions).to(tensors["pixel_values"].device)
    partner = other_image_partner([q.type for q in questions], tensors["image_index"].tolist())
    prefix = model.trips.encode_prefix(tensors["pixel_values"], selection).take(tensors["image_index"])
    mask = tensors["attention_mask"]
    text = model.trips.encode_text(tensors["input_ids"], mask)
    options = {"prefix": prefix, "text_states": text[partner], "selection": selection, "generator": generator}
    swapped = model.trips(None, mask[partner], **options)
    for own, other in zip(selections, swapped.selections, strict=True):
        tally.own.setdefault(own.layer, []).append(relevance_recall(own.kept, relevant).cpu())
        tally.other.setdefault(own.layer, []).append(relevance_recall(other.kept, relevant).cpu())


def other_image_partner(types: list[str], images: list[int]) -> Tensor:
    """(B,) for each question the number of one of the same type about another image, where the batch has one.

    Rows of one type, in order of their images, are shifted by the largest number that any image has.
    """
    partner = torch.arange(len(types))
    for kind in set(types):
        rows = [row for row, other in enumerate(types) if other == kind]
        most = max(sum(images[row] == image for row in rows) for image in {images[row] for row in rows})
        partner[rows] = torch.tensor(rows[most % len(rows) :] + rows[: most % len(rows)])
    return partner


def _summary(tally: _Tally, selection: SelectionConfig) -> dict[str, Any]:
    correct = torch.cat(tally.correct)
    mask = {kind: torch.tensor([other == kind for other in tally.types]) for kind in QUESTION_TYPES}
    accuracy = {"overall": correct.mean().item()}
    accuracy |= {kind: correct[rows].mean().item() for kind, rows in mask.items() if rows.any()}
    own = {layer: torch.cat(rows) for layer, rows in tally.own.items()}
    gain = {layer: own[layer] - torch.cat(rows) for layer, rows in tally.other.items()}
    # Without selection every patch survives whatever the text.
    recalls = {str(layer): own[layer].mean().item() if own else 1.0 for layer in selection.layers}
    gains = {str(layer): gain[layer].mean().item() if gain else 0.0 for layer in selection.layers}
    by_type = {}
    if gain:
        last = gain[selection.layers[-1]]
        by_type = {kind: last[rows].mean().item() for kind, rows in mask.items() if rows.any()}
    return {
        "accuracy": accuracy,
        "relevance_recall": recalls,
        "relevance_gain": gains,
        "relevance_gain_by_type": by_type,
    }


def flops_of(model: TripsForQuestionAnswering, selection: SelectionConfig, text_length: int, side: int) -> float:
    """Operations of one pair of a text and an image of `side` pixels, in units of 1e9; without the answer decoder."""
    patches = side // model.config.vision_config.patch_size
    return count_flops(model.config, (patches, patches), text_length, selection).total


@torch.no_grad()
def throughput_of(
    models: dict[str, tuple[TripsForQuestionAnswering, SelectionConfig]], batcher: SceneBatcher, rounds: int
) -> dict[str, float]:
    """Image-text pairs per second of every row, median over interleaved rounds (one image per text, no sharing)."""
    batch = batcher.batch(TEST_START, 64, 1)
    names = ("pixel_values", "input_ids", "attention_mask")
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, (model, selection) in models.items():
            device = next(model.parameters()).device
            tensors = {key: batch.tensors[key].to(device) for key in names}
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            model.eval()(**tensors, selection=selection)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: len(batch.questions) / statistics.median(values) for name, values in times.items()}
