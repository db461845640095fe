"""Typed VQA samples, their reader, and the count of bad ones: data is checked here, once, and trusted behind it.

Not part of the paper; it feeds the VQA experiments (Table 1). A shard is a WebDataset tar with ``KEY.jpg`` or
``KEY.png`` and ``KEY.json`` per image::

    {"image_id": "image3", "questions": [{"question_id": "image3-0", "question": "what ...?", "answer": "desk"}]}

``answers`` (a list, as the ten people of VQA 2.0) may stand in place of ``answer``.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips.errors import ConfigError, DataError, MissingDependencyError
from trips.images import FileSlice

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
_TAR_BLOCK = 512
_META_MEMBER = re.compile(r"__[^/]*__(/|$)")  # of webdataset: about the tar, not of a sample


@dataclass(frozen=True)
class Question:
    """One question about an image.

    Attributes:
        question_id: unique over the data set.
        text: the question as written.
        answers: distinct answers as written; compare them through `normalise_answer`. Empty where the set keeps them
            back, as test sets do.
        weights: share of the people who gave each answer; they sum to 1.
        given: every person's answer in the order of the file, which the official accuracy needs; empty where unknown.
        question_type, answer_type: kinds that accuracies are told apart by, such as "how many" and "number".
        loss_weight: of the question in training; ALBEF gives Visual Genome's questions 0.5.
    """

    question_id: str
    text: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    given: tuple[str, ...] = ()
    question_type: str | None = None
    answer_type: str | None = None
    loss_weight: float = 1.0

    @classmethod
    def of(cls, question_id: str, text: str, given: Sequence[str], **fields: Any) -> Question:
        """A question with the answers of one person, several or none; other `fields` as above."""
        counts = Counter(given)
        shares = tuple(count / len(given) for count in counts.values())
        return cls(question_id, text, tuple(counts), shares, tuple(given), **fields)


@dataclass(frozen=True)
class VqaRecord:
    """One image and all questions about it.

    Attributes:
        image_id: name of the image in its data set.
        image: encoded bytes, or where they are, not yet decoded.
        questions: at least one.
        source: where it came from, "file.tar:KEY"; messages call it by this name.
    """

    image_id: str
    image: bytes | Path | FileSlice = field(repr=False)
    questions: tuple[Question, ...]
    source: str


class BadSamples:
    """Counts and names samples that cannot be used, and stops the run when there are too many of them.

    A sample counts once, however often it is seen. In the worker processes of a data loader each worker keeps its own
    count; the collator therefore passes what was skipped on to the main process.

    Args:
        limit: most bad samples to accept: a whole number, or a share (0.0 to 1.0) of the samples seen so far.
        minimum: bad samples that a share always allows, so that an early one does not end the run.
    Raises:
        ConfigError: a negative number, or a share above 1.
    """

    def __init__(self, limit: int | float = 0.01, minimum: int = 10) -> None:
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0:
            raise ConfigError("not a count or share", item="limit", found=limit, expected="0 or more")
        if isinstance(limit, float) and limit > 1:
            raise ConfigError("share above 1", item="limit", found=limit, hint="use a whole number for a count")
        if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
            raise ConfigError("not a count", item="minimum", found=minimum, expected="0 or more")
        self.limit, self.minimum = limit, minimum
        self.errors: dict[str, str] = {}
        self._seen: set[str] = set()
        self._number = 0

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def num_seen(self) -> int:
        """Number of different samples seen, good and bad."""
        return max(len(self._seen), self._number)

    @property
    def num_allowed(self) -> int:
        """Bad samples accepted at this point."""
        return self.limit if isinstance(self.limit, int) else max(self.minimum, int(self.limit * self.num_seen))

    def saw(self, source: str) -> None:
        """Count a sample, good or bad, towards the number that a share refers to."""
        self._seen.add(source)

    def saw_number(self, number: int) -> None:
        """Tell how many different samples were seen so far, where they are too many to keep their names."""
        self._number = max(self._number, number)

    @contextmanager
    def guard(self, source: str) -> Iterator[None]:
        """Run the work on one sample; a DataError inside is recorded instead of raised.

        Raises:
            DataError: the limit is passed.
        """
        self.saw(source)
        try:
            yield
        except DataError as error:
            self.record(source, error)

    def record(self, source: str, error: Exception | str) -> None:
        """Count one bad sample under its name.

        Raises:
            DataError: the limit is passed; lists the first few.
        """
        self.saw(source)
        self.errors.setdefault(source, str(error))
        if len(self) > self.num_allowed:
            limit = f"{self.limit:.2%}, at least {self.minimum}" if isinstance(self.limit, float) else f"{self.limit}"
            raise DataError(
                f"too many bad samples (limit {limit})",
                item="data",
                found=self.summary(),
                hint="repair or remove them, or raise the limit: data.max_bad_share",
            )

    def summary(self, num_named: int = 3) -> str:
        """One line for the log: how many, and the first `num_named` with their reasons."""
        if not self.errors:
            return f"0 bad of {self.num_seen} samples"
        named = [
            reason if reason.startswith((f"{source}: ", f"{source} (")) else f"{source}: {reason}"
            for source, reason in list(self.errors.items())[:num_named]
        ]
        more = f"; and {len(self) - num_named} more" if len(self) > num_named else ""
        return f"{len(self)} bad of {self.num_seen} samples: {'; '.join(named)}{more}"


def normalise_answer(answer: str) -> str:
    """Canonical text of an answer: what the decoder learns to write and what counts as the same answer.

    Lower case, underscores to spaces, white space collapsed. A set ("red, black") becomes its different members in
    alphabetical order, joined by ", ", so that it is right only as a whole but in any order. A comma between two
    digits ("1,000") does not separate.
    """
    members = re.split(r"(?<!\d),|,(?!\d)", answer.lower().replace("_", " "))
    return ", ".join(sorted({" ".join(member.split()) for member in members} - {""}))


def read_vqa_shards(paths: Iterable[Path | str], bad_samples: BadSamples | None = None) -> Iterator[VqaRecord]:
    """Read VQA records from WebDataset tars, in the order of the files, without shuffling.

    All tars are checked before the first record comes. A damaged tar always raises, because nobody can say how many
    samples are lost; a bad sample inside a sound tar (no image, broken JSON, missing keys, a question id seen before)
    is recorded in `bad_samples` and skipped.

    Args:
        paths: plain tar files.
        bad_samples: where to count bad samples; None raises at the first.
    Returns:
        Iterator over records; images stay where they are in the tars.
    Raises:
        DataError: no path given; a tar is missing, empty, truncated or no plain tar; a bad sample, or too many.
        MissingDependencyError: webdataset is not installed.
    """
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise MissingDependencyError(
            "needed to read tar shards", item="webdataset", hint='pip install "trips-vlm[train]"'
        ) from error
    if isinstance(paths, (str, Path)):
        raise ConfigError("not a list of files", item="paths", found=str(paths), hint="put a single file in a list")
    shards = [Path(path) for path in paths]
    if not shards:
        raise DataError("no tar files given", item="paths")
    for shard in shards:
        _check_tar(shard)

    def records() -> Iterator[VqaRecord]:
        seen_ids: set[str] = set()
        for shard in shards:
            samples = group_by_keys(_members(shard))
            while (sample := _next_sample(samples, shard)) is not None:
                source, record = f"{shard.name}:{sample['__key__']}", None
                with bad_samples.guard(source) if bad_samples is not None else nullcontext():
                    record = _check_new(_parse_sample(sample, source), seen_ids)
                if record is not None:
                    yield record

    return records()


def _check_tar(path: Path) -> None:
    if not path.exists():
        raise DataError("tar file does not exist", item=str(path))
    if not path.is_file():
        raise DataError("is not a file", item=str(path), expected="a tar file")
    size = path.stat().st_size
    if size == 0:
        raise DataError("tar file is empty", item=str(path))
    try:
        # Plain tars only: images do not compress, and a cut gzip stream can end without any error.
        with tarfile.open(path, "r:") as tar:
            end = max((member.offset_data + member.size for member in tar), default=0)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"not a whole, plain tar file: {error}", item=str(path), hint="copy it again, unpack it if compressed"
        ) from error
    with path.open("rb") as file:
        # Readers stop without any error at a damaged header, or where a tar was cut between two members. Only the end
        # mark, two zero blocks behind the last member, tells that nothing was lost.
        file.seek(end + -end % _TAR_BLOCK)
        if file.read(2 * _TAR_BLOCK) != bytes(2 * _TAR_BLOCK):
            raise DataError(f"tar file is truncated or damaged behind byte {end} of {size}", item=str(path))


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """Files of a tar in the form that webdataset groups by their keys; only annotations are read.

    webdataset's own reader takes every image into memory, expands braces in names and runs "pipe:" names as commands.
    """
    path = shard.absolute()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg() and not _META_MEMBER.match(member.name):
                data: Any = FileSlice(path, member.offset_data, member.size)
                if member.name.lower().endswith(".json"):
                    data = data.read_bytes()
                yield {"fname": member.name, "data": data, "__url__": str(shard)}


def _next_sample(samples: Iterator[dict[str, Any]], shard: Path) -> dict[str, Any] | None:
    try:
        return next(samples, None)
    except Exception as error:  # tarfile and webdataset raise many types for a damaged archive
        reason = error.args[0] if error.args else type(error).__name__
        raise DataError(f"tar file cannot be read: {reason}", item=str(shard), hint="copy it again") from error


def _parse_sample(sample: dict[str, Any], source: str) -> VqaRecord:
    images = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
    if len(images) != 1:
        raise DataError(
            "needs exactly one image", item=source, found=len(images), expected=f"one of {', '.join(IMAGE_SUFFIXES)}"
        )
    if "json" not in sample:
        raise DataError("annotation is missing", item=source, expected="KEY.json beside the image")
    try:
        meta = json.loads(sample["json"])
    except ValueError as error:  # broken JSON or not UTF-8
        raise DataError(f"broken JSON: {error}", item=source) from error
    entries = _require(meta, "questions", list, source)
    if not entries:
        raise DataError("has no questions", item=source)
    questions = tuple(_parse_question(entry, f"{source} questions[{i}]") for i, entry in enumerate(entries))
    return VqaRecord(str(meta.get("image_id", sample["__key__"])), images[0], questions, source)


def _parse_question(entry: object, item: str) -> Question:
    question_id = _require(entry, "question_id", (str, int), item)
    text = _require(entry, "question", str, item)
    if not any(char.isprintable() and not char.isspace() for char in text):
        raise DataError("question is blank", item=item, found=text)
    people = isinstance(entry, dict) and "answers" in entry
    given = _require(entry, "answers", list, item) if people else [_require(entry, "answer", str, item)]
    if not given:
        raise DataError("has no answers", item=item)
    for answer in given:
        if not isinstance(answer, str) or not normalise_answer(answer):
            raise DataError("answer is not text", item=item, found=answer)
    return Question.of(str(question_id), text, given)


def _require(mapping: object, key: str, kind: type | tuple[type, ...], item: str) -> Any:
    if not isinstance(mapping, dict):
        raise DataError("not a JSON object", item=item, found=type(mapping).__name__)
    if key not in mapping:
        raise DataError(f'key "{key}" is missing', item=item, found=sorted(mapping))
    if not isinstance(mapping[key], kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f'key "{key}" has the wrong type', item=item, found=mapping[key], expected=names)
    return mapping[key]


def _check_new(record: VqaRecord, seen_ids: set[str]) -> VqaRecord:
    ids = [question.question_id for question in record.questions]
    repeated = [name for name, count in Counter(ids).items() if count > 1 or name in seen_ids]
    if repeated:
        raise DataError("question id occurs twice", item=record.source, found=repeated[0])
    seen_ids.update(ids)
    return record
