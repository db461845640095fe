"""Blind guesses on the embedded corpus: neither the picture alone nor the words alone beat the prior.

Exact where it can be (the whole distribution of a scene is at hand), else by guessers fitted on one set of scenes and
scored on another, with standard errors over scenes.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from trips.data.scene_texts import candidates, statement_candidates
from trips.data.scenes import QUESTION_TYPES, SceneCorpus, answers_of, prior, text_prior

CORPUS = SceneCorpus(seed=11)
NUM_FIT, NUM_SCORE, PER_SCENE = 2000, 1000, 4

Texts = list[list[tuple[str, str]]]  # for each scene, its (text, answer) pairs


def lookup_guess(fit: Texts, score: Texts) -> list[list[bool]]:
    """Majority answer of the same text, of all texts where it is new."""
    table: dict[str, Counter] = defaultdict(Counter)
    for text, answer in (pair for scene in fit for pair in scene):
        table[text][answer] += 1
        table[""][answer] += 1
    return [[table[t if t in table else ""].most_common(1)[0][0] == a for t, a in scene] for scene in score]


def bayes_guess(fit: Texts, score: Texts) -> list[list[bool]]:
    """Naive Bayes on words and pairs of neighbouring words."""

    def words(text: str) -> list[str]:
        single = text.split()
        return single + [" ".join(pair) for pair in zip(single, single[1:], strict=False)]

    names = {a: i for i, a in enumerate(sorted({answer for scene in fit for _, answer in scene}))}
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.full(len(names), 1.0))
    totals = np.zeros(len(names))
    for text, answer in (pair for scene in fit for pair in scene):
        totals[names[answer]] += 1
        for word in words(text):
            counts[word][names[answer]] += 1

    def right(text: str, answer: str) -> bool:
        logits = np.log(totals) + sum(np.log(counts[w] / totals) for w in words(text) if w in counts)
        return int(np.argmax(logits)) == names[answer]

    return [[right(text, answer) for text, answer in scene] for scene in score]


def assert_no_better_than(bound: float, hits: list[list[bool]]) -> None:
    means = np.array([np.mean(scene) for scene in hits])
    error = means.std(ddof=1) / len(means) ** 0.5
    assert 0 < error < 0.02
    assert bound - 5 * error <= means.mean() <= bound + 3 * error, (means.mean(), bound, error)


@pytest.fixture(scope="module")
def texts() -> dict[str, Texts]:
    """For each type, (text, answer) pairs of the same NUM_FIT + NUM_SCORE scenes."""
    result: dict[str, Texts] = {kind: [] for kind in QUESTION_TYPES}
    for index in range(NUM_FIT + NUM_SCORE):
        scene = CORPUS.scene(index)
        for kind in QUESTION_TYPES:
            questions = CORPUS.questions(scene, PER_SCENE, types=(kind,))
            result[kind].append([(question.text, question.answer) for question in questions])
    return result


@pytest.fixture(scope="module")
def statements() -> Texts:
    pairs = [[CORPUS.statement(i, variant) for variant in range(2)] for i in range(1200)]
    return [[(statement.text, str(statement.label)) for statement in pair] for pair in pairs]


@pytest.mark.parametrize("guess", [lookup_guess, bayes_guess])
@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_words_alone_are_no_better_than_chance(texts: dict[str, Texts], kind: str, guess) -> None:
    assert_no_better_than(text_prior(kind), guess(texts[kind][:NUM_FIT], texts[kind][NUM_FIT:]))


@pytest.mark.parametrize("guess", [lookup_guess, bayes_guess])
def test_words_of_statements_alone_are_no_better_than_chance(statements: Texts, guess) -> None:
    assert_no_better_than(1 / 2, guess(statements[:800], statements[800:]))


@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_the_picture_alone_is_no_better_than_the_prior(kind: str) -> None:
    for index in range(40):
        assert set(candidates(CORPUS.scene(index), kind)) == set(answers_of(kind))  # every answer can be the one
    # Answers are drawn uniformly from those: in many draws for a few scenes, each one's share is within 4.5 errors.
    share, draws = prior(kind), 4000
    for index in range(3):
        counts = Counter(question.answer for question in CORPUS.questions(index, draws, types=(kind,)))
        for answer in answers_of(kind):
            assert abs(counts[answer] / draws - share) < 4.5 * (share * (1 - share) / draws) ** 0.5


def test_two_pictures_alone_do_not_tell_the_label() -> None:
    for index in range(4):
        labels = [CORPUS.statement(index, variant).label for variant in range(400)]
        assert abs(np.mean(labels) - 0.5) < 4.5 * 0.5 / len(labels) ** 0.5


@pytest.mark.parametrize("kind", ["relation", "existence"])
def test_picture_and_unordered_words_name_the_same_with_yes_and_no(kind: str) -> None:
    # Stronger than the blind bounds: with the picture at hand, no single word has a leaning.
    for index in range(20):
        facts = candidates(CORPUS.scene(index), kind)
        bags = [Counter(w for fact in facts[a] for words in fact.words for w in words.split()) for a in ("yes", "no")]
        for bag in bags:
            bag["a"] += bag.pop("an", 0)
        assert bags[0] == bags[1]


def test_statements_name_the_same_words_true_and_false() -> None:
    for index in range(20):
        for kind in statement_candidates(CORPUS.scene(2 * index), CORPUS.scene(2 * index + 1)):
            true, false = (
                Counter(w.removesuffix("s") for fact in kind[label] for words in fact.words for w in words.split())
                for label in (True, False)
            )
            if kind[True][0].wording != "both":
                assert true == false


def test_wordings_are_independent_of_answers() -> None:
    counts: dict[str, Counter] = defaultdict(Counter)
    for index in range(300):
        for question in CORPUS.questions(index, 6, types=("existence",)):
            counts[question.answer][question.text.split()[0]] += 1
    rows = np.array([[counts[answer][first] for first in ("is", "does", "can")] for answer in ("yes", "no")])
    expected = rows.sum(axis=1, keepdims=True) * rows.sum(axis=0, keepdims=True) / rows.sum()
    assert ((rows - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_the_mixture_is_kept_to() -> None:
    weights = dict(CORPUS.config.mixture)
    counts = Counter(question.type for question in CORPUS.questions(0, 5000))
    for kind, weight in weights.items():
        assert abs(counts[kind] / 5000 - weight) < 4.5 * (weight * (1 - weight) / 5000) ** 0.5
