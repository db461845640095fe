"""Generated pictures of the embedded corpus: what a scene holds and how it is painted, in numpy alone.

A scene has four background bands (sky, hill, field, lake) and objects of one by two patches on the patch grid. All is
placed by chance such that neither the picture nor the words alone favour an answer: band colours and textures are
permutations, shapes occur at most once, object colours occur in fixed counts. `scene_texts` asks about these scenes and
`scenes` joins both. The paper has no such corpus; here the patches that a text speaks of are known, so that a selection
can be scored.

Legend: S side of the picture in pixels, P side of a patch in pixels, G = S / P patches a side, N = G * G patches in row
order. A box is (x0, y0, x1, y1) in pixels, x1 and y1 excluded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trips.data.scene_looks import (
    BACKGROUND_COLOURS,
    BANDS,
    COLOURS,
    FILLS,
    SHAPES,
    TEXTURES,
    glyph_masks,
    texture_maps,
)
from trips.errors import ConfigError

Box = tuple[int, int, int, int]

NUM_PATCH_LABELS = 1 + len(SHAPES) * len(COLOURS)
"""Classes of `Scene.patch_labels`: background, and each shape in each colour."""

QUESTION_TYPES = ("object", "background", "relation", "existence", "counting")

# Beyond eight objects some colours get more than one: spread so that counts 1, 2 and 3 all occur from 11 objects on.
_EXTRA_COUNTS = ((), (1,), (1, 1), (2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 1, 1), (2, 2, 2, 1), (2, 2, 2, 1, 1))


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the embedded corpus.

    Args:
        image_size: side S of the square picture in pixels, a multiple of `patch_size` and at least seven patches.
        patch_size: side P of a patch in pixels, at least 8 (a glyph needs that many).
        num_objects: objects in a scene, 1 to 16; from 8 on every colour occurs, from 11 on counts 1, 2 and 3 occur.
        noise: each channel of each pixel is moved by a uniform whole number of -noise to +noise levels.
        mixture: question types and their weights (need not sum to 1), used where no types are asked for.
    Raises:
        ConfigError: a value is outside these bounds.
    """

    image_size: int = 64
    patch_size: int = 8
    num_objects: int = 12
    noise: int = 6
    mixture: tuple[tuple[str, float], ...] = (
        ("object", 0.4),
        ("background", 0.2),
        ("relation", 0.1),
        ("existence", 0.15),
        ("counting", 0.15),
    )

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "num_objects", "noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError("must be a whole number", item=f"SceneConfig.{name}", found=value)
        if self.patch_size < 8:
            raise ConfigError(
                "is too small for the glyphs", item="SceneConfig.patch_size", found=self.patch_size, expected=">= 8"
            )
        if self.image_size % self.patch_size or self.image_size < 7 * self.patch_size:
            raise ConfigError(
                "does not fit the patches",
                item="SceneConfig.image_size",
                found=self.image_size,
                expected=f"a multiple of patch_size {self.patch_size} and at least {7 * self.patch_size}",
            )
        check_num_objects(self, self.num_objects)
        if not 0 <= self.noise <= 40:
            raise ConfigError("is out of range", item="SceneConfig.noise", found=self.noise, expected="0 to 40 levels")
        for entry in self.mixture:
            if len(entry) != 2 or entry[0] not in QUESTION_TYPES:
                raise ConfigError(
                    "is not a type with its weight",
                    item="SceneConfig.mixture",
                    found=entry,
                    expected=f"(type, weight) with one of {QUESTION_TYPES}",
                )
            if not isinstance(entry[1], (int, float)) or not 0 <= entry[1] < float("inf"):
                raise ConfigError(
                    f"weight of {entry[0]}", item="SceneConfig.mixture", found=entry[1], expected="finite and >= 0"
                )
        if len({kind for kind, _ in self.mixture}) < len(self.mixture):
            raise ConfigError("names a type twice", item="SceneConfig.mixture", found=self.mixture)
        if sum(weight for _, weight in self.mixture) <= 0:
            raise ConfigError("no type has a weight", item="SceneConfig.mixture", found=self.mixture)


@dataclass(frozen=True)
class SceneObject:
    """One object: names of its shape, colour and fill, and its footprint of 2P x P pixels on the patch grid."""

    shape: str
    colour: str
    fill: str
    box: Box


@dataclass(frozen=True)
class Region:
    """One background band: its name, colour, texture, and boxes that tile exactly its pixels (its edges are wavy)."""

    name: str
    colour: str
    texture: str
    boxes: tuple[Box, ...]

    @property
    def box(self) -> Box:
        """The tight box around the whole band, in pixels."""
        x0, y0, x1, y1 = zip(*self.boxes, strict=True)
        return min(x0), min(y0), max(x1), max(y1)


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture and what is on it.

    Args:
        image: (S, S, 3) uint8, RGB.
        objects: in reading order of their places.
        regions: the four bands from top to bottom.
        index: the number of the scene in its corpus.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    regions: tuple[Region, ...]
    index: int

    def patch_labels(self, patch_size: int) -> np.ndarray:
        """What is on each patch, as classes for an auxiliary loss.

        Args:
            patch_size: side of a patch in pixels; with the corpus's own size an object labels exactly its two patches.
        Returns:
            (N,) int64 in [0, NUM_PATCH_LABELS): 0 background, else 1 + shape * 8 + colour of the object whose footprint
            holds the patch's centre.
        Raises:
            ConfigError: the patch size does not divide the picture's side.
        """
        side = self.image.shape[0]
        if patch_size < 1 or side % patch_size:
            raise ConfigError("does not divide the picture", item="patch_size", found=patch_size, expected=f"of {side}")
        half, labels = patch_size // 2, np.zeros((side // patch_size,) * 2, dtype=np.int64)
        for thing in self.objects:
            # The first centre at or after an edge e is the patch number ceil((e - half) / patch_size).
            x0, y0, x1, y1 = (-((half - edge) // patch_size) for edge in thing.box)
            labels[y0:y1, x0:x1] = 1 + SHAPES.index(thing.shape) * len(COLOURS) + _COLOUR_NAMES.index(thing.colour)
        return labels.reshape(-1)


_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_VALUES = np.array(list(COLOURS.values()), dtype=np.int16)
_BACKGROUND_NAMES = tuple(BACKGROUND_COLOURS)
_BACKGROUND_VALUES = np.array(list(BACKGROUND_COLOURS.values()), dtype=np.int16)


def check_num_objects(config: SceneConfig, num_objects: int) -> None:
    """Raise ConfigError unless so many objects fit every possible arrangement of the corpus's grid."""
    grid = config.image_size // config.patch_size
    # A row that takes no further object holds at least ceil((G - 1) / 3) of them, whatever the order of placing.
    most = min(len(SHAPES), grid * -(-(grid - 1) // 3))
    if isinstance(num_objects, bool) or not isinstance(num_objects, int) or not 1 <= num_objects <= most:
        raise ConfigError("is out of range", item="num_objects", found=num_objects, expected=f"1 to {most}")


def _colour_counts(num_objects: int, rng: np.random.Generator) -> list[int]:
    """Colour number of each object: all eight with fixed counts, or distinct ones where there are fewer than eight."""
    order = rng.permutation(len(COLOURS)).tolist()
    if num_objects < len(order):
        return order[:num_objects]
    extra = _EXTRA_COUNTS[num_objects - len(order)]
    return order + [colour for colour, more in zip(order, extra, strict=False) for _ in range(more)]


def draw_scene(config: SceneConfig, rng: np.random.Generator, index: int, num_objects: int) -> Scene:
    """Paint one scene: bands with textures, grey specks that nothing asks about, objects, noise.

    A scene of fewer than eight objects is easy: colours and textures of its bands are independent and may repeat, so
    that the picture as a whole tells something of the answers. Balanced scenes tell nothing before a word is bound to
    a place, which leaves a model that starts from nothing without a slope to follow.

    Args:
        config: sizes and noise.
        rng: the scene's own generator; all chance comes from it.
        index: kept in the scene.
        num_objects: already checked by `check_num_objects`.
    Returns:
        the scene; its objects' places are independent of their shapes, colours and fills.
    """
    size, patch = config.image_size, config.patch_size
    grid = size // patch

    # Bands. One wave shifts all edges alike, so each band keeps its height in every column.
    reach, least = patch // 4, -(-3 * patch // 2)
    cuts = np.sort(rng.integers(0, size - 4 * least - 2 * reach + 1, size=3)) + reach + least * np.arange(1, 4)
    phase, amplitude = rng.random(2)
    wave = np.rint(amplitude * reach * np.sin(2 * np.pi * (np.arange(size) / size + phase))).astype(int)
    band_of = (np.arange(size)[:, None, None] >= (cuts + wave[:, None])[None]).sum(axis=2)  # (S, S) of 0..3
    colours, textures = rng.permutation(4), rng.permutation(4)
    if num_objects < len(COLOURS):  # an easy scene, see `draw_scene`
        colours, textures = rng.integers(0, 4, size=4), rng.integers(0, 4, size=4)
    shift_y, shift_x = rng.integers(0, patch, size=2).tolist()
    maps = texture_maps(size, patch)[:, shift_y : shift_y + size, shift_x : shift_x + size]
    texture = np.take_along_axis(maps, textures[band_of][None], axis=0)[0]
    image = _BACKGROUND_VALUES[colours[band_of]] + texture[:, :, None]  # (S, S, 3) int16
    starts = [0, *(np.flatnonzero(np.diff(wave)) + 1).tolist(), size]
    runs = [(x0, x1, [0, *(cuts + wave[x0]).tolist(), size]) for x0, x1 in zip(starts, starts[1:], strict=False)]
    regions = tuple(
        Region(
            name=name,
            colour=_BACKGROUND_NAMES[colours[band]],
            texture=TEXTURES[textures[band]],
            boxes=tuple((x0, edges[band], x1, edges[band + 1]) for x0, x1, edges in runs),
        )
        for band, name in enumerate(BANDS)
    )

    for x, y, length, upright, level in rng.integers(0, (size, size, 3, 2, 100), size=(6, 5)).tolist():
        long, thin = (length + 1) * patch // 8, patch // 8
        image[y : y + (long if upright else thin), x : x + (thin if upright else long)] = 80 + level

    # Objects: places in random order, taken where free.
    masks = glyph_masks(patch)
    height, width = masks.shape[2:]
    colour_of = _colour_counts(num_objects, rng)
    shape_of = rng.permutation(len(SHAPES)).tolist()[:num_objects]
    chance = rng.integers(0, (2, 2 * patch - width + 1, patch - height + 1), size=(num_objects, 3)).tolist()
    used: set[int] = set()
    objects: list[SceneObject] = []
    for place in rng.permutation(grid * (grid - 1)).tolist():
        row, column = divmod(place, grid - 1)
        cell = row * grid + column
        if cell in used or cell + 1 in used:
            continue
        used.update((cell, cell + 1))
        colour, shape, (fill, move_x, move_y) = (part[len(objects)] for part in (colour_of, shape_of, chance))
        x, y = column * patch, row * patch
        view = image[y + move_y : y + move_y + height, x + move_x : x + move_x + width]
        view[masks[shape, fill]] = _COLOUR_VALUES[colour]
        box = (x, y, x + 2 * patch, y + patch)
        objects.append(SceneObject(SHAPES[shape], _COLOUR_NAMES[colour], FILLS[fill], box))
        if len(objects) == num_objects:
            break

    if config.noise:
        image += rng.integers(-config.noise, config.noise + 1, size=image.shape, dtype=np.int8)
    objects.sort(key=lambda thing: (thing.box[1], thing.box[0]))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), tuple(objects), regions, index)
