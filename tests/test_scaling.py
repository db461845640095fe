"""Down-scaling: sizes in whole patches, pixels as Pillow has them, and the scale for a number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trips.errors import ConfigError, ShapeError
from trips.scaling import downscaled, scale_for_tokens, scaled_size

scales = st.floats(0.01, 1.0, allow_nan=False)


@given(height=st.integers(8, 700), width=st.integers(8, 700), scale=scales, patch=st.sampled_from([8, 14, 16]))
def test_sides_are_the_nearest_whole_patches(height, width, scale, patch) -> None:
    for side, found in zip((height, width), scaled_size((height, width), scale, patch), strict=True):
        assert found % patch == 0 and found >= patch
        assert found == patch or abs(found - side * scale) <= patch / 2 + 1e-6


def test_a_smaller_image_is_what_pillow_makes_of_it() -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (48, 64, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((64, 48), Image.Resampling.BOX))
    expected = np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC)).astype(np.float32)
    found = downscaled(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float(), 0.5, 8)
    assert found.shape == (1, 3, 24, 32)
    torch.testing.assert_close(found[0].permute(1, 2, 0), torch.from_numpy(expected), rtol=0, atol=1.5)


def test_nothing_changes_at_scale_one() -> None:
    images = torch.randn(2, 3, 32, 48)
    assert downscaled(images, 1.0, 16) is images
    assert downscaled(images, 0.99, 16) is images
    assert downscaled(torch.randn(1, 3, 40, 40), 1.0, 16).shape == (1, 3, 48, 48)
    assert downscaled(images.bfloat16(), 0.5, 16).dtype == torch.bfloat16
    assert downscaled(images, 0.01, 16).shape == (2, 3, 16, 16)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), share=st.floats(0.01, 1), patch=st.sampled_from([8, 16]))
def test_no_other_scale_comes_nearer(rows, columns, share, patch) -> None:
    """Of those that make a side whole patches; for a square, of all there are."""
    size = (rows * patch, columns * patch)
    wanted = max(1, round(rows * columns * share))

    def tokens(scale: float) -> int:
        height, width = scaled_size(size, scale, patch)
        return height * width // patch**2

    scale = scale_for_tokens(size, patch, wanted)
    assert 0 < scale <= 1
    miss = abs(tokens(scale) - wanted)
    for count, side in [(i, rows) for i in range(1, rows + 1)] + [(j, columns) for j in range(1, columns + 1)]:
        assert miss <= abs(tokens(count / side) - wanted)
    if rows == columns:
        assert miss == min(abs(count**2 - wanted) for count in range(1, rows + 1))


def test_the_papers_image() -> None:
    scale = scale_for_tokens(384, 16, 404)
    assert scaled_size((384, 384), scale, 16) == (320, 320)
    assert scale_for_tokens(384, 16, 576) == 1.0
    assert downscaled(torch.zeros(1, 3, 384, 384), scale, 16).shape == (1, 3, 320, 320)


def test_misuse_is_named() -> None:
    for scale in (0, 1.01, -1, float("nan")):
        with pytest.raises(ConfigError, match="scale"):
            downscaled(torch.zeros(1, 3, 16, 16), scale, 16)
    with pytest.raises(ShapeError, match="pixel_values"):
        downscaled(torch.zeros(3, 16, 16), 0.5, 16)
    for tokens in (0, 577):
        with pytest.raises(ConfigError, match="1 to 576"):
            scale_for_tokens(384, 16, tokens)
