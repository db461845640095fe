"""Batches of the embedded corpus: right rows, right answers, a function of the step alone."""

from __future__ import annotations

import pytest
import torch

from trips.data.scene_batches import SceneBatcher, SceneVqaData, scene_processor
from trips.data.scenes import ANSWERS, SceneCorpus
from trips.errors import ConfigError


@pytest.fixture(scope="module")
def batcher() -> SceneBatcher:
    corpus = SceneCorpus(seed=3)
    return SceneBatcher(corpus, scene_processor(corpus))


def test_rows_belong_to_their_scene_and_answer(batcher):
    batch = batcher.batch(5, 3, 4)
    tokenizer = batcher.processor.tokenizer
    for row, question in enumerate(batch.questions):
        scene = batch.scenes[batch.tensors["image_index"][row]]
        assert question in batcher.corpus.questions(scene, 4)
        words = tokenizer.decode(batch.tensors["input_ids"][row], skip_special_tokens=True)
        assert words.replace(" ", "") == question.text.replace(" ", "")
        answer = tokenizer.decode(batch.tensors["answer_ids"][row], skip_special_tokens=True)
        assert answer == question.answer == ANSWERS[batch.answers[row]]
    for row, scene in enumerate(batch.scenes):
        pixels = batch.tensors["pixel_values"][row] * 0.27 + 0.45
        assert torch.allclose(pixels.permute(1, 2, 0) * 255, torch.from_numpy(scene.image).float(), atol=1e-3)


def test_training_data_is_a_function_of_the_step(batcher):
    data = SceneVqaData(batcher, num_scenes=2, num_questions=3, curriculum=((2, 1), (4, 3)))
    straight = list(data.batches(0, 6))
    resumed = [*data.batches(0, 3), *data.batches(3, 3)]
    for one, two in zip(straight, resumed, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert [data.num_objects(step) for step in range(6)] == [1, 1, 3, 3, None, None]


def test_curriculum_must_rise(batcher):
    with pytest.raises(ConfigError, match="curriculum"):
        SceneVqaData(batcher, curriculum=((4, 1), (2, 3)))
