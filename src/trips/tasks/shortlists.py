"""The first stage of retrieval: shortlists by contrastive features, and the pairs that they make (section 5.1.3).

Nothing grows with images times texts: similarities are made in chunks of rows.

Dimensions: I images, T texts, U different texts, Q queries, C candidates, S pairs, k shortlist, P projection width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 21  # similarities in memory at a time


@dataclass(frozen=True)
class Shortlist:
    """The first stage for Q queries.

    Attributes:
        index: (Q, k) candidates, best first.
        ahead: (Q,) candidates that are not relevant and at least as good as the best relevant one, of all C.
    """

    index: Tensor
    ahead: Tensor


@torch.no_grad()
def best_candidates(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, k: int, max_elements: int = CHUNK
) -> Shortlist:
    """The k most similar candidates of each query, and where its best relevant one stands (ITC of section 3.3).

    A tie counts against the relevant candidate, as in `trips.metrics.recall_at_k`: of equally similar ones it is the
    last to get onto the list.

    Args:
        queries: (Q, P). candidates: (C, P).
        query_ids: (Q,). candidate_ids: (C,); equal ids are relevant to each other, every query has one.
        k: at most C are taken.
        max_elements: similarities in memory at a time, though at least a row of C.
    Returns:
        On the CPU.
    """
    k, rows = min(k, len(candidates)), max(1, max_elements // len(candidates))
    found, ahead = [], []
    for part, ids in zip(queries.split(rows), query_ids.split(rows)):
        scores, relevant = part @ candidates.T, ids[:, None] == candidate_ids[None]  # (rows, C)
        best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
        # Not "at least": beside a score that is no number nothing is lower, and so it finds nothing.
        ahead.append((~(scores < best) & ~relevant).sum(dim=1).cpu())
        behind = torch.where(relevant, scores.nextafter(scores.new_tensor(-torch.inf)), scores)
        found.append(behind.topk(k, dim=1).indices.cpu())
    return Shortlist(torch.cat(found), torch.cat(ahead))


@dataclass(frozen=True)
class CandidatePairs:
    """Every pair that is on the shortlist of its image or of its text, once.

    Attributes:
        images, texts: (S,) sorted by image; texts are numbers of different texts.
        of_image: (I, k) places of an image's shortlist among the pairs.
        of_text: (T, k) places of a text's shortlist.
    """

    images: Tensor
    texts: Tensor
    of_image: Tensor
    of_text: Tensor

    @classmethod
    def of(cls, texts_of_image: Tensor, images_of_text: Tensor, distinct: Tensor) -> CandidatePairs:
        """Join both directions.

        Args:
            texts_of_image: (I, k) texts. images_of_text: (T, k) images.
            distinct: (T,) number of each text among the U different ones: what is written alike is scored once.
        """
        size = int(distinct.max()) + 1
        keys = torch.cat(
            [
                (torch.arange(len(texts_of_image))[:, None] * size + distinct[texts_of_image]).flatten(),
                (images_of_text * size + distinct[:, None]).flatten(),
            ]
        )
        unique, places = keys.unique(return_inverse=True)
        from_images, from_texts = places.split([texts_of_image.numel(), images_of_text.numel()])
        images = unique.div(size, rounding_mode="floor")
        return cls(images, unique % size, from_images.view_as(texts_of_image), from_texts.view_as(images_of_text))

    def __len__(self) -> int:
        return len(self.images)
