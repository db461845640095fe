"""TripsProcessor: images and texts become the tensors that every TRIPS model takes (the left edge of Figure 2).

Images go through Pillow and numpy, so torchvision is not needed: resize to the model's size without cropping (ALBEF's
test transform), scale to [0, 1], normalise per channel. Texts become [CLS] + word pieces and, as in the paper's
T = {t_cls, t_1 .. t_m} and in ALBEF's tokenizer, no [SEP]; answers end with exactly one, the decoder's stop sign.

Legend: B images or texts, H, W pixels of the model's input, L tokens of the longest text.
"""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from trips.errors import CheckpointError, ConfigError, DataError, ShapeError, UnsupportedModelError
from trips.images import ImageSource, load_image
from trips.processor_checks import (
    CONFIG_NAME,
    channels,
    check_saved,
    check_tokenizer,
    image_list,
    positive_int,
    read_json,
    string_list,
    whole_patches,
)

logger = logging.getLogger("trips")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SPACED_MARK = re.compile(r"(?<=\w) [-/:'] (?=\w)|(?<=\d) ?\. (?=\d)")
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
        check_tokenizer(tokenizer)
        super().__init__(tokenizer)
        self.patch_size = positive_int(patch_size, "patch_size")
        self.image_size = whole_patches(image_size, self.patch_size)
        self.image_mean, self.image_std = channels(image_mean, "image_mean"), channels(image_std, "image_std")
        if min(self.image_std) <= 0:
            raise ConfigError("must be positive", item="image_std", found=self.image_std)
        if resample not in _RESAMPLING:
            raise ConfigError("unknown filter", item="resample", found=resample, expected=f"one of {list(_RESAMPLING)}")
        self.resample = resample
        self.max_text_length = positive_int(max_text_length, "max_text_length")
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
            pad_to_multiple_of: pad L up to a multiple, for hardware that prefers it; never beyond `max_text_length`.
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
            batch = image_list(images)
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
            data |= self._pad(self.token_ids([text] if isinstance(text, str) else text), pad_to_multiple_of)
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
            self._pad(self._encode(string_list(answers, "answers"), "answers", sep=True), pad_to_multiple_of)
        )

    def decode_answers(self, answer_ids: Tensor) -> list[str]:
        """Text of answers that a model wrote, up to their first [SEP].

        Word pieces do not say where white space stood; around - / : and ' inside a word, and in decimals, it goes.

        Args:
            answer_ids: (B, T), [CLS] first, as ``generate`` returns them.
        """
        ended = (answer_ids == self.tokenizer.sep_token_id).long().cumsum(dim=1).bool()
        rows = answer_ids.masked_fill(ended, self.tokenizer.sep_token_id)
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [_SPACED_MARK.sub(lambda match: match[0].strip(), text) for text in texts]

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
        """Turn what `resize` returns into `pixel_values`: B arrays (H, W, 3) uint8 to (B, 3, H, W) float32.

        Raises:
            ShapeError: arrays of different sizes.
        """
        height, width = arrays[0].shape[:2]
        if any(array.shape != (height, width, 3) for array in arrays):
            found = sorted({array.shape for array in arrays})
            raise ShapeError("images of a batch differ", item="images", found=found, expected="one size (H, W, 3)")
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (self.image_mean, self.image_std))
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        pixel_values = torch.empty(len(arrays), 3, height, width)
        # One image at a time, in the memory of the batch: it stays in the processor's cache for all three passes.
        for image, array in zip(pixel_values.numpy(), arrays):
            image[...] = array.transpose(2, 0, 1)
            image *= scale
            image += shift
        return pixel_values

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """The texts of a call as token ids, not padded; many at once are cheaper than one by one.

        Raises:
            ConfigError, DataError: as in a call.
        """
        return self._encode(string_list(texts, "text"), "text", self.add_sep)

    def _encode(self, texts: list[str], item: str, sep: bool) -> list[list[int]]:
        """Token ids with [CLS], and [SEP] if asked, cut to `max_text_length`."""
        for i, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # half a surrogate pair; tokenizers would only say "wrong type"
                raise DataError(f"is not valid Unicode: {error}", item=f"{item}[{i}]") from error
        # split_special_tokens: "[SEP]" typed by a user is text, not a token. verbose: the length is our business.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False,
            return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
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
            length = min(length + -length % positive_int(multiple, "pad_to_multiple_of"), self.max_text_length)
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
            known = [name for name in inspect.signature(TripsProcessor.__init__).parameters if name != "self"]
            check_saved(folder / kwargs.get("subfolder", ""), cls.__name__, known)
        elif folder.exists() or len(folder.parts) > 2 or str(pretrained_model_name_or_path)[:1] in ("", ".", "/", "~"):
            # Not even the form of a hub id ("name" or "owner/name").
            raise CheckpointError("no such folder", item=str(folder), expected=f"a folder with {CONFIG_NAME}")
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
        stored = read_json(path)
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
            config = read_json(path.parent / "config.json")
            found["patch_size"] = config.get("patch_size", config.get("vision_config", {}).get("patch_size"))
        return cls(tokenizer, image_size, **{**found, **options})
