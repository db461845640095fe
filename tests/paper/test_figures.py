"""The kept-patch figure: pixels of dropped patches fade, those of kept ones stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trips.errors import ShapeError
from trips.paper.figures import draw_selection, faded, selection_row
from trips.selection import Selection


@pytest.mark.parametrize("size", [(8, 12), (9, 13)], ids=["whole patches", "odd"])
def test_faded_pixel_by_pixel(size):
    image = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
    kept = np.array([True, False, False, False, True, True])
    result = faded(image, kept, (2, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            patch = (y * 2 // size[0]) * 3 + x * 3 // size[1]
            if kept[patch]:
                assert (result[y, x] == image[y, x]).all()
            else:
                assert (result[y, x] > 230).all()


def test_faded_refuses_another_grid():
    with pytest.raises(ShapeError, match="kept"):
        faded(np.zeros((4, 4, 3), np.uint8), np.zeros(5, bool), (2, 2))


def test_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    image = np.full((16, 16, 3), 90, np.uint8)
    candidates = torch.tensor([[0, 1, 3, -1]])
    record = Selection(
        2, torch.rand(1, 4), torch.rand(1, 4), candidates, torch.tensor([[1, 3]]), torch.tensor([[1, -1]])
    )
    row = selection_row("what colour is the star ?", image, [record], 0, 4)
    assert row.layers == (2,) and row.kept[0].tolist() == [False, True, False, False]
    path = draw_selection([row, row], (2, 2), tmp_path / "new" / "kept.png", "title")
    assert Image.open(path).size[0] > 300
