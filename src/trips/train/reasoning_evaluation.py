"""How good a visual reasoning model is: accuracy and consistency of statements, accuracy of assigned captions.

As NLVR's scripts count them (section 5.1.2). What training costs stands beside it.

Dimensions: B statements of a batch, n images of each.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trips.bench.flops import count_reasoning_flops
from trips.data.pairs import PairDataset
from trips.data.statement_batches import AssignmentCollator, StatementCollator, StatementDataset
from trips.data.statements import ReasoningRecord
from trips.metrics import consistency
from trips.processor import TripsProcessor
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.train.settings import StepInfo

VERDICTS_FILE = "verdicts_test.csv"


@dataclass(frozen=True)
class ReasoningScores:
    """Result of `evaluate_reasoning`; figures are None where no statement has a label.

    Attributes:
        verdicts: what the model said, by identifier; without statements whose images cannot be read.
        num_statements: statements of the data.
        accuracy: share of the statements with a label that were judged rightly.
        consistency: share of sentences judged rightly beside all their images.
        consistency_permutations: share of statements judged rightly in all orders of their images; None also where
            each has one order.
    """

    verdicts: dict[str, bool] = field(repr=False)
    num_statements: int
    accuracy: float | None = None
    consistency: float | None = None
    consistency_permutations: float | None = None


class ReasoningMeasurement:
    """Figures of a model on a run's test data, and its verdicts as a file.

    Args:
        model: as it is whenever it is measured.
        dataset: the test data.
        batch_size: statements per batch.
    """

    def __init__(self, model: TripsForVisualReasoning, dataset: StatementDataset, batch_size: int) -> None:
        self.model, self.dataset, self.batch_size = model, dataset, batch_size
        self._verdicts: dict[str, bool] = {}

    def __call__(self) -> dict[str, Any]:
        """Measure.

        Returns:
            ``num_statements``, and where labels are known ``accuracy``, ``accuracy_blank_images``, ``consistency`` and,
            where images come in several orders, ``consistency_permutations``.
        """
        scores = evaluate_reasoning(self.model, self.dataset, self.batch_size)
        self._verdicts = scores.verdicts
        figures: dict[str, Any] = {"num_statements": scores.num_statements}
        if scores.accuracy is None:
            return figures
        blank = evaluate_reasoning(self.model, self.dataset, self.batch_size, blank_images=True)
        figures |= {"accuracy": scores.accuracy, "accuracy_blank_images": blank.accuracy}
        figures["consistency"] = scores.consistency
        if scores.consistency_permutations is not None:
            figures["consistency_permutations"] = scores.consistency_permutations
        return figures

    def write(self, folder: Path) -> None:
        """Write the verdicts of the last measurement as NLVR's scripts read them: identifier, comma, true or false.

        Behind the comma of a statement whose images could not be read stands nothing, which counts as wrong.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / VERDICTS_FILE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for record in self.dataset.records:
                verdict = self._verdicts.get(record.identifier)
                writer.writerow([record.identifier, "" if verdict is None else str(verdict).lower()])


@torch.no_grad()
def evaluate_reasoning(
    model: TripsForVisualReasoning, dataset: StatementDataset, batch_size: int = 16, *, blank_images: bool = False
) -> ReasoningScores:
    """Judge all statements of a dataset, without its augmentation and shuffling.

    A statement whose images cannot be read counts as wrong: leaving it out would flatter the score.

    Args:
        model: put into evaluation mode, and back if it was training.
        dataset: statements with or without labels.
        batch_size: statements per batch.
        blank_images: judge without looking: every pixel is the mean colour.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    everything = StatementDataset(dataset.records, dataset.processor, dataset.bad_samples)
    collator = StatementCollator(dataset.processor, dataset.num_images)
    verdicts: dict[str, bool] = {}
    for start in range(0, len(everything), batch_size):
        batch = collator([everything[i] for i in range(start, min(start + batch_size, len(everything)))])
        if not batch["identifiers"]:
            continue
        inputs = {key: batch[key].to(device) for key in ("pixel_values", "input_ids", "attention_mask")}
        if blank_images:
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        judged = model(**inputs).logits.argmax(dim=1) == 1
        verdicts |= zip(batch["identifiers"], judged.tolist(), strict=True)
    model.train(was_training)
    labelled = [record for record in dataset.records if record.label is not None]
    if not labelled:
        return ReasoningScores(verdicts, len(dataset))
    correct = [verdicts.get(record.identifier) == record.label for record in labelled]
    statements = [record.statement for record in labelled]
    permuted = len(set(statements)) < len(statements)
    return ReasoningScores(
        verdicts,
        len(dataset),
        accuracy=sum(correct) / len(correct),
        consistency=consistency(correct, [record.group for record in labelled]),
        consistency_permutations=consistency(correct, statements) if permuted else None,
    )


@torch.no_grad()
def evaluate_assignment(
    model: TripsForVisualReasoning, pairs: PairDataset, collator: AssignmentCollator, batch_size: int = 16
) -> float:
    """Share of captions assigned to the right image, or rightly to none; chance is 1 / (n + 1).

    The other images come from the batch, so figures compare only at one batch size; a last short batch is left out.

    Args:
        model: put into evaluation mode, and back if it was training.
        pairs: one caption of each image.
        collator: places the images.
        batch_size: pairs per batch, as many as there are at most.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    batch_size = min(batch_size, len(pairs))
    correct, count = 0, len(pairs) // batch_size * batch_size
    for start in range(0, count, batch_size):
        batch = collator(pairs.__getitems__([(0, position) for position in range(start, start + batch_size)]))
        inputs = {key: batch[key].to(device) for key in ("pixel_values", "input_ids", "attention_mask")}
        correct += int((model(**inputs).logits.argmax(dim=1).cpu() == batch["labels"]).sum())
    model.train(was_training)
    return correct / count


def majority_accuracy(train: Sequence[ReasoningRecord], test: Sequence[ReasoningRecord]) -> float | None:
    """Accuracy of always giving the label that the training statements have most often; None without test labels."""
    best = Counter(record.label for record in train).most_common(1)[0][0]
    labels = [record.label for record in test if record.label is not None]
    return labels.count(best) / len(labels) if labels else None


def training_flops(model: TripsForVisualReasoning, processor: TripsProcessor, info: StepInfo) -> float:
    """Operations of training on one statement, forward and backward; as if each were as long as the longest allowed."""
    side, patch = processor.image_size, model.config.vision_config.patch_size
    grid = side[0] // patch, side[1] // patch
    count = count_reasoning_flops(model.config, grid, processor.max_text_length, info.selection, distill=info.distill)
    return 3e9 * count.total
