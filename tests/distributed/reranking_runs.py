"""Retrieval in two stages as one process or as one of several: what `scenarios.py` runs and its test compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from retrieval_records import retrieval_model, retrieval_processor, retrieval_records

from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples
from trips.distributed import alone
from trips.errors import DataError
from trips.train import reranking


def ranked(**options: Any) -> dict[str, Any]:
    """Retrieval in two stages on 13 pictures, of which two cannot be read: one in the share of each of two processes.

    Returns:
        What was found without the times, the names of the bad samples, and all scores of the second stage.
    """
    records, bad, seen = retrieval_records(13), BadSamples(), []
    for number in (3, 12):
        records[number] = PairRecord(records[number].image[:60], records[number].texts, None, f"cut {number}")
    with pytest.MonkeyPatch.context() as patch:
        recall = reranking.recall_of_shortlist
        patch.setattr(reranking, "recall_of_shortlist", lambda scores, own: seen.append(scores) or recall(scores, own))
        found = reranking.evaluate_two_stage(
            retrieval_model(), records, retrieval_processor(), bad, guides=("text", "image"), shortlist=10,
            **{"batch_size": 2, **options},
        )  # fmt: skip
    for timed in (found["first_stage"], *found["reranked"].values()):
        for name in ("seconds", "pairs_per_second"):
            timed.pop(name, None)
    return {"found": found, "bad": list(bad.errors), "scores": seen}


def reranked(out: Path, rank: int, world: int) -> None:
    """Both processes share the work and each tells everything; within `alone` one does it while the other waits."""
    torch.save(ranked(), out / f"{rank}.pt")
    torch.save(ranked(memory_gb=1e-5), out / f"{rank}-little.pt")
    if rank == 0:
        with alone():
            torch.save(ranked(), out / "alone.pt")
    records = retrieval_records(6)
    for gone in (1, 3):  # the second process fails to read the picture anew, and both say so

        class Vanishing(list):
            reads = 0

            def __getitem__(self, number: int, gone: int = gone) -> PairRecord:
                self.reads += number == gone
                lost = number == gone and self.reads > 2
                return dataclasses.replace(records[number], image=b"") if lost else records[number]

        with pytest.raises(DataError, match=f"record {gone}"):
            reranking.evaluate_two_stage(
                retrieval_model(), Vanishing(records), retrieval_processor(), BadSamples(), shortlist=18, batch_size=1
            )
