"""trips.data.transforms: each operation against plain numpy, the crop by its distribution, the flip by its inverse."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trips.data.transforms import OPERATIONS, TrainTransform, crop_box, randaugment, swap_sides
from trips.errors import ConfigError, DataError
from trips.images import OpenedImage, load_image

STRENGTHS = (-1.0, -0.7, 0.0, 0.35, 0.7, 1.0)


def picture(width: int = 23, height: int = 17, seed: int = 0) -> Image.Image:
    """Smooth RGB noise with a range well inside 0 to 255, so that every operation has something to do."""
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 200, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def warp(array: np.ndarray, inverse: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Bilinear sampling pixel by pixel: the place p of the result shows `inverse @ p + offset`; grey 128 outside."""
    height, width = array.shape[:2]
    result = np.full(array.shape, 128.0)
    for row in range(height):
        for column in range(width):
            x, y = inverse @ (column + 0.5, row + 0.5) + offset
            if not (0 <= x < width and 0 <= y < height):
                continue
            x, y = x - 0.5, y - 0.5  # from places to pixel centres
            left, top = math.floor(x), math.floor(y)
            mixed = np.zeros(3)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                near = array[min(max(top + i, 0), height - 1), min(max(left + j, 0), width - 1)]
                mixed += near * ((y - top) if i else (1 - y + top)) * ((x - left) if j else (1 - x + left))
            result[row, column] = mixed
    return result


# Operations


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometry_is_the_forward_map_undone_pixel_by_pixel(name: str, strength: float) -> None:
    image = picture(61, 47)
    forward, shift = np.eye(2), np.zeros(2)
    if name.startswith("shear"):
        forward[(0, 1) if name.endswith("x") else (1, 0)] = 0.3 * strength
    elif name.startswith("translate"):
        axis = 0 if name.endswith("x") else 1
        shift[axis] = round(strength * image.size[axis] * 10 / 256)
    else:
        angle = -math.radians(30 * strength)  # the y axis points down
        forward = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        middle = np.array(image.size) / 2
        shift = middle - forward @ middle
    inverse = np.linalg.inv(forward)
    expected = warp(pixels(image), inverse, -inverse @ shift)
    found = pixels(OPERATIONS[name](image, strength))
    # Pillow rounds; a place on the very edge may fall on either side of it.
    assert np.mean(np.abs(found - expected) > 1.01) < 0.003
    if strength:
        assert (found != pixels(image)).mean() > 0.3
    else:
        assert np.array_equal(found, pixels(image))


def test_directions_at_sight() -> None:
    array = np.zeros((40, 40, 3), np.uint8)
    array[5, 20] = 255  # above the middle
    dot = Image.fromarray(array)

    def place(name: str, strength: float) -> tuple[int, int]:
        found = pixels(OPERATIONS[name](dot, strength))[..., 0].copy()
        found[found == 128] = 0
        row, column = np.unravel_index(found.argmax(), found.shape)
        return int(row), int(column)

    assert place("translate_x", 1.0) == (5, 22) and place("translate_y", -1.0) == (3, 20)
    assert place("rotate", 1.0)[1] < 20 < place("rotate", -1.0)[1]  # counter-clockwise where positive
    assert place("shear_x", 1.0)[1] > 20 and place("shear_y", 1.0)[0] > 5


@pytest.mark.parametrize("strength", STRENGTHS)
def test_brightness_and_sharpness_blend_with_black_and_with_blur(strength: float) -> None:
    image, factor = picture(), 0.1 + 1.8 * abs(strength)
    array = pixels(image)
    bright = np.clip(array * factor, 0, 255)
    assert np.abs(pixels(OPERATIONS["brightness"](image, strength)) - bright).max() <= 1
    blurred = array.copy()  # the border has no whole neighbourhood and stays
    for row in range(1, array.shape[0] - 1):
        for column in range(1, array.shape[1] - 1):
            around = array[row - 1 : row + 2, column - 1 : column + 2].sum((0, 1))
            blurred[row, column] = (around + 4 * array[row, column]) / 13
    sharp = np.clip(blurred + factor * (array - blurred), 0, 255)
    assert np.abs(pixels(OPERATIONS["sharpness"](image, strength)) - sharp).max() <= 2


def test_autocontrast_and_equalise_by_channel() -> None:
    image = picture()
    array = pixels(image)
    low, high = array.min((0, 1)), array.max((0, 1))
    assert np.abs(pixels(OPERATIONS["autocontrast"](image, 0.7)) - (array - low) * 255 / (high - low)).max() <= 1

    image = picture(64, 48)
    array, found = pixels(image), pixels(OPERATIONS["equalise"](image, 0.7))
    for channel in range(3):
        before, after = array[..., channel].ravel(), found[..., channel].ravel()
        order = np.argsort(before, kind="stable")
        assert (np.diff(after[order]) >= 0).all()  # monotone: brighter stays brighter
        # Each grey goes to the share of pixels below it.
        share = np.array([(before < value).mean() for value in before])
        assert np.abs(after / 255 - share).max() < 0.05
    assert np.array_equal(pixels(OPERATIONS["identity"](image, 0.7)), array)


def test_the_operations_are_those_of_the_recipe_and_touch_no_colour() -> None:
    assert len(OPERATIONS) == 10
    grey = picture().convert("L").convert("RGB")
    for operation in OPERATIONS.values():
        found = np.asarray(operation(grey, 0.7))
        assert found.shape == (17, 23, 3) and (found == found[..., :1]).all()


def test_randaugment_draws_evenly_and_applies_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    for name in OPERATIONS:
        record = lambda image, strength, name=name: seen.append((name, strength)) or image  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, record)
    rng, draws = np.random.default_rng(0), 4000
    for _ in range(draws):
        randaugment(picture(), rng, 2, 7)
    assert abs(len(seen) - draws) < 4 * math.sqrt(draws / 2)  # 2 drawn, each with probability 0.5
    assert {strength for _, strength in seen} == {0.7, -0.7}
    assert abs(sum(strength < 0 for _, strength in seen) - len(seen) / 2) < 4 * math.sqrt(len(seen) / 4)
    counts = np.array([sum(name == other for other, _ in seen) for name in OPERATIONS])
    assert (np.abs(counts - len(seen) / 10) < 4 * math.sqrt(len(seen) / 10)).all()


# Crop


@given(
    st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_a_crop_lies_inside_and_keeps_area_and_ratio(
    width: int, height: int, low: float, more: float, seed: int
) -> None:
    scale = (low, low + (1 - low) * more)
    left, top, right, bottom = crop_box(width, height, scale, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    crop_width, crop_height = right - left, bottom - top
    # Rounding to whole pixels moves each side by half a pixel.
    ratios = [(crop_width + a) / max(crop_height - a, 1e-9) for a in (-0.51, 0.51)]
    assert ratios[0] <= 4 / 3 and ratios[1] >= 3 / 4
    largest = min(width * height, min(width, height) ** 2 * 4 / 3)
    if scale[1] * width * height < 0.5 * largest and scale[0] * width * height > 4:  # no draw fails, no fallback
        areas = [(crop_width + a) * (crop_height + a) / (width * height) for a in (-0.51, 0.51)]
        assert areas[0] <= scale[1] and areas[1] >= scale[0]


def test_distribution_of_crops() -> None:
    rng, size = np.random.default_rng(0), 1000
    boxes = np.array([crop_box(size, size, (0.2, 0.6), rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]

    def distance(sample: np.ndarray) -> float:
        """Kolmogorov's distance from the uniform distribution on [0, 1]; 0.03 has a chance of 0.15 % at 4,000."""
        ordered = np.sort(sample)
        return float(np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max())

    assert distance((width * height / size**2 - 0.2) / 0.4) < 0.03
    assert distance((np.log(width / height) / math.log(4 / 3) + 1) / 2) < 0.03
    assert distance((boxes[:, 0] + rng.random(len(boxes))) / (size - width + 1)) < 0.03
    assert distance((boxes[:, 1] + rng.random(len(boxes))) / (size - height + 1)) < 0.03


def test_crops_reach_every_edge_equally_often() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(5, 5, (0.6, 0.7), rng) for _ in range(3000)])
    near = [(boxes[:, side] == edge).mean() for side, edge in ((0, 0), (1, 0), (2, 5), (3, 5))]
    assert 0.4 < min(near) and max(near) - min(near) < 0.05


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1))]
)
def test_middle_of_a_strip(size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert crop_box(*size, (1.0, 1.0), np.random.default_rng(0)) == expected


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a man left of a bus", "a man right of a bus"),
        ("Left, then RIGHT.", "Right, then LEFT."),
        ("a left-hand drive", "a right-hand drive"),
        ("the leftmost cup, rightward", "the rightmost cup, leftward"),
        ("left_hand and right's", "right_hand and left's"),
        ("leftover bright copyright lefty", "leftover bright copyright lefty"),
        ("élleft left", "élleft right"),
        ("", ""),
    ],
)
def test_sides_by_example(text: str, expected: str) -> None:
    assert swap_sides(text) == expected
    assert swap_sides(expected) == text


@given(st.lists(st.sampled_from(["left", "Right", "LEFT", "leftover", "-", " ", "most", "ward", "é", "1", "_"])))
def test_swapping_twice_changes_nothing(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert swap_sides(swap_sides(text)) == text


# Whole transform


@given(st.integers(0, 2**32 - 1), st.sampled_from(["none", "swap"]), st.integers(1, 90), st.integers(1, 90))
def test_pure_function_of_the_generator(seed: int, flip: str, width: int, height: int) -> None:
    image = picture(width, height)
    before, transform = image.tobytes(), TrainTransform((16, 20), flip=flip)
    first, text = transform(image, np.random.default_rng(seed), "a cup left of it")
    np.random.seed(seed % 1000)  # the global generator has no part in it
    again, text_again = pickle.loads(pickle.dumps(transform))(image, np.random.default_rng(seed), "a cup left of it")
    assert first.shape == (16, 20, 3) and first.dtype == np.uint8 and first.flags.writeable
    assert np.array_equal(first, again) and text == text_again
    assert image.tobytes() == before
    if flip == "none":
        assert text == "a cup left of it"


def test_a_flip_mirrors_the_picture_exactly_where_it_swaps_the_words() -> None:
    image, plain = picture(64, 64), TrainTransform(16, (1.0, 1.0), None)
    flipping, flips = TrainTransform(16, (1.0, 1.0), None, "swap"), 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        straight, _ = plain(image, copy.deepcopy(rng), "left")
        array, text = flipping(image, rng, "left")
        flips += text == "right"
        assert np.array_equal(array, straight[:, ::-1] if text == "right" else straight)
    assert 110 < flips < 190


def test_crop_without_augmentation_is_a_crop_then_a_resize() -> None:
    image, rng = picture(300, 200), np.random.default_rng(5)
    box = crop_box(300, 200, (0.2, 1.0), copy.deepcopy(rng))
    array, _ = TrainTransform(32, randaugment=None)(image, rng, "")
    plain = np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BICUBIC))
    # In one pass the outermost pixels may see a little beyond the crop.
    assert np.abs(array.astype(int) - plain)[2:-2, 2:-2].max() <= 1


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@given(
    seed=st.integers(0, 2**32 - 1),
    side=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    form=st.sampled_from(["JPEG", "PNG"]),
    orientation=st.sampled_from([1, 6]),
)
def test_decoding_what_is_small_is_exactly_a_call(
    seed: int, side: tuple[int, int], form: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # A crop of less than twice 16 pixels, or a format that knows no draft.
    factor = 1 if form == "JPEG" else 5
    data = encoded(picture(side[0] * factor, side[1] * factor), form, exif=exif)
    transform, rng, again = TrainTransform(16, flip="swap"), np.random.default_rng(seed), np.random.default_rng(seed)
    array, text = transform.decode(data, rng, "a cup left of it")
    expected, expected_text = transform(load_image(data), again, "a cup left of it")
    assert np.array_equal(array, expected) and text == expected_text and rng.random() == again.random()


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(120, 500), height=st.integers(120, 500))
def test_decoding_what_is_large_takes_the_same_crop_of_no_fewer_pixels(seed: int, width: int, height: int) -> None:
    data = encoded(picture(width, height), "JPEG", quality=95)
    transform, rng, again = TrainTransform((16, 20), randaugment=None), *map(np.random.default_rng, (seed, seed))
    with pytest.MonkeyPatch.context() as patch:
        decoded: list[Image.Image] = []
        load = OpenedImage.load
        patch.setattr(OpenedImage, "load", lambda self, min_size: decoded.append(load(self, min_size)) or decoded[0])
        array, _ = transform.decode(data, rng, "")
    left, top, right, bottom = crop_box(width, height, transform.scale, np.random.default_rng(seed))
    factor = min((right - left) / 20, (bottom - top) / 16)  # how much finer the crop is than the result
    reduction = width / decoded[0].width
    assert reduction <= factor * 1.01 or reduction == 1
    assert reduction > min(factor / 2, 8) * 0.95  # a coarser one would still do, if there was one
    expected, _ = transform(load_image(data), again, "")
    # One pixel to the side would be 1 on the average already.
    assert np.abs(array.astype(int) - expected).mean() < 0.8 and np.abs(array.astype(int) - expected).max() < 8


def test_real_photo(shared_dir) -> None:
    import tarfile

    with tarfile.open(shared_dir / "data" / "flickr8k-mini-val-000.tar") as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
        image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
    arrays = [TrainTransform(64)(image, np.random.default_rng(seed), "a dog")[0] for seed in range(20)]
    assert len({array.tobytes() for array in arrays}) == 20
    assert all(array.std() > 5 for array in arrays)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": (8, True)}, "image_size"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.6, 0.5)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": 0.5}, "scale"),
        ({"randaugment": (2, 11)}, "randaugment"),
        ({"randaugment": (-1, 3)}, "randaugment"),
        ({"randaugment": (2, 7.5)}, "randaugment"),
        ({"flip": "mirror"}, "flip"),
    ],
)
def test_wrong_options_are_named(options: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainTransform(**{"image_size": 8, **options})


def test_only_rgb() -> None:
    with pytest.raises(DataError, match="not RGB"):
        TrainTransform(8)(Image.new("L", (9, 9)), np.random.default_rng(0), "")
