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


@pytest.mark.parametrize("side", [32, 48, 96])
def test_resized_pictures_keep_their_contents_and_what_is_relevant(batcher, side):
    resized = SceneBatcher(batcher.corpus, batcher.processor, side)
    own, other = batcher.batch(5, 2, 4), resized.batch(5, 2, 4)
    assert other.questions == own.questions and torch.equal(other.answers, own.answers)
    pixels, drawn = other.tensors["pixel_values"], own.tensors["pixel_values"]
    assert pixels.shape == (2, 3, side, side)
    assert torch.allclose(pixels.mean(dim=(2, 3)), drawn.mean(dim=(2, 3)), atol=0.03)
    size, patch = batcher.corpus.config.image_size, batcher.corpus.config.patch_size
    grid = side // patch
    for question, marked in zip(own.questions, resized.relevant(own.questions).view(-1, grid, grid), strict=True):
        assert marked.any()
        for row, column in marked.nonzero().tolist():  # each marked patch touches a box, edges rounded outwards
            y, x, step, slack = (
                row * patch * size / side,
                column * patch * size / side,
                patch * size / side,
                size / side,
            )
            assert any(
                x0 - slack < x + step and x < x1 + slack and y0 - slack < y + step and y < y1 + slack
                for x0, y0, x1, y1 in question.boxes
            )


def test_a_side_that_holds_no_whole_patches_is_refused(batcher):
    for side in (0, 60):
        with pytest.raises(ConfigError, match="multiple of the patch size"):
            SceneBatcher(batcher.corpus, batcher.processor, side)
