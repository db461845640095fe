"""Look at every sample of a data set before a run does: ``trips data check``.

Not part of the paper. It reads the tars as they are (`trips.data.shards.index_tar`, never a sidecar), decodes every
image and looks at every text, whatever the task: captions, KEY.txt, questions, statements. What no reader can use is
bad, and named; what is legal but rarely meant is suspicious, and named too.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trips.data.listings import text_problem
from trips.data.remote import expand_patterns, is_remote
from trips.data.shards import INDEX_SUFFIX, Members, Shard, index_tar, read_index
from trips.errors import ConfigError, DataError
from trips.images import load_image

MAX_WORDS = 10_000  # of one text
# A caption on more than this share of the samples, and at least so many, says nothing about any of them.
MAX_REPEATED_SHARE, MAX_REPEATED = 0.01, 10


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of a number."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        shards, samples, texts: how many there are, bad ones included.
        formats: number of images that decode, by format as Pillow calls it.
        width, height: of these images in pixels, as they are seen upright; None where there is none.
        damaged: tars that are missing, cut or damaged, and how.
        bad: samples that cannot be used, wholly or in part, and why.
        suspicious: samples and texts that can be used but are rarely meant.
    """

    shards: int
    samples: int
    texts: int
    formats: dict[str, int]
    width: Spread | None
    height: Spread | None
    damaged: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    suspicious: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged or bad."""
        return not self.damaged and not self.bad


@dataclass
class _ShardFindings:
    """What one shard holds; small enough to come back from another process."""

    samples: int = 0
    texts: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)  # number of samples with each
    first_seen: dict[tuple[str, str], str] = field(default_factory=dict)  # (kind, id) to source
    damaged: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    suspicious: dict[str, str] = field(default_factory=dict)


def check(
    patterns: str | Path | Sequence[str | Path],
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every sample of local tars and say what is wrong with it. Texts and ids are held in memory, images are not.

    Args:
        patterns: paths, globs or brace ranges of tars in the layout of `trips.data.pack`, of `trips.data.records` or
            of img2dataset.
        workers: processes, each of which takes a shard at a time; 0 reads in this one. More need
            ``if __name__ == "__main__"`` in a script.
        progress: called with the shards done and their number.
    Returns:
        The report.
    Raises:
        DataError: a pattern names no file, a tar is named twice; a worker process died.
        ConfigError: a URL, or fewer than 0 workers.
    """
    if type(workers) is not int or workers < 0:
        raise ConfigError("out of range", item="workers", found=workers, expected="0 or more")
    names = expand_patterns(patterns)
    remote = [name for name in names if is_remote(name)]
    if remote:
        raise ConfigError("is not a local tar", item="patterns", found=remote[0], hint="copy it here first")
    total = _ShardFindings()
    for done, found in enumerate(_all_findings(names, workers), 1):
        _add(total, found)
        if progress is not None:
            progress(done, len(names))
    most = max(MAX_REPEATED, MAX_REPEATED_SHARE * total.samples)
    for text, count in total.captions.most_common():
        if count <= most:
            break
        total.suspicious[f"caption {text[:80]!r}"] = f"stands at {count} of {total.samples} samples"
    widths, heights = ([size[axis] for size in total.sizes] for axis in (0, 1))
    return CheckReport(
        len(names), total.samples, total.texts, dict(total.formats.most_common()), _spread(widths), _spread(heights),
        total.damaged, total.bad, total.suspicious,
    )  # fmt: skip


def _spread(values: list[int]) -> Spread | None:
    return Spread(min(values), float(np.median(values)), max(values)) if values else None


def _add(total: _ShardFindings, found: _ShardFindings) -> None:
    """Join the findings of another shard to those so far; an id of both counts as repeated."""
    for (kind, name), source in found.first_seen.items():
        first = total.first_seen.setdefault((kind, name), source)
        if first != source:
            _repeated(found, kind, name, first, source)
    total.samples += found.samples
    total.texts += found.texts
    total.sizes += found.sizes
    for part in ("formats", "captions", "damaged", "bad", "suspicious"):
        getattr(total, part).update(getattr(found, part))


def _repeated(findings: _ShardFindings, kind: str, name: str, first: str, source: str) -> None:
    # Question ids name answers in a result file; one image id for two samples may be meant.
    group = findings.suspicious if kind == "image id" else findings.bad
    group[f"{source} {kind}" if source in group else source] = f"{kind} {name!r} occurs at {first} already"


def _all_findings(names: list[str], workers: int) -> Iterator[_ShardFindings]:
    if not workers:
        yield from map(_check_shard, names)
        return
    # spawn: a fork of a process with threads (torch has some) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_check_shard, names)
    except BrokenProcessPool as error:
        raise DataError("a worker process died", item="workers", hint="fewer workers need less memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _check_shard(name: str) -> _ShardFindings:
    findings, path = _ShardFindings(), Path(name)
    try:
        shard = Shard(name, index_tar(path))
    except DataError as error:
        findings.damaged[name] = error.message
        return findings
    if shard.index.damage is not None:
        findings.damaged[name] = f"{shard.index.damage}; {len(shard)} samples before it can be read"
    elif not len(shard):
        findings.damaged[name] = "holds no sample"
    sidecar = Path(f"{name}{INDEX_SUFFIX}")
    if sidecar.exists() and (kept := read_index(path)) is not None and kept.to_json() != shard.index.to_json():
        findings.damaged[str(sidecar)] = "does not describe its tar; delete it"
    keys = Counter(shard.index.key(i) for i in range(len(shard)))
    findings.samples = len(shard)
    with path.open("rb") as stream:
        for i in range(len(shard)):
            key = shard.index.key(i)
            # With the folder: check takes several, which may hold shards of one name.
            source = f"{name}:{key}"
            if keys[key] > 1:
                findings.bad[source] = f"key occurs {keys[key]} times in its tar"
                continue
            try:
                members = shard.read(i, stream)
                _check_image(members, source, findings)
                _check_texts(members, source, findings)
            except DataError as error:
                findings.bad[source] = str(error).removeprefix(f"{source}: ")
    return findings


def _check_image(members: Members, source: str, findings: _ShardFindings) -> None:
    if members.image is None:
        raise DataError("has more than one image" if members.num_images else "has no image", item=source)
    image = load_image(members.image, name=source)
    with Image.open(io.BytesIO(members.image)) as opened:
        findings.formats[opened.format or "unknown"] += 1
    findings.sizes.append(image.size)


def _check_texts(members: Members, source: str, findings: _ShardFindings) -> None:
    meta: Any = {}
    if members.json is not None:
        try:
            meta = json.loads(members.json)
        except (ValueError, RecursionError) as error:  # broken, or not UTF-8
            raise DataError(f"broken JSON: {error}", item=source) from error
        if not isinstance(meta, dict):
            raise DataError("JSON is no object", item=source, found=type(meta).__name__)
    captions, others = _texts_of(meta, members.txt, source)
    findings.texts += len(captions) + len(others)
    if not captions and not others:
        raise DataError("has no text", item=source, found=sorted(meta))
    for label, text in captions + others:
        where = source if len(captions) + len(others) == 1 else f"{source} {label}"
        problem = text_problem(text)
        if problem is not None:
            findings.bad[where] = f"{label} {problem}"
        elif (doubt := _doubt(text)) is not None:
            findings.suspicious[where] = f"{label} {doubt}"
    findings.captions.update({text.strip() for _, text in captions if isinstance(text, str)})
    entries = meta.get("questions") or []
    ids = [("question id", entry.get("question_id")) for entry in entries if isinstance(entry, dict)]
    given = Counter((kind, str(name)) for kind, name in [("image id", meta.get("image_id")), *ids] if name is not None)
    for (kind, name), count in given.items():
        first = findings.first_seen.setdefault((kind, name), source)
        if first != source or count > 1:
            _repeated(findings, kind, name, first, source)


def _texts_of(meta: dict[str, Any], txt: bytes | None, source: str) -> tuple[list, list]:
    """Captions, and texts of other kinds, each with a label."""
    captions: list[tuple[str, object]] = []
    others: list[tuple[str, object]] = []
    for name, plural in (("captions", True), ("caption", False), ("questions", True), ("sentence", False)):
        if meta.get(name) is None:  # img2dataset leaves null where only KEY.txt has the caption
            continue
        value, group = meta[name], others if name in ("questions", "sentence") else captions
        if plural and not isinstance(value, list):
            raise DataError(f"{name} are no list", item=source, found=type(value).__name__)
        for i, text in enumerate(value if plural else [value]):
            if name == "questions":
                text = text.get("question") if isinstance(text, dict) else text
            group.append((f"{name}[{i}]" if plural else name, text))
    if txt is not None and not captions:  # img2dataset writes the caption twice
        try:
            captions.append(("txt", txt.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise DataError(f"txt is not UTF-8: {error}", item=source) from error
    return captions, others


def _doubt(text: str) -> str | None:
    """Why a text that can be used is rarely what was meant."""
    words = len(text.split())
    if words > MAX_WORDS:
        return f"has {words} words"
    if "\ufffd" in text:  # what a decoder puts where it met wrong bytes
        return "holds a replacement character: decoded in the wrong encoding"
    # Not all that Python calls not printable: joiners and marks of direction (Cf) belong to emoji and scripts.
    odd = next((char for char in text if unicodedata.category(char) in ("Cc", "Cn", "Co") and not char.isspace()), None)
    return None if odd is None else f"holds {odd!r}, which is not printable"
