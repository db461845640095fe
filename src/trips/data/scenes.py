"""The embedded corpus: endless seeded scenes with questions, captions and statements whose relevant patches are known.

Stands beside the real data sets of the paper, not in their place: a small tower can learn it on a CPU, and
`relevant_patches` tells which patches a text speaks of, so that a text-guided selection (Section 3.2) can be scored
against the truth, against chance and against selection without text. Looks are in `scene_looks`, painting is in
`scene_drawing`, wording and balance are in `scene_texts`.

Legend: S side of the picture in pixels, P side of a patch, N = (S / P)^2 patches in row order. Boxes are
(x0, y0, x1, y1) in pixels, x1 and y1 excluded.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from trips.data.scene_drawing import (
    NUM_PATCH_LABELS,
    QUESTION_TYPES,
    Box,
    Region,
    Scene,
    SceneConfig,
    SceneObject,
    check_num_objects,
    draw_scene,
)
from trips.data.scene_looks import BACKGROUND_COLOURS, BANDS, COLOURS, FILLS, SHAPES, TEXTURES
from trips.data.scene_texts import (
    ANSWERS,
    SceneStatement,
    SceneText,
    answers_of,
    candidates,
    check_type,
    draw_caption,
    draw_question,
    draw_statement,
    supported_types,
)
from trips.errors import ConfigError, DataError

__all__ = [
    "ANSWERS",
    "BACKGROUND_COLOURS",
    "BANDS",
    "COLOURS",
    "FILLS",
    "NUM_PATCH_LABELS",
    "QUESTION_TYPES",
    "SHAPES",
    "TEXTURES",
    "Region",
    "Scene",
    "SceneConfig",
    "SceneCorpus",
    "SceneObject",
    "SceneStatement",
    "SceneText",
    "answers_of",
    "prior",
    "corpus_texts",
    "relevant_patches",
    "text_prior",
    "train_tokenizer",
]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Separate streams of chance: drawing more questions never changes a picture.
_SCENE, _QUESTIONS, _CAPTION, _STATEMENT = range(4)


class SceneCorpus:
    """Scenes by number, each a pure function of (config, seed, index), in any order and in any process.

    Args:
        config: sizes, number of objects, noise, mixture of question types.
        seed: whole number >= 0; corpora of different seeds are independent.
    Raises:
        ConfigError: the seed is not such a number.
    """

    def __init__(self, config: SceneConfig | None = None, seed: int = 0) -> None:
        self.config = SceneConfig() if config is None else config
        self.seed = _whole("seed", seed)

    def _rng(self, index: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index, *stream)))

    def scene(self, index: int, num_objects: int | None = None) -> Scene:
        """Scene number `index`.

        Args:
            index: whole number >= 0.
            num_objects: another number of objects than the config's, for a curriculum; below eight all colours are
                distinct, and `prior` no longer bounds a guess (an object's colour is one of fewer).
        Returns:
            the scene, its image (S, S, 3) uint8.
        Raises:
            ConfigError: index or number of objects out of range.
        """
        index = _whole("index", index)
        if num_objects is None:
            num_objects = self.config.num_objects
        else:
            check_num_objects(self.config, num_objects)
        return draw_scene(self.config, self._rng(index, _SCENE), index, num_objects)

    def _scene_of(self, index_or_scene: int | Scene) -> Scene:
        return index_or_scene if isinstance(index_or_scene, Scene) else self.scene(index_or_scene)

    def questions(self, index_or_scene: int | Scene, n: int, types: Sequence[str] | None = None) -> list[SceneText]:
        """Questions about a scene, drawn independently of each other (repeats are possible).

        Args:
            index_or_scene: number of the scene, or a scene of this corpus.
            n: how many, >= 0.
            types: draw uniformly from these; without it from those of the config's mixture that the scene supports.
        Returns:
            n questions, a function of (seed, index, n, types) and the scene.
        Raises:
            ConfigError: unknown type, a type that a scene of so few objects cannot support, or no type at all.
        """
        scene, n = self._scene_of(index_or_scene), _whole("n", n)
        if isinstance(types, str):
            raise ConfigError("is one string, not a list of types", item="types", found=types, hint=f'use ("{types}",)')
        weights = dict(self.config.mixture) if types is None else dict.fromkeys(types, 1.0)
        possible = supported_types(scene)
        for kind in weights:
            check_type(kind)
            if types is not None and kind not in possible:
                raise ConfigError(
                    f"scene {scene.index} cannot support this type",
                    item=f"question type {kind}",
                    found=f"{len(scene.objects)} objects",
                    hint="counting needs 11 objects or more, relation two or more",
                )
        kinds = [kind for kind in weights if weights[kind] > 0 and kind in possible]
        if not kinds:
            raise ConfigError("leaves no question type to draw from", item="types or mixture", found=tuple(weights))
        rng = self._rng(scene.index, _QUESTIONS, n)
        edges = np.cumsum([weights[kind] for kind in kinds])
        numbers = np.searchsorted(edges[:-1], rng.random(n) * edges[-1], side="right").tolist()
        facts = {kinds[number]: candidates(scene, kinds[number]) for number in set(numbers)}
        return [draw_question(facts[kinds[number]], kinds[number], rng) for number in numbers]

    def caption(self, index_or_scene: int | Scene, variant: int = 0) -> SceneText:
        """A true caption that names two or three things of a scene.

        Args:
            index_or_scene: number of the scene, or a scene of this corpus.
            variant: 0, 1, 2, ... are independent draws.
        Returns:
            a text of type "caption" without an answer.
        Raises:
            ConfigError: index or variant out of range.
        """
        scene = self._scene_of(index_or_scene)
        return draw_caption(scene, self._rng(scene.index, _CAPTION, _whole("variant", variant)))

    def statement(self, index: int, variant: int = 0) -> SceneStatement:
        """A true or false statement about scenes 2 * index (left) and 2 * index + 1 (right).

        Truth is a fair coin given the two pictures and given the sentence. Variants 0, 1, 2, ... are independent draws
        about the same pictures. Keep training and test apart by index: these scenes are also those of `scene`.

        Raises:
            ConfigError: index or variant out of range, or scenes with too few objects for any kind of statement.
        """
        index = _whole("index", index)
        rng = self._rng(index, _STATEMENT, _whole("variant", variant))
        return draw_statement(self.scene(2 * index), self.scene(2 * index + 1), rng)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ConfigError("must be a whole number", item=name, found=value, expected=">= 0")
    return int(value)


def prior(type: str) -> float:
    """Accuracy of the best guess from the picture alone, by construction (scenes of eight objects or more).

    Also that of the best constant answer: every answer of a type is equally likely for every scene.
    """
    return 1 / len(answers_of(type))


def text_prior(type: str) -> float:
    """Accuracy of the best guess from the words alone, by construction.

    It is `prior`, but 1/4 for background questions, whose words tell whether a colour or a texture is asked for.
    """
    return 1 / 4 if type == "background" else prior(type)


def relevant_patches(boxes: Iterable[Box], image_size: int, patch_size: int, min_share: float = 0.25) -> np.ndarray:
    """Patches that a text speaks of: those of whose area the union of its boxes covers at least `min_share`.

    A box that alone reaches that share in no patch (it is small, or thin) adds the one patch that holds most of it, the
    first of equals; so each box is seen by at least one patch.

    Args:
        boxes: pixel boxes inside the picture, whole numbers.
        image_size: side S of the picture in pixels.
        patch_size: side P of a patch, a divisor of S.
        min_share: share of a patch's area, in (0, 1].
    Returns:
        (N,) bool, row order.
    Raises:
        ConfigError: sizes that do not fit, or the share out of range.
        DataError: a box that is empty, leaves the picture, or is no four whole numbers.
    """
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise ConfigError(
            "does not divide image_size", item="patch_size", found=patch_size, expected=f"of {image_size}"
        )
    if not 0 < min_share <= 1:
        raise ConfigError("is out of range", item="min_share", found=min_share, expected="in (0, 1]")
    grid = image_size // patch_size
    union = np.zeros((image_size, image_size), dtype=bool)
    corners = []
    for box in boxes:
        corners.append(_checked(box, image_size))
        x0, y0, x1, y1 = corners[-1]
        union[y0:y1, x0:x1] = True
    left, top, right, bottom = np.array(corners, dtype=int).reshape(-1, 4, 1).transpose(1, 0, 2)  # each (boxes, 1)
    edges = np.arange(grid) * patch_size
    across = np.minimum(edges + patch_size, right) - np.maximum(edges, left)  # (boxes, G) pixels; negative: apart
    down = np.minimum(edges + patch_size, bottom) - np.maximum(edges, top)
    small = across.max(axis=1) * down.max(axis=1) < min_share * patch_size**2
    marked = np.zeros((grid, grid), dtype=bool)
    marked[down[small].argmax(axis=1), across[small].argmax(axis=1)] = True
    shares = union.reshape(grid, patch_size, grid, patch_size).mean(axis=(1, 3))
    return (marked | (shares >= min_share)).reshape(-1)


def _checked(box: Box, image_size: int) -> Box:
    whole = len(box) == 4 and all(isinstance(edge, (int, np.integer)) for edge in box)
    if not whole or not (0 <= box[0] < box[2] <= image_size and 0 <= box[1] < box[3] <= image_size):
        raise DataError(
            "is not a box of pixels inside the picture",
            item="box",
            found=tuple(box),
            expected=f"whole numbers (x0, y0, x1, y1) with 0 <= x0 < x1 <= {image_size} and so for y",
        )
    return box


def corpus_texts(corpus: SceneCorpus, num_texts: int) -> Iterator[str]:
    """At least num_texts questions, captions and statements of the first scenes, in the proportion 8 : 2 : 1."""
    for index in range(-(-num_texts // 11)):
        scene = corpus.scene(index)
        yield from (question.text for question in corpus.questions(scene, 8))
        yield from (corpus.caption(scene, variant).text for variant in range(2))
        yield corpus.statement(index).text


def train_tokenizer(corpus: SceneCorpus, num_texts: int = 4000, vocab_size: int = 400) -> Tokenizer:
    """A WordPiece tokenizer for the corpus, with BERT's normaliser, pre-tokeniser and special tokens.

    The vocabulary is the special tokens, single characters (so that any English text can be spelled), the answers, then
    the corpus's words from the commonest down. The library's own trainer would merge pieces into the same whole words,
    but numbers and merges them by the order of a hash table, so that no two runs would agree.

    Args:
        corpus: where the texts come from (questions, captions, statements of its first scenes).
        num_texts: how many texts to learn from.
        vocab_size: upper bound of the vocabulary.
    Returns:
        the tokenizer, the same for the same arguments; every answer is one token. It adds no special tokens to a text
        by itself: the processor owns their layout.
    Raises:
        ConfigError: the vocabulary is too small to hold every answer as one token.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in corpus_texts(corpus, _whole("num_texts", num_texts)):
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = string.ascii_lowercase + string.digits
    common = sorted(counts, key=lambda word: (-counts[word], word))
    needed = [*SPECIAL_TOKENS, *string.punctuation, *characters, *(f"##{c}" for c in characters), *ANSWERS]
    needed = list(dict.fromkeys(needed))
    if len(needed) > _whole("vocab_size", vocab_size):
        raise ConfigError(
            "is too small for the characters and the answers",
            item="vocab_size",
            found=vocab_size,
            expected=f">= {len(needed)}",
        )
    words = list(dict.fromkeys([*needed, *common]))[:vocab_size]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
