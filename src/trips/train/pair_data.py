"""Batches of image-text pairs as a pure function of the step: what makes resumption exact and processes agree.

Feeds pre-training (3.3, 4.1). The order is the dataset's (`trips.data.order`); here it is cut into steps, and each
step into the shares of the processes, which in the order of their ranks make up the batch of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trips.data.pair_batches import PairCollator, PairItem
from trips.data.pairs import PairDataset
from trips.errors import ConfigError, TripsError
from trips.losses import check_negatives
from trips.train.signals import leave_to_parent


class PairTrainingData:
    """Training batches of a `PairDataset` for `trips.train.loop.train`.

    Args:
        dataset: pairs in an order that its seed decides; its `BadSamples` counts what is replaced, None stops at the
            first.
        collator: joins pairs into tensors.
        batch_size: pairs per step over all processes.
        num_workers: processes that read and decode; 0 does it in this one.
        rank, num_processes: this process and their number; None asks accelerate.
    Raises:
        ConfigError: the batch is larger than an epoch, or does not divide by the number of processes.
    """

    def __init__(
        self,
        dataset: PairDataset,
        collator: PairCollator,
        batch_size: int,
        num_workers: int = 0,
        rank: int | None = None,
        num_processes: int | None = None,
    ) -> None:
        if rank is None or num_processes is None:
            from accelerate import PartialState

            rank, num_processes = PartialState().process_index, PartialState().num_processes
        if not 1 <= batch_size <= len(dataset):
            raise ConfigError(
                "does not fit the data", item="batch_size", found=batch_size, expected=f"1 to {len(dataset)} pairs"
            )
        if batch_size % num_processes:
            raise ConfigError(
                "must divide by the number of processes",
                item="batch_size",
                found=batch_size,
                expected=f"n x {num_processes}",
            )
        self.dataset, self.collator, self.batch_size = dataset, collator, batch_size
        self.num_workers, self.rank, self.num_processes = num_workers, rank, num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the few pairs beyond them are others in every epoch."""
        return len(self.dataset) // self.batch_size

    @property
    def retries(self) -> int:
        """Failed and repeated attempts at fetching shards, those of the workers included."""
        return self.dataset.cache.retries

    def positions(self, step: int) -> list[tuple[int, int]]:
        """(epoch, position) of each pair of this process in a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.num_processes
        start = place * self.batch_size + self.rank * share
        return [(epoch, position) for position in range(start, start + share)]

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        """Batches of steps ``start_step`` to ``start_step + num_steps - 1``; see `PairCollator` for their content.

        Raises:
            DataError: too many bad samples; or one, where the dataset does not count them; a shard out of reach; a
                batch in which a pair has no hard negative.
        """
        steps = range(start_step, start_step + num_steps)
        loader = DataLoader(
            _ErrorsAsItems(self.dataset),
            batch_sampler=map(self.positions, steps),
            collate_fn=_ErrorsThrough(self.collator),
            num_workers=self.num_workers,
            worker_init_fn=leave_to_parent,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.dataset.seed),
        )
        for step, batch in zip(steps, loader):
            if "error" in batch:
                raise batch["error"]
            self._count(step, batch)
            check_negatives(batch["image_ids"], batch["caption_ids"], item=f"batch of step {step}, rank {self.rank}")
            yield batch

    def _count(self, step: int, batch: dict[str, Any]) -> None:
        """Enter what happened in a worker process into the counts of this one."""
        if self.num_workers:
            self.dataset.cache.retries += batch["retries"]
        bad = self.dataset.bad_samples
        if bad is not None:
            # All processes together; another epoch brings no other samples.
            bad.saw_number(min((step + 1) * self.batch_size, self.dataset.num_samples))
            for source, reason in batch["skipped"]:
                bad.record(source, reason)


class _ErrorsAsItems(Dataset):
    """A dataset that returns its errors: raised in a worker, one would arrive as a traceback in a string."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[PairItem | TripsError]:
        try:
            return self.dataset.__getitems__(keys)
        except TripsError as error:
            return [error]


class _ErrorsThrough:
    """A collator that hands on the first error of a batch instead of the batch."""

    def __init__(self, collator: PairCollator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[PairItem | TripsError]) -> dict[str, Any]:
        for item in items:
            if isinstance(item, TripsError):
                return {"error": item}
        try:
            return self.collator(items)
        except TripsError as error:
            return {"error": error}
