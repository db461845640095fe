"""trips.data.pack and listings: every layout against the same samples, every bad row by name, equal bytes."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trips.data.listings import read_listing, text_problem
from trips.data.pack import pack
from trips.data.remote import ShardCache, locate_samples
from trips.data.shards import index_tar
from trips.errors import ConfigError, DataError
from trips.images import load_image

CAPTIONS = {"a.jpg": ["a cup , on a table", 'a "red" cup'], "sub/b.jpg": ["ein Hund läuft"], "c.png": ["a bus"]}


def save(path: Path, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(
        0, 255, (size[1] // 2 + 1, size[0] // 2 + 1, 3), np.uint8
    )
    Image.fromarray(noise).resize(size).save(path, **options)
    return path.read_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in CAPTIONS:
        save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def samples(shards: tuple[str, ...]) -> dict[str, dict[str, bytes]]:
    """Key to suffix to bytes, by tarfile alone."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


# Every layout of the same three images, sub/b.jpg twice where a layout has one caption per row.

ROWS = [(name, caption) for name, captions in CAPTIONS.items() for caption in captions]


def write_table(path: Path, delimiter: str, header: tuple[str, str] = ("image", "caption")) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *ROWS])


def write_albef(folder: Path) -> None:
    rows = [{"image": name, "caption": texts if len(texts) > 1 else texts[0]} for name, texts in CAPTIONS.items()]
    (folder / "list.json").write_text(json.dumps(rows))


def write_karpathy(folder: Path) -> None:
    images = [
        {
            "filepath": os.path.dirname(name),
            "filename": os.path.basename(name),
            "sentences": [{"raw": t} for t in texts],
        }
        for name, texts in CAPTIONS.items()
    ]
    (folder / "list.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def write_coco(folder: Path) -> None:
    names = list(CAPTIONS)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    notes = [{"id": 70 + i, "image_id": names.index(name), "caption": text} for i, (name, text) in enumerate(ROWS)]
    (folder / "list.json").write_text(json.dumps({"images": images, "annotations": notes}))


def write_lines(folder: Path, name: str = "list.jsonl") -> None:
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in ROWS]
    (folder / name).write_text("\n".join([*rows[:2], "", *rows[2:]]), encoding="utf-8-sig")


def write_flickr(folder: Path, name: str = "list.txt") -> None:
    (folder / name).write_text("".join(f"{name}#{i}\t{text}\r\n" for i, (name, text) in enumerate(ROWS)), newline="")


def write_beside(folder: Path) -> None:
    for name, texts in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")


LAYOUTS = {
    "albef": (write_albef, "list.json"),
    "karpathy": (write_karpathy, "list.json"),
    "coco": (write_coco, "list.json"),
    "lines": (write_lines, "list.jsonl"),
    "csv": (lambda folder: write_table(folder / "list.csv", ","), "list.csv"),
    "tsv": (lambda folder: write_table(folder / "list.tsv", "\t", ("filename", "title")), "list.tsv"),
    "flickr": (write_flickr, "list.txt"),
    "flickr8k": (lambda folder: write_table(folder / "captions.txt", ","), ""),
    "imagefolder": (lambda folder: write_lines(folder, "metadata.jsonl"), ""),
    "beside": (write_beside, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(layout: str, photos: Path, tmp_path: Path) -> None:
    write, name = LAYOUTS[layout]
    write(photos)
    report = pack(photos / name, tmp_path / "out", shard_size=2)
    assert (report.written, report.captions, report.rejected) == (3, 4, {})
    assert [Path(shard).name for shard in report.shards] == ["pairs-000000.tar", "pairs-000001.tar"]
    names = ["pairs-000000.tar", "pairs-000000.tar.index.json", "pairs-000001.tar", "pairs-000001.tar.index.json"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    found = samples(report.shards)
    by_image = {
        bytes_: json.loads(sample["json"])
        for sample in found.values()
        for suffix, bytes_ in sample.items()
        if suffix != "json"
    }
    assert len(by_image) == 3 and all(set(sample) - {"json"} < {"jpg", "png"} for sample in found.values())
    for name, captions in CAPTIONS.items():
        meta = by_image[(photos / name).read_bytes()]  # copied byte for byte
        assert meta["captions"] == captions and (meta["width"], meta["height"]) == (40, 30)
        if layout != "coco":
            assert meta["image_id"] == os.path.splitext(name)[0]


def test_shards_are_sound_for_other_readers(photos: Path, tmp_path: Path) -> None:
    write_albef(photos)
    for i in range(3):
        save(photos / f"{'long' * 40}.{i}.jpg")
    names = [f"{'long' * 40}.{i}.jpg" for i in range(3)]
    rows = json.loads((photos / "list.json").read_text()) + [{"image": name, "caption": "x"} for name in names]
    (photos / "list.json").write_text(json.dumps(rows))
    report = pack(photos / "list.json", tmp_path / "out")
    with tarfile.open(report.shards[0]) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["a.jpg", "a.json"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.type) == (0, 0, 0, "", tarfile.REGTYPE)
        assert "/" not in member.name and len(member.name) < 100 and not member.pax_headers
    assert len(samples(report.shards)) == 6  # cut names stay apart
    webdataset = pytest.importorskip("webdataset")
    keys = [sample["__key__"] for sample in webdataset.WebDataset(report.shards[0], shardshuffle=False)]
    assert keys == list(samples(report.shards))


def test_shards_from_a_url_are_indexed_without_being_fetched(photos: Path, tmp_path: Path) -> None:
    write_albef(photos)
    report = pack(photos / "list.json", tmp_path / "out", shard_size=2)
    with serve(tmp_path / "out") as server:
        store = ShardCache(tmp_path / "cache")
        for shard in report.shards:
            index = locate_samples(f"{server.url}/{Path(shard).name}", store)
            assert index.to_json() == index_tar(shard).to_json() and index.damage is None
        assert {path for path in server.asked if path.endswith(".tar")} == set()


# Sizes and formats


@settings(max_examples=20)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 100), st.sampled_from(["jpg", "png", "bmp"]))
def test_reduced_only_where_too_large(width: int, height: int, max_side: int, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = save(folder / f"a.{suffix}", (width, height))
        (folder / "a.txt").write_text("a cup")
        (sample,) = samples(pack(folder, folder / "out", max_side=max_side).shards).values()
    meta = json.loads(sample.pop("json"))
    ((written_suffix, written),) = sample.items()
    size = load_image(written).size
    assert size == (meta["width"], meta["height"])
    if max(width, height) <= max_side:
        assert size == (width, height) and (written == data) == (suffix != "bmp")
    else:
        factor = max_side / max(width, height)
        assert max(size) == max_side and written_suffix == "jpg"
        assert abs(size[0] - width * factor) <= 1 and abs(size[1] - height * factor) <= 1


def test_rotated_photos_count_as_they_are_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "in" / "a.jpg", (40, 20), exif=exif)
    (tmp_path / "in" / "a.txt").write_text("a cup")
    for max_side, expected in ((None, (20, 40)), (10, (5, 10))):
        (sample,) = samples(pack(tmp_path / "in", tmp_path / f"{max_side}", max_side=max_side).shards).values()
        meta = json.loads(sample["json"])
        assert (meta["width"], meta["height"]) == expected == load_image(sample["jpg"]).size


def test_quality_is_that_of_pillow(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.bmp")
    (tmp_path / "in" / "a.txt").write_text("a cup")
    (sample,) = samples(pack(tmp_path / "in", tmp_path / "out", quality=30).shards).values()
    buffer = io.BytesIO()
    Image.open(tmp_path / "in" / "a.bmp").convert("RGB").save(buffer, "JPEG", quality=30)
    assert sample["jpg"] == buffer.getvalue()


# What is bad is named, and the rest is written


def test_bad_rows_and_images_are_rejected_with_a_reason(photos: Path, tmp_path: Path) -> None:
    whole = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("no image")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "dir.jpg").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    Image.new("RGB", (65_600, 1)).save(photos / "wide.bmp")
    save(photos / "a.png")
    (tmp_path / "secret.jpg").write_bytes(whole)
    rows = [
        ({"image": "a.jpg", "caption": " a cup "}, None),
        ({"image": "cut.jpg", "caption": "x"}, "cut.jpg"),
        ({"image": "text.jpg", "caption": "x"}, "not a readable image"),
        ({"image": "empty.jpg", "caption": "x"}, "empty"),
        ({"image": "dir.jpg", "caption": "x"}, "not a file"),
        ({"image": "pipe.jpg", "caption": "x"}, "not a file"),
        ({"image": "wide.bmp", "caption": "x"}, "does not fit into a JPEG"),
        ({"image": "none.jpg", "caption": "x"}, "does not exist"),
        ({"image": "../secret.jpg", "caption": "x"}, "leads out"),
        ({"image": str(tmp_path / "secret.jpg"), "caption": "x"}, "leads out"),
        ({"image": str(photos / "c.png"), "caption": "an absolute path inside"}, None),
        ({"image": "sub/../sub/b.jpg", "caption": "  "}, "is empty"),
        ({"image": "sub/b.jpg", "caption": "nul\0"}, "NUL"),
        ({"image": "sub/b.jpg", "caption": "\u200b\n"}, "is empty"),
        ({"image": "sub/b.jpg", "caption": "\ud800 half"}, "not valid Unicode"),
        ({"image": "sub/b.jpg", "caption": 7}, "int"),
        ({"image": "sub/b.jpg", "caption": []}, "no caption"),
        ({"image": "sub/b.jpg"}, "no caption"),
        ({"image": "nul\0.jpg", "caption": "x"}, "NUL"),
        ({"image": ["a.jpg"], "caption": "x"}, "names no image"),
        ({"caption": "x"}, "names no image"),
        ({"image": "other.jpg", "caption": "x", "image_id": "a"}, "belongs to 'a.jpg'"),
        ({"image": "other.jpg", "caption": "x", "image_id": 1.5}, "image id"),
        ({"image": "a.png", "caption": "x", "image_id": "a2"}, "has the key of a.jpg"),
        ("a string", "no object"),
    ]
    (photos / "list.jsonl").write_text("\n".join([json.dumps(row) for row, _ in rows] + ["{broken"]))
    report = pack(photos / "list.jsonl", tmp_path / "out")
    bad = {f"list.jsonl line {i}": part for i, (_, part) in enumerate(rows, 1) if part is not None}
    bad[f"list.jsonl line {len(rows) + 1}"] = "broken JSON"
    assert set(report.rejected) == set(bad)
    for place, part in bad.items():
        assert part in report.rejected[place], (place, report.rejected[place])
    written = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in written} == report.rejected
    kept = [json.loads(sample["json"])["captions"] for sample in samples(report.shards).values()]
    assert kept == [["a cup"], ["an absolute path inside"]] and report.written == 2


def test_one_bad_caption_does_not_cost_the_image(photos: Path, tmp_path: Path) -> None:
    (photos / "list.json").write_text(json.dumps([{"image": "a.jpg", "caption": ["one", "", "two", None]}]))
    report = pack(photos / "list.json", tmp_path / "out")
    assert set(report.rejected) == {"list.json [0] captions[1]", "list.json [0] captions[3]"}
    (sample,) = samples(report.shards).values()
    assert json.loads(sample["json"])["captions"] == ["one", "two"]


def test_folder_without_list(photos: Path, tmp_path: Path) -> None:
    write_beside(photos)
    save(photos / "c.webp")
    save(photos / "lonely.JPG")
    (photos / "no_image.txt").write_text("x")
    (photos / "sub" / "b.txt").write_bytes(b"\xff\xfe\xff")
    report = pack(photos, tmp_path / "out")
    expected = {
        "c.webp": "second image",
        "lonely.JPG": "no text",
        "no_image.txt": "no image",
        "sub/b.jpg": "text cannot",
    }
    assert set(report.rejected) == set(expected)
    assert all(part in report.rejected[name] for name, part in expected.items())


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.csv", None, ["none.csv", "does not exist"]),
        ("list.json", "{", ["list.json", "cannot be read"]),
        ("list.json", '{"a": 1}', ["list.json", "no list of images"]),
        ("list.json", "[" * 100_000, ["list.json", "cannot be read"]),
        ("list.csv", "picture,words\na.jpg,x\n", ["list.csv", "header", "picture"]),
        ("list.csv", "", ["list.csv", "is empty"]),
        ("list.csv", 'image,caption\na.jpg,"x\n', ["list.csv", "cannot be read behind line 1"]),
        ("list.csv", "image,caption\na.jpg,a cup, red\n", ["no image can be used", "line 2", "more cells"]),
        ("list.csv", b"image,caption\na.jpg,\xff\n", ["list.csv", "utf-8", "save it as UTF-8"]),
        ("list.json", "[]", ["no image can be used", "empty list"]),
        ("list.xml", "<a/>", ["list.xml", "unknown kind"]),
    ],
)
def test_a_list_that_is_no_list(name: str, content: str | bytes | None, parts: list[str], photos: Path) -> None:
    if content is not None:
        (photos / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((DataError, ConfigError)) as caught:
        pack(photos / name, photos.parent / "out")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert sorted(os.listdir(photos.parent)) == ["photos"]  # nothing is left behind


def test_two_lists_in_a_folder_are_not_guessed_between(photos: Path, tmp_path: Path) -> None:
    write_lines(photos, "metadata.jsonl")
    write_table(photos / "captions.csv", ",")
    with pytest.raises(DataError, match="several lists"):
        pack(photos, tmp_path / "out")


def test_splits_are_never_mixed_by_accident(photos: Path, tmp_path: Path) -> None:
    parts = dict(zip(CAPTIONS, ("train", "test", "restval")))
    rows = [{"filename": name, "split": part, "sentences": [{"raw": "x"}]} for name, part in parts.items()]
    (photos / "list.json").write_text(json.dumps({"images": rows}))
    with pytest.raises(DataError, match=r"several splits.*restval \(1\), test \(1\), train \(1\)"):
        pack(photos / "list.json", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"list\.json#val: is not in the list"):
        pack(photos / "list.json", tmp_path / "out", splits=["val"])
    entries, rejected = read_listing(photos / "list.json", splits=["train", "restval"])
    assert [entry.image for entry in entries] == ["a.jpg", "c.png"] and rejected == {}


def test_images_may_stand_elsewhere(photos: Path, tmp_path: Path) -> None:
    write_albef(photos)
    (photos / "list.json").rename(tmp_path / "list.json")
    assert pack(tmp_path / "list.json", tmp_path / "out", images=photos).written == 3
    with pytest.raises(DataError, match="no image can be used"):
        pack(tmp_path / "list.json", tmp_path / "out2")
    with pytest.raises(DataError, match="not a folder"):
        pack(tmp_path / "list.json", tmp_path / "out2", images=tmp_path / "none")


# Bytes, and what is on disk


def test_bytes_depend_on_the_data_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for i in range(40):
        save(folder / f"{i:02d}.{('jpg', 'bmp')[i % 2]}", (60 + i, 50))
        (folder / f"{i:02d}.txt").write_text(f"caption {i}" if i % 7 else "\0")
    (folder / "11.bmp").write_bytes(b"BM broken")
    results = {}
    for workers in (0, 2):
        seen: list[tuple[int, int]] = []
        report = pack(
            folder, tmp_path / f"out{workers}", shard_size=7, max_side=64, workers=workers,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )  # fmt: skip
        files = {path.name: path.read_bytes() for path in (tmp_path / f"out{workers}").iterdir()}
        results[workers] = (files, list(report.rejected.items()), report.written)
        assert seen == [(i, 34) for i in range(1, 35)]
        os.utime(folder / "00.jpg", (1, 1))
    assert results[0] == results[2] and results[0][2] == 33
    sizes = [len(samples((str(tmp_path / "out0" / name),))) for name in sorted(results[0][0]) if name.endswith("tar")]
    assert sizes == [7, 7, 7, 7, 5]


def test_overwriting_is_asked_for_and_leaves_foreign_files(photos: Path, tmp_path: Path) -> None:
    write_albef(photos)
    out = tmp_path / "out"
    pack(photos / "list.json", out, shard_size=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        pack(photos / "list.json", out)
    (photos / "bad.json").write_text("[]")
    with pytest.raises(DataError):
        pack(photos / "bad.json", out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before  # a failure costs nothing
    pack(photos / "list.json", out, overwrite=True)
    assert sorted(os.listdir(out)) == ["pairs-000000.tar", "pairs-000000.tar.index.json"]
    with pytest.raises(ConfigError, match="other files"):
        pack(photos / "list.json", photos, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        pack(photos / "list.json", photos / "a.jpg", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "photos"]
    (tmp_path / "empty").mkdir()
    assert pack(photos / "list.json", tmp_path / "empty").written == 3


def test_what_appears_meanwhile_is_not_overwritten(photos: Path, tmp_path: Path) -> None:
    write_albef(photos)

    def meanwhile(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "pairs-000000.tar").write_text("of another run")

    with pytest.raises(ConfigError, match="exists already"):
        pack(photos / "list.json", tmp_path / "out", progress=meanwhile)
    assert (tmp_path / "out" / "pairs-000000.tar").read_text() == "of another run"


def test_interrupted_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    write_albef(photos)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(photos / "list.json", tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    "options", [{"shard_size": 0}, {"max_side": 0}, {"quality": 96}, {"workers": -1}, {"shard_size": True}]
)
def test_numbers_out_of_range(options: dict, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        pack(photos, tmp_path / "out", **options)


@given(st.text(max_size=8))
def test_text_problem_against_its_meaning(text: str) -> None:
    visible = [char for char in text if char.isprintable() and not char.isspace()]
    assert (text_problem(text) is None) == (bool(visible) and "\0" not in text)


def test_real_photos(shared_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with (
        tarfile.open(shared_dir / "data" / "flickr8k-mini-val-000.tar") as tar,
        (folder / "captions.txt").open("w") as f,
    ):
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".jpg"):
                (folder / member.name).write_bytes(data)
            else:
                f.writelines(f"{member.name[:-5]}.jpg#{i}\t{c}\n" for i, c in enumerate(json.loads(data)["captions"]))
    report = pack(folder, tmp_path / "out", shard_size=20)
    assert (report.written, report.captions, len(report.shards), report.rejected) == (50, 250, 3, {})
