"""The official VQA accuracy: cases by hand, and a second, deliberately naive implementation on random answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trips.errors import ConfigError, DataError
from trips.vqa_accuracy import VqaScore, official_form, vqa_accuracy

PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
SOME_CONTRACTIONS = {
    "dont": "don't",
    "mightve": "might've",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "maam": "ma'am",
    "somebody'd": "somebodyd",
    "yall'd've": "y'all'd've",
    "ow's'at": "'ow's'at",
}

# What is compared, from the rules: marks first, then case and number words, then articles, then contractions.
FORMS = [
    # case and white space
    ("Yes", "yes"),
    ("  yes ", "yes"),
    ("red\nblue", "red blue"),  # a line break is a space
    ("red\tblue", "red blue"),
    ("red  \n blue", "red blue"),
    ("ÉCOLE", "école"),
    ("", ""),
    # articles, only as whole words
    ("a dog", "dog"),
    ("an apple", "apple"),
    ("The  dog", "dog"),
    ("a", ""),
    ("the a an", ""),
    ("theatre", "theatre"),
    ("dog a cat", "dog cat"),
    # number words up to ten, and none
    ("none", "0"),
    ("None", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("TWO", "2"),
    ("three dogs", "3 dogs"),
    ("ten", "10"),
    ("eleven", "eleven"),
    ("twenty one", "twenty 1"),
    ("someone", "someone"),
    ("twenty-one", "twenty 1"),  # the hyphen goes before number words are looked up
    # punctuation inside a word becomes a space, beside a space it vanishes
    ("t-shirt", "t shirt"),
    ("yes!", "yes"),
    ("yes !", "yes"),
    ("a-b c-d", "b c d"),  # no hyphen beside a space: both become spaces, and then "a" is an article
    ("black - white", "black white"),
    ("black-white - red", "blackwhite red"),  # one hyphen beside a space: all hyphens vanish
    ("black/white", "black white"),
    ("red, blue", "red blue"),
    ("red,blue", "red blue"),
    ("red ,blue", "red blue"),
    ("x -y z-w", "x y zw"),  # a space before it does as well
    ("x-?b c?d", "x b c d"),  # asked of the text as it came in: the hyphen's going puts no space beside a mark
    ("b?-x c?d", "b x c d"),
    ("(red)", "red"),
    ("one_two", "1 2"),
    ("x@y", "x y"),
    ('"stop"', "stop"),
    ("[stop]{go}", "stop go"),
    ("a+b=c", "b c"),
    ("back\\slash", "back slash"),
    ("<b>", "b"),
    ("what?!", "what"),
    ("`tick`", "tick"),
    ("red;blue", "red blue"),
    # a comma between digits: every mark in the text vanishes
    ("1,000", "1000"),
    ("1,000-2,000", "10002000"),
    ("1,2,3", "123"),
    ("t-shirt 1,5", "tshirt 15"),
    ("1, 2", "1 2"),
    ("a1,b2", "a1 b2"),  # not between digits
    # periods go unless a digit follows
    ("5.", "5"),
    (".5", ".5"),
    ("2.5", "2.5"),
    ("st. louis", "st louis"),
    ("u.s.a.", "usa"),
    ("yes.", "yes"),
    ("...", ""),
    ("3.a", "3a"),  # a digit before does not protect it
    ("." * 32 + "x", "x"),
    ("." * 33 + "x", ".x"),  # the 33rd stays
    # untouched marks
    ("10:30", "10:30"),
    ("$5", "$5"),
    ("50%", "50%"),
    ("a&w", "a&w"),
    ("#1", "#1"),
    ("it's", "it's"),
    # contractions
    ("dont", "don't"),
    ("DONT", "don't"),
    ("it mightve", "it might've"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),  # both missing: not in the table
    ("Im", "im"),  # its key has a capital, the text is in lower case by then
    ("ive", "ive"),
    ("somebody'd", "somebodyd"),  # the wrong way round
    ("let's", "let's"),
    ("maam", "ma'am"),
    ("one maam", "1 ma'am"),
    ("twas", "'twas"),
    ("weve a star", "we've star"),
    ("don-t", "don t"),
    ("a.n dog", "dog"),  # the period goes first and leaves an article
    ("dont.", "don't"),
]


@pytest.mark.parametrize(("text", "expected"), FORMS)
def test_forms_by_hand(text: str, expected: str) -> None:
    assert official_form(text) == expected


def people(**counts: int) -> list[str]:
    """Ten answers: red=4, blue=6."""
    answers = [name for name, count in counts.items() for _ in range(count)]
    assert len(answers) == 10
    return answers


ACCURACIES = [
    # k of ten gave it: k people have k - 1 others, 10 - k have k, each worth min(1, others / 3)
    ("red", people(red=1, blue=9), 0.3),  # (1 x 0 + 9 x 1/3) / 10
    ("red", people(red=2, blue=8), 0.6),  # (2 x 1/3 + 8 x 2/3) / 10
    ("red", people(red=3, blue=7), 0.9),  # (3 x 2/3 + 7) / 10
    ("red", people(red=4, blue=6), 1.0),
    ("red", people(red=9, blue=1), 1.0),
    ("green", people(red=4, blue=6), 0.0),
    ("red", people(red=1, blue=3, green=6), 0.3),
    # both sides are normalised where the people differ
    ("Red.", people(red=1, blue=9), 0.3),
    ("the red", people(red=4, blue=6), 1.0),
    ("2", ["two"] * 4 + ["three"] * 6, 1.0),
    ("two", ["2"] * 4 + ["3"] * 6, 1.0),
    ("t shirt", ["t-shirt"] * 2 + ["t shirt"] * 2 + ["coat"] * 6, 1.0),  # spellings add up
    ("dont", ["don't"] * 3 + ["do"] * 7, 0.9),
    ("1000", ["1,000"] * 4 + ["many"] * 6, 1.0),
    ("a", ["the"] * 4 + ["cat"] * 6, 1.0),  # both are nothing but an article
    # ten alike: nothing is normalised
    ("yes", ["yes"] * 10, 1.0),
    ("Yes", ["yes"] * 10, 0.0),
    ("yes.", ["yes"] * 10, 0.0),
    ("2", ["two"] * 10, 0.0),
    ("two", ["two"] * 10, 1.0),
    ("yes", ["Yes"] * 10, 0.0),
    ("Yes", ["Yes"] * 10, 1.0),
    # ... but line breaks and outer spaces are gone before that is asked
    (" yes\n", ["yes"] * 10, 1.0),
    ("yes", ["yes", " yes"] * 5, 1.0),
    ("Yes", ["yes", " yes"] * 5, 0.0),
    ("Yes", ["yes", "yes."] * 5, 1.0),  # differ as written, alike only when normalised: both sides are
    ("red blue", ["red\nblue"] * 10, 1.0),
    # people are told apart by position: two with the same answer and no id do not vanish together
    ("red", ["red"] * 10, 1.0),
    ("red", ["red", "red", "blue", "blue"], 0.5),  # (2 x 1/3 + 2 x 2/3) / 4
    # fewer people
    ("red", ["red", "red", "red", "red"], 1.0),
    ("red", ["red", "red", "red"], 2 / 3),
    ("red", ["red", "red"], 1 / 3),
    ("red", ["red"], 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), ACCURACIES)
def test_accuracies_by_hand(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


OLDER = [
    # the prediction is always normalised, the people's answers never more than their punctuation
    ("Yes", ["yes"] * 10, 1.0),
    ("yes", ["Yes"] * 10, 0.0),
    ("yes", ["Yes"] * 4 + ["no"] * 6, 0.0),
    ("yes", ["yes."] * 4 + ["no"] * 6, 1.0),
    ("yes", ["yes."] * 10, 0.0),  # ten alike: their period stays
    ("two", ["two"] * 10, 0.0),  # "2" by now
    ("two", ["2"] * 10, 1.0),
    ("two", ["two"] * 4 + ["2"] * 6, 1.0),
    ("two", ["two"] * 7 + ["2"] * 3, 0.9),
    ("the dog", ["the dog"] * 4 + ["cat"] * 6, 0.0),
    ("dont", ["dont"] * 10, 0.0),
    ("1,000", ["1,000"] * 4 + ["many"] * 6, 1.0),
    ("red", ["red\n"] * 4 + ["blue"] * 6, 0.0),  # people's line breaks stay
    ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), OLDER)
def test_older_script_by_hand(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers, version="older") == pytest.approx(expected, abs=1e-12)


def naive_marks(text: str) -> str:
    """Letter by letter, each looked at with its neighbours."""
    padded = f"x{text}x"
    triples = [padded[i - 1 : i + 2] for i in range(1, len(padded) - 1)]
    number = any(before.isdigit() and here == "," and behind.isdigit() for before, here, behind in triples)
    lonely = {here for before, here, behind in triples if " " in (before, behind)}
    letters = [("" if number or c in lonely else " ") if c in PUNCTUATION else c for c in text]
    text, out, periods = "".join(letters), "", 0
    for i, letter in enumerate(text):
        if letter == "." and not text[i + 1 : i + 2].isdigit() and periods < 32:
            periods += 1
        else:
            out += letter
    return out


def naive_form(text: str) -> str:
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in naive_marks(text).lower().split():
        word = "0" if word == "none" else str(numbers.index(word)) if word in numbers else word
        if word not in ("a", "an", "the"):
            words.append(SOME_CONTRACTIONS.get(word, word))
    return " ".join(words)


def naive_accuracy(prediction: str, answers: list[str]) -> float:
    clean = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in (prediction, *answers)]
    if any(answer != clean[1] for answer in clean[1:]):
        clean = [naive_form(answer) for answer in clean]
    total = 0.0
    for i in range(1, len(clean)):
        others = [clean[j] for j in range(1, len(clean)) if j != i and clean[j] == clean[0]]
        total += min(1.0, len(others) / 3)
    return total / len(answers)


PIECES = st.sampled_from(
    [*PUNCTUATION, *" .'1290:$", "  ", ", ", "yes", "The", "a", "one", "None", "dont", "couldnt've", "somebody'd", "\n"]
)
TEXTS = st.lists(PIECES, max_size=7).map("".join)


@settings(max_examples=300)
@given(TEXTS)
def test_forms_equal_the_naive_ones(text: str) -> None:
    assert official_form(text) == naive_form(text.replace("\n", " ").replace("\t", " ").strip())


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=11, max_size=11))
def test_accuracies_equal_the_naive_ones(texts: list[str], places: list[int]) -> None:
    prediction, *answers = (texts[place % len(texts)] for place in places)
    assert vqa_accuracy(prediction, answers) == pytest.approx(naive_accuracy(prediction, answers), abs=1e-12)


def test_scores_are_means_by_type_and_rounded_as_in_the_script() -> None:
    score = VqaScore()
    assert score.accuracy is None and score.num_questions == 0
    with pytest.raises(DataError, match="no questions"):
        score.report()
    for accuracy, kind, question in ((0.3, "number", "how many"), (1.0, "yes/no", "is the"), (0.0, "number", None)):
        score.add(accuracy, answer_type=kind, question_type=question)
    score.add(0.9)
    assert score.num_questions == 4 and score.accuracy == pytest.approx(2.2 / 4)
    assert score.by_answer_type == {"number": 0.15, "yes/no": 1.0}
    assert score.by_question_type == {"how many": 0.3, "is the": 1.0}
    assert score.report() == {
        "overall": 55.0,
        "perAnswerType": {"number": 15.0, "yes/no": 100.0},
        "perQuestionType": {"how many": 30.0, "is the": 100.0},
    }
    thirds = VqaScore()
    for accuracy in (1.0, 0.0, 0.0):
        thirds.add(accuracy)
    assert thirds.report()["overall"] == 33.33


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="nobody answered"):
        vqa_accuracy("yes", [])
    with pytest.raises(ConfigError, match="version.*newest"):
        vqa_accuracy("yes", ["yes"] * 10, version="newest")
