"""Operation counts of question answering in closed form (section 5.1.1); conventions of `trips.bench.flops`.

The same guided pass for all (`count_flops`), then the decoder: learning answers, ranking candidates, or writing. At
the paper's size ranking is not free: 128 candidates of one word piece add 20 G to the 95 of a pair at 384 pixels.

Letters: L question tokens, A answers of a question, T tokens of an answer with [CLS] and [SEP], k candidates read to
their end.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.bench.flops import FlopCount, count_flops
from trips.bench.products import decoder_products, memory_products, word_head_products
from trips.config import SelectionConfig, TripsConfig
from trips.errors import ConfigError


@dataclass(frozen=True)
class AnsweringFlopCount(FlopCount):
    """Operations of one question about an image, in units of 1e9.

    Attributes:
        vision, text, fusion: see `FlopCount`.
        decoder: answer decoder and its head over the vocabulary.
    """

    decoder: float

    @property
    def total(self) -> float:
        """Sum of the four, in units of 1e9."""
        return super().total + self.decoder


def count_answer_training_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    *,
    answers: float = 1,
    answer_length: int = 3,
    texts_per_image: float = 1,
    distill: bool = False,
) -> AnsweringFlopCount:
    """Exact forward operations of one question and its answers in a step of `TripsForQuestionAnswering`.

    Args:
        config: the model's.
        grid: patches (down, across).
        text_length: L, padding included.
        selection: setting, else the model's.
        answers: A, mean over questions.
        answer_length: T, padding included; that the vocabulary is spared for padding is not counted.
        texts_per_image: questions that share an image.
        distill: a full-patch step.
    Raises:
        ConfigError: a location beyond the last layer, an answer without a token.
    """
    decoder, read = config.decoder_config, _read_tokens(answer_length)
    each = memory_products(decoder, text_length) + decoder_products(decoder, text_length, read)
    products = answers * (each + word_head_products(decoder, read))
    pair = count_flops(config, grid, text_length, selection, texts_per_image=texts_per_image, observe=distill)
    return _with_decoder(pair, products)


def count_answer_ranking_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    *,
    candidates: int = 3129,
    top_k: int = 128,
    answer_length: float = 3,
    texts_per_image: float = 1,
) -> AnsweringFlopCount:
    """Exact operations of one question whose candidate answers are ranked (`trips.tasks.answers.rank_answers`).

    One step gives every candidate's first token; of the best k the rest is read, over keys and values of the question
    that are projected once.

    Args:
        config, grid, text_length, selection, texts_per_image: see `count_answer_training_flops`.
        candidates: in the list; more than k cost nothing.
        top_k: k.
        answer_length: T of those that are read to their end. A mean of several is exact but for the products of
            attention within the answer.
    Raises:
        ConfigError: as there.
    """
    decoder, k = config.decoder_config, min(candidates, top_k)
    rest = _read_tokens(answer_length) - 1  # [CLS] was read in the first step
    first = memory_products(decoder, text_length) + decoder_products(decoder, text_length, 1)
    others = decoder_products(decoder, text_length, rest, behind=1) + word_head_products(decoder, rest)
    pair = count_flops(config, grid, text_length, selection, texts_per_image=texts_per_image)
    return _with_decoder(pair, first + word_head_products(decoder, 1) + k * others)


def count_answer_writing_flops(
    config: TripsConfig,
    grid: tuple[int, int],
    text_length: int,
    selection: SelectionConfig | None = None,
    *,
    answer_length: int = 3,
    texts_per_image: float = 1,
) -> AnsweringFlopCount:
    """Exact operations of one question whose answer is written greedily, token by token over kept keys and values.

    Args:
        config, grid, text_length, selection, texts_per_image: see `count_answer_training_flops`.
        answer_length: T; T - 1 tokens are written.
    Raises:
        ConfigError: as there.
    """
    decoder, written = config.decoder_config, _read_tokens(answer_length)
    products = memory_products(decoder, text_length) + word_head_products(decoder, written)
    products += sum(decoder_products(decoder, text_length, 1, behind=step) for step in range(written))
    pair = count_flops(config, grid, text_length, selection, texts_per_image=texts_per_image)
    return _with_decoder(pair, products)


def _with_decoder(pair: FlopCount, products: float) -> AnsweringFlopCount:
    return AnsweringFlopCount(pair.vision, pair.text, pair.fusion, 2 * products / 1e9)


def _read_tokens(answer_length: float) -> float:
    """T - 1: the decoder reads all tokens but the last, which it only predicts."""
    if answer_length < 2:
        raise ConfigError("an answer has [CLS] and [SEP]", item="answer_length", found=answer_length, expected=">= 2")
    return answer_length - 1
