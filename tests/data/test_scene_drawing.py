"""Scenes of the embedded corpus: the picture holds what the record says, and things are told apart by their looks."""

from __future__ import annotations

import numpy as np
import pytest

from trips.data.scene_looks import glyph_masks
from trips.data.scenes import (
    BACKGROUND_COLOURS,
    BANDS,
    COLOURS,
    NUM_PATCH_LABELS,
    SHAPES,
    TEXTURES,
    SceneConfig,
    SceneCorpus,
)
from trips.errors import ConfigError

CORPUS = SceneCorpus(seed=3)
LARGE = SceneConfig(image_size=154, patch_size=14, num_objects=16)


@pytest.mark.parametrize("config", [SceneConfig(), LARGE, SceneConfig(image_size=63, patch_size=9)])
def test_pictures_hold_what_they_say(config: SceneConfig) -> None:
    corpus, patch = SceneCorpus(config, seed=1), config.patch_size
    for index in range(12):
        scene = corpus.scene(index)
        image = scene.image.astype(int)
        assert image.shape == (config.image_size, config.image_size, 3) and scene.image.dtype == np.uint8
        assert len(scene.objects) == config.num_objects
        taken = np.zeros(image.shape[:2], dtype=int)
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert not any(edge % patch for edge in thing.box) and (x1 - x0, y1 - y0) == (2 * patch, patch)
            assert 0 <= x0 and 0 <= y0 and x1 <= config.image_size and y1 <= config.image_size
            taken[y0:y1, x0:x1] += 1
            inside, nominal = image[y0:y1, x0:x1], np.array(COLOURS[thing.colour])
            painted = inside[np.abs(inside - nominal).max(axis=-1) <= config.noise]
            assert len(painted) >= 0.15 * 2 * patch * patch
            assert np.abs(painted.mean(axis=0) - nominal).max() <= 4  # noise averages out, less what is clipped at 255
        assert taken.max() == 1
        # No pixel outside the footprints has an object's colour: object colours are far from grey and brown.
        around = image[taken == 0]
        for value in COLOURS.values():
            assert (np.abs(around - np.array(value)).max(axis=-1) > config.noise).all()

        assert [region.name for region in scene.regions] == list(BANDS)
        assert sorted(r.colour for r in scene.regions) == sorted(BACKGROUND_COLOURS)
        assert sorted(r.texture for r in scene.regions) == sorted(TEXTURES)
        tiles = np.zeros(image.shape[:2], dtype=int)
        spread = {}
        for region in scene.regions:
            own = np.zeros(image.shape[:2], dtype=bool)
            for x0, y0, x1, y1 in region.boxes:
                assert region.box[0] <= x0 < x1 <= region.box[2] and region.box[1] <= y0 < y1 <= region.box[3]
                own[y0:y1, x0:x1] = True
                tiles[y0:y1, x0:x1] += 1
            assert own.sum(axis=0).min() >= 1.5 * patch
            free = image[own & (taken == 0)]
            nearest = min(
                BACKGROUND_COLOURS,
                key=lambda name: np.abs(free.mean(axis=0) - np.array(BACKGROUND_COLOURS[name])).sum(),
            )
            assert nearest == region.colour
            spread[region.texture] = np.median(np.abs(free - np.median(free, axis=0)).max(axis=-1))
        assert (tiles == 1).all()
        assert spread["plain"] <= config.noise < min(spread["striped"], spread["checked"])


@pytest.mark.parametrize("size, patch", [(64, 8), (154, 14)])
def test_without_noise_every_pixel_is_accounted_for(size: int, patch: int) -> None:
    corpus = SceneCorpus(SceneConfig(image_size=size, patch_size=patch, noise=0), seed=2)
    masks = glyph_masks(patch)
    for index in range(8):
        scene = corpus.scene(index)
        image, left_over = scene.image.astype(int), np.ones((size, size), dtype=bool)
        for region in scene.regions:
            for x0, y0, x1, y1 in region.boxes:
                # Its own colour, lighter or darker by the same in all channels.
                change = image[y0:y1, x0:x1] - np.array(BACKGROUND_COLOURS[region.colour])
                own = (change.max(axis=-1) == change.min(axis=-1)) & (np.abs(change).max(axis=-1) <= 40)
                left_over[y0:y1, x0:x1] = ~own
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            painted = (image[y0:y1, x0:x1] == np.array(COLOURS[thing.colour])).all(axis=-1)
            rows, columns = np.flatnonzero(painted.any(axis=1)), np.flatnonzero(painted.any(axis=0))
            glyph = masks[SHAPES.index(thing.shape), ("solid", "hollow").index(thing.fill)]
            tight = glyph[glyph.any(axis=1)][:, glyph.any(axis=0)]
            assert np.array_equal(painted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], tight)
            left_over[y0:y1, x0:x1] = False
        specks = image[left_over]
        assert (specks.max(axis=-1) == specks.min(axis=-1)).all()  # grey
        assert len(specks) <= 6 * 3 * (patch / 8) ** 2


def test_colours_and_shapes_occur_in_fixed_numbers() -> None:
    for index in range(30):
        things = CORPUS.scene(index).objects
        counts = sorted([sum(thing.colour == colour for thing in things) for colour in COLOURS], reverse=True)
        assert counts == [3, 2, 2, 1, 1, 1, 1, 1]
        assert len({thing.shape for thing in things}) == len(things)
    assert {thing.fill for thing in things} == {"solid", "hollow"}


def test_glyphs_are_distinct_even_when_moved() -> None:
    masks = glyph_masks(8)
    for fill in (0, 1):
        for a in range(len(SHAPES)):
            for b in range(a):
                for move in (-1, 0, 1):
                    moved = np.roll(masks[b, fill], move, axis=1)
                    assert (masks[a, fill] != moved).sum() >= 8, (SHAPES[a], SHAPES[b])
    assert (masks[:, 0].sum(axis=(1, 2)) > masks[:, 1].sum(axis=(1, 2)) + 3).all()  # hollow ones have a visible hole


@pytest.mark.parametrize("config", [SceneConfig(), LARGE])
def test_patch_labels_name_the_two_patches_of_each_object(config: SceneConfig) -> None:
    scene, patch = SceneCorpus(config).scene(4), config.patch_size
    grid = config.image_size // patch
    labels = scene.patch_labels(patch)
    assert labels.shape == (grid * grid,) and labels.dtype == np.int64
    expected = np.zeros(grid * grid, dtype=int)
    for number in range(grid * grid):
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            if x0 <= number % grid * patch < x1 and y0 <= number // grid * patch < y1:
                expected[number] = 1 + SHAPES.index(thing.shape) * 8 + list(COLOURS).index(thing.colour)
    assert np.array_equal(labels, expected) and labels.max() < NUM_PATCH_LABELS == 129
    half = scene.patch_labels(patch // 2).reshape(2 * grid, 2 * grid)
    assert np.array_equal(half[::2, ::2], half[1::2, 1::2]) and np.array_equal(half[::2, ::2].reshape(-1), labels)
    with pytest.raises(ConfigError, match="patch_size"):
        scene.patch_labels(patch - 1)
