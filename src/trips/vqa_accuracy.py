"""The accuracy of VQA 2.0 (section 5.1.1, Table 1), computed as the official evaluation script computes it.

Ten people answered each question; an answer that three of the others gave is right. The script's rules are kept to the
letter, with their oddities, since figures that others published contain them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

from trips.errors import ConfigError, DataError

Version = Literal["current", "older"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The script's pattern wants to spare a period behind a digit as well, but is mistyped there.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # a flag that the script passes in the place of a count
_DIGITS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_DIGITS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))
# An underscore is an apostrophe that the word may lack: "don_t" is dont -> don't. Punctuation has gone before, so
# that no word holds an underscore of its own. Six of the script's 120 are left out, which never change a word: two that
# map to themselves, and four that expect a capital I.
_LACKING = """
ain_t aren_t can_t could_ve couldn_t couldn't_ve couldn_t've didn_t doesn_t don_t hadn_t hadn_t've hadn't_ve hasn_t
haven_t he_d he_d've he'd_ve he_s how_d how_ll how_s isn_t it_d it_d've it'd_ve it_ll ma_am mightn_t mightn_t've
mightn't_ve might_ve mustn_t must_ve needn_t not_ve o_clock oughtn_t _ow's'at 'ow_s'at 'ow's_at shan_t she_d've
she'd_ve should_ve shouldn_t shouldn_t've shouldn't_ve somebody_d've somebody'd_ve somebody_ll somebody_s someone_d
someone_d've someone'd_ve someone_ll someone_s something_d something_d've something'd_ve something_ll that_s there_d
there_d've there'd_ve there_re there_s they_d they_d've they'd_ve they_ll they_re they_ve _twas wasn_t we_d've we'd_ve
we_ve weren_t what_ll what_re what_s what_ve when_s where_d where_s where_ve who_d who_d've who'd_ve who_ll who_s
who_ve why_ll why_re why_s won_t would_ve wouldn_t wouldn_t've wouldn't_ve y_all y_all'll y'all_ll y_all'd've
y'all_d've y'all'd_ve you_d you_d've you'd_ve you_ll you_re you_ve
"""
_CONTRACTIONS = {word.replace("_", ""): word.replace("_", "'") for word in _LACKING.split()}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the script


def vqa_accuracy(prediction: str, answers: Sequence[str], *, version: Version = "current") -> float:
    """Accuracy of one answer: over the people, the mean of min(1, others who gave it / 3).

    Of ten people 1, 2, 3, 4 or more who gave it make 0.3, 0.6, 0.9, 1. "Others" are told apart by position, as the ids
    in the official files do it.

    Args:
        prediction: the answer to judge.
        answers: what the people said, one entry for each person; with fewer than four nothing can be wholly right.
        version: "current" is the official script since March 2021: where all people said the same, neither side is
            normalised, not even in case; else both sides get `official_form`. "older" is what ALBEF's results come
            from: the prediction always gets it; the people's answers lose punctuation only, and only where they differ.
    Returns:
        0 to 1.
    Raises:
        DataError: no answers. ConfigError: an unknown version.
    """
    if not answers:
        raise DataError("nobody answered", item="answers", expected="one answer for each person")
    if version == "current":
        said, people = _one_line(prediction), [_one_line(answer) for answer in answers]
        if len(set(people)) > 1:
            said, people = official_form(said), [official_form(answer) for answer in people]
    elif version == "older":
        said, people = official_form(prediction), list(answers)
        if len(set(people)) > 1:
            people = [_without_punctuation(answer) for answer in people]
    else:
        raise ConfigError("unknown version", item="version", found=version, expected="current | older")
    matches = people.count(said)
    accuracies = [min(1.0, (matches - (answer == said)) / 3) for answer in people]
    return sum(accuracies) / len(accuracies)


@functools.lru_cache(maxsize=2**16)  # people repeat each other: two million answers are a hundred thousand texts
def official_form(text: str) -> str:
    """An answer as the script compares it: no punctuation, lower case, digits for number words, no articles.

    Punctuation next to a space vanishes, other punctuation becomes a space; with a comma between digits all of it
    vanishes. Then number words up to ten, articles, and words that lack their apostrophe, in this order.
    """
    words = _without_punctuation(_one_line(text)).lower().split()
    words = [_DIGITS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


class VqaScore:
    """Running means of the accuracies of questions: of all, per type of answer and per type of question."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, accuracy: float, *, answer_type: str | None = None, question_type: str | None = None) -> None:
        """Count one question.

        Args:
            accuracy: 0 to 1.
            answer_type, question_type: as the data set has them ("number", "how many"); None where it has none.
        """
        for kind, name in (("overall", ""), ("answer", answer_type), ("question", question_type)):
            if name is not None:
                total, count = self._sums.get((kind, name), (0.0, 0))
                self._sums[kind, name] = total + accuracy, count + 1

    @property
    def num_questions(self) -> int:
        """Questions counted."""
        return self._sums.get(("overall", ""), (0.0, 0))[1]

    @property
    def accuracy(self) -> float | None:
        """Mean over all questions, 0 to 1; None without any."""
        return self._means("overall").get("")

    @property
    def by_answer_type(self) -> dict[str, float]:
        """Mean of each type of answer, 0 to 1."""
        return self._means("answer")

    @property
    def by_question_type(self) -> dict[str, float]:
        """Mean of each type of question, 0 to 1."""
        return self._means("question")

    def report(self) -> dict[str, Any]:
        """The script's own output: percentages rounded to two digits.

        Returns:
            ``overall``, and ``perAnswerType`` and ``perQuestionType`` by type.
        Raises:
            DataError: no questions.
        """
        if self.accuracy is None:
            raise DataError("no questions were counted", item="VqaScore")
        kinds = (("overall", "overall"), ("perAnswerType", "answer"), ("perQuestionType", "question"))
        rounded = {key: {name: round(mean, 2) for name, mean in self._means(kind, 100).items()} for key, kind in kinds}
        return {**rounded, "overall": rounded["overall"][""]}

    def _means(self, kind: str, scale: int = 1) -> dict[str, float]:
        return {name: scale * total / count for (of, name), (total, count) in sorted(self._sums.items()) if of == kind}


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    number, out = _COMMA_IN_NUMBER.search(text) is not None, text
    for mark in _PUNCTUATION:
        # Asked of the text as it came in, so that one mark's going changes nothing for the next.
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)
