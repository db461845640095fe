"""trips.data.records: real DAQUAR against tarfile, answers by property, and every damaged tar and sample."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trips.data.records import BadSamples, Question, normalise_answer, read_vqa_shards
from trips.errors import ConfigError, DataError


def question(name: object, **changes: object) -> dict:
    entry = {"question_id": name, "question": "what is it ?", "answer": "red_bus"} | changes
    return {key: value for key, value in entry.items() if value is not ...}


def annotation(*questions: object, **changes: object) -> bytes:
    return json.dumps({"image_id": "img", "questions": list(questions)} | changes).encode()


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, *questions: object) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", b"\xff\xd8" + key.encode() * 700),
        (f"{key}.json", annotation(*(questions or [question(key)]))),
    ]


# Answers


@given(st.lists(st.from_regex(r"[a-z0-9]{1,4}([_ ][a-z]{1,4})?", fullmatch=True), min_size=1, max_size=6), st.randoms())
def test_a_set_is_equal_in_any_order_spelling_and_only_as_a_whole(members: list[str], rng: random.Random) -> None:
    plain = [" ".join(member.replace("_", " ").split()) for member in members]
    canonical = normalise_answer(", ".join(members))
    assert set(canonical.split(", ")) == set(plain) and canonical == ", ".join(sorted(set(plain)))
    assert normalise_answer(canonical) == canonical
    shuffled = rng.sample(members, len(members))
    assert normalise_answer(" ,  ".join(m.upper().replace(" ", "_") for m in shuffled)) == canonical
    if len(set(plain)) > 1:
        assert normalise_answer(", ".join(m for m in members if m.replace("_", " ") != plain[0])) != canonical


def test_normalise_answer_by_example() -> None:
    cases = {
        "garbage_bin": "garbage bin",
        "red, black": "black, red",
        "Book,tape_Dispenser , book": "book, tape dispenser",
        "1,000": "1,000",
        "2, 1": "1, 2",
        " , ": "",
    }
    assert {answer: normalise_answer(answer) for answer in cases} == cases


# Reading


def test_daquar_equals_plain_tarfile(daquar_tars: dict[str, list[Path]]) -> None:
    pytest.importorskip("webdataset")
    for split, images, questions in [("train", 794, 6795), ("test", 490, 4237)]:
        expected = {}
        for path in daquar_tars[split]:
            with tarfile.open(path) as tar:
                content = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
            for name, data in content.items():
                if name.endswith(".json"):
                    expected[f"{path.name}:{name[:-5]}"] = (content[name[:-5] + ".jpg"], json.loads(data)["questions"])
        bad = BadSamples(limit=0)
        records = list(read_vqa_shards(daquar_tars[split], bad))
        assert [record.source for record in records] == list(expected)  # the order of the files
        for record in records:
            image, entries = expected[record.source]
            assert record.image.read_bytes() == image and record.source.endswith(record.image_id)
            assert record.questions == tuple(
                Question(e["question_id"], e["question"], (e["answer"],), (1.0,), (e["answer"],)) for e in entries
            )
        assert len(records) == images == bad.num_seen and not len(bad)
        assert sum(len(record.questions) for record in records) == questions


def test_answers_of_several_people_become_shares(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    people = ["red"] * 6 + ["dark red"] * 3 + ["blue"]
    path = write_tar(tmp_path / "a.tar", sample("x", question(7, answer=..., answers=people)))
    [record] = read_vqa_shards([str(path)])
    [parsed] = record.questions
    assert parsed == Question("7", "what is it ?", ("red", "dark red", "blue"), (0.6, 0.3, 0.1), tuple(people))
    assert record.source == "a.tar:x" and b"\xff\xd8" not in repr(record).encode()


def test_folders_and_upper_case_suffixes_are_read(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files = [("train/a.PNG", b"image"), ("train/a.json", annotation(question("a")))]
    path = write_tar(tmp_path / "a {0..1}.tar", files)  # braces are not expanded
    [record] = read_vqa_shards([path])
    assert (record.image.read_bytes(), record.source) == (b"image", f"{path.name}:train/a")


# Damage


GOOD = question("q")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("k.json", annotation(GOOD))], "s.tar:k: needs exactly one image; found 0"),
        ([("k.jpg", b"x"), ("k.png", b"y"), ("k.json", annotation(GOOD))], "s.tar:k: needs exactly one image; found 2"),
        ([("k.jpg", b"x")], "s.tar:k: annotation is missing"),
        ([("k.jpg", b"x"), ("k.json", b'{"questions": [')], "s.tar:k: broken JSON"),
        ([("k.jpg", b"x"), ("k.json", b"\xff\xfe\x00")], "s.tar:k: broken JSON"),
        ([("k.jpg", b"x"), ("k.json", b"[1]")], "s.tar:k: not a JSON object; found 'list'"),
        ([("k.jpg", b"x"), ("k.json", b"{}")], 's.tar:k: key "questions" is missing'),
        (sample("k")[:1] + [("k.json", annotation())], "s.tar:k: has no questions"),
        (sample("k", "what ?"), r"s.tar:k questions\[0\]: not a JSON object; found 'str'"),
        (sample("k", GOOD, question(..., question_id=...)), r'questions\[1\]: key "question_id" is missing'),
        (sample("k", question("q", question=...)), r'questions\[0\]: key "question" is missing'),
        (sample("k", question("q", question=3)), r'key "question" has the wrong type; found 3; expected str'),
        (sample("k", question("q", question=" \n\x00")), r"questions\[0\]: question is blank"),
        (sample("k", question("q", answer=...)), r'questions\[0\]: key "answer" is missing'),
        (sample("k", question("q", answer=2)), r'key "answer" has the wrong type; found 2'),
        (sample("k", question("q", answer="_")), "answer is not text; found '_'"),
        (sample("k", question("q", answers=[])), "has no answers"),
        (sample("k", question("q", answers=["red", None])), "answer is not text"),
        (sample("k", GOOD, GOOD), "s.tar:k: question id occurs twice; found 'q'"),
        (sample("j", GOOD) + sample("k", GOOD), "s.tar:k: question id occurs twice; found 'q'"),
    ],
)
def test_bad_samples_raise_or_are_counted_and_skipped(tmp_path: Path, files: list, message: str) -> None:
    pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "s.tar", sample("before") + files + sample("later"))
    with pytest.raises(DataError, match=message):
        list(read_vqa_shards([path]))
    bad = BadSamples(limit=1)
    sources = [record.source for record in read_vqa_shards([path], bad)]
    assert [source for source in sources if source != "s.tar:j"] == ["s.tar:before", "s.tar:later"]
    assert list(bad.errors) == ["s.tar:k"] and bad.num_seen == len(sources) + 1
    with pytest.raises(DataError, match="too many bad samples"):
        list(read_vqa_shards([path], BadSamples(limit=0)))


def test_damaged_tars_are_named_before_the_first_record(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    good = write_tar(tmp_path / "good.tar", sample("a") + sample("b"))
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:1000])
    with tarfile.open(good) as tar:  # cut between two members: tarfile alone would not notice
        (tmp_path / "between.tar").write_bytes(good.read_bytes()[: tar.getmember("b.jpg").offset])
    (tmp_path / "text.tar").write_bytes(b"this is no tar " * 100)
    write_tar(tmp_path / "packed.tar", sample("a"), "w:gz")
    for name, message in [
        ("text.tar", "text.tar: not a whole, plain tar file"),
        ("packed.tar", "packed.tar: not a whole, plain tar file.*unpack"),
        ("none.tar", "none.tar: tar file does not exist"),
        ("", "is not a file"),
        ("empty.tar", "empty.tar: tar file is empty"),
        ("cut.tar", "cut.tar: not a whole, plain tar file"),
        ("between.tar", "between.tar: tar file is truncated"),
    ]:
        with pytest.raises(DataError, match=message):
            read_vqa_shards([good, tmp_path / name], BadSamples(limit=1.0))
    with pytest.raises(DataError, match="no tar files given"):
        read_vqa_shards([])
    with pytest.raises(ConfigError, match="put a single file in a list"):
        read_vqa_shards(good)


def test_tars_damaged_inside_are_named(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    doubled = write_tar(tmp_path / "doubled.tar", [("k.jpg", b"x"), ("k.jpg", b"x")])
    whole = bytearray(write_tar(tmp_path / "whole.tar", sample("a") + sample("b")).read_bytes())
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = {member.name: member for member in tar}
    # The end mark is there, but the bytes before it end in the middle of an image.
    (tmp_path / "hole.tar").write_bytes(whole[: members["b.jpg"].offset_data + 100] + bytes(1024))
    garbled = whole.copy()
    garbled[members["a.json"].offset : members["a.json"].offset + 512] = b"?" * 512
    (tmp_path / "garbled.tar").write_bytes(garbled)
    for path, message in [
        (doubled, "tar file cannot be read.*duplicate"),
        (tmp_path / "hole.tar", "tar file is truncated or damaged behind byte"),
        (tmp_path / "garbled.tar", "tar file is truncated or damaged behind byte"),
    ]:
        with pytest.raises(DataError, match=f"{path.name}: {message}"):
            list(read_vqa_shards([path], BadSamples(limit=1.0)))


# Counting


def test_bad_samples_counts_each_once_and_names_the_first() -> None:
    bad = BadSamples(limit=3)
    for source in ("a", "b", "a", "c"):
        with bad.guard(source):
            raise DataError("broken", item=source)
    with bad.guard("good"):
        pass
    bad.record("a", "again")
    assert (len(bad), bad.num_seen, bad.errors["a"]) == (3, 4, "a: broken")
    assert bad.summary(num_named=2) == "3 bad of 4 samples: a: broken; b: broken; and 1 more"
    with pytest.raises(
        DataError, match="too many bad samples .limit 3.*a: broken; b: broken; .*and 1 more.*data.max_bad_share"
    ):
        bad.record("d", "broken")
    assert BadSamples().summary() == "0 bad of 0 samples"


def test_other_errors_pass_the_guard() -> None:
    bad = BadSamples()
    with pytest.raises(KeyError), bad.guard("a"):
        raise KeyError("a mistake of ours, not of the data")
    assert not len(bad)


@given(share=st.floats(0, 1), minimum=st.integers(0, 5), good=st.integers(0, 300), wrong=st.integers(0, 60))
def test_a_share_stops_exactly_past_its_limit(share: float, minimum: int, good: int, wrong: int) -> None:
    bad = BadSamples(limit=share, minimum=minimum)
    for i in range(good):
        bad.saw(f"good {i}")
    stopped_at = None
    for i in range(1, wrong + 1):
        try:
            bad.record(f"bad {i}", "broken")
        except DataError:
            stopped_at = i
            break
    over = [i for i in range(1, wrong + 1) if i > minimum and i > share * (good + i)]
    assert stopped_at == (over[0] if over else None)


@pytest.mark.parametrize("options", [{"limit": -1}, {"limit": 1.5}, {"limit": True}, {"limit": "3"}, {"minimum": -1}])
def test_bad_limits_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="limit|minimum"):
        BadSamples(**options)
