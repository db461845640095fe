"""trips.data.remote: patterns, and copies of remote files that are whole or absent, whatever the network does."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from faulty_server import serve
from pair_shards import write_corpus

from trips.data.remote import ShardCache, expand_patterns, is_remote, locate_samples
from trips.data.shards import INDEX_SUFFIX, index_tar, write_index
from trips.errors import ConfigError, DataError, MissingDependencyError


def cache(folder: Path, waits: list[float] | None = None, **options: object) -> ShardCache:
    return ShardCache(folder / "cache", sleep=(waits if waits is not None else []).append, **options)


def copies(store: ShardCache) -> list[str]:
    return sorted(p.name.partition("-")[2] for p in store.folder.iterdir() if p.suffix not in (".lock", ".json"))


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, [1] * 4)
    monkeypatch.chdir(tmp_path)
    names = [f"{i:05d}.tar" for i in range(4)]
    assert expand_patterns("*.tar") == expand_patterns("0000{0..3}.tar") == expand_patterns(names) == names
    assert expand_patterns(["0000{3,1}.tar", Path("00000.tar")]) == [names[3], names[1], names[0]]
    assert expand_patterns("[0-9]*[02].tar") == [names[0], names[2]]
    assert expand_patterns(f"file://{tmp_path}/*.tar") == [str(tmp_path / name) for name in names]
    remote = "http://host/a/{000..002}.tar"
    assert expand_patterns(remote) == [f"http://host/a/00{i}.tar" for i in range(3)]
    assert is_remote(remote) and not is_remote("file:///a") and not is_remote("a/b")
    for bad in ("missing.tar", "x*.tar", ["00000.tar", "no{1..3}.tar"], f"file://{tmp_path}/no.tar"):
        with pytest.raises(DataError, match=r"^corpus: no file matches; found '.*(missing|x\*|no)"):
            expand_patterns(bad, "corpus")
    with pytest.raises(DataError, match="named twice.*00001"):
        expand_patterns(["*.tar", "00001.tar"])
    for bad in ([], "{a.tar"):
        with pytest.raises(ConfigError):
            expand_patterns(bad)
    with pytest.raises(ConfigError, match="protocol is not known"):
        expand_patterns("nosuch://host/*.tar")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match="s3://bucket"):
        expand_patterns("s3://bucket/*.tar")


def test_any_protocol_of_fsspec(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    write_corpus(tmp_path, [2, 3])
    for name in ("00000.tar", "00001.tar"):
        memory.pipe_file(f"/pairs/{name}", (tmp_path / name).read_bytes())
    store = cache(tmp_path)
    urls = expand_patterns("memory://pairs/*.tar")
    assert [url.rsplit("/", 1)[-1] for url in urls] == ["00000.tar", "00001.tar"]
    for url in urls:
        assert store.fetch(url).read_bytes() == (tmp_path / url.rsplit("/", 1)[-1]).read_bytes()
    with pytest.raises(DataError, match=r"no file matches.*pairs/x\*"):
        expand_patterns("memory://pairs/x*.tar")


def test_room_goes_to_the_last_used(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in "abcd":
        memory.pipe_file(f"/room/{name}", name.encode() * 100)
    store = cache(tmp_path, max_bytes=250)
    used = [store.fetch(f"memory://room/{name}") for name in "ab"]
    for age, path in enumerate(used):
        os.utime(path, (1000 + age, 1000 + age))
    stream = store.open("memory://room/b")
    store.fetch("memory://room/a")  # now b is the older one
    os.utime(used[1], (1000, 1000))
    store.fetch("memory://room/c")
    assert copies(store) == ["a", "c"] and stream.read() == b"b" * 100  # whoever has it open reads on
    stream.close()
    memory.pipe_file("/room/large", b"x" * 1000)
    assert store.fetch("memory://room/large").stat().st_size == 1000 and copies(store) == ["large"]


def test_http_faults_are_repeated_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "www", [1] * 30)
    waits: list[float] = []
    with serve(tmp_path / "www", drop_every=4, cut_every=5) as server:
        store = cache(tmp_path, waits)
        for i in range(30):
            path = store.fetch(f"{server.url}/{i:05d}.tar")
            assert path.read_bytes() == (tmp_path / "www" / f"{i:05d}.tar").read_bytes()
        assert server.dropped > 5 and server.cut > 5
        # aiohttp itself repeats a request once whose connection closed before any answer came.
        assert server.cut <= store.retries <= server.dropped + server.cut
        assert store.retries == len(waits) == caplog.text.count("attempt")
        assert copies(store) == [f"{i:05d}.tar" for i in range(30)]
        asked = server.asked.total()
        store.fetch(f"{server.url}/00007.tar")
        assert server.asked.total() == asked  # from the copy
        assert len(expand_patterns(f"{server.url}/*.tar")) == 30


def test_the_limit_of_attempts_and_permanent_errors(tmp_path: Path) -> None:
    write_corpus(tmp_path / "www", [1])
    waits: list[float] = []
    with serve(tmp_path / "www", cut_every=1) as server:
        store, url = cache(tmp_path, waits, max_tries=4, backoff=20), f"{server.url}/00000.tar"
        with pytest.raises(DataError, match="cannot be fetched in 4 attempts") as caught:
            store.fetch(url)
        assert str(caught.value).startswith(url) and "Traceback" not in str(caught.value)
        assert waits == [20, 40, 60] and store.retries == 3 and copies(store) == []
        server.cut_every, server.drop_every = 0, 1
        with pytest.raises(DataError, match="in 4 attempts: ServerDisconnectedError"):
            store.fetch(url)
        server.drop_every = 0
        for status, tries in ((404, 1), (403, 1), (503, 4), (429, 4)):
            server.status, before = status, server.asked.total()
            with pytest.raises(DataError, match="cannot be fetched"):
                store.fetch(url)
            assert server.asked.total() - before == tries
        server.status = 0
        with pytest.raises(DataError, match=r"another size.*expected 77 bytes"):
            store.fetch(url, size=77)
        assert copies(store) == []
        path = store.fetch(url)
        path.write_bytes(b"old")  # a copy of what the server had before
        assert store.fetch(url).read_bytes() == b"old"
        size = (tmp_path / "www" / "00000.tar").stat().st_size
        assert store.fetch(url, size).stat().st_size == size
    with pytest.raises(DataError, match="cannot be fetched in 4 attempts"):  # nobody listens there any more
        store.fetch(f"{server.url}/00001.tar")


def test_the_length_is_checked_for_protocols_that_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/short/a", b"x" * 100)
    lengths = iter([99, 0, 100])

    def get_file(self: object, remote: str, local: str, callback: fsspec.Callback, **_: object) -> None:
        callback.set_size(100)
        Path(local).write_bytes(b"x" * next(lengths))

    monkeypatch.setattr(type(memory), "get_file", get_file)
    store = cache(tmp_path)
    assert store.fetch("memory://short/a").read_bytes() == b"x" * 100 and store.retries == 2


def test_a_full_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tried = cache(tmp_path), []

    def full(*_: object) -> None:
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_transfer", full)
    with pytest.raises(DataError, match="No space left"):
        store.fetch("memory://x/a.tar")
    assert len(tried) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot keep a copy"):
        ShardCache(tmp_path / "file").fetch("memory://x/a.tar")


def _fetch_all(folder: str, urls: list[str]) -> int:
    store = ShardCache(folder, sleep=lambda _: None)
    for url in urls:
        if store.fetch(url).read_bytes()[:5] != b"00000":
            raise AssertionError(url)
    return store.retries


def test_processes_and_threads_fetch_a_shard_once(tmp_path: Path) -> None:
    write_corpus(tmp_path / "www", [1])
    for i in range(1, 8):
        (tmp_path / "www" / f"{i:05d}.tar").write_bytes((tmp_path / "www" / "00000.tar").read_bytes())
    with serve(tmp_path / "www") as server:
        urls = [f"{server.url}/{i:05d}.tar" for i in range(8)]
        folder = str(tmp_path / "cache")
        # Forked after fsspec's thread has run in this process: what a data loader does.
        _fetch_all(folder, urls[:1])
        workers = [
            multiprocessing.get_context("fork").Process(target=_fetch_all, args=(folder, urls)) for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(_fetch_all, [folder] * 3, [urls] * 3)) == [0, 0, 0]
        for worker in workers:
            worker.join(30)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert set(server.asked.values()) == {1} and len(server.asked) == 8


def test_indexes_of_remote_tars(tmp_path: Path) -> None:
    www = tmp_path / "www"
    write_corpus(www, [3, 2, 4])
    indexes = [index_tar(www / f"{i:05d}.tar") for i in range(3)]
    write_index(www / "00000.tar", indexes[0])
    Path(f"{www / '00002.tar'}{INDEX_SUFFIX}").write_text("<html>not found</html>")
    with serve(www) as server:
        urls, store = [f"{server.url}/{i:05d}.tar" for i in range(3)], cache(tmp_path)
        for _ in range(2):
            for url, expected in zip(urls, indexes, strict=True):
                assert locate_samples(url, store).to_json() == expected.to_json()
        tars = {path: times for path, times in server.asked.items() if path.endswith(".tar")}
        assert tars == {"/00001.tar": 1, "/00002.tar": 1}  # the first has a sidecar of use
        store.path(urls[1]).unlink()
        assert locate_samples(urls[1], store).to_json() == indexes[1].to_json()  # outlives the copy
        with pytest.raises(DataError, match=r"00009\.tar.*cannot be fetched"):
            locate_samples(f"{server.url}/00009.tar", store)
    local = www / "00001.tar"
    assert locate_samples(str(local), store, write=True).to_json() == indexes[1].to_json()
    assert Path(f"{local}{INDEX_SUFFIX}").is_file()


def test_options_are_checked() -> None:
    for options in ({"max_bytes": 0}, {"max_tries": 0}, {"backoff": -1.0}, {"max_tries": True}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ShardCache(**options)
