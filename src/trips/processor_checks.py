"""What `TripsProcessor` accepts: checks of its arguments and of the files that it is loaded from.

Each returns the value in the one form that the processor works with, or raises a typed error that names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trips.errors import CheckpointError, ConfigError, DataError
from trips.images import ImageSource

logger = logging.getLogger("trips")

CONFIG_NAME = "processor_config.json"


def image_list(images: ImageSource | list[ImageSource]) -> list[ImageSource]:
    """A list of images: of one, of a list, or of an array (B, H, W, C).

    Raises:
        ConfigError: an empty list.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        return [images]
    if not images:
        raise ConfigError("empty list", item="images", expected="at least one image")
    return list(images)


def string_list(texts: object, item: str) -> list[str]:
    """A list of strings.

    Raises:
        ConfigError: a bare string, another type or an empty list.
        DataError: an entry that is no string; names its position.
    """
    if not isinstance(texts, (list, tuple)):
        raise ConfigError("not a list of strings", item=item, found=texts, hint="put a single string in a list: [text]")
    if not texts:
        raise ConfigError("empty list", item=item, expected="at least one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError("not a string", item=f"{item}[{i}]", found=type(text).__name__, expected="text")
    return list(texts)


def positive_int(value: object, item: str) -> int:
    """A whole number of 1 or more, else `ConfigError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError("not a positive whole number", item=item, found=value)
    return value


def channels(values: Any, item: str) -> list[float]:
    """Three finite numbers, else `ConfigError`."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise ConfigError("needs one number per channel", item=item, found=values, expected="3 numbers")
    return numbers


def whole_patches(image_size: object, patch_size: int) -> tuple[int, int]:
    """(height, width) in pixels, each rounded down to whole patches, with a warning where that changes it.

    Raises:
        ConfigError: not one or two positive whole numbers, or a side smaller than a patch.
    """
    sides = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sides) != 2:
        raise ConfigError("wrong number of sides", item="image_size", found=image_size, expected="(height, width)")
    height, width = (positive_int(side, "image_size") for side in sides)
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


def check_tokenizer(tokenizer: object) -> None:
    """Raise `ConfigError` unless it is a tokenizer of transformers with [CLS], [SEP] and [PAD]."""
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


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object, else `CheckpointError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("file is missing", item=str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: broken JSON or not UTF-8
        raise CheckpointError(f"file cannot be read: {error}", item=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", item=str(path), found=type(content).__name__)
    return content


def check_saved(folder: Path, class_name: str, known: Sequence[str]) -> None:
    """Name what is missing or foreign in a saved folder before transformers falls back to something else.

    Args:
        folder: with `CONFIG_NAME` and the tokenizer's files.
        class_name: of the processor that is to be loaded.
        known: keys that may stand there, the names of its arguments.
    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another class; an unknown key.
    """
    path = folder / CONFIG_NAME
    stored = read_json(path)
    if stored.get("processor_class") != class_name:
        raise CheckpointError(
            "belongs to another processor",
            item=str(path),
            found=stored.get("processor_class"),
            expected=class_name,
        )
    for key in stored.keys() - set(known) - {"processor_class", "auto_map"}:
        raise CheckpointError("unknown key", item=str(path), found=key, expected=f"one of {list(known)}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
        raise CheckpointError("tokenizer files are missing", item=str(folder), expected="tokenizer.json")
