"""What a visitor hands in, checked before it costs anything: whose file, its size, kind and pixels, and the words."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trips.errors import DataError
from trips.images import load_image, open_image

MAX_BYTES = 30 * 2**20
MAX_PIXELS = 60_000_000  # of a phone's largest photos; 180 MB decoded
MAX_LETTERS = 500  # of a question; a model reads some tens of words
# What cameras, phones and browsers make. Pillow reads more, EPS by running another program on it.
_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}


def uploaded_path(upload: object, folder: str | Path) -> str | None:
    """Path of a file that was handed in; None for anything else, so that no request can read another file.

    Args:
        upload: what a request says of the file; requests are written by whoever likes to.
        folder: of all uploads.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str) or "\0" in path:
        return None
    return path if Path(path).resolve().is_relative_to(Path(folder).resolve()) else None


def open_photo(path: str | Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An uploaded picture, upright and in full; nothing is decoded before its size is known.

    Args:
        path: of the file; messages have its name alone, not the server's folders.
        max_bytes: of the file. max_pixels: height times width.
    Raises:
        DataError: no picture, a damaged one, one of a format that is no photo's, or one beyond these sizes.
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
    found = open_image(data, name=path.name).format
    if found not in _FORMATS:
        raise DataError("not a format of photos", item=path.name, found=found, expected=", ".join(sorted(_FORMATS)))
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
