"""The embedded corpus as a whole: determinism, relevant patches, tokenizer, priors, errors that name the argument."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trips.data.scenes import (
    ANSWERS,
    QUESTION_TYPES,
    SceneConfig,
    SceneCorpus,
    corpus_texts,
    prior,
    relevant_patches,
    text_prior,
    train_tokenizer,
)
from trips.errors import ConfigError, DataError

CORPUS = SceneCorpus(seed=3)


def test_scenes_are_a_function_of_seed_and_index_in_any_order() -> None:
    one, other = SceneCorpus(seed=5), pickle.loads(pickle.dumps(SceneCorpus(seed=5)))
    forward = [(one.scene(i), one.questions(i, 4), one.caption(i)) for i in range(6)]
    for i in reversed(range(6)):
        scene, questions, caption = other.scene(i), other.questions(i, 4), other.caption(i)
        assert np.array_equal(scene.image, forward[i][0].image) and scene.objects == forward[i][0].objects
        assert scene.regions == forward[i][0].regions and (questions, caption) == forward[i][1:]
        assert other.questions(scene, 4) == questions
    assert one.statement(2).text == other.statement(2).text
    assert not np.array_equal(SceneCorpus(seed=6).scene(0).image, forward[0][0].image)
    assert not np.array_equal(forward[0][0].image, forward[1][0].image)


@given(st.data())
def test_relevant_patches_against_counting_pixels(data: st.DataObject) -> None:
    patch = data.draw(st.integers(1, 9))
    grid = data.draw(st.integers(1, 6))
    size = patch * grid
    share = data.draw(st.sampled_from([0.01, 0.25, 0.5, 1.0]))

    def interval() -> tuple[int, int]:
        start = data.draw(st.integers(0, size - 1))
        return start, data.draw(st.integers(start + 1, size))

    boxes = []
    for _ in range(data.draw(st.integers(0, 3))):
        (x0, x1), (y0, y1) = interval(), interval()
        boxes.append((x0, y0, x1, y1))

    def pixels(number: int, among: list) -> int:
        row, column = number // grid * patch, number % grid * patch
        return sum(
            any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in among)
            for y in range(row, row + patch)
            for x in range(column, column + patch)
        )

    need = share * patch * patch
    expected = [pixels(number, boxes) >= need for number in range(grid * grid)]
    for box in boxes:
        own = [pixels(number, [box]) for number in range(grid * grid)]
        if max(own) < need:
            expected[own.index(max(own))] = True
    found = relevant_patches(boxes, size, patch, share)
    assert found.dtype == bool and found.tolist() == expected


def test_relevant_patches_of_scenes() -> None:
    scene = CORPUS.scene(0)
    thing = scene.objects[0]
    kept = np.flatnonzero(relevant_patches([thing.box], 64, 8))
    first = thing.box[1] // 8 * 8 + thing.box[0] // 8
    assert kept.tolist() == [first, first + 1]
    bands = [relevant_patches(region.boxes, 64, 8) for region in scene.regions]
    assert np.any(bands, axis=0).all() and all(8 <= band.sum() <= 40 for band in bands)
    assert not relevant_patches([], 64, 8).any()


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (0, 0, 65, 4), (-1, 0, 4, 4), (5, 5, 4, 9), (0.5, 0, 4, 4), (0, 0, 4)])
def test_relevant_patches_refuse_bad_boxes(box: tuple) -> None:
    with pytest.raises(DataError, match="box"):
        relevant_patches([box], 64, 8)


def test_relevant_patches_refuse_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="patch_size"):
        relevant_patches([], 64, 9)
    with pytest.raises(ConfigError, match="min_share"):
        relevant_patches([], 64, 8, min_share=0.0)


def test_tokenizer_knows_every_text_and_each_answer_is_one_token() -> None:
    tokenizer = train_tokenizer(SceneCorpus(seed=0))
    assert tokenizer.to_str() == train_tokenizer(SceneCorpus(seed=0)).to_str()
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= 400
    ids = [tokenizer.encode(answer).ids for answer in ANSWERS]
    assert all(len(answer) == 1 for answer in ids) and len({answer[0] for answer in ids}) == len(ANSWERS) == 21
    for text in corpus_texts(SceneCorpus(seed=99), 1000):
        encoded = tokenizer.encode(text)
        assert "[UNK]" not in encoded.tokens and len(encoded.ids) == len(text.split())
        assert tokenizer.decode(encoded.ids).replace(" ", "") == text.replace(" ", "")
    spelled = tokenizer.encode("Zebra!?")
    assert "[UNK]" not in spelled.tokens and tokenizer.decode(spelled.ids).replace(" ", "") == "zebra!?"
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(SceneCorpus(), num_texts=20, vocab_size=100)


def test_priors() -> None:
    assert [prior(kind) for kind in QUESTION_TYPES] == [1 / 8, 1 / 8, 1 / 2, 1 / 2, 1 / 3]
    assert [text_prior(kind) for kind in QUESTION_TYPES] == [1 / 8, 1 / 4, 1 / 2, 1 / 2, 1 / 3]
    with pytest.raises(ConfigError, match="colour"):
        prior("colour")


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 60},
        {"image_size": 48},
        {"image_size": 64.0},
        {"patch_size": 4},
        {"num_objects": 0},
        {"num_objects": 17},
        {"noise": -1},
        {"mixture": (("colour", 1.0),)},
        {"mixture": (("object", -1.0),)},
        {"mixture": (("object", float("nan")),)},
        {"mixture": (("object", 0.0),)},
        {"mixture": (("object", 1.0), ("object", 1.0))},
        {"mixture": ()},
    ],
)
def test_bad_configs_name_the_key(values: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SceneConfig(**values)


def test_bad_calls_name_the_argument() -> None:
    for call, name in (
        (lambda: SceneCorpus(seed=-1), "seed"),
        (lambda: CORPUS.scene(-1), "index"),
        (lambda: CORPUS.scene(1.5), "index"),
        (lambda: CORPUS.scene(0, num_objects=17), "num_objects"),
        (lambda: CORPUS.questions(0, -1), "n:"),
        (lambda: CORPUS.questions(0, 1, types="object"), "types"),
        (lambda: CORPUS.questions(0, 1, types=()), "types"),
        (lambda: CORPUS.questions(0, 1, types=("colour",)), "colour"),
        (lambda: CORPUS.caption(0, variant=-1), "variant"),
    ):
        with pytest.raises(ConfigError, match=name):
            call()
    assert CORPUS.questions(0, 0) == []
    single = SceneCorpus(SceneConfig(num_objects=1))
    colours = [single.scene(index).objects[0].colour for index in range(100)]
    pair = next(index for index in range(50) if colours[2 * index] == colours[2 * index + 1])
    with pytest.raises(ConfigError, match=f"scenes {2 * pair}, {2 * pair + 1}"):  # one thing each: nothing to count
        single.statement(pair)
