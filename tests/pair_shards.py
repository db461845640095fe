"""Small shards of image-text pairs for tests, and a processor that knows their words."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trips.processor import TripsProcessor

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of number left right dog cat".split() + [f"w{i}" for i in range(300)]
SIZE = 8


def pair_processor(max_text_length: int = 10) -> TripsProcessor:
    """8-pixel images, whole words."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return TripsProcessor(fast, image_size=SIZE, patch_size=4, max_text_length=max_text_length)


def jpeg(value: int = 0, quality: int = 60) -> bytes:
    """A flat picture of 8 x 8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), value % 256, np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar with KEY.SUFFIX for each suffix of each key, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, num_texts: int = 1) -> dict[str, bytes]:
    """One good sample; its texts hold its number."""
    captions = [f"a photo of number w{number} w{text}" for text in range(num_texts)]
    meta = {"image_id": f"image {number}", "captions": captions}
    return {"jpg": jpeg(number), "json": json.dumps(meta).encode()}


def write_corpus(folder: Path, counts: list[int], num_texts: int = 1) -> str:
    """Shards with so many samples each, keys 00000, 00001, ... throughout; returns the pattern that names them."""
    number = 0
    for shard, count in enumerate(counts):
        keys = range(number, number + count)
        write_tar(folder / f"{shard:05d}.tar", {f"{key:05d}": sample(key, num_texts) for key in keys})
        number += count
    return str(folder / "*.tar")
