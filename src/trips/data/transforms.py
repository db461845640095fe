"""Training augmentation of ALBEF's recipes: random crop, RandAugment without colours, a flip that the text knows of.

The paper names RandAugment for fine-tuning (5.1) and follows ALBEF in pre-training; the numbers are ALBEF's. Everything
is a pure function of picture, text and generator, so that a sample looks the same in any worker process and after
resumption.

Legend: H, W height and width in pixels of the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from trips.errors import ConfigError, DataError
from trips.images import open_image

Flip = Literal["none", "swap"]

_TRIES = 10  # crops to draw before the middle of the picture is taken
_RATIO = (3 / 4, 4 / 3)  # width / height of a crop
_FILL = (128, 128, 128)
_TOP_LEVEL = 10  # strength of an operation is its level / 10
# Explicit letters: IGNORECASE would also take the dotless i for an i.
_SIDE_WORD = re.compile(
    r"(?<![^\W_])([Ll]eft|LEFT|[Rr]ight|RIGHT)(?=(?:[Mm]ost|MOST|[Ww]ards?|WARDS?|[Hh]anded|HANDED)?(?![^\W_]))"
)
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic), flip and RandAugment of one training picture, together with its text.

    Args:
        image_size: pixels of the result, one number or (height, width).
        scale: smallest and largest share of the picture's area that a crop covers; (0.2, 1.0) is ALBEF's
            pre-training, (0.5, 1.0) its fine-tuning.
        randaugment: how many operations to draw and their level (0 to 10); None applies none. Each drawn operation is
            applied with probability 0.5.
        flip: "none"; or "swap": mirror with probability 0.5 and swap the words left and right in the text (see
            `swap_sides`).
    Raises:
        ConfigError: a value that is not one of the above.
    """

    image_size: int | tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    randaugment: tuple[int, int] | None = (2, 7)
    flip: Flip = "none"

    def __post_init__(self) -> None:
        sides = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ConfigError(
                "not a size", item="image_size", found=self.image_size, expected="pixels, or (height, width)"
            )
        if not (_is_pair(self.scale, (int, float)) and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise ConfigError(
                "not a range", item="scale", found=self.scale, expected="(low, high), 0 < low <= high <= 1"
            )
        plan = self.randaugment
        if plan is not None and not (_is_pair(plan, int) and plan[0] >= 0 and 0 <= plan[1] <= _TOP_LEVEL):
            raise ConfigError(
                "not a plan", item="randaugment", found=plan, expected=f"(operations, level 0 to {_TOP_LEVEL}), or null"
            )
        if self.flip not in get_args(Flip):
            raise ConfigError("unknown value", item="flip", found=self.flip, expected=" | ".join(get_args(Flip)))

    def __call__(self, image: Image.Image, rng: np.random.Generator, text: str) -> tuple[np.ndarray, str]:
        """Augment one sample; the same generator state gives the same result.

        Args:
            image: RGB, as `trips.images.load_image` returns it; not changed.
            rng: where all chance comes from.
            text: caption or question of the picture.
        Returns:
            (H, W, 3) uint8 array, and the text, changed only by a flip.
        Raises:
            DataError: the picture is not RGB.
        """
        if image.mode != "RGB":
            raise DataError(
                "picture is not RGB", item="image", found=image.mode, hint="trips.images.load_image makes it so"
            )
        return self._change(image, crop_box(*image.size, self.scale, rng), rng, text)

    def decode(
        self, data: bytes, rng: np.random.Generator, text: str, name: str | None = None
    ) -> tuple[np.ndarray, str]:
        """As a call on the decoded picture, but a JPEG is decoded no finer than its crop needs.

        The crop is drawn first, by the size in the header. Where both its sides are at least twice those of the result,
        the picture is decoded at 1/2, 1/4 or 1/8, never below what is needed. The same crop is taken, only the pixels
        differ slightly; where it is smaller, and for other formats, the result is exactly the same.

        Args:
            data: encoded picture.
            rng, text: as in a call.
            name: how messages call the picture.
        Raises:
            DataError: see `trips.images.load_image`.
        """
        opened = open_image(data, name=name)
        full_width, full_height = opened.size
        left, top, right, bottom = crop_box(full_width, full_height, self.scale, rng)
        height, width = self._size
        needed = math.ceil(height * full_height / (bottom - top)), math.ceil(width * full_width / (right - left))
        image = opened.load(min_size=needed)
        # 1, 2, 4 or 8; the last pixel of a row may stand for fewer, so the quotient of the widths is not exact.
        step = round(max(full_width, full_height) / max(image.size))
        return self._change(image, (left / step, top / step, right / step, bottom / step), rng, text)

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2
        return height, width

    def _change(
        self, image: Image.Image, box: tuple[float, float, float, float], rng: np.random.Generator, text: str
    ) -> tuple[np.ndarray, str]:
        height, width = self._size
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)  # crop and resize in one pass
        if self.flip == "swap" and rng.random() < 0.5:
            image, text = ImageOps.mirror(image), swap_sides(text)
        if self.randaugment is not None:
            image = randaugment(image, rng, *self.randaugment)
        return np.array(image), text


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop: its area uniform in `scale`, its ratio log-uniform in 3/4 to 4/3, its place uniform.

    A draw that does not fit into the picture is repeated. After ten, it is the largest box in the middle of the picture
    whose ratio is allowed.

    Args:
        width, height: of the picture, pixels.
        scale: smallest and largest share of the area.
        rng: where the chance comes from.
    Returns:
        (left, top, right, bottom) in pixels, right and bottom exclusive.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < _RATIO[0]:
        crop_height = max(1, round(width / _RATIO[0]))
    elif width / height > _RATIO[1]:
        crop_width = max(1, round(height * _RATIO[1]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def randaugment(image: Image.Image, rng: np.random.Generator, count: int, level: int) -> Image.Image:
    """Apply `count` operations drawn with replacement from `OPERATIONS`, each with probability 0.5.

    Args:
        image: RGB.
        rng: where the chance comes from.
        count: operations to draw.
        level: 0 to 10, the same for all; shear, translation and rotation go either way.
    Returns:
        RGB image of the same size.
    """
    names = list(OPERATIONS)
    for _ in range(count):
        # All three are drawn whether used or not: what comes next never depends on what was applied.
        operation, applied, sign = OPERATIONS[names[rng.integers(len(names))]], rng.random() < 0.5, rng.random() < 0.5
        if applied:
            image = operation(image, (-level if sign else level) / _TOP_LEVEL)
    return image


def swap_sides(text: str) -> str:
    """Text of the mirrored picture: the words left and right change places, their case stays.

    "left-hand" and "leftmost" count, "leftover" and "bright" do not. It cannot tell "the man has left" or "right now"
    from a side.
    """
    return _SIDE_WORD.sub(lambda match: _OTHER_SIDE[match[0]], text)


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    """Blend with a degenerate picture: factor 0.1 at strength 0, 1.9 at 1; 1 would change nothing."""
    return lambda image, strength: kind(image).enhance(abs(strength) * 1.8 + 0.1)


def _shear_x(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, (1, -0.3 * strength, 0, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, (1, 0, 0, -0.3 * strength, 1, 0))


def _translate_x(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, (1, 0, -_shift(image.width, strength), 0, 1, 0))


def _translate_y(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, -_shift(image.height, strength)))


def _shift(side: int, strength: float) -> int:
    return round(strength * side * 10 / 256)  # ALBEF: up to 10 pixels, there of 256 in pre-training


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    """Up to 30 degrees about the middle, counter-clockwise where the strength is positive."""
    cos, sin = math.cos(math.radians(30 * strength)), math.sin(math.radians(30 * strength))
    x, y = image.width / 2, image.height / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _affine(image: Image.Image, inverse: tuple[float, ...]) -> Image.Image:
    """Map each place (x, y) of the result to (a x + b y + c, d x + e y + f) of the picture; grey where that is none."""
    return image.transform(
        image.size, Image.Transform.AFFINE, inverse, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


# Each takes an RGB picture and a strength from -1 to 1; only the geometric ones know a direction.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, strength: image,
    "autocontrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalise": lambda image, strength: ImageOps.equalize(image),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}


def _is_pair(value: object, kind: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
