"""Retrieval measured in both stages on records: contrastive features of everything, then matching (section 5.1.3).

Works as one process, or over all processes that torch.distributed joins. Every batch is made up the same whatever their
number (in the second stage only where memory holds the states of all texts), and goes to one of them; what comes out is
added up over all, zeros from the others. So two processes find what one finds, and each returns it.

Dimensions: I images, T texts, U different texts, P projection width, S pairs, k shortlist.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trips.bench.retrieval_flops import count_reranking_flops
from trips.data.pair_records import PairRecord
from trips.data.records import BadSamples
from trips.distributed import world
from trips.errors import ConfigError, DataError, TripsError
from trips.metrics import recall_of_ahead, recall_of_shortlist
from trips.processor import TripsProcessor
from trips.tasks.reranking import Reranker, RerankGuide, TextTable
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.tasks.shortlists import CandidatePairs, best_candidates
from trips.train.progress import progress_of

RANKS = (1, 5, 10)


@torch.no_grad()
def evaluate_two_stage(
    model: TripsForImageTextRetrieval,
    records: Sequence[PairRecord],
    processor: TripsProcessor,
    bad_samples: BadSamples,
    *,
    shortlist: int = 128,
    guides: Sequence[RerankGuide] = ("text",),
    batch_size: int = 32,
    memory_gb: float = 4.0,
    progress: bool = True,
) -> dict[str, Any]:
    """R@1, 5 and 10 both ways by contrastive features, and by matching among the best of them.

    An image finds a text if any of its own captions ranks within K; each direction ranks its own shortlist anew, by the
    logit of "match" alone, and what is not on it ranks below. Ties count against. Texts that read alike to the model
    are computed once.

    Args:
        model: put into evaluation mode, and back if it was training; the same weights in all processes.
        records: I images with all their T texts, the same in all processes, read as often as they are needed; one that
            cannot be used is left out with its texts, and counted in all processes.
        shortlist: k, candidates of each query for the second stage.
        guides: who selects patches there; "text" is the model's own setting, "image" lets the image [CLS] ask.
        batch_size: images per batch; four times as many texts and pairs.
        memory_gb: most memory of the second stage for states kept between batches, see `Reranker`.
        progress: tell how far it is: a bar where stderr is a terminal, else log lines.
    Returns:
        ``first_stage`` and, under ``reranked``, each guide: ``text_recall`` (image to text) and ``image_recall`` (text
        to image), {k: share}, ``mean_recall`` of the six, ``seconds``. Each guide also has ``selection_guide`` (who
        really selects), ``pairs_per_second``, and the operations ``gflops_per_pair``, ``gflops_per_image`` and
        ``gflops_per_text`` at ``text_length`` tokens, the mean of the pairs. Besides: ``shortlist``, ``pairs`` (S),
        ``num_images``, ``num_texts``.
    Raises:
        ConfigError: an argument out of range; a shortlist too short to tell R@10.
        DataError: no image can be read, too many cannot, or one that could be read at first.
    """
    _check(guides, shortlist, batch_size, memory_gb)
    was_training = model.training
    model.eval()
    try:
        run = _Evaluation(model, records, processor, bad_samples, batch_size, memory_gb, progress)
        return run.measure(shortlist, guides)
    finally:
        model.train(was_training)


class _Evaluation:
    """What both stages share: records, their texts as tokens, and which of them can be used."""

    def __init__(
        self,
        model: TripsForImageTextRetrieval,
        records: Sequence[PairRecord],
        processor: TripsProcessor,
        bad_samples: BadSamples,
        batch_size: int,
        memory_gb: float,
        progress: bool,
    ) -> None:
        self.model, self.records, self.processor, self.bad_samples = model, records, processor, bad_samples
        self.batch_size, self.memory_gb, self.progress = batch_size, memory_gb, progress
        self.device, (self.rank, self.processes) = next(model.parameters()).device, world()

    def measure(self, k: int, guides: Sequence[RerankGuide]) -> dict[str, Any]:
        start = time.perf_counter()
        texts = _read_texts(self.records, self.processor)
        if k < min(RANKS[-1], max(len(self.records), len(texts.owners))):
            raise ConfigError(
                f"R@{RANKS[-1]} cannot be told from fewer candidates",
                item="shortlist",
                found=k,
                expected=f"at least {RANKS[-1]}",
            )
        images, features = self._encode_images(texts)
        if not len(images):
            raise DataError("no image can be read", item="data.test", found=f"{len(self.records)} samples")
        used = torch.isin(texts.owners, images)
        owners, distinct = torch.searchsorted(images, texts.owners[used]), texts.distinct[used]  # (T,)
        text_features = self._encode_texts(texts.table)[distinct.to(self.device)]
        ids = torch.arange(len(images), device=self.device), owners.to(self.device)
        of_image = best_candidates(features, text_features, *ids, k)
        of_text = best_candidates(text_features, features, *reversed(ids), k)
        pairs = CandidatePairs.of(of_image.index, of_text.index, distinct)
        results: dict[str, Any] = {
            "first_stage": _recalls(recall_of_ahead(of_image.ahead), recall_of_ahead(of_text.ahead))
            | {"seconds": time.perf_counter() - start},
            "reranked": {},
        }
        relevant = owners[of_image.index] == torch.arange(len(images))[:, None], of_text.index == owners[:, None]
        for guide in guides:
            start = time.perf_counter()
            scores, reranker = self._rerank(guide, pairs, images, texts.table)
            seconds = time.perf_counter() - start
            length = round(texts.table.lengths[pairs.texts].float().mean().item())
            count = count_reranking_flops(self.model.config, self._grid, length, guide=guide)
            selection = reranker.selection
            results["reranked"][guide] = {
                **_recalls(
                    recall_of_shortlist(scores[pairs.of_image], relevant[0]),
                    recall_of_shortlist(scores[pairs.of_text], relevant[1]),
                ),
                "selection_guide": selection.guide if selection.active else "none",
                "seconds": seconds,
                "pairs_per_second": len(pairs) / seconds,
                "gflops_per_pair": count.pair,
                "gflops_per_image": count.image,
                "gflops_per_text": count.text,
                "text_length": length,
            }
        sizes = {"pairs": len(pairs), "num_images": len(images), "num_texts": len(owners)}
        return {**results, "shortlist": k, **sizes}

    @property
    def _grid(self) -> tuple[int, int]:
        (height, width), patch = self.processor.image_size, self.model.config.vision_config.patch_size
        return height // patch, width // patch

    def _encode_images(self, texts: _Texts) -> tuple[Tensor, Tensor]:
        """Numbers of the records that can be used, in order, and their (I, P) features on the model's device."""
        width = self.model.config.pretraining.projection_dim
        features = torch.zeros(len(self.records), width, device=self.device)
        batches = torch.arange(len(self.records)).split(self.batch_size)[self.rank :: self.processes]
        errors = dict(texts.errors)

        def work() -> None:
            with self._bar("images", sum(map(len, batches))) as advance:
                for batch in batches:
                    arrays, good = [], []
                    for number in batch.tolist():
                        record = self.records[number]
                        try:
                            if number not in errors:
                                arrays.append(self.processor.resize(record.image, name=record.source))
                                good.append(number)
                        except DataError as error:
                            errors[number] = str(error)
                    if good:
                        pixels = self.processor.normalise(arrays).to(self.device)
                        features[torch.tensor(good, device=self.device)] = self.model.encode_image(pixels)
                    advance(len(batch))

        self._together(work)
        for found in self._share(errors):
            errors |= found
        for number, source in enumerate(texts.sources):
            if number in errors:
                self.bad_samples.record(source, errors[number])
            else:
                self.bad_samples.saw(source)
        images = torch.tensor([number for number in range(len(self.records)) if number not in errors], dtype=torch.long)
        return images, self._sum(features)[images.to(self.device)]

    def _encode_texts(self, table: TextTable) -> Tensor:
        """(U, P) features on the model's device."""
        features = torch.zeros(len(table), self.model.config.pretraining.projection_dim, device=self.device)
        batches = table.by_length(4 * self.batch_size)[self.rank :: self.processes]

        def work() -> None:
            with self._bar("texts", sum(map(len, batches))) as advance:
                for batch in batches:
                    tensors = (tensor.to(self.device) for tensor in table.batch(batch))
                    features[batch.to(self.device)] = self.model.encode_texts(*tensors)
                    advance(len(batch))

        self._together(work)
        return self._sum(features)

    def _rerank(
        self, guide: RerankGuide, pairs: CandidatePairs, images: Tensor, table: TextTable
    ) -> tuple[Tensor, Reranker]:
        """(S,) scores on the CPU, and what made them."""

        def load(numbers: list[int]) -> Tensor:
            chosen = [self.records[number] for number in images[numbers].tolist()]
            return self.processor.normalise([self.processor.resize(r.image, name=r.source) for r in chosen])

        grid, options = self._grid, {"batch_size": self.batch_size, "memory_gb": self.memory_gb}
        reranker = Reranker(self.model, table, load, grid[0] * grid[1], guide=guide, **options)
        scores = torch.zeros(len(pairs), device=self.device)
        blocks = reranker.blocks(pairs.images, self.processes)[self.rank :: self.processes]

        def work() -> None:
            with self._bar(f"pairs ({guide} guides)", sum(block.stop - block.start for block in blocks)) as advance:
                for block in blocks:
                    scores[block] = reranker.score(pairs.images[block], pairs.texts[block], advance)

        self._together(work)
        return self._sum(scores).cpu(), reranker

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, each of which has filled in its own places and left the others at zero."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def _share(self, value: Any) -> list[Any]:
        """The objects of all processes."""
        shared = [value] * self.processes
        if self.processes > 1:
            dist.all_gather_object(shared, value)
        return shared

    def _together(self, work: Callable[[], None]) -> None:
        """Do this process's share of the work; an error of one is raised in all, so that none waits for another."""
        error = None
        try:
            work()
        except TripsError as caught:
            error = caught
        for found in self._share(error):
            if found is not None:
                raise found

    def _bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return progress_of(name, total, enabled=self.progress and self.rank == 0)


@dataclass(frozen=True)
class _Texts:
    """All texts as tokens.

    Attributes:
        table: the U different ones.
        distinct, owners: (T,) number in the table, and record, of every text.
        sources: of the records.
        errors: records whose texts cannot be used, by number.
    """

    table: TextTable
    distinct: Tensor
    owners: Tensor
    sources: list[str]
    errors: dict[int, str]


def _read_texts(records: Sequence[PairRecord], processor: TripsProcessor) -> _Texts:
    known: dict[bytes, int] = {}  # by their tokens, as one run of bytes: what reads alike is one text
    distinct, owners, sources, errors = [], [], [], {}
    for number in range(len(records)):
        record = records[number]
        sources.append(record.source)
        try:
            rows = processor.token_ids(list(record.texts))
        except (DataError, ConfigError) as error:  # no text that the tokenizer leaves anything of, or none at all
            errors[number] = str(error)
            continue
        distinct += [known.setdefault(np.array(row, dtype=np.int32).tobytes(), len(known)) for row in rows]
        owners += [number] * len(rows)
    if not known:
        raise DataError("no text can be read", item="data.test", found=f"{len(records)} samples")
    table = TextTable.of([np.frombuffer(row, dtype=np.int32) for row in known])
    return _Texts(table, torch.tensor(distinct), torch.tensor(owners), sources, errors)


def _recalls(text_recall: dict[int, float], image_recall: dict[int, float]) -> dict[str, Any]:
    mean = sum([*text_recall.values(), *image_recall.values()]) / (2 * len(RANKS))
    return {"text_recall": text_recall, "image_recall": image_recall, "mean_recall": mean}


def _check(guides: Sequence[str], shortlist: int, batch_size: int, memory_gb: float) -> None:
    if not guides or not set(guides) <= {"text", "image"}:
        raise ConfigError("unknown guide", item="guides", found=guides, expected="text, image or both")
    for name, value, least in (("shortlist", shortlist, 1), ("batch_size", batch_size, 1), ("memory_gb", memory_gb, 0)):
        if not least <= value < math.inf:
            raise ConfigError("out of range", item=name, found=value, expected=f"at least {least}")
