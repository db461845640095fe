"""What the encoders of pairs take (Figure 2a): the checks that the dual-stream and the single-stream model share.

Dimensions: B texts (rows), L text tokens, n images of a text, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trips.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from trips.vision import VisionPrefix


def check_ids(input_ids: Tensor, attention_mask: Tensor, most: int) -> None:
    """`ShapeError` unless both are (B, L) and L is at most `most`, the positions that the text embeddings have."""
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ShapeError(
            "ids and mask do not fit",
            item="input_ids",
            found=(tuple(input_ids.shape), tuple(attention_mask.shape)),
            expected="both (B, L)",
        )
    if input_ids.shape[1] > most:
        raise ShapeError(
            "a text is longer than the model has positions",
            item="input_ids",
            found=f"{input_ids.shape[1]} tokens",
            expected=f"at most {most}",
            hint="a processor with max_text_length of as many cuts it",
        )


def check_one_source(pixel_values: Tensor | None, prefix: VisionPrefix | None) -> None:
    """`ConfigError` unless an image comes in just one of two forms."""
    if (pixel_values is None) == (prefix is None):
        raise ConfigError("give either pixel_values or prefix", item="forward")


def text_and_mask(
    encode_text: Callable[[Tensor, Tensor], Tensor],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    text_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """States (B, L, D) of texts, encoded unless they are given, and their mask (B, L), all ones unless it is given.

    Raises:
        ConfigError: neither ids nor states. ShapeError: a mask of another shape.
    """
    if text_states is None:
        if input_ids is None:
            raise ConfigError("give input_ids or text_states", item="forward")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return encode_text(input_ids, attention_mask), attention_mask
    if attention_mask is None:
        attention_mask = text_states.new_ones(text_states.shape[:2], dtype=torch.long)
    elif attention_mask.shape != text_states.shape[:2]:
        raise ShapeError(
            "mask and text states do not fit",
            item="attention_mask",
            found=tuple(attention_mask.shape),
            expected=tuple(text_states.shape[:2]),
        )
    return text_states, attention_mask


def check_rows(images: Tensor, texts: Tensor) -> None:
    """`ShapeError` unless there is a row of image tokens for each text."""
    if images.shape[0] != texts.shape[0]:
        raise ShapeError(
            "one image per text is needed, or an image_index",
            item="pixel_values",
            found=images.shape[0],
            expected=texts.shape[0],
        )


def check_images_of_texts(pixel_values: Tensor | None, prefix: VisionPrefix | None, batch: int, n: int) -> None:
    """Texts about n images each.

    Args:
        pixel_values: (B, n, 3, H, W). prefix: B n rows, in its place. batch: B.
    Raises:
        ConfigError: neither, or both. ShapeError: another number of images.
    """
    check_one_source(pixel_values, prefix)
    if prefix is None and (pixel_values.ndim != 5 or pixel_values.shape[:2] != (batch, n)):
        item, found, expected = "pixel_values", tuple(pixel_values.shape), f"({batch}, {n}, 3, H, W)"
    elif prefix is not None and prefix.states.shape[0] != batch * n:
        item, found, expected = "prefix", f"{prefix.states.shape[0]} rows", f"{batch * n} rows, text by text"
    else:
        return
    raise ShapeError(f"{n} image(s) for each of {batch} text(s) are needed", item=item, found=found, expected=expected)
