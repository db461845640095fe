"""Both stages of retrieval on tensors, against every pair by itself through the whole model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from retrieval_records import (
    NUM_PATCHES,
    matches_one_by_one,
    owners,
    retrieval_model,
    retrieval_processor,
    retrieval_records,
)

from trips.errors import ConfigError
from trips.metrics import recall_at_k, recall_of_ahead, recall_of_shortlist
from trips.tasks.reranking import Reranker, TextTable, rerank_selection
from trips.tasks.shortlists import CandidatePairs, best_candidates

PROCESSOR = retrieval_processor()
RECORDS = retrieval_records(5)
TEXTS = [text for record in RECORDS for text in record.texts]


def test_chunks_change_nothing_and_equal_topk() -> None:
    queries, candidates = torch.randn(13, 5), torch.randn(31, 5)
    ids = torch.arange(13), torch.arange(31) % 13
    expected = (queries @ candidates.T).topk(7).indices
    for elements in (1, 31 * 4, 10**6):
        found = best_candidates(queries, candidates, *ids, 7, elements)
        assert torch.equal(found.index, expected)
    assert best_candidates(queries, candidates, *ids, 99).index.shape == (13, 31)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**16))
def test_ties_count_against_the_relevant(queries, candidates, k, elements, seed) -> None:
    """Whole numbers, so that similarities tie often, and exactly."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, 3, (queries, 2), generator=generator).float()
    right = torch.randint(0, 3, (candidates, 2), generator=generator).float()
    candidate_ids = torch.randint(0, queries, (candidates,), generator=generator)
    query_ids = candidate_ids[torch.randint(0, candidates, (queries,), generator=generator)]
    found = best_candidates(left, right, query_ids, candidate_ids, k, elements)
    scores, relevant = left @ right.T, query_ids[:, None] == candidate_ids[None]
    assert recall_of_ahead(found.ahead, (1, 3)) == recall_at_k(scores, relevant, (1, 3))
    for row in range(queries):
        ranked = sorted((-scores[row, c].item(), relevant[row, c].item()) for c in range(candidates))[:k]
        listed = found.index[row].tolist()
        assert len(set(listed)) == len(listed)
        assert [(-scores[row, c].item(), relevant[row, c].item()) for c in listed] == ranked
    # The list ranked by what made it is recall on everything, where it holds everything.
    everything = best_candidates(left, right, query_ids, candidate_ids, candidates).index
    again = recall_of_shortlist(scores.gather(1, everything), relevant.gather(1, everything), (1, 3))
    assert again == recall_at_k(scores, relevant, (1, 3))


def test_what_is_not_on_the_shortlist_or_no_number_finds_nothing() -> None:
    scores, relevant = torch.tensor([[3.0, 2.0], [1.0, 0.0]]), torch.tensor([[False, True], [False, False]])
    assert recall_of_shortlist(scores, relevant, (1, 2, 5)) == {1: 0.0, 2: 0.5, 5: 0.5}
    lost = torch.full((2, 12), torch.nan)
    first = torch.zeros(2, 12, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    assert recall_of_shortlist(lost, first) == {1: 0.0, 5: 0.0, 10: 0.0}
    found = best_candidates(lost[:, :2], torch.ones(12, 2), torch.arange(2), torch.arange(12) % 2, 5)
    assert recall_of_ahead(found.ahead, (1, 5)) == {1: 0.0, 5: 0.0}


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**16))
def test_pairs_are_those_of_both_directions_once(images, texts, k, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts_of_image = torch.randint(0, texts, (images, k), generator=generator)
    images_of_text = torch.randint(0, images, (texts, k), generator=generator)
    distinct = torch.randint(0, 3, (texts,), generator=generator)
    pairs = CandidatePairs.of(texts_of_image, images_of_text, distinct)
    listed = list(zip(pairs.images.tolist(), pairs.texts.tolist(), strict=True))
    forward = [[(i, int(distinct[t])) for t in row] for i, row in enumerate(texts_of_image.tolist())]
    backward = [[(i, int(distinct[t])) for i in row] for t, row in enumerate(images_of_text.tolist())]
    assert listed == sorted({pair for row in forward + backward for pair in row}) and len(pairs) == len(listed)
    assert [[listed[place] for place in row] for row in pairs.of_image.tolist()] == forward
    assert [[listed[place] for place in row] for row in pairs.of_text.tolist()] == backward


# --- the second stage


class Counted:
    """All pairs of the records through a `Reranker`, and what it asked for on the way."""

    def __init__(self, model, monkeypatch: pytest.MonkeyPatch | None = None, processes: int = 1, **options) -> None:
        self.loaded, self.encoded, self.done, self.kept = [], 0, 0, []
        pixels = PROCESSOR(images=[record.image for record in RECORDS])["pixel_values"]

        def load(numbers: list[int]) -> torch.Tensor:
            self.loaded += numbers
            return pixels[numbers]

        if monkeypatch is not None:
            encode, own = model.trips.encode_text, Reranker._text_states

            def encode_text(input_ids, attention_mask):
                self.encoded += len(input_ids)
                return encode(input_ids, attention_mask)

            def text_states(reranker, texts):
                states = own(reranker, texts)
                self.kept.append(states.states.nbytes)
                return states

            monkeypatch.setattr(model.trips, "encode_text", encode_text)
            monkeypatch.setattr(Reranker, "_text_states", text_states)
        table = TextTable.of(PROCESSOR.token_ids(TEXTS))
        self.reranker = Reranker(model, table, load, NUM_PATCHES, **{"batch_size": 2, **options})
        images = torch.arange(len(RECORDS)).repeat_interleave(len(TEXTS))
        texts = torch.arange(len(TEXTS)).repeat(len(RECORDS))
        self.blocks = self.reranker.blocks(images, processes)
        parts = [self.reranker.score(images[block], texts[block], self.advance) for block in self.blocks]
        self.scores = torch.cat(parts).view(len(RECORDS), len(TEXTS))

    def advance(self, count: int) -> None:
        self.done += count


SETTINGS = {
    "text": {},
    "wide": {"text_width": 16, "width_map": "orthogonal"},
    "keys": {"score": "keys", "inattentive": "drop"},
    "from_the_first_layer": {"layers": (1, 4), "keep_rate": (0.9, 0.3)},
    "image": {"guide": "image"},
    "none": {"guide": "none"},
    "everything_kept": {"keep_rate": 1.0},
}


TEXT_GB = sum(map(len, PROCESSOR.token_ids(TEXTS))) * 32 * 4 / 1e9  # states of all texts
MEMORY = (4.0, TEXT_GB, 0.0)  # for everything; for half of the texts and an image; for as little as can be


@pytest.mark.parametrize("guide", ["text", "image"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_are_those_of_each_pair_from_scratch(setting, guide) -> None:
    model = retrieval_model(**SETTINGS[setting])
    chosen = model.config.selection
    if guide == "image" and chosen.active:
        chosen = chosen.replace(guide="image")
    expected = matches_one_by_one(model, RECORDS, chosen)
    for memory_gb in MEMORY:
        found = Counted(model, guide=guide, memory_gb=memory_gb)
        torch.testing.assert_close(found.scores, expected, rtol=0, atol=1e-5)
        assert found.done == expected.numel()
    assert expected.std() > 0.05  # pairs differ by far more than the tolerance


def test_the_guides_differ() -> None:
    model = retrieval_model()
    assert (Counted(model, guide="text").scores - Counted(model, guide="image").scores).abs().max() > 1e-3


@pytest.mark.parametrize("guide", ["text", "image"])
@pytest.mark.parametrize("memory_gb", MEMORY)
def test_an_image_is_computed_once_and_texts_as_often_as_memory_demands(guide, memory_gb, monkeypatch) -> None:
    found = Counted(retrieval_model(), monkeypatch, guide=guide, memory_gb=memory_gb, batch_size=1)
    assert sorted(found.loaded) == list(range(len(RECORDS)))
    reranker, texts = found.reranker, len(TEXTS)
    assert reranker.keeps_texts == (memory_gb == 4.0)
    if reranker.keeps_texts:
        assert found.encoded == texts and len(found.blocks) == len(RECORDS)
    else:
        assert found.encoded >= texts * len(found.blocks)
        # All but the least that can be worked with: states of a batch of pairs, here of texts that all differ.
        most = reranker.pair_batch * int(reranker.texts.lengths.max()) * reranker.token_bytes
        assert max(found.kept) <= max(memory_gb * 1e9 / 2, most)
        tokens = NUM_PATCHES + 1 if guide == "text" else 7  # of 16 patches half, half of those and the fused one
        image_bytes = tokens * 32 * 4
        assert reranker.most_images <= max(1, memory_gb * 1e9 / 2 / image_bytes)


def test_where_memory_is_half_enough_a_text_is_encoded_once_per_block(monkeypatch) -> None:
    # All texts fit in one half, but with a batch of images beside them they would not in the whole.
    found = Counted(retrieval_model(), monkeypatch, memory_gb=2 * TEXT_GB, batch_size=5)
    assert not found.reranker.keeps_texts and found.encoded == len(TEXTS) * len(found.blocks)


def test_blocks_hold_whole_images() -> None:
    images = torch.tensor([0, 0, 0, 2, 5, 5, 6])
    table = TextTable.of([[1, 2]])
    model = retrieval_model()
    reranker = Reranker(model, table, lambda numbers: None, NUM_PATCHES, batch_size=2)
    assert reranker.blocks(images) == [slice(0, 4), slice(4, 7)]
    assert reranker.blocks(images[:3]) == [slice(0, 3)]
    reranker = Reranker(model, table, lambda numbers: None, NUM_PATCHES, batch_size=1, memory_gb=0)
    assert reranker.blocks(images, 2) == [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)]


def test_half_precision_is_respected() -> None:
    model = retrieval_model()
    exact = Counted(model).scores
    with torch.autocast("cpu", torch.bfloat16):
        rough = Counted(model).scores
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().median() < 0.05


def test_padding_is_as_the_processor_has_it() -> None:
    table, index = TextTable.of(PROCESSOR.token_ids(TEXTS)), torch.tensor([len(TEXTS) - 1, 0, 4])
    ids, mask = table.batch(index)
    expected = PROCESSOR(text=[TEXTS[i] for i in index.tolist()])
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"])
    lengths = [table.lengths[batch].tolist() for batch in table.by_length(3)]
    assert sum(lengths, []) == sorted(table.lengths.tolist()) and len(owners(RECORDS)) == len(table)


def test_an_unknown_guide_is_refused() -> None:
    with pytest.raises(ConfigError, match="guide"):
        Counted(retrieval_model(), guide="both")
    assert not rerank_selection(retrieval_model(keep_rate=1.0).config.selection, "image").active
