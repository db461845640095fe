"""Trained models in use: answers, matching, statements, against the model's own methods called by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from pipelines import CANDIDATES, QUESTIONS, picture, same, tiny_processor
from tiny import BOS, EOS, randomise, tiny_config, tiny_pretraining_model, tiny_vqa_model
from torch import Tensor

import trips
from trips.answering import Answer
from trips.errors import ConfigError, DataError
from trips.pipeline import TripsPipeline


@pytest.fixture(scope="module")
def processor() -> trips.TripsProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def answering(processor) -> TripsPipeline:
    return TripsPipeline(tiny_vqa_model(), processor, CANDIDATES, batch_size=2)


@pytest.fixture(scope="module")
def matching(processor) -> TripsPipeline:
    return TripsPipeline(tiny_pretraining_model(), processor, batch_size=2)


def likelihoods(model: trips.TripsForQuestionAnswering, processor: trips.TripsProcessor, question: str) -> list[float]:
    """Of all candidates, one by one, without anything of the pipeline."""
    inputs = processor(images=picture(0), text=question)
    answers = [processor.encode_answers([one])["input_ids"][0].tolist() for one in CANDIDATES]
    with torch.no_grad():
        states, mask = model(**inputs).question_states[0], inputs["attention_mask"][0]
        return [reference.answer_log_likelihood(model.decoder, states, mask, answer) for answer in answers]


# --- questions


def test_ask_ranks_the_candidates_and_says_their_share(answering, processor) -> None:
    every = answering.ask(picture(0), QUESTIONS, top_k=9)
    assert [len(row) for row in every] == [len(CANDIDATES)] * 3
    for question, row in zip(QUESTIONS, every):
        scores = likelihoods(answering.model, processor, question)
        shares = torch.softmax(torch.tensor(scores), dim=0).tolist()
        order = sorted(range(len(scores)), key=lambda i, s=scores: -s[i])
        assert [answer.text for answer in row] == [CANDIDATES[i] for i in order]
        assert [answer.probability for answer in row] == pytest.approx([shares[i] for i in order], abs=1e-5)
        alone = answering.ask(picture(0), question, top_k=2)
        assert same(alone, row[:2])
    assert not same(every[0], every[1]) and len(answering.ask(picture(0), "what")) == 1


def test_candidates_of_a_call_come_back_as_they_were_given(answering) -> None:
    assert answering.answers == CANDIDATES
    own = answering.ask(picture(0), "what is it?", 5, ["Red", "A  red bus"])
    assert {answer.text for answer in own} == {"Red", "A  red bus"}
    among = {answer.text: answer.probability for answer in answering.ask(picture(0), "what is it?", 5)}
    odds = {answer.text: answer.probability for answer in own}
    assert odds["Red"] / odds["A  red bus"] == pytest.approx(among["red"] / among["a red bus"], rel=1e-4)
    assert answering.ask(picture(0), "what", answers=["dog"]) == [Answer("dog", 1.0)]


def test_pictures_in_any_form_give_one_answer(answering, tmp_path: Path) -> None:
    image, stream = picture(3), io.BytesIO()
    image.save(stream, "png")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    expected = answering.ask(image, "what is it?", 3)
    for form in (stream.getvalue(), np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert same(answering.ask(form, "what is it?", 3), expected)


def test_without_candidates_the_model_writes(processor) -> None:
    model = tiny_vqa_model()
    model.decoder.cls.predictions.bias.data[EOS] += 1  # so that answers end, at different lengths
    writing, ended = TripsPipeline(model, processor), []
    assert writing.answers is None
    for (best, *others), question in zip(writing.ask(picture(0), QUESTIONS, top_k=4), QUESTIONS):
        assert others and best.probability >= max(answer.probability for answer in others)
        assert len({answer.text for answer in (best, *others)}) == 1 + len(others)
        inputs = processor(images=picture(0), text=question)
        written = model.generate(**inputs, num_beams=4, length_penalty=0.0)[0].tolist()
        ended.append(EOS in written)
        written = written[: written.index(EOS) + 1] if ended[-1] else written
        assert written[0] == BOS and best.text == processor.decode_answers(torch.tensor([written]))[0]
        with torch.no_grad():
            states = model(**inputs).question_states[0]
            score = reference.answer_log_likelihood(model.decoder, states, inputs["attention_mask"][0], written)
        assert best.probability == pytest.approx(float(np.exp(score)), rel=1e-3)
    assert any(ended)


def test_a_call_can_take_another_selection(answering, processor) -> None:
    unselected = trips.SelectionConfig(guide="none")
    changed = answering.ask(picture(0), "what is it?", 5, selection=unselected)
    assert not same(changed, answering.ask(picture(0), "what is it?", 5))
    plain = TripsPipeline(tiny_vqa_model(guide="none"), processor, CANDIDATES)
    assert same(changed, plain.ask(picture(0), "what is it?", 5))


def test_the_form_of_transformers(answering) -> None:
    def told(rows: list[dict]) -> list[Answer]:
        assert all(set(row) == {"answer", "score"} for row in rows)
        return [Answer(row["answer"], row["score"]) for row in rows]

    said = answering.ask(picture(0), "what is it?", 2)
    assert same(told(answering(picture(0), "what is it?", top_k=2)), said)
    assert same(told(answering({"image": picture(0), "question": "what is it?"}, top_k=2)), said)
    pairs = [{"image": picture(i), "question": "what is it?"} for i in range(2)]
    first, second = answering(pairs, top_k=2)
    assert same(told(first), said)
    assert same(told(second), answering.ask(picture(1), "what is it?", 2)) and not same(told(second), said)
    assert [same(told(row), said) for row in answering(picture(0), ["what is it?"], top_k=2)] == [True]
    assert len(answering(picture(0), "what")) == 5
    for wrong in ({"image": picture(0)}, None):
        with pytest.raises(ConfigError, match="question"):
            answering(wrong)


# --- images and texts


def from_scratch(model: trips.TripsForPreTraining, processor: trips.TripsProcessor, texts: list[str]) -> Tensor:
    """Matching probabilities of every pair of three pictures and the texts, one after the other."""
    rows = []
    for i in range(3):
        row = []
        for text in texts:
            inputs = processor(images=picture(i), text=text)
            with torch.no_grad():
                fused = model.trips(**inputs).last_hidden_state
                row.append(torch.softmax(model.itm_head(fused[0, 0]), dim=0)[1])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_scores_equal_each_pair_from_scratch(matching, processor) -> None:
    texts = ["a red bus on the sofa", "two", "is it the cat", "a dog", "what"]
    found = matching.score([picture(i) for i in range(3)], texts)
    assert found.shape == (3, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found, from_scratch(matching.model, processor, texts), rtol=0, atol=1e-5)
    one = matching.score(picture(1), "two")  # a single text is one text, not three letters
    assert one.shape == (1, 1) and float(one) == pytest.approx(float(found[1, 1]), abs=1e-5)


def test_the_prefix_of_an_image_is_computed_once(matching, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = matching.model.trips.encode_prefix
    monkeypatch.setattr(
        matching.model.trips, "encode_prefix", lambda pixels, *rest: seen.append(len(pixels)) or encode(pixels, *rest)
    )
    matching.score([picture(i) for i in range(3)], ["a dog", "two", "what"])
    assert seen == [2, 1]


def test_similarities_are_cosines_of_the_features(matching, processor) -> None:
    texts = ["a red bus", "two", "is it the cat"]
    found = matching.similarity([picture(i) for i in range(3)], texts)
    inputs = processor(images=[picture(i) for i in range(3)], text=texts)
    images = matching.model.encode_image(inputs["pixel_values"])
    expected = images @ matching.model.encode_texts(inputs["input_ids"], inputs["attention_mask"]).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.abs().max() <= 1 + 1e-6 and matching.similarity(picture(0), "two").shape == (1, 1)


def test_half_precision(processor) -> None:
    exact = TripsPipeline(tiny_pretraining_model(), processor).score(picture(0), ["a dog", "two"])
    half = TripsPipeline(tiny_pretraining_model().to(torch.bfloat16), processor)
    found = half.score(picture(0), ["a dog", "two"])
    assert found.dtype == half.similarity(picture(0), "two").dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)


# --- statements


def test_statements_equal_the_models_own_judgement(processor) -> None:
    model = randomise(trips.TripsForVisualReasoning(tiny_config()))
    judging = TripsPipeline(model, processor, batch_size=2)
    sentences = ["a red bus on the sofa", "two", "is it the cat"]
    found = judging.verify([picture(0), picture(1)], sentences)
    for sentence, probability in zip(sentences, found):
        inputs = processor(images=[picture(0), picture(1)], text=[sentence])
        alone = model.verify(inputs["pixel_values"][None], inputs["input_ids"], inputs["attention_mask"])
        assert probability == pytest.approx(float(alone[0]), abs=1e-5)
        assert judging.verify([picture(0), picture(1)], sentence) == pytest.approx(probability, abs=1e-5)
    with pytest.raises(ConfigError, match="images: .*found 1; expected 2"):
        judging.verify(picture(0), "two")
    with pytest.raises(ConfigError, match="TripsForVisualReasoning: .*score.*expected verify"):
        judging.score(picture(0), "two")


# --- mistakes


def test_mistakes_are_named(answering, matching, processor) -> None:
    cases = [
        (ConfigError, r"TripsForPreTraining: .*ask.*score\(\) and similarity\(\)", lambda: matching.ask("x", "what")),
        (ConfigError, r"TripsForQuestionAnswering: .*expected ask", lambda: answering.score(picture(0), "what")),
        (ConfigError, "verify", lambda: answering.verify(picture(0), "what")),
        (ConfigError, "top_k", lambda: answering.ask(picture(0), "what", 0)),
        (ConfigError, "question: empty", lambda: answering.ask(picture(0), [])),
        (ConfigError, "answers: not a list", lambda: answering.ask(picture(0), "what", 1, "red")),
        (ConfigError, "selection", lambda: answering.ask(picture(0), "what", selection=0.5)),
        (ConfigError, "texts", lambda: matching.score(picture(0), {"a": 1})),
        (ConfigError, "images", lambda: matching.score([], "what")),
        (ConfigError, "batch_size", lambda: TripsPipeline(matching.model, processor, batch_size=0)),
        (ConfigError, "TripsModel", lambda: TripsPipeline(matching.model.trips, processor)),
        (DataError, "/none.jpg: image file does not exist", lambda: answering.ask("/none.jpg", "what")),
        (DataError, r"images\[3\].*/none.jpg", lambda: matching.score([picture(0)] * 3 + ["/none.jpg"], "what")),
        (DataError, "is empty", lambda: answering.ask(picture(0), " ")),
        (DataError, r"answers\[1\]: occurs twice", lambda: answering.ask(picture(0), "what", 1, ["Red", "red"])),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
