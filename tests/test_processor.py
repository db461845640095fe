"""trips.processor: pixels against numpy, token layout against the tokenizer itself, saving, and every bad argument."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from trips.errors import CheckpointError, ConfigError, DataError, ShapeError, UnsupportedModelError
from trips.processor import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, TripsProcessor

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] what is the colour of bus red ##es [ ] sep mask a b c d ?".split()
PAD, UNK, CLS, SEP = range(4)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_processor(**options) -> TripsProcessor:
    return TripsProcessor(make_tokenizer(), **{"image_size": 32, "patch_size": 8, **options})


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Images


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.sampled_from([(16, 16), (8, 32), (40, 24)]))
def test_pixels_equal_resize_and_normalise_by_numpy(height: int, width: int, size: tuple[int, int]) -> None:
    image = photo(height, width)
    pixels = make_processor(image_size=size)(images=image)["pixel_values"]
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).astype(np.float64)
    expected = (resized.transpose(2, 0, 1) / 255 - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[
        :, None, None
    ]
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, *size)
    np.testing.assert_allclose(pixels[0].numpy(), expected, rtol=0, atol=2e-6)


def test_bicubic_resize_equals_convolution_by_hand() -> None:
    """Pillow's own resize against the definition: cubic kernel with a = -0.5, widened when shrinking."""
    row = np.random.default_rng(0).integers(60, 180, 24).astype(np.float64)

    def cubic(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))

    weights = cubic((np.arange(24)[None] + 0.5 - (np.arange(8)[:, None] + 0.5) * 3) / 3)
    expected = (weights / weights.sum(1, keepdims=True)) @ row
    image = np.repeat(np.repeat(row[None, :, None], 8, 0), 3, 2).astype(np.uint8)
    resized = make_processor(image_size=8).resize(image)
    assert np.abs(resized[0, :, 0] - expected).max() <= 1


def test_mean_std_and_filter_are_used() -> None:
    image = photo(30, 50)
    processor = make_processor(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, resample="bilinear")
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    expected = ((resized - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(processor(images=image)["pixel_values"][0].numpy(), expected, atol=2e-6)


def test_normalising_is_the_formula_at_every_value_and_place() -> None:
    processor, rng = make_processor(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD), np.random.default_rng(0)
    arrays = [np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3), rng.integers(0, 256, (16, 16, 3), np.uint8)]
    arrays.append(np.asfortranarray(arrays[1])[::-1])  # whatever their order in memory
    found = processor.normalise(arrays)
    assert found.shape == (3, 3, 16, 16) and found.is_contiguous() and found.dtype == torch.float32
    expected = (np.stack(arrays) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    for other in (np.zeros((1, 1, 3), np.uint8), np.zeros((16, 16, 1), np.uint8)):  # which numpy would repeat
        with pytest.raises(ShapeError, match="images of a batch differ"):
            processor.normalise([arrays[0], other])


def test_token_ids_are_those_of_a_call() -> None:
    texts = ["what is a ?", "the bus s red buses", "red " * 60]
    for processor in (make_processor(), make_processor(add_sep=True)):
        call = processor(text=texts)
        for ids_, row, mask in zip(processor.token_ids(texts), call["input_ids"], call["attention_mask"], strict=True):
            assert row[mask.bool()].tolist() == ids_
    with pytest.raises(DataError, match=r"text\[1\]: is empty"):
        make_processor().token_ids(["a", " "])


def test_batch_of_one_equals_row_of_a_batch() -> None:
    processor = make_processor()
    images, texts = [photo(20, 40), photo(64, 32), photo(1, 1)], ["what is a ?", "red", "the bus s red buses"]
    batch = processor(images=images, text=texts)
    for i in range(3):
        alone = processor(images=images[i], text=texts[i])
        length = alone["input_ids"].shape[1]
        assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][i])
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][i, :length])
        assert batch["attention_mask"][i].sum() == length == alone["attention_mask"].sum()


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1)])
def test_absurd_aspect_ratios_are_squeezed(size: tuple[int, int]) -> None:
    pixels = make_processor()(images=Image.new("L", size, 255))["pixel_values"]
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels, white.view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_size_is_rounded_down_to_whole_patches_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    processor = TripsProcessor(make_tokenizer(), image_size=456, patch_size=16)
    assert processor.image_size == (448, 448) and "456" in caplog.text and "448" in caplog.text
    caplog.clear()
    assert TripsProcessor(make_tokenizer(), (224, 384), 16).image_size == (224, 384) and not caplog.text


def test_arrays_paths_and_bytes_give_the_same_batch(tmp_path: Path) -> None:
    image = photo(20, 30)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    batch = make_processor()(images=[image, tmp_path / "a.png", str(tmp_path / "a.png"), data, np.asarray(image)])
    assert all(torch.equal(row, batch["pixel_values"][0]) for row in batch["pixel_values"])
    stacked = make_processor()(images=np.stack([np.asarray(image)] * 2))["pixel_values"]
    assert torch.equal(stacked, batch["pixel_values"][:2])


def test_jpeg_draft_changes_little_and_only_large_files() -> None:
    y, x = np.mgrid[0:512, 0:768]
    smooth = np.stack([x / 3, y / 2, (x + y) / 5], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    exact, draft = make_processor(), make_processor(jpeg_draft=True)
    difference = np.abs(exact.resize(buffer.getvalue()).astype(int) - draft.resize(buffer.getvalue()))
    assert 0 < difference.max() <= 6
    assert np.array_equal(exact.resize(smooth), draft.resize(smooth))


# Texts


def test_texts_start_with_cls_and_carry_no_sep() -> None:
    out = make_processor()(text=["what is the colour of the buses ?", "Red"])
    first = [CLS, *ids("what is the colour of the bus ##es ?")]
    assert out["input_ids"].tolist() == [first, [CLS, *ids("red")] + [PAD] * 8]
    assert out["attention_mask"].tolist() == [[1] * 10, [1, 1] + [0] * 8]
    assert out["input_ids"].dtype == out["attention_mask"].dtype == torch.long
    assert make_processor(add_sep=True)(text="red")["input_ids"].tolist() == [[CLS, *ids("red"), SEP]]


def test_answers_end_with_exactly_one_sep_even_when_cut() -> None:
    processor = make_processor(max_text_length=4)
    out = processor.encode_answers(["red", "a b c d"])
    assert out["input_ids"].tolist() == [[CLS, *ids("red"), SEP, PAD], [CLS, *ids("a b"), SEP]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_answers_read_back_as_they_were_written(minilm_dir: Path) -> None:
    processor = TripsProcessor(AutoTokenizer.from_pretrained(minilm_dir), image_size=32, patch_size=8)
    texts = [
        "t-shirt",
        "10:30",
        "2.5",
        "50/50",
        "it's",
        "don't",
        "black, white",
        "st. louis",
        "unbelievably tall",
        "$5",
    ]
    written = processor.encode_answers(texts)["input_ids"]  # padded to the longest
    spaced = {"$5": "$ 5"}
    assert processor.decode_answers(written) == [spaced.get(text, text) for text in texts]
    # What stands behind the first [SEP] is not the answer's, whatever it is.
    assert make_processor().decode_answers(torch.tensor([[CLS, *ids("red bus"), SEP, *ids("a b"), SEP]])) == ["red bus"]
    assert make_processor().decode_answers(torch.tensor([[CLS, SEP, PAD], [CLS, *ids("red bus")]])) == ["", "red bus"]


def test_special_tokens_typed_by_a_user_are_text() -> None:
    out = make_processor()(text="the [SEP] bus [MASK]")["input_ids"][0].tolist()
    assert out == [CLS, *ids("the [ sep ] bus [ mask ]")]


def test_control_characters_are_cleaned() -> None:
    clean, dirty = make_processor()(text=["the bus is red", "\x00the\x07 b\x00us\tis\r\n red\u200b\x7f"])["input_ids"]
    assert torch.equal(clean, dirty)


def test_long_text_is_cut_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    processor = make_processor()
    for _ in range(2):
        out = processor(text=["red", "bus " * 10_000])
    assert out["input_ids"].shape == (2, 40) and out["input_ids"][1].tolist() == [CLS, *ids("bus " * 39)]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "text[1] has 10001 tokens" in warnings[0] and "40" in warnings[0]


@given(multiple=st.integers(1, 17), words=st.integers(1, 12))
def test_padding_to_a_multiple(multiple: int, words: int) -> None:
    out = make_processor()(text=["bus " * words, "a"], pad_to_multiple_of=multiple)
    length = out["input_ids"].shape[1]
    assert length % multiple == 0 and 0 <= length - (words + 1) < multiple
    assert out["attention_mask"].sum(1).tolist() == [words + 1, 2]


def test_padding_to_a_multiple_ends_at_the_longest_text() -> None:
    processor = make_processor(max_text_length=13)
    assert processor(text="bus " * 10, pad_to_multiple_of=8)["input_ids"].shape == (1, 13)
    assert processor(text="bus " * 30, pad_to_multiple_of=8)["input_ids"].shape == (1, 13)


def test_number_of_images_and_texts_may_differ() -> None:
    out = make_processor()(images=[photo(9, 9)], text=["a", "b", "c"])
    assert len(out["pixel_values"]) == 1 and len(out["input_ids"]) == 3
    assert set(make_processor()(text="a")) == {"input_ids", "attention_mask"}
    assert set(make_processor()(images=photo(9, 9))) == {"pixel_values"}


def test_a_real_bert_tokenizer_loses_nothing_but_the_sep(minilm_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    processor = TripsProcessor(tokenizer, image_size=32, patch_size=8)
    texts = ["What colour is the na\u00efve bus?", "left of the untidy desk \U0001f600"]
    out = processor(text=texts)
    for text, row, mask in zip(texts, out["input_ids"], out["attention_mask"]):
        expected = tokenizer(text)["input_ids"]  # [CLS] ... [SEP]
        assert row[mask.bool()].tolist() == expected[:-1]
        assert processor.encode_answers([text])["input_ids"][0].tolist() == expected
    assert processor.decode(out["input_ids"][0], skip_special_tokens=True) == "what colour is the naive bus?"


# Bad arguments


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, ConfigError, "nothing to process"),
        ({"text": ""}, DataError, r"text\[0\]: is empty"),
        ({"text": ["a", " \t\n"]}, DataError, r"text\[1\]: is empty"),
        ({"text": ["a", "b", "\x00\x07"]}, DataError, r"text\[2\]: is empty"),
        ({"text": ["a", None]}, DataError, r"text\[1\]: not a string; found 'NoneType'"),
        ({"text": ["a", "\ud800"]}, DataError, r"text\[1\]: is not valid Unicode"),
        ({"text": []}, ConfigError, "text: empty list"),
        ({"text": 3}, ConfigError, "text: not a list of strings; found 3"),
        ({"images": []}, ConfigError, "images: empty list"),
        ({"images": [photo(4, 4)] * 2, "text": "a"}, ConfigError, "text: one string for 2 images"),
        ({"images": [photo(4, 4), "none.jpg"]}, DataError, r"images\[1\] \(none.jpg\): image file does not exist"),
        ({"images": [b"xx"]}, DataError, r"images\[0\]: not a readable image"),
        ({"images": torch.zeros(3, 4, 4)}, DataError, r"images\[0\]: cannot read a picture from this type"),
        ({"text": "a", "return_tensors": "np"}, ConfigError, "return_tensors"),
        ({"text": "a", "pad_to_multiple_of": 0}, ConfigError, "pad_to_multiple_of"),
    ],
)
def test_bad_input_is_named(call: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_processor()(**call)


def test_bad_answers_are_named() -> None:
    for answers, error, message in [
        ("red", ConfigError, r"answers: not a list of strings; found 'red'.*\[text\]"),
        ([], ConfigError, "answers: empty list"),
        (["red", " "], DataError, r"answers\[1\]: is empty"),
        (["red", 2], DataError, r"answers\[1\]: not a string"),
    ]:
        with pytest.raises(error, match=message):
            make_processor().encode_answers(answers)


@pytest.mark.parametrize(
    ("options", "item"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 4}, "image_size"),
        ({"image_size": (32, 32, 3)}, "image_size"),
        ({"image_size": 32.0}, "image_size"),
        ({"patch_size": -1}, "patch_size"),
        ({"patch_size": None}, "patch_size"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_mean": (0.5, 0.5)}, "image_mean"),
        ({"image_std": (1, 1, 0)}, "image_std"),
        ({"image_std": (1, 1, float("nan"))}, "image_std"),
        ({"resample": "sharp"}, "resample"),
        ({"max_text_length": 2}, "max_text_length"),
        ({"max_text_length": True}, "max_text_length"),
    ],
)
def test_bad_options_are_named(options: dict, item: str) -> None:
    with pytest.raises(ConfigError, match=item):
        make_processor(**options)


def test_bad_tokenizers_are_named() -> None:
    with pytest.raises(ConfigError, match="not a tokenizer of transformers; found 'Tokenizer'"):
        TripsProcessor(make_tokenizer().backend_tokenizer)
    without = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, cls_token="[CLS]")
    with pytest.raises(ConfigError, match="special tokens are not set; found .'sep_token', 'pad_token'."):
        TripsProcessor(without)


# Saving and loading


def options_of(processor: TripsProcessor) -> dict:
    names = "image_size patch_size image_mean image_std resample max_text_length add_sep jpeg_draft".split()
    return {name: getattr(processor, name) for name in names}


def test_save_and_load_keep_every_option(tmp_path: Path) -> None:
    processor = make_processor(
        image_size=(24, 40), image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, resample="lanczos",
        max_text_length=9, add_sep=True, jpeg_draft=True,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    loaded = TripsProcessor.from_pretrained(tmp_path)
    assert options_of(loaded) == options_of(processor) and options_of(loaded) != options_of(make_processor())
    call = {"images": photo(30, 20), "text": ["what is a ?", "red [SEP]"]}
    for key, value in processor(**call).items():
        assert torch.equal(value, loaded(**call)[key])
    assert TripsProcessor.from_pretrained(str(tmp_path), image_size=64).image_size == (64, 64)


def test_auto_processor_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SomeConfig(PretrainedConfig):
        model_type = "some-config"

    monkeypatch.setattr(PROCESSOR_MAPPING, "_extra_content", {})  # the registration ends with this test
    AutoProcessor.register(SomeConfig, TripsProcessor)
    make_processor(max_text_length=7).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TripsProcessor and loaded.max_text_length == 7


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    config = tmp_path / "processor_config.json"

    def fails(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            TripsProcessor.from_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match="none: no such folder"):
        TripsProcessor.from_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no such folder"):
        TripsProcessor.from_pretrained("./none")
    fails("processor_config.json: file is missing")
    make_processor().save_pretrained(tmp_path)
    good = json.loads(config.read_text())
    for text, message in [
        ("{", "processor_config.json: file cannot be read"),
        ("[]", "processor_config.json: not a JSON object"),
        (
            json.dumps(good | {"processor_class": "CLIPProcessor"}),
            "belongs to another processor; found 'CLIPProcessor'",
        ),
        (json.dumps(good | {"image_sise": 3}), "unknown key; found 'image_sise'"),
    ]:
        config.write_text(text)
        fails(message)
    config.write_text(json.dumps(good | {"patch_size": 0}))
    with pytest.raises(ConfigError, match="patch_size"):
        TripsProcessor.from_pretrained(tmp_path)
    config.write_text(json.dumps(good))
    (tmp_path / "tokenizer.json").write_text("{}")
    fails("processor cannot be loaded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    fails("tokenizer files are missing")


def test_for_vision_tower_reads_the_real_dinov2(dinov2_dir: Path) -> None:
    for source in (dinov2_dir, dinov2_dir / "preprocessor_config.json"):
        processor = TripsProcessor.for_vision_tower(source, make_tokenizer(), 224)
        assert (processor.patch_size, processor.image_size, processor.resample) == (14, (224, 224), "bicubic")
        assert (tuple(processor.image_mean), tuple(processor.image_std)) == (IMAGENET_MEAN, IMAGENET_STD)


def test_for_vision_tower_of_written_configs(tmp_path: Path) -> None:
    def build(preprocessor: dict, **options) -> TripsProcessor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return TripsProcessor.for_vision_tower(tmp_path, make_tokenizer(), 32, **options)

    stats = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    with pytest.raises(CheckpointError, match="preprocessor_config.json: file is missing"):
        TripsProcessor.for_vision_tower(tmp_path, make_tokenizer(), 32)
    with pytest.raises(CheckpointError, match="config.json: file is missing"):
        build(stats)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 16}}))  # as CLIP nests it
    processor = build(stats | {"resample": 2}, max_text_length=5)
    assert (processor.patch_size, processor.resample, processor.max_text_length) == (16, "bilinear", 5)
    assert build({"do_normalize": False}, patch_size=8).image_std == [1.0, 1.0, 1.0]
    with pytest.raises(CheckpointError, match="key is missing; expected image_std"):
        build({"image_mean": [0, 0, 0]})
    with pytest.raises(ConfigError, match="resample"):
        build(stats | {"resample": 77})
    with pytest.raises(UnsupportedModelError, match="another range"):
        build(stats | {"rescale_factor": 1 / 127.5})
