"""trips.data.shards: places in the tar against tarfile's own extraction; sidecars; every kind of damage."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_shards import sample, write_corpus, write_tar

from trips.data.shards import INDEX_SUFFIX, Members, Shard, ShardIndex, index_tar, load_index, read_index, write_index
from trips.errors import DataError


def read_all(path: Path, index: ShardIndex | None = None) -> dict[str, Members]:
    shard = Shard(str(path), index_tar(path) if index is None else index)
    with path.open("rb") as stream:
        return {shard.index.key(i): shard.read(i, stream) for i in range(len(shard))}


def extract_all(path: Path) -> dict[str, dict[str, bytes]]:
    """The same by tarfile: key and suffix to content."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isreg():
                folder, _, name = member.name.rpartition("/")
                base, _, suffix = name.partition(".")
                found.setdefault(f"{folder}/{base}" if folder else base, {})[suffix] = tar.extractfile(member).read()
    return found


def same(a: ShardIndex, b: ShardIndex) -> bool:
    return a.to_json() == b.to_json() and np.array_equal(a.keys, b.keys) and a.members.dtype == b.members.dtype


@pytest.mark.parametrize("name", ["flickr8k-mini-val-000", "daquar-train-000"])
def test_real_tars_equal_what_tarfile_extracts(shared_dir: Path, name: str) -> None:
    path = shared_dir / "data" / f"{name}.tar"
    expected, found = extract_all(path), read_all(path)
    assert found.keys() == expected.keys() and len(found) > 40 and index_tar(path).damage is None
    for key, members in found.items():
        assert (members.image, members.json, members.txt) == (expected[key]["jpg"], expected[key]["json"], None)
        assert members.num_images == 1


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind(tmp_path: Path, style: int) -> None:
    names = [
        "./a/b.c/one.JPG", "./a/b.c/one.txt", "./a/b.c/one.cls", "._one.jpg", "plain", "ümläut.png",
        f"{'long/' * 30}{'k' * 120}.txt", "two.jpg", "two.png", "two.json", "seg.seg.jpg", "one.txt",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as tar:
        for i, name in enumerate(names):
            (tmp_path / "x").write_bytes(bytes([i]) * (i * 100))
            tar.add(tmp_path / "x", name)
        tar.add(tmp_path, "folder.jpg", recursive=False)
    found = read_all(tmp_path / "a.tar")
    assert list(found) == ["./a/b.c/one", "ümläut", f"{'long/' * 30}{'k' * 120}", "two", "one"]
    assert found["./a/b.c/one"] == Members(b"", None, bytes([1]) * 100, 1)
    assert found["two"] == Members(None, bytes([9]) * 900, None, 2)
    assert found["one"].txt == bytes([11]) * 1100 and found["ümläut"].image == bytes([5]) * 500


def test_sidecar_round_trip_staleness_and_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path, [3])
    path = tmp_path / "00000.tar"
    sidecar = Path(f"{path}{INDEX_SUFFIX}")
    assert read_index(path) is None and same(load_index(path), index_tar(path)) and not sidecar.exists()
    index = load_index(path, write=True)
    assert same(read_index(path), index) and [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    # Proof that the sidecar is what is read: one that tells another, still possible story.
    told = json.loads(sidecar.read_text()) | {"keys": ["x", "y", "z"]}
    sidecar.write_text(json.dumps(told))
    assert [load_index(path).key(i) for i in range(3)] == ["x", "y", "z"]
    write_tar(path, {f"{i}": sample(i) for i in range(9)})
    assert len(load_index(path)) == 9 and "stale" in caplog.text
    assert len(load_index(path, write=True)) == 9 and len(read_index(path)) == 9
    for broken in ("{", "[]", "{}", '{"format": "trips-tar-index", "version": 2}', "\0"):
        sidecar.write_text(broken)
        assert read_index(path) is None and len(load_index(path)) == 9
    outside = json.loads(index_tar(path).to_json())
    outside["members"][0][0] = outside["size"]
    with pytest.raises(DataError, match="outside"):
        ShardIndex.from_json(json.dumps(outside), "x.json")
    with pytest.raises(DataError, match=r"^x\.json.*not an index"):
        ShardIndex.from_json(json.dumps(outside | {"members": [[1, 2]]}), "x.json")


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, [2])

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("trips.data.shards.write_index", refuse)
    assert len(load_index(tmp_path / "00000.tar", write=True)) == 2


@given(data=st.data())
def test_whatever_the_cut_the_samples_before_it_are_there(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write_corpus(folder, [4])
    path = folder / "00000.tar"
    whole, content = read_all(path), path.read_bytes()
    last = index_tar(path).members[:, 1].sum(axis=1)  # where the json of each sample, its last member, ends
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    index = index_tar(path)
    found = read_all(path, index)
    assert list(found.items()) == list(whole.items())[: int((last <= cut).sum())]
    mark = int(last[-1]) + -int(last[-1]) % 512 + 1024
    assert (index.damage is None) == (cut >= mark)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, [5])
    path = tmp_path / "00000.tar"
    content, place = bytearray(path.read_bytes()), int(index_tar(path).members[3, 0, 0]) - 512
    content[place : place + 100] = b"\xff" * 100  # the header of the fourth picture
    path.write_bytes(content)
    index = index_tar(path)
    assert len(index) == 3 and f"of {len(content)}" in index.damage and len(read_all(path, index)) == 3
    assert same(ShardIndex.from_json(index.to_json(), "x"), index)


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    write_corpus(tmp_path, [2])
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes() * 50))
    (tmp_path / "b.tar").write_bytes(b"<html>" * 200)
    for name, reason in (("a.tar", "not a plain tar"), ("b.tar", "not a plain tar"), ("c.tar", "does not exist")):
        with pytest.raises(DataError, match=reason) as caught:
            index_tar(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(DataError, match="folder"):
        index_tar(tmp_path)
    (tmp_path / "d.tar").write_bytes(b"")
    assert len(index_tar(tmp_path / "d.tar")) == 0 and "0 bytes" in index_tar(tmp_path / "d.tar").damage
    with tarfile.open(tmp_path / "e.tar", "w"):
        pass
    assert len(index_tar(tmp_path / "e.tar")) == 0 and index_tar(tmp_path / "e.tar").damage is None


def test_a_tar_that_shrank_after_indexing_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, [2])
    path = tmp_path / "00000.tar"
    index = index_tar(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"shorter than when it was indexed.*00000\.tar:0000"):
        read_all(path, index)


def test_write_index_leaves_nothing_half(tmp_path: Path) -> None:
    write_corpus(tmp_path, [1])
    with pytest.raises(OSError):
        write_index(tmp_path / "missing" / "a.tar", index_tar(tmp_path / "00000.tar"))
