"""TripsProcessor: images and texts become the tensors that every TRIPS model takes (the left edge of Figure 2).

Images go through Pillow and numpy, so torchvision is not needed: resize to the model's size without cropping (ALBEF's
test transform), scale to [0, 1], normalise per channel. Texts become [CLS] + word pieces and, as in the paper's
T = {t_cls, t_1 .. t_m} and in ALBEF's tokenizer, no [SEP]; answers end with exactly one, the decoder's stop sign.

Legend: B images or texts, H, W pixels of the model's input, L tokens of the longest text.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from trips.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from trips.images import ImageSource, load_image

logger = logging.getLogger("trips")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_CONFIG_NAME = "processor_config.json"
_RESAMPLING = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}


class TripsProcessor(ProcessorMixin):
    """Resizes and normalises images, encodes texts, questions and answers.

    Args:
        tokenizer: BERT WordPiece tokenizer of transformers (any with [CLS], [SEP] and a padding token).
        image_size: pixels of the model's input, one number or (height, width); rounded down to whole patches, with a
            warning, because the patch convolution would not see the rest.
        patch_size: pixels along one side of a patch.
        image_mean, image_std: per channel, for values in [0, 1]; `CLIP_MEAN` and `CLIP_STD` by default.
        resample: "bicubic" (ALBEF), "bilinear", "lanczos", "nearest", "box" or "hamming".
        max_text_length: longest text in tokens, [CLS] and [SEP] included; the rest is cut off.
        add_sep: end texts with [SEP] too, for stock BERT checkpoints used as they are.
        jpeg_draft: decode large JPEG files at 1/2, 1/4 or 1/8, never below `image_size`. Several times faster, but the
            pixels differ slightly from those of a full decode, so use it for training and inference alike or not.
    Raises:
        ConfigError: an argument is not one of the above; the message names it.
    """

    # Plain positional arguments: transformers reads the names of this signature when it saves and loads.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int | tuple[int, int] = 384,
        patch_size: int = 16,
        image_mean: tuple[float, float, float] = CLIP_MEAN,
        image_std: tuple[float, float, float] = CLIP_STD,
        resample: str = "bicubic",
        max_text_length: int = 40,
        add_sep: bool = False,
        jpeg_draft: bool = False,
    ) -> None:
        _check_tokenizer(tokenizer)
        super().__init__(tokenizer)
        self.patch_size = _positive_int(patch_size, "patch_size")
        self.image_size = _whole_patches(image_size, self.patch_size)
        self.image_mean, self.image_std = _channels(image_mean, "image_mean"), _channels(image_std, "image_std")
        if min(self.image_std) <= 0:
            raise ConfigError("must be positive", item="image_std", found=self.image_std)
        if resample not in _RESAMPLING:
            raise ConfigError("unknown filter", item="resample", found=resample, expected=f"one of {list(_RESAMPLING)}")
        self.resample = resample
        self.max_text_length = _positive_int(max_text_length, "max_text_length")
        if self.max_text_length < 3:
            raise ConfigError("no room for text", item="max_text_length", found=max_text_length, expected="3 or more")
        self.add_sep, self.jpeg_draft = bool(add_sep), bool(jpeg_draft)
        self._warned_of_truncation = False

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["pixel_values", "input_ids", "attention_mask"]

    def __call__(
        self,
        images: ImageSource | list[ImageSource] | None = None,
        text: str | list[str] | None = None,
        return_tensors: str = "pt",
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """Encode images, texts or both; their numbers may differ (which question is about which image is data).

        Args:
            images: what `load_image` reads, or a list of it; one picture is a batch of one.
            text: one text or a list; one text is a batch of one unless several images are given.
            return_tensors: only "pt".
            pad_to_multiple_of: pad L up to a multiple, for hardware that prefers it.
        Returns:
            `pixel_values` (B, 3, H, W) float32; `input_ids` and `attention_mask` (B, L) int64, padded to the longest.
        Raises:
            ConfigError: neither given, an empty list, one string for several images, another tensor type.
            DataError: an unreadable image or an empty text; names its position.
        """
        if return_tensors != "pt":
            raise ConfigError("only PyTorch tensors", item="return_tensors", found=return_tensors, expected='"pt"')
        if images is None and text is None:
            raise ConfigError("nothing to process", item="TripsProcessor", expected="images, text or both")
        data: dict[str, Tensor] = {}
        if images is not None:
            batch = _as_image_list(images)
            if isinstance(text, str) and len(batch) > 1:
                raise ConfigError(
                    f"one string for {len(batch)} images",
                    item="text",
                    found=text,
                    expected="a list of strings",
                    hint="repeat it in a list if every image gets the same text",
                )
            data["pixel_values"] = self.normalise([self.resize(one, f"images[{i}]") for i, one in enumerate(batch)])
        if text is not None:
            texts = [text] if isinstance(text, str) else _string_list(text, "text")
            data |= self._pad(self._encode(texts, "text", self.add_sep), pad_to_multiple_of)
        return BatchFeature(data)

    def encode_answers(self, answers: list[str], pad_to_multiple_of: int | None = None) -> BatchFeature:
        """Encode answers for the decoder: [CLS] + word pieces + one [SEP], which survives truncation.

        Args:
            answers: list of strings, none blank.
            pad_to_multiple_of: as in a call.
        Returns:
            `input_ids` and `attention_mask` (B, L) int64.
        Raises:
            ConfigError: not a list of strings (a bare string would be spelt letter by letter), or an empty one.
            DataError: a blank answer; names its position.
        """
        return BatchFeature(
            self._pad(self._encode(_string_list(answers, "answers"), "answers", sep=True), pad_to_multiple_of)
        )

    def resize(self, image: ImageSource, name: str | None = None) -> np.ndarray:
        """Decode one image and squeeze it to the model's size: (H, W, 3) uint8, small enough to cache.

        Args:
            image: what `load_image` reads.
            name: how messages call it.
        Raises:
            DataError: see `load_image`.
        """
        height, width = self.image_size
        rgb = load_image(image, name=name, min_size=self.image_size if self.jpeg_draft else None)
        return np.asarray(rgb.resize((width, height), _RESAMPLING[self.resample]))

    def normalise(self, arrays: list[np.ndarray]) -> Tensor:
        """Turn what `resize` returns into `pixel_values`: B arrays (H, W, 3) uint8 to (B, 3, H, W) float32."""
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().float()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.image_mean, self.image_std))
        return pixels.div_(255.0).sub_(mean).div_(std)

    def _encode(self, texts: list[str], item: str, sep: bool) -> list[list[int]]:
        """Token ids with [CLS], and [SEP] if asked, cut to `max_text_length`."""
        for i, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # half a surrogate pair; tokenizers would only say "wrong type"
                raise DataError(f"is not valid Unicode: {error}", item=f"{item}[{i}]") from error
        # split_special_tokens: "[SEP]" typed by a user is text, not a token. verbose: the length is our business.
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        room = self.max_text_length - (2 if sep else 1)
        rows = []
        for i, pieces in enumerate(encoded["input_ids"]):
            if not pieces:  # nothing but white space and control characters, which the normaliser removes
                raise DataError("is empty", item=f"{item}[{i}]", found=texts[i], expected="at least one word")
            if len(pieces) > room and not self._warned_of_truncation:
                self._warned_of_truncation = True
                logger.warning(
                    "%s[%d] has %d tokens and is cut to max_text_length = %d; further cuts are not reported",
                    item,
                    i,
                    len(pieces) + self.max_text_length - room,
                    self.max_text_length,
                )
            tail = [self.tokenizer.sep_token_id] if sep else []
            rows.append([self.tokenizer.cls_token_id, *pieces[:room], *tail])
        return rows

    def _pad(self, rows: list[list[int]], multiple: int | None) -> dict[str, Tensor]:
        length = max(len(row) for row in rows)
        if multiple is not None:
            length += -length % _positive_int(multiple, "pad_to_multiple_of")
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> TripsProcessor:
        """Load what `save_pretrained` wrote: `processor_config.json` and the tokenizer's files.

        Args:
            pretrained_model_name_or_path: local folder, or a model id of the Hugging Face hub.
            **kwargs: arguments of `TripsProcessor` that replace the stored ones, and those of transformers.
        Raises:
            CheckpointError: the folder or a file is missing, damaged or belongs to another processor; names it.
            ConfigError: a stored or given argument is not valid.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            _check_saved(folder / kwargs.get("subfolder", ""), cls.__name__)
        elif folder.exists() or len(folder.parts) > 2 or str(pretrained_model_name_or_path)[:1] in ("", ".", "/", "~"):
            # Not even the form of a hub id ("name" or "owner/name").
            raise CheckpointError("no such folder", item=str(folder), expected=f"a folder with {_CONFIG_NAME}")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ConfigError:
            raise
        except Exception as error:  # transformers and tokenizers raise many types for damaged files
            hint = None if folder.is_dir() else "there is no such folder, so it was taken for a name on the hub"
            raise CheckpointError(f"processor cannot be loaded: {error}", item=str(folder), hint=hint) from error

    @classmethod
    def for_vision_tower(
        cls,
        source: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int | tuple[int, int],
        **options: Any,
    ) -> TripsProcessor:
        """Build a processor with the mean, std and filter that a vision tower (CLIP, ViT, DINOv2) was trained with.

        Args:
            source: the tower's folder, or its `preprocessor_config.json`. The patch size comes from the `config.json`
                beside it unless `patch_size` is among the options.
            tokenizer, image_size, **options: as in `TripsProcessor`; resizing to `image_size` replaces the tower's
                own resize and crop.
        Raises:
            CheckpointError: a file is missing or damaged; names it.
            UnsupportedModelError: the tower scales pixels to another range than [0, 1].
        """
        path = Path(source) / "preprocessor_config.json" if Path(source).is_dir() else Path(source)
        stored = _read_json(path)
        if not stored.get("do_rescale", True) or abs(stored.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise UnsupportedModelError("scales pixels to another range than [0, 1]", item=str(path))
        found: dict[str, Any] = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
        if stored.get("do_normalize", True):
            for key in found:
                if key not in stored:
                    raise CheckpointError("key is missing", item=str(path), expected=key)
                found[key] = stored[key]
        if stored.get("resample") is not None:
            names = {int(filter_): name for name, filter_ in _RESAMPLING.items()}
            found["resample"] = names.get(stored["resample"], stored["resample"])
        if "patch_size" not in options:
            config = _read_json(path.parent / "config.json")
            found["patch_size"] = config.get("patch_size", config.get("vision_config", {}).get("patch_size"))
        return cls(tokenizer, image_size, **{**found, **options})


def _as_image_list(images: ImageSource | list[ImageSource]) -> list[ImageSource]:
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        return [images]
    if not images:
        raise ConfigError("empty list", item="images", expected="at least one image")
    return list(images)


def _string_list(texts: object, item: str) -> list[str]:
    if not isinstance(texts, (list, tuple)):
        raise ConfigError("not a list of strings", item=item, found=texts, hint="put a single string in a list: [text]")
    if not texts:
        raise ConfigError("empty list", item=item, expected="at least one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError("not a string", item=f"{item}[{i}]", found=type(text).__name__, expected="text")
    return list(texts)


def _positive_int(value: object, item: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError("not a positive whole number", item=item, found=value)
    return value


def _channels(values: Any, item: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise ConfigError("needs one number per channel", item=item, found=values, expected="3 numbers")
    return numbers


def _whole_patches(image_size: object, patch_size: int) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sides) != 2:
        raise ConfigError("wrong number of sides", item="image_size", found=image_size, expected="(height, width)")
    height, width = (_positive_int(side, "image_size") for side in sides)
    if min(height, width) < patch_size:
        raise ConfigError(
            "smaller than one patch", item="image_size", found=image_size, expected=f"at least {patch_size} px"
        )
    whole = (height - height % patch_size, width - width % patch_size)
    if whole != (height, width):
        logger.warning(
            "image_size %s is not a multiple of patch_size %d; images become %s", (height, width), patch_size, whole
        )
    return whole


def _check_tokenizer(tokenizer: object) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            "not a tokenizer of transformers",
            item="tokenizer",
            found=type(tokenizer).__name__,
            expected="a BERT WordPiece tokenizer",
            hint="wrap a tokenizers.Tokenizer in transformers.PreTrainedTokenizerFast",
        )
    missing = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise ConfigError("special tokens are not set", item="tokenizer", found=missing, expected="[CLS], [SEP], [PAD]")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("file is missing", item=str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: broken JSON or not UTF-8
        raise CheckpointError(f"file cannot be read: {error}", item=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", item=str(path), found=type(content).__name__)
    return content


def _check_saved(folder: Path, class_name: str) -> None:
    """Name what is missing or foreign in a saved folder before transformers falls back to something else."""
    stored = _read_json(folder / _CONFIG_NAME)
    if stored.get("processor_class") != class_name:
        raise CheckpointError(
            "belongs to another processor",
            item=str(folder / _CONFIG_NAME),
            found=stored.get("processor_class"),
            expected=class_name,
        )
    known = TripsProcessor.__init__.__code__.co_varnames[1 : TripsProcessor.__init__.__code__.co_argcount]
    for key in stored.keys() - set(known) - {"processor_class", "auto_map"}:
        raise CheckpointError("unknown key", item=str(folder / _CONFIG_NAME), found=key, expected=f"one of {known[1:]}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
        raise CheckpointError("tokenizer files are missing", item=str(folder), expected="tokenizer.json")
