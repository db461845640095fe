"""Decoding at the border: any picture that a user may hold becomes an 8-bit RGB Pillow image, or a DataError.

Not part of the paper: every image of Figure 2 enters the library through `load_image`, so that nothing behind it has
to think of palettes, 16-bit scans, rotated phone photos or damaged files.

Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from trips.errors import ConfigError, DataError

# Twice Pillow's warning threshold, which is where Pillow itself refuses to open a file.
MAX_PIXELS = 178_956_970
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class FileSlice:
    """Bytes inside a larger file, such as an image in a tar: read when they are wanted, so that lists stay small.

    Attributes:
        path: of the file. offset, size: of the bytes.
    """

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """The bytes; `DataError` if the file is gone or has become shorter."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", item=str(self.path)) from error
        if len(data) != self.size:
            raise DataError("file has become shorter", item=str(self.path), found=len(data), expected=self.size)
        return data


ImageSource = FileSlice | str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray | IO[bytes]


def load_image(
    source: ImageSource,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    min_size: int | tuple[int, int] | None = None,
) -> Image.Image:
    """Read one picture as an 8-bit RGB Pillow image, upright.

    Transparent pixels (RGBA, LA, palettes and PNG transparency) are composited on white. 16-bit greyscale and 32-bit
    integer pixels are scaled to 8 bits, not clipped; float pixels must lie in [0, 1]. EXIF rotation is applied. Of an
    animation the first frame is taken (of a Pillow image the frame that it stands at). The caller's image is never
    changed; an upright RGB Pillow image is returned as it is.

    Args:
        source: path, encoded bytes, binary file object (read from its current position), Pillow image, or array:
            (H, W), (H, W, 1) grey, (H, W, 2) grey + alpha, (H, W, 3) RGB, (H, W, 4) RGBA of uint8, bool, uint16
            (scaled) or float in [0, 1].
        name: how messages call the picture; default the path or the kind of source.
        max_pixels: most pixels (H * W) to decode, checked from the header. Pillow's own limit stays in force, so
            values above `MAX_PIXELS` change nothing.
        min_size: pixels that the caller needs, one number or (height, width) of the upright picture. A larger JPEG is
            then decoded at 1/2, 1/4 or 1/8, but never below this size on either side. Other formats ignore it.
    Returns:
        RGB image of (W, H) pixels.
    Raises:
        DataError: the file is missing, a folder, empty, truncated, not an image or too large; the array has no pixels
            or a shape, type or range that is not one of the above. The message names the picture.
        ConfigError: `min_size` is not positive.
    """
    if isinstance(min_size, int):
        min_size = (min_size, min_size)
    if min_size is not None and min(min_size) < 1:
        raise ConfigError("must be positive", item="min_size", found=min_size)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or "Pillow image", max_pixels, None)
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image array", max_pixels)
    if isinstance(source, FileSlice):
        return _from_bytes(source.read_bytes(), name or str(source.path), max_pixels, min_size)
    if isinstance(source, (str, Path)):
        return _from_path(source, name, max_pixels, min_size)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), name or "image bytes", max_pixels, min_size)
    if callable(getattr(source, "read", None)):
        return _from_file(source, name or str(getattr(source, "name", "image file object")), max_pixels, min_size)
    raise DataError(
        "cannot read a picture from this type",
        item=name or "image",
        found=type(source).__name__,
        expected="a path, bytes, binary file object, Pillow image or numpy array",
    )


@dataclass(frozen=True)
class OpenedImage:
    """An encoded picture whose header has been read; its pixels are decoded by `load`.

    Attributes:
        size: (width, height) in pixels of the upright picture in full.
        format: as Pillow calls it, such as "JPEG"; empty where it has no name.
    """

    size: tuple[int, int]
    format: str
    _image: Image.Image
    _label: str

    def load(self, min_size: tuple[int, int] | None = None) -> Image.Image:
        """Decode; once.

        Args:
            min_size: as in `load_image`.
        Raises:
            DataError: as in `load_image`.
        """
        return _to_rgb(self._image, self._label, MAX_PIXELS, min_size)


def open_image(data: bytes, *, name: str | None = None) -> OpenedImage:
    """Read the header of an encoded picture, for callers who choose by its size how much of it to decode.

    Args:
        data: encoded picture.
        name: how messages call it.
    Raises:
        DataError: empty, or not an image.
    """
    label = name or "image bytes"
    image = _open(data, label)
    width, height = image.size
    size = (height, width) if _orientation(image) >= 5 else (width, height)
    return OpenedImage(size, image.format or "", image, label)


def _from_path(source: str | Path, name: str | None, max_pixels: int, min_size: tuple[int, int] | None) -> Image.Image:
    text = str(source)
    label = text if name is None or name == text else f"{name} ({text})"
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DataError("is an address, not a local file", item=label, hint="download it first")
    try:
        path = Path(source)
        if path.is_dir():
            raise DataError("is a folder, not an image file", item=label)
        if not path.exists():
            raise DataError("image file does not exist", item=label)
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        if isinstance(error, DataError):
            raise
        raise DataError(f"image file cannot be read: {error}", item=label) from error
    return _from_bytes(data, label, max_pixels, min_size)


def _from_file(file: IO[bytes], label: str, max_pixels: int, min_size: tuple[int, int] | None) -> Image.Image:
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # ValueError: closed file, or text that does not decode
        raise DataError(f"file object cannot be read: {error}", item=label) from error
    if not isinstance(data, bytes):
        raise DataError("file object is not binary", item=label, found=type(data).__name__, hint='open it with "rb"')
    if not data:
        raise DataError("no bytes left in the file object", item=label, hint="empty file, or it was read before")
    return _from_bytes(data, label, max_pixels, min_size)


def _from_bytes(data: bytes, label: str, max_pixels: int, min_size: tuple[int, int] | None) -> Image.Image:
    return _to_rgb(_open(data, label), label, max_pixels, min_size)


def _open(data: bytes, label: str) -> Image.Image:
    if not data:
        raise DataError("image is empty (0 bytes)", item=label)
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # the plugins of Pillow raise a dozen types for damaged headers; all mean the same
        raise DataError(f"not a readable image ({len(data)} bytes): {_reason(error)}", item=label) from error


def _to_rgb(image: Image.Image, label: str, max_pixels: int, min_size: tuple[int, int] | None) -> Image.Image:
    width, height = image.size
    _check_size(height, width, label, max_pixels)
    try:
        if min_size is not None:
            _draft(image, min_size)
        image.load()
        image = _upright(image)
        if image.mode == "RGB" and not image.has_transparency_data:
            return image
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            pixels = np.asarray(image)
            grey = _scale_int32(pixels, label) if image.mode == "I" else _to_uint8(pixels, label)
            return Image.fromarray(grey).convert("RGB")
        if image.has_transparency_data:
            # Pillow knows no direct way from premultiplied grey ("La") to RGBA.
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
        return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # see _open: damaged pixels raise as many types as damaged headers
        raise DataError(f"picture cannot be decoded ({width}x{height} px): {_reason(error)}", item=label) from error


def _draft(image: Image.Image, min_size: tuple[int, int]) -> None:
    """Let the JPEG decoder skip frequencies that a small picture cannot show; a no-op for other formats."""
    height, width = min_size
    if _orientation(image) >= 5:  # stored on its side: 5 to 8 swap height and width
        height, width = width, height
    image.draft(None, (width, height))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) not in range(2, 9):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the rotation itself cannot fail; rewriting a broken EXIF block can
        return image


def _from_array(array: np.ndarray, label: str, max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (2, 3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise DataError(
            "array does not have the shape of a picture",
            item=label,
            found=array.shape,
            expected="(H, W) or (H, W, 1 | 2 | 3 | 4)",
            hint="channels come last: array.transpose(1, 2, 0)" if channels_first else None,
        )
    _check_size(array.shape[0], array.shape[1], label, max_pixels)
    pixels = _to_uint8(array, label)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)), label, max_pixels, None)


def _to_uint8(array: np.ndarray, label: str) -> np.ndarray:
    """(H, W[, C]) uint8 from other number types: full scale maps to 255, nothing is clipped."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded; 65535 = 255 * 257
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (0.0 <= low and high <= 1.0):  # written so that NaN fails too
            raise DataError(
                "float pixels out of range", item=label, found=(low, high), expected="values in [0, 1]",
                hint='divide by the full scale, or use .astype("uint8") for 0 to 255',
            )  # fmt: skip
        return np.rint(array.astype(np.float64) * 255.0).astype(np.uint8)
    raise DataError(
        "array does not have a pixel type",
        item=label,
        found=str(array.dtype),
        expected="uint8, bool, uint16 or float in [0, 1]",
        hint='.astype("uint8") if the values are 0 to 255',
    )


def _scale_int32(array: np.ndarray, label: str) -> np.ndarray:
    """(H, W) uint8 from Pillow's mode "I": 16-bit samples in 32 bits, or rarely the full positive range."""
    if array.min() < 0:
        raise DataError("negative pixel values", item=label, found=int(array.min()), expected="0 or more")
    full = 65535.0 if array.max() <= 65535 else 2147483647.0
    return np.rint(array * (255.0 / full)).astype(np.uint8)


def _check_size(height: int, width: int, label: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise DataError("picture has no pixels", item=label, found=f"{width}x{height} px")
    if height * width > max_pixels:
        raise DataError(
            "picture is too large to decode safely",
            item=label,
            found=f"{width}x{height} px",
            expected=f"at most {max_pixels} pixels",
        )


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    # Pillow names the BytesIO object that we made; that means nothing to the user.
    return "unknown format" if "cannot identify image file" in text else text
