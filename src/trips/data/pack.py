"""From images and captions on disk to WebDataset shards for pre-training and retrieval: ``trips data pack``.

Not part of the paper; it makes the pairs of 4.1. A sample is ``KEY.jpg`` (or png, webp) and ``KEY.json``::

    {"image_id": "kitchen", "captions": ["a clean kitchen island", ...], "width": 640, "height": 480}

Beside each shard stands its index, so that who reads it from a URL need not fetch it whole first.

The bytes of the shards are a function of the list and the images alone: not of the time, the user or the number of
processes. Lists are described in `trips.data.listings`.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from trips.data.listings import ListedImage, read_listing
from trips.data.shards import index_tar, write_index
from trips.errors import ConfigError, DataError
from trips.images import load_image

_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # formats whose bytes are copied, and their suffix
_SHARD = "pairs-{:06d}.tar"
_OWN_FILES = re.compile(r"pairs-\d{6}\.tar(\.index\.json)?|rejects\.jsonl")
_MAX_KEY = 80  # with a suffix below the 100 characters of a plain tar header


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote.

    Attributes:
        written: samples.
        captions: texts of these samples.
        shards: paths of the tars.
        rejected: what was left out: its place in the list or its image, and the reason. Also in rejects.jsonl.
    """

    written: int
    captions: int
    shards: tuple[str, ...]
    rejected: dict[str, str]


@dataclass(frozen=True)
class _Picture:
    """Encoded image of a sample, ready to be written; width and height as it is seen upright."""

    data: bytes
    suffix: str
    width: int
    height: int


def pack(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    splits: Sequence[str] = (),
    shard_size: int = 1000,
    max_side: int | None = None,
    quality: int = 90,
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Write images with captions as shards ``OUT/pairs-000000.tar``, ...; what is bad goes to ``OUT/rejects.jsonl``.

    Each shard gets its index, ``pairs-000000.tar.index.json`` (`trips.data.shards`).

    Every image is decoded once to see that it is whole. JPEG, PNG and WebP files are copied byte for byte; other
    formats, and images above `max_side`, become JPEG. The folder appears when everything is written, or not at all.

    Args:
        source: list or folder, see `trips.data.listings.read_listing`.
        out: folder to make.
        images: folder that the paths of the list are relative to; None takes that of the list.
        splits: parts of the list to take, by its field "split".
        shard_size: samples per shard; the last may hold fewer.
        max_side: largest width or height in pixels; larger images are reduced. None keeps all as they are.
        quality: of the JPEGs that are written anew, 1 to 95.
        workers: processes that decode; 0 decodes in this one. More need ``if __name__ == "__main__"`` in a script.
        overwrite: replace the folder of an earlier `pack`.
        progress: called with the images done and their number.
    Returns:
        The report.
    Raises:
        DataError: the list cannot be read, or not one of its images can be used.
        ConfigError: a number out of range; `out` exists, or holds other files than those of `pack`.
    """
    _check_numbers(shard_size=(shard_size, 1, None), quality=(quality, 1, 95), workers=(workers, 0, None))
    if max_side is not None:
        _check_numbers(max_side=(max_side, 1, None))
    target = Path(out)
    _check_target(target, overwrite)
    entries, rejected = read_listing(source, images, splits)
    keyed = _with_keys(entries, rejected)
    root = Path(images) if images is not None else Path(source) if Path(source).is_dir() else Path(source).parent
    scratch = target.parent / f".{target.name}.tmp-{os.getpid()}"
    tasks = ((root / entry.image, entry.image, max_side, quality) for _, entry in keyed)
    try:
        scratch.mkdir(parents=True)
        with closing(_prepare_all(tasks, workers)) as pictures:
            good, num_shards = _fill(scratch, keyed, pictures, shard_size, rejected, progress)
        if not good:
            first = [f"{place}: {reason}" for place, reason in list(rejected.items())[:3]]
            raise DataError("no image can be used", item=str(source), found=first or "an empty list")
        if rejected:
            lines = [json.dumps({"source": place, "reason": why}) + "\n" for place, why in rejected.items()]
            (scratch / "rejects.jsonl").write_text("".join(lines), encoding="utf-8")
        for number in range(num_shards):
            path = scratch / _SHARD.format(number)
            write_index(path, index_tar(path))
        _publish(scratch, target, overwrite)
    except OSError as error:
        raise DataError(f"cannot be written: {error}", item=str(target)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shards = tuple(str(target / _SHARD.format(i)) for i in range(num_shards))
    return PackReport(len(good), sum(len(entry.captions) for entry in good), shards, rejected)


def _fill(
    folder: Path,
    keyed: list[tuple[str, ListedImage]],
    pictures: Iterator[_Picture | str],
    shard_size: int,
    rejected: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> tuple[list[ListedImage], int]:
    """Write the shards; returns the images in them and the number of shards."""
    good: list[ListedImage] = []
    num_shards = 0
    with ExitStack() as open_shard:
        for done, ((key, entry), picture) in enumerate(zip(keyed, pictures), 1):
            if isinstance(picture, str):
                rejected[entry.source] = picture
            else:
                if len(good) % shard_size == 0:
                    open_shard.close()
                    path = folder / _SHARD.format(num_shards)
                    tar = open_shard.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT))
                    num_shards += 1
                _write(tar, key, entry, picture)
                good.append(entry)
            if progress is not None:
                progress(done, len(keyed))
    return good, num_shards


def _check_numbers(**numbers: tuple[object, int, int | None]) -> None:
    for name, (value, low, high) in numbers.items():
        if type(value) is not int or value < low or (high is not None and value > high):
            expected = f"{low} to {high}" if high is not None else f"{low} or more"
            raise ConfigError("out of range", item=name, found=value, expected=expected)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError("is a file", item=str(target), expected="a folder to make")
    found = sorted(path.name for path in target.iterdir())
    foreign = [name for name in found if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise ConfigError("folder holds other files", item=str(target), found=foreign[:3], hint="name a new folder")
    if found and not overwrite:
        raise ConfigError("exists already", item=str(target), hint="name a new folder, or allow to overwrite")


def _publish(scratch: Path, target: Path, overwrite: bool) -> None:
    """Put the finished folder in its place; an earlier one disappears only then."""
    _check_target(target, overwrite)
    if target.exists():
        old = scratch.with_name(f"{scratch.name}-old")
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old)
    else:
        scratch.rename(target)


def _with_keys(entries: list[ListedImage], rejected: dict[str, str]) -> list[tuple[str, ListedImage]]:
    """Give each image its key, from its path; entries whose key is taken are rejected."""
    keyed: dict[str, ListedImage] = {}
    for entry in entries:
        stem = os.path.splitext(entry.image)[0]
        # WebDataset parts key and suffix at the first dot, and a key must not read as a path.
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)
        if key != stem or len(key) > _MAX_KEY:
            key = f"{key[: _MAX_KEY - 9]}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
        if key in keyed:
            rejected[entry.source] = f"{entry.image}: has the key of {keyed[key].image}"
        else:
            keyed[key] = entry
    return list(keyed.items())


def _prepare_all(tasks: Iterator[tuple], workers: int) -> Iterator[_Picture | str]:
    """Results in the order of the tasks; only as many are ahead as keep the processes busy."""
    if not workers:
        yield from (_prepare(*task) for task in tasks)
        return
    # spawn: a fork of a process with threads (torch has some) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting: deque[Future] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_prepare, *task))
            if len(waiting) >= 16 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died", item="workers", hint="fewer workers need less memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(path: Path, name: str, max_side: int | None, quality: int) -> _Picture | str:
    """Read and check one image; the reason if it cannot be used."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            return f"{name}: is not a file"
        data = path.read_bytes()
        image = load_image(data, name=name)
        with Image.open(io.BytesIO(data)) as opened:
            suffix = _KEPT.get(opened.format or "")
    except DataError as error:
        return str(error)
    except FileNotFoundError:
        return f"{name}: image file does not exist"
    except OSError as error:
        return f"{name}: image file cannot be read: {error.strerror}"
    if max_side is not None and max(image.size) > max_side:
        factor = max_side / max(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)  # a strip keeps a pixel
        image, suffix = image.resize((width, height), Image.Resampling.BICUBIC), None
    if suffix is None:
        buffer = io.BytesIO()
        try:
            image.save(buffer, "JPEG", quality=quality)
        except (OSError, ValueError):  # the format ends at 65,500 pixels
            return f"{name}: picture of {image.width}x{image.height} px does not fit into a JPEG"
        data, suffix = buffer.getvalue(), "jpg"
    return _Picture(data, suffix, *image.size)


def _write(tar: tarfile.TarFile, key: str, entry: ListedImage, picture: _Picture) -> None:
    meta = {"image_id": entry.image_id, "captions": entry.captions, "width": picture.width, "height": picture.height}
    for suffix, content in ((picture.suffix, picture.data), ("json", json.dumps(meta, ensure_ascii=False).encode())):
        info = tarfile.TarInfo(f"{key}.{suffix}")  # its owner and time are 0
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
