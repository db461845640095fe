"""Down-scaling: the control that removes patches by resolution alone, without looking at text or image.

Not part of the paper, which compares locations and keep rates: a smaller image is the simplest way to have fewer
tokens, and all layers gain from it.

Dimensions: I images, C channels, H, W height and width in pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trips.errors import ConfigError, ShapeError


def scaled_size(size: tuple[int, int], scale: float, patch_size: int) -> tuple[int, int]:
    """(H, W) in pixels after scaling: each side rounded to whole patches, at least one.

    Raises:
        ConfigError: scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise ConfigError("not a share of the image's side", item="scale", found=scale, expected="0 < s <= 1")
    height, width = (max(1, int(side * scale / patch_size + 0.5)) * patch_size for side in size)
    return height, width


def downscaled(pixel_values: Tensor, scale: float, patch_size: int) -> Tensor:
    """Images made smaller, bicubic with antialiasing.

    Args:
        pixel_values: (I, C, H, W), normalised or not.
        scale: factor on both sides, in (0, 1].
        patch_size: pixels of a patch's side; each side becomes a multiple of it.
    Returns:
        (I, C, H', W') in the dtype of the input, see `scaled_size`; the input itself where nothing changes.
    Raises:
        ConfigError: scale outside (0, 1]. ShapeError: not a batch of images.
    """
    if pixel_values.ndim != 4:
        raise ShapeError(
            "not a batch of images", item="pixel_values", found=tuple(pixel_values.shape), expected="(I, C, H, W)"
        )
    height, width = pixel_values.shape[2:]
    size = scaled_size((height, width), scale, patch_size)
    if size == (height, width):
        return pixel_values
    small = F.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)
    return small.to(pixel_values.dtype)


def scale_for_tokens(image_size: int | tuple[int, int], patch_size: int, num_tokens: int) -> float:
    """The scale whose image holds as nearly as possible so many patches, among those that make a side whole patches.

    A square image can only hold square numbers: for 404 patches of 576 it is 20/24, with 400.

    Args:
        image_size: pixels of a side, or (H, W).
        patch_size: pixels of a patch's side.
        num_tokens: patches wanted, without [CLS].
    Returns:
        a scale in (0, 1] for `downscaled`; of two that are equally near, the smaller.
    Raises:
        ConfigError: fewer than one patch or more than the image holds.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    most = (size[0] // patch_size) * (size[1] // patch_size)
    if not 1 <= num_tokens <= most:
        raise ConfigError(
            "the image does not hold so many patches", item="num_tokens", found=num_tokens, expected=f"1 to {most}"
        )
    scales = sorted({count * patch_size / side for side in size for count in range(1, side // patch_size + 1)})

    def miss(scale: float) -> int:
        height, width = scaled_size(size, scale, patch_size)
        return abs((height // patch_size) * (width // patch_size) - num_tokens)

    return min(scales, key=miss)
