"""TRIPS-S in every task: losses pair by pair, what learns, leaks, both stages of search, towers, an earlier run."""

from __future__ import annotations

import copy

import pytest
import torch
from pipelines import QUESTIONS, picture, tiny_processor
from pretraining_reference import NEGATIVES, expected_losses
from reasoning_models import reasoning_batch, reasoning_config, tiny_reasoning_model
from retrieval_records import matches_one_by_one, retrieval_model, retrieval_processor, retrieval_records
from tiny import (
    ANSWER_MASK,
    ANSWERS,
    images,
    pair_batch,
    randomise,
    texts,
    tiny_bert_config,
    tiny_config,
    tiny_pretraining_model,
    tiny_vision_config,
    tiny_vqa_model,
)
from torch import Tensor, nn
from transformers import BertForMaskedLM, ViTModel

import trips
from trips.config import SelectionConfig, TripsConfig
from trips.errors import CheckpointError, ConfigError
from trips.importers import build_model_from_towers
from trips.pipeline import TripsPipeline
from trips.single_stream import TripsSingleStreamModel
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.reranking import Reranker, TextTable
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.transfer import start_from

SINGLE = {"architecture": "single"}


def untouched(model: nn.Module) -> list[str]:
    """Parameters without a finite gradient that is not zero."""
    wrong = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if parameter.requires_grad and (
            gradient is None or not bool(gradient.isfinite().all()) or not float(gradient.abs().max())
        ):
            wrong.append(name)
    return wrong


# --- pre-training


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        ({}, {}),
        ({"itc_guide": "none"}, {"learning": "gate"}),
        ({"queue_size": 0, "alpha": 0.0}, {}),
        ({"negatives": "global"}, {"guide": "none"}),
        ({}, {"keep_rate": 1.0}),
        ({}, {"guide": "similarity"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_losses_equal_those_of_one_pair_at_a_time(options, selection) -> None:
    model = tiny_pretraining_model(options, queue_ids=() if options.get("queue_size") == 0 else (51, 7), **SINGLE,
                                   **selection)  # fmt: skip
    batch = pair_batch()
    expected, found = expected_losses(model, batch, model.config.selection), model(**batch, negatives=NEGATIVES)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(found.loss, sum(expected.values()), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_captions_is_in_the_contrastive_image() -> None:
    """Neither its value nor its gradient knows them; the joint [CLS] would."""
    model, batch = tiny_pretraining_model(**SINGLE), pair_batch()
    before = model.encode_image(batch["pixel_values"])
    prefix = model.trips.encode_prefix(batch["pixel_values"])
    states = model.trips.image_alone(prefix, model.config.selection)[:, 0]
    (model.image_projection(states) ** 2).sum().backward()
    assert model.get_input_embeddings().weight.grad is None
    assert float(model.trips.modality_embeddings.weight.grad[0].abs().max()) == 0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    torch.testing.assert_close(model.encode_image(batch["pixel_values"]), before, rtol=0, atol=0)
    seen: list[Tensor] = []
    hook = model.image_projection.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    other = batch | {"input_ids": batch["input_ids"].roll(1, 0), "attention_mask": batch["attention_mask"].roll(1, 0)}
    for inputs in (batch, other):
        model(**inputs, negatives=NEGATIVES)
    hook.remove()
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("learning", ["literal", "gate"])
def test_pretraining_reaches_every_weight_and_learns(learning) -> None:
    torch.manual_seed(0)
    config = tiny_config("vit", **SINGLE, learning=learning)
    config.pretraining = trips.PretrainingConfig(projection_dim=8, queue_size=0, alpha=0.0)
    model = TripsForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    batch, losses = pair_batch(), []
    for step in range(25):
        model.start_step(step)
        out = model(**batch, negatives=NEGATIVES)
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            assert untouched(model) == []
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_a_teacher_learns_by_moving_average_alone() -> None:
    model, batch = tiny_pretraining_model(**SINGLE), pair_batch()
    assert isinstance(model.momentum.trips, TripsSingleStreamModel)
    model(**batch, negatives=NEGATIVES).loss.backward()
    assert all(parameter.grad is None for parameter in model.momentum.parameters())
    model.start_step(0)
    ours, theirs = model.trips.state_dict(), model.momentum.trips.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_there_is_nothing_to_distil_from() -> None:
    model = tiny_vqa_model(**SINGLE)
    with pytest.raises(ConfigError, match="observe"):
        model(images(2), *texts(2), distill=True)
    with pytest.raises(ConfigError, match="observe"):
        tiny_pretraining_model(**SINGLE)(**pair_batch(), distill=True)


# --- question answering and several images


@pytest.mark.parametrize("learning", ["literal", "gate"])
def test_answering_reaches_every_weight_and_learns(learning) -> None:
    torch.manual_seed(0)
    model = TripsForQuestionAnswering(tiny_config("vit", **SINGLE, learning=learning)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    ids, mask = texts(4)
    losses = []
    for step in range(25):
        out = model(images(4), ids, mask, ANSWERS, ANSWER_MASK)
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            assert untouched(model) == []
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_the_decoder_reads_the_joint_states_of_the_text() -> None:
    model = tiny_vqa_model(**SINGLE)
    ids, mask = texts(2)
    out = model(images(), ids, mask)
    assert torch.equal(out.question_states, model.trips(ids, mask, images()).last_hidden_state)
    ranked, _ = model.rank_answers(out.question_states, mask, ANSWERS, ANSWER_MASK)
    assert ranked.shape == (2, 4)
    assert model.generate(images(), ids, mask, max_new_tokens=3).shape[0] == 2


def test_statements_learn_what_the_second_image_shows() -> None:
    torch.manual_seed(0)
    model = TripsForVisualReasoning(reasoning_config(**SINGLE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    (ids, mask), losses = texts(1), []
    pixels = images(2)[torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])]
    inputs = {"pixel_values": pixels, "input_ids": ids.expand(4, -1), "attention_mask": mask.expand(4, -1)}
    for _ in range(40):
        out = model(**inputs, labels=torch.tensor([1, 0, 1, 0]))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss_task))
    assert losses[-1] < 0.25 * losses[0]


# --- both stages of search, pictures and sentences


def test_reranking_reads_every_pair_as_a_whole() -> None:
    dual = retrieval_model()
    config = TripsConfig(**{**dual.config.to_dict(), **SINGLE})
    model, records, processor = (
        randomise(TripsForImageTextRetrieval(config)),
        retrieval_records(4),
        retrieval_processor(),
    )
    captions = sorted({text for record in records for text in record.texts})
    flat = [text for record in records for text in record.texts]
    pixels = processor(images=[record.image for record in records])["pixel_values"]
    table = TextTable.of(processor.token_ids(captions))
    index = torch.arange(4).repeat_interleave(len(captions)), torch.arange(len(captions)).repeat(4)
    options = {"batch_size": 2, "memory_gb": 1e-6}
    for selection in (config.selection, SelectionConfig(layers=(), guide="none")):
        reranker = Reranker(model, table, lambda numbers: pixels[numbers], 16, selection=selection, **options)
        assert reranker.per_pair
        parts = [reranker.score(index[0][block], index[1][block]) for block in reranker.blocks(index[0])]
        expected = matches_one_by_one(model, records, selection)[:, [flat.index(text) for text in captions]]
        torch.testing.assert_close(torch.cat(parts).view(4, -1), expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.02
    with pytest.raises(ConfigError, match="read with its text"):
        Reranker(model, table, lambda numbers: pixels[numbers], 16, guide="image")


@torch.no_grad()
def test_people_use_it_with_pictures_and_sentences() -> None:
    processor = tiny_processor()
    answering = TripsPipeline(tiny_vqa_model(**SINGLE), processor, ["red", "dog", "two"])
    found = answering.ask(picture(1), QUESTIONS)
    alone = [answering.ask(picture(1), question) for question in QUESTIONS]
    assert [row[0].text for row in found] == [row[0].text for row in alone]
    matching = TripsPipeline(tiny_pretraining_model(**SINGLE), processor)
    pictures, sentences = [picture(1), picture(2)], ["a red bus", "a dog on the sofa", "two"]
    scores, cosines = matching.score(pictures, sentences), matching.similarity(pictures, sentences)
    for i, one in enumerate(pictures):
        for t, text in enumerate(sentences):
            inputs = processor(images=one, text=text)
            states = matching.model.trips(**inputs).last_hidden_state[:, 0]
            expected = matching.model.itm_head(states).softmax(-1)[0, 1]
            torch.testing.assert_close(scores[i, t], expected, rtol=0, atol=1e-5)
            image = matching.model.encode_image(inputs["pixel_values"])
            words = matching.model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
            torch.testing.assert_close(cosines[i, t], (image @ words.T)[0, 0], rtol=0, atol=1e-5)
    judging = TripsPipeline(tiny_reasoning_model(**SINGLE), processor)
    assert 0 < judging.verify(pictures, "two") < 1


# --- where it comes from


@torch.no_grad()
def test_it_is_built_from_a_vision_tower_and_the_embeddings_of_a_bert(tmp_path) -> None:
    vit = randomise(ViTModel(tiny_vision_config("vit")))
    bert = randomise(BertForMaskedLM(tiny_bert_config(num_layers=4)))
    vit.save_pretrained(tmp_path / "vit")
    bert.save_pretrained(tmp_path / "bert")
    folders, options = (tmp_path / "vit", tmp_path / "bert"), {"num_text_layers": 1, "num_fusion_layers": 2}
    options["selection"] = SelectionConfig(layers=(2,), keep_rate=0.5)
    model, report = build_model_from_towers(*folders, architecture="single", **options)
    assert type(model) is TripsSingleStreamModel and report.initialised == ["modality_embeddings.weight"]
    tower, words = vit.state_dict(), bert.bert.embeddings.state_dict()
    for name, value in model.vision.tower.state_dict().items():
        assert torch.equal(value, tower[name]), name
    for name, value in model.text.embeddings.state_dict().items():
        assert torch.equal(value, words[name]), name
    assert bool(model(*texts(2), images()).last_hidden_state.isfinite().all())
    answering, _ = build_model_from_towers(*folders, TripsForQuestionAnswering, architecture="single", **options)
    last, ours = bert.bert.encoder.layer[-1], answering.decoder.bert.encoder.layer[-1]
    assert torch.equal(ours.attention.self.query.weight, last.attention.self.query.weight)
    taught, report = build_model_from_towers(*folders, TripsForPreTraining, architecture="single", **options)
    assert "momentum.trips.modality_embeddings.weight" in report.initialised
    assert torch.equal(taught.mlm_head.bias, bert.cls.predictions.bias)
    ours, theirs = taught.trips.state_dict(), taught.momentum.trips.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_fine_tuning_starts_from_the_joint_stack(tmp_path) -> None:
    source = tiny_pretraining_model(**SINGLE)
    source.save_pretrained(tmp_path)
    answering = tiny_vqa_model(**SINGLE)
    layers = copy.deepcopy(answering.decoder.bert.encoder.state_dict())
    for model in (
        answering,
        tiny_reasoning_model(**SINGLE),
        randomise(TripsForImageTextRetrieval(source.config), seed=3),
    ):
        start_from(model, tmp_path)
        ours, theirs = model.trips.state_dict(), source.trips.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    words = answering.decoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(words, source.get_input_embeddings().weight)
    assert all(torch.equal(value, layers[name]) for name, value in answering.decoder.bert.encoder.state_dict().items())
    for other in (tiny_vqa_model(), tiny_reasoning_model(), tiny_pretraining_model()):
        with pytest.raises((CheckpointError, ConfigError), match="another architecture"):
            start_from(other, tmp_path)


@torch.no_grad()
def test_tasks_come_back_as_they_were_saved(tmp_path) -> None:
    ids, mask = texts(2)
    model = tiny_vqa_model(**SINGLE)
    model.save_pretrained(tmp_path / "vqa")
    loaded = TripsForQuestionAnswering.from_pretrained(tmp_path / "vqa")
    assert torch.equal(loaded(images(), ids, mask).question_states, model(images(), ids, mask).question_states)
    model, batch = tiny_reasoning_model({"num_images": 3}, **SINGLE), reasoning_batch(2, 3)
    model.save_pretrained(tmp_path / "nlvr2")
    loaded = TripsForVisualReasoning.from_pretrained(tmp_path / "nlvr2")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
