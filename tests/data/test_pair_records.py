"""trips.data.pair_records: ALBEF's form of a caption against the rule applied letter by letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_shards import WORDS, jpeg, pair_processor, write_tar

from trips.data.pair_records import clean_caption, parse_pair
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.data.shards import Members
from trips.errors import DataError
from trips.train.pretraining import read_pairs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Man's dog; it (really) runs!", "a mans dog it really runs"),
        ("black-and-white / colour", "black and white colour"),
        ("<PERSON> with <person>", "person with person"),
        ("  a\t\tcup \n of  tea.\n", "a cup of tea"),
        ('#1: "hi" ~ what? * ok, 3.5', "1 hi what ok 35"),
        ("$5 & 50% [off] <b> ü_É", "$5 & 50% [off] <b> ü_é"),
        ("?!...", ""),
        (" ".join(["Word"] * 40), " ".join(["word"] * 30)),
    ],
)
def test_captions_by_example(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


@given(st.text(st.sampled_from("aBéİ ,.'!?\"()*#:;~-/\t\n<>1")) | st.text())
def test_the_rule_letter_by_letter(text: str) -> None:
    words, word = [], ""
    for letter in text.lower():
        if letter in "-/" or letter.isspace():
            words, word = [*words, word], ""
        elif letter not in {",", ".", "'", "!", "?", '"', "(", ")", "*", "#", ":", ";", "~"}:
            word += letter
    expected = " ".join([one for one in [*words, word] if one][:30])
    assert clean_caption(text) == expected.replace("<person>", "person")
    assert clean_caption(clean_caption(text)) == clean_caption(text)


def test_a_text_of_which_nothing_is_left_counts_as_blank() -> None:
    content = json.dumps({"captions": ["?!", "A Dog."]}).encode()
    assert parse_pair(Members(b"x", content, None, 1), "s").texts == ("?!", "A Dog.")
    assert parse_pair(Members(b"x", content, None, 1), "s", clean=True).texts == ("a dog",)
    with pytest.raises(DataError, match="^s: text is empty"):
        parse_pair(Members(b"x", None, b"...", 1), "s", clean=True)


def test_training_and_measuring_read_the_same_form(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", {"k": {"jpg": jpeg(), "txt": b"A photo, of (dog)!"}, "l": {"jpg": jpeg(), "txt": b"!"}}
    )
    pattern = str(tmp_path / "a.tar")
    made = PairDataset([Corpus("a", pattern)], pair_processor(), bad_samples=BadSamples(), clean=True)
    for item in (made[0, 0], made[0, 1]):
        assert [WORDS[i] for i in item.input_ids] == ["[CLS]", "a", "photo", "of", "dog"]
    plain = PairDataset([Corpus("a", pattern)], pair_processor(), bad_samples=BadSamples())
    assert {len(plain[0, i].input_ids) for i in range(2)} == {2, 9}
    for clean, texts in ((True, [("a photo of dog",)]), (False, [("A photo, of (dog)!",), ("!",)])):
        assert [one.texts for one in read_pairs([pattern], ShardCache(), BadSamples(), clean)] == texts
