"""What the tests of trained models in use share: a tokenizer of few words, pictures of noise, answers to compare."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny import VOCABULARY
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trips
from trips.answering import Answer

# As many as the tiny models know, so that whatever they write is text.
WORDS = """what is it the red blue cat dog on two a ? sofa bus , green chair table lamp man woman tree road car sky hat
one three four big small near under left right no""".split()
CANDIDATES = ["red", "a red bus", "dog", "two", "blue sofa"]
QUESTIONS = ["what is it?", "is the cat on the sofa?", "what"]


def tiny_processor() -> trips.TripsProcessor:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    assert len(pieces) == VOCABULARY
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return trips.TripsProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), 32, patch_size=8)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def same(found: list[Answer], expected: list[Answer]) -> bool:
    """Equal texts, and probabilities but for rounding: weights in other places of memory are summed differently."""
    shares = [answer.probability for answer in expected]
    return [answer.text for answer in found] == [answer.text for answer in expected] and [
        answer.probability for answer in found
    ] == pytest.approx(shares, abs=1e-5)
