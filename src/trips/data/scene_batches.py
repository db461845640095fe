"""Batches of the embedded corpus: scenes and their questions as a pure function of the step.

Dimensions: I scenes, Q questions a scene, B = I Q questions in order of their scenes, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trips.data.scenes import ANSWERS, Scene, SceneCorpus, SceneText, relevant_patches, train_tokenizer
from trips.errors import ConfigError
from trips.processor import TripsProcessor

TEST_START = 10_000_000
"""First scene number of the test part: training never reaches it."""


def scene_processor(corpus: SceneCorpus) -> TripsProcessor:
    """The processor of a model for the corpus: its own WordPiece vocabulary, pixels to about [-1.7, 2]."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(corpus), **special)
    return TripsProcessor(
        tokenizer,
        image_size=corpus.config.image_size,
        patch_size=corpus.config.patch_size,
        image_mean=(0.45, 0.45, 0.45),
        image_std=(0.27, 0.27, 0.27),
    )


@dataclass(frozen=True)
class SceneBatch:
    """Scenes with questions, as tensors and as what they are.

    Attributes:
        tensors: what `TripsForQuestionAnswering.forward` takes.
        scenes: the I scenes.
        questions: the B questions.
        answers: (B,) numbers in ANSWERS.
    """

    tensors: dict[str, Tensor]
    scenes: tuple[Scene, ...]
    questions: tuple[SceneText, ...]
    answers: Tensor


class SceneBatcher:
    """Turns scenes into batches with one processor.

    Args:
        corpus: where scenes and questions come from.
        processor: see `scene_processor`.
        side: pixels of a side of the pictures as the model sees them, a multiple of the patch size; other than the
            corpus's, pictures are drawn as ever and resized, so that a larger one shows nothing more.
    Raises:
        ConfigError: a side that is no multiple of the patch size.
    """

    def __init__(self, corpus: SceneCorpus, processor: TripsProcessor, side: int | None = None) -> None:
        self.corpus, self.processor = corpus, processor
        self.side = corpus.config.image_size if side is None else side
        if self.side < 1 or self.side % corpus.config.patch_size:
            raise ConfigError(
                "no multiple of the patch size", item="side", found=side, expected=f"of {corpus.config.patch_size}"
            )
        encoded = processor.encode_answers(list(ANSWERS))
        self.answer_ids, self.answer_mask = encoded["input_ids"], encoded["attention_mask"]
        self._numbers = {answer: number for number, answer in enumerate(ANSWERS)}

    def scenes(self, start: int, count: int, num_objects: int | None = None) -> tuple[Scene, ...]:
        """Scenes number `start` to `start + count - 1`."""
        return tuple(self.corpus.scene(start + i, num_objects) for i in range(count))

    def pixels(self, scenes: Sequence[Scene]) -> Tensor:
        """(I, 3, S, S) float32, S the batcher's side."""
        pixels = self.processor.normalise([scene.image for scene in scenes])
        if self.side == self.corpus.config.image_size:
            return pixels
        return F.interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True)

    def batch(
        self,
        start: int,
        num_scenes: int,
        num_questions: int,
        num_objects: int | None = None,
        types: Sequence[str] | None = None,
    ) -> SceneBatch:
        """`num_questions` about each of `num_scenes` scenes; types as in `SceneCorpus.questions`."""
        scenes = self.scenes(start, num_scenes, num_objects)
        questions = tuple(text for scene in scenes for text in self.corpus.questions(scene, num_questions, types))
        answers = torch.tensor([self._numbers[question.answer] for question in questions])
        tensors = {
            "pixel_values": self.pixels(scenes),
            "image_index": torch.arange(num_scenes).repeat_interleave(num_questions),
            **self.processor(text=[question.text for question in questions]),
            "answer_ids": self.answer_ids[answers],
            "answer_mask": self.answer_mask[answers],
        }
        return SceneBatch(tensors, scenes, questions, answers)

    def relevant(self, questions: Sequence[SceneText]) -> Tensor:
        """(B, N) bool: the patches that each question speaks of."""
        config, side = self.corpus.config, self.side
        rows = [
            relevant_patches([_resized(box, side, config.image_size) for box in q.boxes], side, config.patch_size)
            for q in questions
        ]
        return torch.from_numpy(np.stack(rows))


def _resized(box: Sequence[int], side: int, drawn: int) -> tuple[int, int, int, int]:
    """A box of a picture `drawn` pixels wide in one of `side`, edges rounded outwards."""
    x0, y0, x1, y1 = box
    return x0 * side // drawn, y0 * side // drawn, -(-x1 * side // drawn), -(-y1 * side // drawn)


@dataclass(frozen=True)
class SceneVqaData:
    """Training data of the embedded corpus; see `trips.train.settings.TrainingData`.

    Attributes:
        batcher: makes the batches.
        num_scenes: I per step. num_questions: Q per scene.
        curriculum: (last step, objects in a scene) in rising order; behind the last entry scenes are full. Few
            objects first, because binding a word to one of many things hardly starts from scratch.
        offset: added to the step, so that stages see different scenes.
    Raises:
        ConfigError: the curriculum does not rise.
    """

    batcher: SceneBatcher
    num_scenes: int = 16
    num_questions: int = 8
    curriculum: tuple[tuple[int, int], ...] = ()
    offset: int = 0

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.curriculum]
        if steps != sorted(set(steps)):
            raise ConfigError("steps must rise", item="curriculum", found=self.curriculum)

    def num_objects(self, step: int) -> int | None:
        """Objects in the scenes of a step, None for full scenes."""
        return next((count for last, count in self.curriculum if step < last), None)

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, Any]]:
        """Batches of the steps, each a pure function of its number."""
        for step in range(start_step, start_step + num_steps):
            start = (self.offset + step) * self.num_scenes
            yield self.batcher.batch(start, self.num_scenes, self.num_questions, self.num_objects(step)).tensors
