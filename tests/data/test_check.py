"""trips.data.check and the verbs of ``trips data``: counts against tarfile, every bad sample by name, cuts anywhere."""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trips import cli, cli_data
from trips.data.check import MAX_WORDS, check
from trips.data.pack import pack
from trips.data.shards import INDEX_SUFFIX, index_tar, write_index
from trips.errors import ConfigError, DataError


def encoded(size: tuple[int, int] = (12, 9), kind: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes | dict]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(key: str, *captions: object, image: bytes | None = None, **changes: object) -> list[tuple[str, bytes | dict]]:
    meta = {"image_id": key, "captions": list(captions or (f"caption of {key}",))} | changes
    return [(f"{key}.jpg", encoded() if image is None else image), (f"{key}.json", meta)]


def names(found: dict[str, str]) -> set[str]:
    return {name.rsplit(":", 1)[1] for name in found}


# Counts


def test_counts_of_every_layout(tmp_path: Path) -> None:
    files = pair("a", "one", "two", image=encoded((10, 40)))
    files += [("b.PNG", encoded((30, 20), "PNG")), ("b.json", {"caption": None}), ("b.txt", "läuft".encode())]
    files += [("c.webp", encoded((20, 60), "WEBP")), ("c.json", {"caption": "three"}), ("c.txt", b"three")]
    questions = [{"question_id": f"d{i}", "question": "what is it ?", "answer": "cup"} for i in range(3)]
    files += [("d.jpg", encoded((40, 10))), ("d.json", {"questions": questions})]
    exif = Image.Exif()
    exif[0x0112] = 6
    files += [("e.jpg", encoded((70, 50), exif=exif)), ("e.json", {"sentence": "there is a tower"})]
    files += [("__index__.dat", b"x"), ("README", b"x")]
    report = check([write_tar(tmp_path / "a.tar", files)])
    assert report.ok and report.bad == report.damaged == report.suspicious == {}
    assert (report.shards, report.samples, report.texts) == (1, 5, 2 + 1 + 1 + 3 + 1)
    assert report.formats == {"JPEG": 3, "PNG": 1, "WEBP": 1}
    widths, heights = [10, 30, 20, 40, 50], [40, 20, 60, 10, 70]
    for spread, values in ((report.width, widths), (report.height, heights)):
        assert (spread.smallest, spread.median, spread.largest) == (min(values), statistics.median(values), max(values))


def test_real_data_against_tarfile(shared_dir: Path) -> None:
    path = shared_dir / "data" / "flickr8k-mini-val-000.tar"
    with tarfile.open(path) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}
    sizes = [Image.open(io.BytesIO(data)).size for name, data in contents.items() if name.endswith(".jpg")]
    texts = sum(len(json.loads(data)["captions"]) for name, data in contents.items() if name.endswith(".json"))
    report = check(path)
    assert report.ok and report.suspicious == {}
    assert (report.samples, report.texts, report.formats) == (len(sizes), texts, {"JPEG": len(sizes)})
    assert report.width.median == statistics.median(width for width, _ in sizes)
    assert report.height.smallest == min(height for _, height in sizes)


def test_what_pack_writes_passes(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(seed=i)[: None if i else 200])
        (tmp_path / f"{i}.txt").write_text(f"a cup {i}\n\0\na table")
    packed = pack(tmp_path, tmp_path / "out", shard_size=3)
    report = check(packed.shards)
    assert report.ok and report.suspicious == {}
    assert (report.shards, report.samples, report.texts) == (2, 4, 8) == (2, packed.written, packed.captions)


# Findings


def test_bad_samples_are_named(tmp_path: Path) -> None:
    whole = encoded((64, 64))
    question = {"question_id": 1, "question": "what ?", "answer": "cup"}
    cases: dict[str, tuple[list[tuple[str, bytes | dict]], str]] = {
        "cut": (pair("cut", image=whole[: len(whole) // 2]), "truncated"),
        "html": (pair("html", image=b"<html>"), "not a readable image"),
        "none": (pair("none")[1:], "has no image"),
        "two": ([*pair("two"), ("two.png", whole)], "more than one image"),
        "silent": (pair("silent")[:1], "has no text"),
        "broken": ([("broken.jpg", whole), ("broken.json", b"{")], "broken JSON"),
        "deep": ([("deep.jpg", whole), ("deep.json", b"[" * 100_000)], "broken JSON"),
        "list": ([("list.jpg", whole), ("list.json", b"[]")], "no object"),
        "bytes": ([("bytes.jpg", whole), ("bytes.txt", b"\xff")], "not UTF-8"),
        "string": ([("string.jpg", whole), ("string.json", {"captions": "abc"})], "no list"),
        "no_captions": (pair("no_captions", captions=[]), "has no text"),
        "blank": (pair("blank", "  \u200b"), "is empty"),
        "nul captions[1]": (pair("nul", "good", "a\0b"), "NUL"),
        "number captions[0]": (pair("number", 7, "good"), "int"),
        "half": (pair("half", "a \ud800"), "Unicode"),
        "question": ([("question.jpg", whole), ("question.json", {"questions": [{"question": 3}]})], "questions[0]"),
        "again": ([("again.jpg", whole), ("again.json", {"questions": [question, question]})], "question id '1'"),
    }  # fmt: skip
    files = [file for made, _ in cases.values() for file in made] + pair("good")
    files += pair("twice", image_id="t1") + pair("between") + pair("twice", image_id="t2")
    cases["twice"] = ([], "key occurs 2 times")
    path = write_tar(tmp_path / "a.tar", files)
    report = check(path)
    assert not report.ok and report.damaged == report.suspicious == {}
    assert names(report.bad) == set(cases)
    for name, (_, part) in cases.items():
        assert part in report.bad[f"{path}:{name}"], (name, report.bad[f"{path}:{name}"])
    assert report.samples == len(cases) + 3  # good, between, and twice counts twice


def test_suspicious_texts_and_ids_do_not_fail(tmp_path: Path) -> None:
    files = pair("long", "word " * (MAX_WORDS + 1)) + pair("fine", "word " * MAX_WORDS)
    files += (
        pair("bell", "a\x07b", "fine")
        + pair("wrong", "r\ufffdd")
        + pair("emoji", "a family 👨\u200d👩\u200d👧 on grass\n")
    )
    files += [file for i in range(11) for file in pair(f"r{i}", "click here", "click here")]
    files += [file for i in range(10) for file in pair(f"s{i}", "a dog")] + pair("clash", image_id="s0")
    path = write_tar(tmp_path / "a.tar", files)
    other = write_tar(tmp_path / "b" / "a.tar", pair("elsewhere", image_id="s1"))
    report = check([path, other])
    assert report.ok
    expected = {
        f"{path}:long": f"captions[0] has {MAX_WORDS + 1} words",
        f"{path}:bell captions[0]": "captions[0] holds '\\x07', which is not printable",
        f"{path}:wrong": "captions[0] holds a replacement character: decoded in the wrong encoding",
        f"{path}:clash": f"image id 's0' occurs at {path}:s0 already",
        f"{other}:elsewhere": f"image id 's1' occurs at {path}:s1 already",
        "caption 'click here'": "stands at 11 of 28 samples",
    }
    assert report.suspicious == expected


def test_question_ids_are_unique_over_all_tars(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        questions = [{"question_id": "q", "question": "what ?"}, {"question_id": name, "question": "what ?"}]
        paths.append(
            write_tar(
                tmp_path / f"{name}.tar", [(f"{name}.jpg", encoded()), (f"{name}.json", {"questions": questions})]
            )
        )
    report = check(paths)
    assert report.bad == {f"{paths[1]}:b": f"question id 'q' occurs at {paths[0]}:a already"}


# Damage


SAMPLES = [pair(f"k{i}", image=encoded((16, 16), seed=i)) for i in range(4)]
with tempfile.TemporaryDirectory() as _folder:
    WHOLE = write_tar(Path(_folder) / "a.tar", [file for sample in SAMPLES for file in sample]).read_bytes()


def ends() -> list[int]:
    """Byte behind the last data of each sample, from the sizes alone."""
    place, found = 0, []
    for sample in SAMPLES:
        for _, content in sample:
            size = len(json.dumps(content).encode() if isinstance(content, dict) else content)
            last = place + 512 + size
            place = last + -last % 512
        found.append(last)
    return found


@settings(max_examples=60)
@given(st.integers(0, len(WHOLE) - 1))
def test_a_tar_cut_anywhere_gives_the_whole_samples_before(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(WHOLE[:length])
        report = check(path)
    whole = sum(end <= length for end in ends())
    end_mark = ends()[-1] + -ends()[-1] % 512 + 1024
    assert (report.samples, report.bad) == (whole, {})
    assert (str(path) in report.damaged) == (length < end_mark)


def test_files_that_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar" * 1000)
    (tmp_path / "nothing.tar").write_bytes(b"")
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "good.tar", pair("a"))
    report = check(tmp_path / "*.tar")
    assert {Path(name).name for name in report.damaged} == {"text.tar", "nothing.tar", "empty.tar"}
    assert (report.shards, report.samples, report.ok) == (4, 1, False)
    assert check(tmp_path / "empty.tar").width is None


def test_an_index_of_another_tar_is_damage(tmp_path: Path) -> None:
    path, other = write_tar(tmp_path / "a.tar", pair("a")), write_tar(tmp_path / "b.tar", pair("b"))
    assert path.stat().st_size == other.stat().st_size
    sidecar = write_index(path, index_tar(path))
    assert sidecar.name.endswith(INDEX_SUFFIX) and check(path).ok
    write_index(path, index_tar(other))
    assert list(check(path).damaged) == [str(sidecar)]


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    for i in range(4):
        extra = pair("bad", "\0") if i % 2 else pair("same", image_id="0")
        write_tar(tmp_path / f"{i}.tar", pair(f"{i}", "hello") + extra)
    seen: list[tuple[int, int]] = []
    alone = check(tmp_path / "*.tar", progress=lambda done, total: seen.append((done, total)))
    assert check(tmp_path / "*.tar", workers=2) == alone
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and (len(alone.bad), len(alone.suspicious)) == (2, 3)


def test_mistakes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pair("a"))
    with pytest.raises(DataError, match=r"none\*"):
        check(tmp_path / "none*.tar")
    with pytest.raises(ConfigError, match="http://x/a.tar"):
        check([path, "http://x/a.tar"])
    with pytest.raises(ConfigError, match="workers"):
        check(path, workers=-1)


# Command line


def test_pack_then_check_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    rows = ["image,caption,split"]
    for i in range(30):
        Path(f"in/{i}.jpg").write_bytes(encoded((64, 48), seed=i))
        rows.append(f"{i}.jpg,a cup {i},{'test' if i == 29 else 'train' if i % 2 else 'restval'}")
    Path("in/bad[red].jpg").write_bytes(b"x")
    rows.append("bad[red].jpg,a cup,train")
    Path("in/captions.csv").write_text("\n".join(rows))
    assert cli.main(["data", "pack", "in", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "several splits" in err and err.count("\n") == 1
    argv = ["data", "pack", "in", "out", "--splits=train,restval", "--shard_size=20", "--max_side", "32"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert all(words in out for words in ("samples written", "29", "left out", "bad[red].jpg")) and err == ""
    assert cli.main([*argv, "--json"]) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main([*argv, "--json", "--overwrite=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shards"] == ["out/pairs-000000.tar", "out/pairs-000001.tar"] and len(told["rejected"]) == 1

    assert cli.main(["data", "check", "out/*.tar"]) == 0
    assert "24 to 24 px" in capsys.readouterr().out
    assert cli.main(["data", "check", "out/pairs-000000.tar", "out/pairs-000001.tar", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 29 and told["width"] == {"smallest": 32, "median": 32.0, "largest": 32}
    Path("cut.tar").write_bytes(Path("out/pairs-000000.tar").read_bytes()[:5000])
    assert cli.main(["data", "check", "cut.tar"]) == 1
    assert "cut.tar" in capsys.readouterr().out
    assert cli.main(["data", "check", "cut.tar", "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)["damaged"]) == ["cut.tar"]


@pytest.mark.parametrize(
    ("argv", "part"), [(["data"], "pack,check"), (["data", "fly"], "fly"), (["data", "check"], "patterns")]
)
def test_a_mistake_is_one_line(argv: list[str], part: str, capsys) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and part in err and err.count("\n") == 1


def test_help_of_the_verbs(capsys) -> None:
    for verb, words in (("pack", "largest width or height"), ("check", "exit code is 1")):
        assert cli.main(["data", verb, "--help"]) == 0
        assert words in " ".join(capsys.readouterr().out.split())
    assert cli.main(["data", "--help"]) == 0
    assert all(verb in capsys.readouterr().out for verb in list(cli_data.VERBS)[:1])
