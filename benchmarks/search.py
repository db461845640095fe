"""Image search: indexing, refreshing and asking, what reranking with text guidance is worth, and 100,000 vectors.

    python benchmarks/search.py MODEL TAR [TAR ...] --out benchmarks/results/search.json
    python benchmarks/search.py MODEL TAR --quick         # fewer photos, captions and vectors, to see that it runs

The photos of WebDataset tars (``KEY.jpg`` with captions in ``KEY.json``) are unpacked into a folder and indexed; then a
photo is added and another deleted. Captions ask for the photo they were written for: R@1, 5 and 10 by the features
alone and after matching, which is the second stage of section 5.1.3. Times are of the wall clock on this machine.

The second part searches random unit vectors of the model's width; memory is the growth of the process's resident set
while they are opened and asked.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import trips
from trips.data.shards import Shard, load_index
from trips.environment import describe_environment
from trips.search.files import write_shard
from trips.search.vectors import open_vectors, write_vectors

SHORTLIST = 64


def unpack(tars: Sequence[Path], folder: Path, limit: int | None) -> dict[str, list[str]]:
    """Photos into a folder; returns the captions of each by its name."""
    captions: dict[str, list[str]] = {}
    for tar in tars:
        shard = Shard(str(tar), load_index(tar))
        with tar.open("rb") as stream:
            for number in range(min(len(shard), limit or len(shard))):
                members = shard.read(number, stream)
                name = f"{tar.stem}/{shard.index.key(number)}.jpg"
                (folder / tar.stem).mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(members.image)
                captions[name] = json.loads(members.json)["captions"]
    return captions


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return function(), time.perf_counter() - begun


def photos(model: Path, tars: Sequence[Path], num_captions: int, limit: int | None, of_tar: str) -> dict[str, Any]:
    """The first part; captions are those of photos of the tars whose names contain `of_tar`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photos")
        captions = unpack(tars, folder, limit)
        trained = trips.load(model, device="cpu")
        last = 0

        def progress(done: int, total: int) -> None:
            nonlocal last
            if done * 10 // total > last:
                last = done * 10 // total
                print(f"indexed {done} of {total}", flush=True)

        index, seconds = timed(lambda: trained.index(folder, progress=progress))
        size = sum(path.stat().st_size for path in index.folder.rglob("*") if path.is_file())
        result: dict[str, Any] = {
            "photos": len(index),
            "index_seconds": round(seconds, 2),
            "index_bytes_per_photo": round(size / len(index)),
        }
        first = next(iter(captions))
        shutil.copy(folder / first, folder / "added.jpg")
        (folder / first).unlink()
        report, seconds = timed(index.refresh)
        result["refresh_after_one_added_and_one_deleted"] = {
            "seconds": round(seconds, 2),
            **{field: getattr(report, field) for field in ("total", "computed", "removed")},
        }
        shutil.move(folder / "added.jpg", folder / first)
        index.refresh()
        asked = [(text, key) for key, texts in captions.items() if of_tar in key for text in texts]
        random.Random(0).shuffle(asked)
        sample = asked[:num_captions]
        ways = {
            "features alone, all captions": (0, "both", asked),
            "features alone, the sample": (0, "both", sample),
            f"{SHORTLIST} best by the match alone, the sample": (SHORTLIST, "match", sample),
            f"{SHORTLIST} best by match and features, the sample": (SHORTLIST, "both", sample),
        }
        result["captions"] = {"all": len(asked), "sample": len(sample), "of photos of": of_tar}
        result["chance_r1"] = round(1 / len(index), 5)
        for way, (rerank, rank_by, chosen) in ways.items():
            ranks, times = [], []
            for text, key in chosen:
                hits, seconds = timed(partial(index.search, text, 10, rerank, rank_by))
                times.append(seconds)
                names = [Path(hit.path).relative_to(folder).as_posix() for hit in hits]
                ranks.append(names.index(key) if key in names else len(names))
            result[way] = found(ranks, times)
            print(way, result[way], flush=True)
        return result


def found(ranks: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Share of queries whose picture is among the first hits, and the seconds of the middle one."""
    recalls = {f"R@{k}": round(sum(rank < k for rank in ranks) / len(ranks), 4) for k in (1, 5, 10)}
    return {**recalls, "median_query_seconds": round(statistics.median(seconds), 4)}


def synthetic(count: int, width: int) -> dict[str, Any]:
    """The second part: no model, no pictures, vectors alone."""
    with tempfile.TemporaryDirectory() as name:
        generator, shards = np.random.default_rng(0), []
        for start in range(0, count, 10_000):
            rows = generator.standard_normal((min(10_000, count - start), width)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            shards.append(write_shard(Path(name), "", [(str(start + i), "0:0", -1) for i in range(len(rows))], rows))
        kept, seconds = timed(lambda: write_vectors(Path(name, "vectors-0.faiss"), shards))
        path = Path(name, kept.pop("name"))
        before = resident()
        vectors, opening = timed(lambda: open_vectors(path, **kept))
        queries = generator.standard_normal((50, width)).astype(np.float32)
        times = [timed(lambda query=query: vectors.nearest(query, SHORTLIST))[1] for query in queries]
        return {
            "vectors": count,
            "width": width,
            "kind": kept["kind"],
            "file_mb": round(kept["size"] / 1e6, 1),
            "build_seconds": round(seconds, 2),
            "open_seconds": round(opening, 3),
            "median_query_ms": round(1000 * statistics.median(times), 2),
            "resident_growth_mb": round((resident() - before) / 1e6, 1),
        }


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tars", type=Path, nargs="+")
    parser.add_argument("--captions", type=int, default=850, help="asked with reranking too, seconds each on a CPU")
    parser.add_argument("--of-tar", default="test", help="captions of photos that the model has not learnt")
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    limit, captions, count = (40, 20, 5_000) if options.quick else (None, options.captions, options.vectors)
    environment = describe_environment() | {"faiss": version("faiss-cpu")}
    result = {
        "environment": environment,
        "photos": photos(options.model, options.tars, captions, limit, options.of_tar),
        "synthetic": synthetic(count, 256),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
