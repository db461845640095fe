"""Image-text pairs as they stand in shards: one image and its texts.

Feeds pre-training (4.1) and retrieval (5.1.3). Read are the layouts of img2dataset, of ``trips data pack``, and of
questions about images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips.data.listings import text_problem
from trips.data.records import IMAGE_SUFFIXES
from trips.data.shards import Members
from trips.errors import DataError
from trips.images import FileSlice

MAX_CLEAN_WORDS = 30
_REMOVED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


@dataclass(frozen=True)
class PairRecord:
    """One image and its texts.

    Attributes:
        image: encoded bytes, or where they are, not yet decoded.
        texts: captions or questions as written or cleaned, at least one.
        image_id: name of the image in its corpus, which samples with one image share; None if it has none.
        source: where it came from; messages call it by this name.
    """

    image: bytes | Path | FileSlice = field(repr=False)
    texts: tuple[str, ...]
    image_id: str | None
    source: str

    def image_bytes(self) -> bytes:
        """The encoded image.

        Raises:
            DataError: its file cannot be read.
        """
        try:
            return self.image if isinstance(self.image, bytes) else self.image.read_bytes()
        except OSError as error:
            raise DataError(f"image file cannot be read: {error.strerror or error}", item=self.source) from error


def parse_pair(members: Members, source: str, clean: bool = False) -> PairRecord:
    """Read the annotation of one sample.

    Texts are, whichever comes first, "captions" (a list), "caption", or the "question" of each of "questions" in
    KEY.json, or KEY.txt. Those that `text_problem` refuses (blank, NUL) are left out. The image's id is "image_id" or
    "url" (img2dataset repeats an image for each of its captions).

    Args:
        members: what the shard holds of it.
        source: name of the sample.
        clean: put the texts through `clean_caption`; those of which nothing is left count as blank.
    Raises:
        DataError: not exactly one image, no usable text, broken JSON, a key of the wrong type.
    """
    if members.problem is not None:
        raise DataError(members.problem, item=source)
    if members.image is None:
        expected = f"one of {', '.join(IMAGE_SUFFIXES)}"
        raise DataError("needs exactly one image", item=source, found=members.num_images, expected=expected)
    meta: Any = {}
    try:
        if members.json is not None:
            meta = json.loads(members.json)
        plain = None if members.txt is None else members.txt.decode("utf-8")
    except (ValueError, RecursionError) as error:  # broken JSON or not UTF-8
        raise DataError(f"broken annotation: {error}", item=source) from error
    if not isinstance(meta, dict):
        raise DataError("not a JSON object", item=source, found=type(meta).__name__)
    texts = _find_texts(meta, plain, source)
    if clean:
        texts = [clean_caption(text) for text in texts]
    usable = tuple(text for text in texts if text_problem(text) is None)
    if not usable:
        raise DataError(f"text {text_problem(texts[0])}" if texts else "has no texts", item=source)
    image_id = meta.get("image_id", meta.get("url"))
    return PairRecord(members.image, usable, image_id if image_id is None else str(image_id), source)


def clean_caption(text: str) -> str:
    """ALBEF's form of a caption: what its pre-training and its retrieval read.

    Lower case; ``, . ' ! ? " ( ) * # : ; ~`` removed; ``-`` and ``/`` become spaces; ``<person>`` (of conceptual
    captions) becomes person; white space collapsed; the first 30 words. May leave nothing of a text.
    """
    text = text.lower().translate(_REMOVED).replace("<person>", "person")
    return " ".join(text.split()[:MAX_CLEAN_WORDS])


def _find_texts(meta: dict[str, Any], plain: str | None, source: str) -> list[str]:
    if "captions" in meta:
        texts = meta["captions"]
    elif meta.get("caption") is not None:
        texts = [meta["caption"]]
    elif "questions" in meta:
        entries = meta["questions"] if isinstance(meta["questions"], list) else [None]
        texts = [entry.get("question") if isinstance(entry, dict) else None for entry in entries]
    elif plain is not None:
        texts = [plain.strip()]
    else:
        raise DataError("annotation is missing", item=source, expected="KEY.txt, or captions in KEY.json")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("texts have the wrong type", item=source, found=texts, expected="strings")
    return texts
