"""Batches of records as a pure function of (seed, step): what makes resumption exact and processes agree.

Feeds the tasks whose data are held as a list: questions about images and statements about several images (5.1). An
epoch is a seeded permutation of the records; step s stands at a known place of a known epoch. Nothing here draws from
the global generators, which belong to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trips.data.records import BadSamples
from trips.errors import ConfigError, DataError
from trips.train.signals import leave_to_parent


class RecordDataset(Protocol):
    """A dataset of records, such as `VqaDataset` and `StatementDataset`.

    Attributes:
        records: each with a ``source``, the name that messages call it by.
        bad_samples: where bad ones are counted; None raises at the first.
    """

    records: Sequence[Any]
    bad_samples: BadSamples | None

    def __len__(self) -> int:
        """Records."""

    def __getitem__(self, index: int) -> Any:
        """Item of a record, also of a bad one, which then says why."""

    def set_epoch(self, epoch: int) -> None:
        """Choose what is drawn at random."""


class RecordTrainingData:
    """Training batches of a dataset of records for `trips.train.loop.train`.

    Args:
        dataset: its `BadSamples` counts what is skipped, None stops at the first.
        collator: joins items into a batch of tensors with the lists ``sources``, of the good ones, and ``skipped``, a
            (source, reason) for each bad one.
        batch_size: records per step over all processes; each process takes every world-th of them.
        seed: of the order of the records.
        num_workers: processes that decode; 0 decodes in this one.
        rank, world: this process and their number; None asks accelerate.
    Raises:
        ConfigError: the batch is larger than the data, or does not divide by the number of processes.
    """

    def __init__(
        self,
        dataset: RecordDataset,
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if rank is None or world is None:
            from accelerate import PartialState

            rank, world = PartialState().process_index, PartialState().num_processes
        if not 1 <= batch_size <= len(dataset):
            raise ConfigError(
                "does not fit the data", item="batch_size", found=batch_size, expected=f"1 to {len(dataset)} records"
            )
        if batch_size % world:
            raise ConfigError(
                "must divide by the number of processes", item="batch_size", found=batch_size, expected=f"n x {world}"
            )
        self.dataset, self.collator, self.batch_size, self.seed = dataset, collator, batch_size, seed
        self.num_workers, self.rank, self.world = num_workers, rank, world

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the few records beyond them are others in every epoch."""
        return len(self.dataset) // self.batch_size

    def indices(self, step: int) -> tuple[int, list[int]]:
        """Epoch of a step and this process's records in it."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        batch = order[place * self.batch_size : (place + 1) * self.batch_size]
        return epoch, batch[self.rank :: self.world].tolist()

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        """Batches of steps ``start_step`` to ``start_step + num_steps - 1``; see the collator for their content.

        Bad records are counted and left out. A batch of bad ones alone is replaced by the next of its epoch.

        Raises:
            DataError: too many bad samples; or one, where the dataset does not count them.
        """
        steps = range(start_step, start_step + num_steps)
        loader = DataLoader(
            _EpochView(self.dataset),
            batch_sampler=([(epoch, i) for i in chosen] for epoch, chosen in map(self.indices, steps)),
            collate_fn=self.collator,
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )
        for step, batch in zip(steps, loader):
            self._count(batch)
            yield batch if len(batch["sources"]) else self._substitute(step)

    def _substitute(self, step: int) -> dict[str, Any]:
        epoch, place = divmod(step, self.steps_per_epoch)
        self.dataset.set_epoch(epoch)
        for offset in range(1, self.steps_per_epoch):
            _, chosen = self.indices(epoch * self.steps_per_epoch + (place + offset) % self.steps_per_epoch)
            batch = self.collator([self.dataset[i] for i in chosen])
            if len(batch["sources"]):
                return batch
        raise DataError("every record is bad", item=f"epoch {epoch}", found=self.dataset.records[0].source)

    def _count(self, batch: dict[str, Any]) -> None:
        """Enter what a worker process skipped into the count of this one."""
        bad = self.dataset.bad_samples
        for source in batch["sources"] if bad is not None else ():
            bad.saw(source)
        for source, reason in batch["skipped"]:
            if bad is None:
                raise DataError(reason, item=source)
            bad.record(source, reason)


class _EpochView(Dataset):
    """A dataset whose index carries the epoch, so that worker processes need not be started anew for each."""

    def __init__(self, dataset: RecordDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        self.dataset.set_epoch(epoch)
        return self.dataset[index]


def _start_worker(worker: int) -> None:
    """Let a worker hand on every bad sample: an error raised there would arrive as a traceback in a string."""
    leave_to_parent()
    dataset = torch.utils.data.get_worker_info().dataset.dataset
    dataset.bad_samples = BadSamples(limit=len(dataset))
