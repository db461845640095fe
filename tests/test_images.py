"""trips.images: every kind of picture against independent arithmetic, and every damaged one by its message."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trips.errors import ConfigError, DataError
from trips.images import MAX_PIXELS, load_image, open_image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: what a decompression bomb looks like from outside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3)
    data = encode(Image.fromarray(pixels))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), Image.open(path), pixels]
    with path.open("rb") as file:
        for source in [*sources, file, Image.fromarray(pixels)]:
            image = load_image(source)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels)


@given(
    mode=st.sampled_from(
        ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "PA", "La", "RGBa"]
    ),
    width=st.integers(1, 33),
    height=st.integers(1, 33),
)
def test_any_mode_and_size_becomes_rgb_and_leaves_the_source_alone(mode: str, width: int, height: int) -> None:
    image = Image.new(mode, (width, height))
    before = image.tobytes()
    result = load_image(image)
    assert (result.mode, result.size) == ("RGB", (width, height))
    assert (image.mode, image.tobytes()) == (mode, before)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    array = noise(6, 4, 4 if mode == "RGBA" else 2)
    colour, alpha = array[..., :-1].astype(float), array[..., -1:].astype(float) / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (6, 4, 3))
    for source in (Image.fromarray(array, mode), encode(Image.fromarray(array, mode)), array):
        assert np.abs(np.asarray(load_image(source)).astype(float) - expected).max() <= 1  # Pillow rounds in integers


def test_a_palette_with_a_transparent_entry_shows_white_there() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(load_image(encode(image, transparency=0)))
    assert pixels.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    assert np.asarray(load_image(encode(image))).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_rgb_png_with_a_transparent_colour_shows_white_there() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert np.asarray(load_image(encode(image, transparency=(1, 2, 3)))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 300, 32768, 65535]], np.uint16)
    expected = np.rint(values / 65535 * 255)
    for source in (values, encode(Image.fromarray(values)), Image.fromarray(values.astype(np.int32))):
        pixels = np.asarray(load_image(source))
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


def test_all_16_bit_values_are_rounded_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(np.asarray(load_image(values))[..., 0], np.rint(values / 257))


def test_32_bit_full_range_is_scaled_and_negative_is_refused() -> None:
    full = np.array([[0, 2**30, 2**31 - 1]], np.int32)
    assert np.asarray(load_image(Image.fromarray(full)))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(DataError, match="negative pixel values; found -5"):
        load_image(Image.fromarray(np.array([[0, -5]], np.int32)))


def test_float_and_bool_arrays_cover_the_full_scale() -> None:
    assert np.asarray(load_image(np.array([[0.0, 0.5, 1.0]])))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(load_image(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    pixels = noise(3, 5, 3)
    # What EXIF says of the stored picture, undone with numpy: 0th row and column of the upright one.
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(load_image(encode(Image.fromarray(pixels), exif=exif))), upright)


@given(
    orientation=st.integers(1, 8),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    form=st.sampled_from(["JPEG", "PNG"]),
)
def test_an_opened_picture_knows_its_upright_size_and_loads_the_same(
    orientation: int, width: int, height: int, form: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise(height, width, 3)), form, exif=exif)
    for min_size in (None, (5, 9)):
        opened, loaded = open_image(data), load_image(data, min_size=min_size)
        assert opened.size == load_image(data).size
        np.testing.assert_array_equal(np.asarray(opened.load(min_size)), np.asarray(loaded))


def test_bad_bytes_are_named_when_opened_or_loaded() -> None:
    for data, message in ((b"", "^x: image is empty"), (b"nothing", "^x: not a readable image")):
        with pytest.raises(DataError, match=message):
            open_image(data, name="x")
    cut = open_image(encode(Image.fromarray(noise(90, 90, 3)), "JPEG")[:-900], name="x")
    with pytest.raises(DataError, match="^x: picture cannot be decoded"):
        cut.load()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b""])
def test_broken_exif_does_not_cost_the_picture(exif: bytes) -> None:
    assert load_image(encode(Image.new("RGB", (9, 8), "red"), "JPEG", exif=exif)).size == (9, 8)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_jpeg_and_one_pixel() -> None:
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")  # full magenta and yellow: red
    red, green, blue = load_image(cmyk).getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60
    assert load_image(encode(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)


@given(width=st.integers(1, 200), height=st.integers(1, 200), need=st.integers(1, 64), turned=st.booleans())
def test_draft_never_goes_below_what_is_needed(width: int, height: int, need: int, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    stored = Image.new("RGB", (height, width) if turned else (width, height))
    small = load_image(encode(stored, "JPEG", exif=exif), min_size=(need, 2 * need))  # height, width
    assert small.width >= min(width, 2 * need) and small.height >= min(height, need)


def test_draft_shrinks_a_large_jpeg_by_eight_and_keeps_its_content() -> None:
    ramp = np.tile(np.linspace(0, 255, 1600).astype(np.uint8), (800, 1))
    data = encode(Image.fromarray(ramp), "JPEG")
    small = load_image(data, min_size=100)
    assert small.size == (200, 100) and load_image(data).size == (1600, 800)
    expected = ramp[0].reshape(200, 8).mean(1)
    assert np.abs(np.asarray(small)[50, :, 0] - expected).max() < 4
    with pytest.raises(ConfigError, match="min_size"):
        load_image(data, min_size=0)


JPEG = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
PNG = encode(Image.fromarray(noise(64, 64, 3)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "bad.x: image is empty"),
        (b"not an image at all", "bad.x: not a readable image .19 bytes.: unknown format"),
        (JPEG[: len(JPEG) // 2], "bad.x: picture cannot be decoded .64x64 px.: .*truncated"),
        (PNG[: len(PNG) // 2], "bad.x: picture cannot be decoded .64x64 px.: .*truncated"),
        (PNG[:20], "bad.x: not a readable image"),
        (png_header(4, 4), "bad.x: picture cannot be decoded"),
        (png_header(30_000, 30_000), "bad.x: "),
        (io.BytesIO(b""), "bad.x: no bytes left"),
        (io.StringIO("text"), "bad.x: file object is not binary"),
        (np.zeros((0, 5, 3), np.uint8), "bad.x: picture has no pixels; found '5x0 px'"),
        (np.zeros((5, 0), np.uint8), "bad.x: picture has no pixels"),
        (np.zeros((3, 8, 8), np.uint8), "bad.x: array does not have the shape.*transpose"),
        (np.zeros(5, np.uint8), "bad.x: array does not have the shape"),
        (np.zeros((2, 8, 8, 3), np.uint8), "bad.x: array does not have the shape"),
        (np.zeros((4, 4), np.int64), "bad.x: array does not have a pixel type; found 'int64'"),
        (np.zeros((4, 4), np.int32), "bad.x: array does not have a pixel type"),
        (np.zeros((4, 4), complex), "bad.x: array does not have a pixel type"),
        (np.full((4, 4), "a"), "bad.x: array does not have a pixel type"),
        (np.full((4, 4), np.nan), "bad.x: float pixels out of range"),
        (np.full((4, 4), 255.0), "bad.x: float pixels out of range"),
        (None, "bad.x: cannot read a picture from this type; found 'NoneType'"),
        (7, "bad.x: cannot read a picture from this type; found 'int'"),
        (Image.new("RGB", (0, 4)), "bad.x: picture has no pixels"),
    ],
)
def test_bad_sources_are_named(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(source, name="bad.x")


def test_bad_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(JPEG[:900])
    cases = {
        tmp_path / "none.jpg": "none.jpg: image file does not exist",
        tmp_path: "is a folder",
        tmp_path / "empty.jpg": "empty.jpg: image is empty",
        tmp_path / "cut.jpg": "cut.jpg: .*truncated",
        "": "is a folder",
        "nul\0byte.jpg": "image file cannot be read|does not exist",
        "x" * 5000: "image file cannot be read|does not exist",
        "https://example.org/cat.jpg": "not a local file",
    }
    for source, message in cases.items():
        with pytest.raises(DataError, match=message):
            load_image(source)
    with pytest.raises(DataError, match=r"images\[2\] \(.*none.jpg\): image file does not exist"):
        load_image(tmp_path / "none.jpg", name="images[2]")


def test_closed_images_and_files_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    image = Image.open(tmp_path / "a.png")
    image.close()
    file = (tmp_path / "a.png").open("rb")
    file.close()
    for source in (image, file):
        with pytest.raises(DataError):
            load_image(source)


def test_the_size_limit_reads_the_header_only_and_leaves_pillow_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="too large to decode safely; found '100x50 px'; expected at most 4999 pixels"):
        load_image(png_header(100, 50), max_pixels=4999)
    with pytest.raises(DataError, match="too large"):
        load_image(np.zeros((100, 50), np.uint8), max_pixels=4999)
    with pytest.raises(DataError):
        load_image(png_header(MAX_PIXELS + 1, 1))
    assert load_image(np.zeros((100, 50), np.uint8), max_pixels=5000).size == (50, 100)
    assert before == Image.MAX_IMAGE_PIXELS


@given(cut=st.integers(0, len(PNG) - 13), flip=st.integers(0, 255))
def test_damage_anywhere_is_a_data_error_or_a_picture(cut: int, flip: int) -> None:
    damaged = bytearray(PNG)
    damaged[cut] ^= flip
    for data in (bytes(damaged), PNG[:cut], bytes(damaged[:cut])):
        try:
            assert load_image(data).mode == "RGB"
        except DataError as error:
            assert "image bytes" in str(error)
