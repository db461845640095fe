"""How the things of the embedded corpus look: names, colours, glyphs and textures, computed once for each patch size.

Legend: S side of the picture in pixels, P side of a patch in pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (40, 180, 50),
    "blue": (40, 70, 235),
    "yellow": (248, 228, 30),
    "orange": (250, 135, 15),
    "purple": (140, 40, 190),
    "pink": (250, 120, 190),
    "cyan": (40, 215, 225),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (220, 220, 220),
    "grey": (132, 132, 132),
    "brown": (112, 78, 46),
    "black": (34, 34, 34),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
BANDS = ("sky", "hill", "field", "lake")
FILLS = ("solid", "hollow")

# Every glyph is 14 x 7 cells; the cell it may move by inside its 16 x 8 footprint is the jitter.
_GLYPH_WIDTH, _GLYPH_HEIGHT = 14, 7
_GLYPH_ART = (
    (
        ("circle", "box", "triangle", "bow"),
        """
        ....######.... ############## ......##...... ##..........##
        ..##########.. ############## .....####..... ####......####
        .############. ############## ....######.... ######..######
        .############. ############## ...########... ##############
        .############. ############## ..##########.. ######..######
        ..##########.. ############## .############. ####......####
        ....######.... ############## ############## ##..........##
        """,
    ),
    (
        ("cross", "star", "heart", "arrow"),
        """
        .....####..... ......##...... ..####..####.. ........##....
        .....####..... .....####..... .############. ........####..
        ############## ############## ############## #############.
        ############## ..##########.. .############. ##############
        ############## ...########... ...########... #############.
        .....####..... ..####..####.. .....####..... ........####..
        .....####..... .###......###. ......##...... ........##....
        """,
    ),
    (
        ("moon", "house", "fish", "cup"),
        """
        ...#######.... ......##...... ...#####....## ##########....
        .######....... ...########... .#########.### #############.
        #####......... ############## ############## ##########..##
        #####......... ..##########.. ############## ##########..##
        #####......... ..####..####.. ############## #############.
        .######....... ..####..####.. .#########.### ##########....
        ...#######.... ..####..####.. ...#####....## .########.....
        """,
    ),
    (
        ("crown", "boot", "mushroom", "bone"),
        """
        ##....##....## #####......... ....######.... ####......####
        ###..####..### #####......... .############. ####......####
        ####.####.#### #####......... ############## ##############
        ############## ########...... ############## ##############
        ############## ############.. .....####..... ##############
        ############## ############## .....####..... ####......####
        ############## ############## ....######.... ####......####
        """,
    ),
)
SHAPES: tuple[str, ...] = tuple(name for names, _ in _GLYPH_ART for name in names)

_TEXTURE_DEPTH = 44.0  # levels of brightness between the light and the dark part of a texture


@lru_cache(maxsize=8)
def glyph_masks(patch_size: int) -> np.ndarray:
    """(16 shapes, 2 fills, 7P/8, 14P/8) bool masks of the glyphs, in the order of SHAPES and FILLS."""
    cells = np.stack(
        [
            np.array([[cell == "#" for cell in row.split()[column]] for row in art.split("\n") if row.strip()])
            for names, art in _GLYPH_ART
            for column in range(len(names))
        ]
    )
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
    inside = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    masks = np.stack([cells, cells & ~inside], axis=1)
    height, width = (round(cells_a_side * patch_size / 8) for cells_a_side in (_GLYPH_HEIGHT, _GLYPH_WIDTH))
    rows = ((np.arange(height) + 0.5) * _GLYPH_HEIGHT / height).astype(int)
    columns = ((np.arange(width) + 0.5) * _GLYPH_WIDTH / width).astype(int)
    return masks[:, :, rows][:, :, :, columns]


@lru_cache(maxsize=8)
def texture_maps(image_size: int, patch_size: int) -> np.ndarray:
    """(4, S + P, S + P) int16 changes of brightness, each of mean zero; a scene cuts its own phase out of them."""
    period, dark = patch_size // 2, patch_size // 4
    steps = np.arange(image_size + patch_size) % period < dark
    across, down = np.broadcast_arrays(steps[None, :], steps[:, None])
    maps = [np.zeros(across.shape), across, across & down, across ^ down]
    return np.stack([np.rint((m - np.mean(m)) * _TEXTURE_DEPTH) for m in maps]).astype(np.int16)
