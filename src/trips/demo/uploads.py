"""What a visitor hands in, checked before it costs anything: the file's size, pixels by the header, words."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trips.errors import DataError
from trips.images import load_image

MAX_BYTES = 30 * 2**20
MAX_PIXELS = 60_000_000  # of a phone's largest photos; 180 MB decoded
MAX_LETTERS = 500  # of a question; a model reads some tens of words


def open_photo(path: str | Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An uploaded picture, upright and in full; nothing is decoded before its size is known.

    Args:
        path: of the file; messages have its name alone, not the server's folders.
        max_bytes: of the file. max_pixels: height times width.
    Raises:
        DataError: no picture, a damaged one, or one beyond these sizes.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            found, most = f"{size / 2**20:.1f} MiB", f"at most {max_bytes / 2**20:g} MiB"
            raise DataError("file is too large", item=path.name, found=found, expected=most)
        data = path.read_bytes()
    except OSError as error:
        raise DataError("upload is gone: hand it in again", item=path.name) from error
    return load_image(data, name=path.name, max_pixels=max_pixels)


def checked_text(text: object) -> str:
    """A question or caption without blanks around it.

    Raises:
        DataError: none, or one of more than `MAX_LETTERS` letters.
    """
    words = text.strip() if isinstance(text, str) else ""
    if not words:
        raise DataError("is blank: type some words", item="text")
    if len(words) > MAX_LETTERS:
        expected = f"at most {MAX_LETTERS} letters"
        raise DataError("is too long", item="text", found=f"{len(words)} letters", expected=expected)
    return words
