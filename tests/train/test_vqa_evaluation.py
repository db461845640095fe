"""Measuring a VQA model: each way of answering against loops, the two metrics, the server's file, whole runs."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trips.data.loading import AnswerList, VqaCollator, VqaDataset
from trips.data.records import BadSamples, Question, VqaRecord
from trips.errors import CheckpointError, ConfigError, DataError
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.recipe import Recipe, RunSection
from trips.train.recipe_io import load_recipe
from trips.train.run import evaluate_run, run_recipe
from trips.train.towers import build_model, build_processor
from trips.train.vqa import read_records
from trips.train.vqa_evaluation import (
    VqaMeasurement,
    choose_metric,
    evaluate_vqa,
    majority_accuracy,
    score_answers,
    write_answers,
)
from trips.vqa_accuracy import vqa_accuracy

TEN = ["red"] * 3 + ["blue"] * 6 + ["Red."]
CANDIDATES = ["red", "blue", "10:30", "two", "t-shirt"]


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def ask(name: str, *given: str, kind: str | None = None) -> Question:
    if not given:
        return Question(name, "what is it ?", (), ())
    return Question.of(name, f"what is {name} ?", given, answer_type=kind, question_type=kind and "what is")


def make_records() -> list[VqaRecord]:
    asked = [
        [ask("1", *TEN, kind="other"), ask("2", *["two"] * 10, kind="number")],
        [ask("30", *["10:30"] * 4, *["blue"] * 6, kind="other")],
        [ask("x4", *TEN, kind="other"), ask("5", *["2"] * 9, "two", kind="number"), ask("6", *["green"] * 10)],
    ]
    return [VqaRecord(str(i), photo(i), tuple(questions), f"s.tar:{i}") for i, questions in enumerate(asked)]


@pytest.fixture(scope="module")
def model() -> TripsForQuestionAnswering:
    """Has learnt six answers by heart, so that it writes words and tells questions apart."""
    torch.manual_seed(3)
    recipe = load_recipe("debug/vqa_tiny", {"data.image_size": 32})
    words = [question.text for record in make_records() for question in record.questions] + CANDIDATES
    built = build_model(recipe.model, build_processor(recipe.model, recipe.data, words), TripsForQuestionAnswering)
    built.processor = build_processor(recipe.model, recipe.data, words)
    taught = iter([*CANDIDATES, "blue - t-shirt"])
    records = [
        dataclasses.replace(record, questions=tuple(ask(q.question_id, next(taught)) for q in record.questions))
        for record in make_records()
    ]
    dataset, collator = data_of(built.eval(), records)
    batch = collator([dataset[i] for i in range(len(dataset))])
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        built(**inputs).loss.backward()
        optimizer.step()
    return built


def data_of(model: TripsForQuestionAnswering, records: list[VqaRecord]) -> tuple[VqaDataset, VqaCollator]:
    return VqaDataset(records, model.processor, BadSamples()), VqaCollator(model.processor)


@torch.no_grad()
def greedy(model: TripsForQuestionAnswering, record: VqaRecord, question: Question, most: int) -> str:
    """The likeliest next token, one at a time, each time from the whole beginning."""
    processor, ids = model.processor, [[model.config.decoder_config.bos_token_id]]
    inputs = processor(images=[record.image], text=[question.text])
    states = model(**inputs).question_states
    for _ in range(most):
        logits = model.decoder(
            input_ids=torch.tensor(ids), encoder_hidden_states=states, encoder_attention_mask=inputs["attention_mask"]
        ).logits
        ids[0].append(int(logits[0, -1].argmax()))
        if ids[0][-1] == model.config.decoder_config.eos_token_id:
            break
    known = {tuple(processor.encode_answers([answer])["input_ids"][0].tolist()): answer for answer in CANDIDATES}
    return known.get(tuple(ids[0]), processor.decode_answers(torch.tensor(ids))[0])


def test_both_ways_of_answering_equal_loops(model: TripsForQuestionAnswering) -> None:
    records, candidates = make_records(), AnswerList(CANDIDATES)
    dataset, collator = data_of(model, records)
    ranked, written = {}, {}
    for record in records:
        for question in record.questions:
            inputs = model.processor(images=[record.image], text=[question.text])
            losses = []
            for answer in candidates:
                encoded = model.processor.encode_answers([answer])
                with torch.no_grad():
                    losses.append(model(**inputs, answer_ids=encoded["input_ids"]).loss.item())
            ranked[question.question_id] = candidates[int(np.argmin(losses))]
            written[question.question_id] = greedy(model, record, question, 10)
    for way, expected in (("rank", ranked), ("generate", written)):
        assert len(set(expected.values())) >= 4 and "10:30" in expected.values(), expected
        for metric in ("exact", "official"):
            scores = evaluate_vqa(model, dataset, collator, candidates, way=way, metric=metric, batch_size=2, top_k=99)
            assert scores.answers == expected
            right = []
            for question in (question for record in records for question in record.questions):
                said = scores.answers[question.question_id]
                shares = [answer.lower() == said for answer in question.given]
                right.append(vqa_accuracy(said, question.given) if metric == "official" else sum(shares) / len(shares))
            assert scores.accuracy == pytest.approx(sum(right) / len(right)) and scores.num_questions == 6
    assert evaluate_vqa(model, dataset, collator, candidates, way="generate", num_beams=2).num_questions == 6
    for wrong in ({"way": "ranked"}, {"metric": "vqa"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: unknown"):
            evaluate_vqa(model, dataset, collator, candidates, **wrong)
    with pytest.raises(DataError, match="question id occurs twice"):  # one answer would be judged for both
        evaluate_vqa(model, data_of(model, [*records, *make_records()[1:]])[0], collator, candidates)


def test_questions_of_an_image_share_it_and_blank_images_hold_nothing(model: TripsForQuestionAnswering) -> None:
    dataset, collator = data_of(model, make_records())
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or (kwargs["pixel_values"],))[0]), with_kwargs=True
    )
    for way in ("rank", "generate"):
        evaluate_vqa(model, dataset, collator, AnswerList(CANDIDATES), way=way)
        evaluate_vqa(model, dataset, collator, AnswerList(CANDIDATES), way=way, blank_images=True)
    hook.remove()
    assert [len(pixels) for pixels in seen] == [3, 3, 3, 3]
    assert [bool(pixels.any()) for pixels in seen] == [True, False, True, False]


def test_metrics_and_types_by_hand() -> None:
    records = make_records()
    questions = [question for record in records for question in record.questions]
    answers = {"1": "red", "2": "two", "30": "10:30", "x4": "blue", "5": "two"}
    # Official: "Red." counts as red, four of ten; ten alike need the word itself; "two" is "2" where people differ;
    # a question without an answer of ours is wrong.
    score = score_answers(questions, answers, "official")
    assert score.report() == {
        "overall": round(100 * 5 / 6, 2),
        "perAnswerType": {"number": 100.0, "other": 100.0},
        "perQuestionType": {"what is": 100.0},
    }
    # Exact: shares of the people, "Red." is another answer.
    score = score_answers(questions, answers, "exact")
    assert score.accuracy == pytest.approx((0.3 + 1.0 + 0.4 + 0.6 + 0.1 + 0.0) / 6)
    assert score.by_answer_type == {"number": pytest.approx(0.55), "other": pytest.approx(1.3 / 3)}
    assert majority_accuracy(records, records) == pytest.approx((0.6 + 0.6 + 0.6) / 6)  # blue
    assert majority_accuracy(records, records, "official") == pytest.approx(3 / 6)
    assert majority_accuracy(records, [VqaRecord("0", b"", (ask("7"),), "s")]) is None


def test_the_metric_follows_the_number_of_people() -> None:
    def records(*given: Sequence[str]) -> list[VqaRecord]:
        return [VqaRecord("0", b"", tuple(ask(str(i), *people) for i, people in enumerate(given)), "s")]

    ten = ["red"] * 10
    assert choose_metric(records(ten, ten), "auto") == "official"
    assert choose_metric(records(ten, []), "auto") == "official"  # nobody answered the second
    assert choose_metric(records(ten, ["red"]), "auto") == "exact"
    assert choose_metric(records(["red"] * 4), "auto") == "official"
    assert choose_metric(records(["red"] * 3), "auto") == "exact"  # no answer could be wholly right
    assert choose_metric(records([]), "auto") == "exact"
    assert choose_metric(records(["red"] * 3), "official") == "official"
    assert choose_metric(records(ten), "exact") == "exact"
    with pytest.raises(ConfigError, match=r"run\.metric.*question 1 .*expected exact"):
        choose_metric(records(ten, ["red"]), "official")


def test_the_file_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    write_answers(path, {"17": "café", "0": "a, b", "007": "x", "image3-0": "y", "-4": "z", "9" * 30: "w", "٣": "v"})
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"question_id": question_id, "answer": answer}
        for question_id, answer in [(17, "café"), (0, "a, b"), ("007", "x"), ("image3-0", "y")]
        + [("-4", "z"), ("9" * 30, "w"), ("٣", "v")]
    ]


def measure(model: TripsForQuestionAnswering, records: list[VqaRecord], folder: Path, **run: Any) -> tuple[dict, list]:
    dataset, collator = data_of(model, records)
    candidates = AnswerList(run.pop("candidates", CANDIDATES))
    measurement = VqaMeasurement(model, dataset, collator, candidates, model.config.selection, RunSection(**run))
    figures = measurement()
    measurement.write(folder)
    return figures, json.loads((folder / "answers_test.json").read_text())


def test_every_question_is_in_the_file_and_only_known_answers_count(
    model: TripsForQuestionAnswering, tmp_path: Path
) -> None:
    records = [*make_records(), VqaRecord("9", b"broken", (ask("90", *["red"] * 10),), "s.tar:9")]
    figures, answers = measure(model, records, tmp_path)
    assert [entry["question_id"] for entry in answers] == [1, 2, 30, "x4", 5, 6, 90] and answers[-1]["answer"] == ""
    said = {str(entry["question_id"]): entry["answer"] for entry in answers}
    known = [question for record in records for question in record.questions]
    expected = [vqa_accuracy(said[question.question_id], question.given) for question in known]
    assert (figures["metric"], figures["num_questions"]) == ("official", 7) and "num_scored" not in figures
    assert figures["accuracy"] == pytest.approx(sum(expected) / 7)
    # Within reach is all but "green"; of 5 since one of the ten said "two".
    assert figures["answer_coverage"] == 6 / 7
    assert set(figures["accuracy_by_answer_type"]) == {"number", "other"}
    assert set(figures["accuracy_by_question_type"]) == {"what is"}
    # Some unanswered, as in a mixture of sets; then all, as in a test set.
    mixed, _ = measure(model, [*make_records(), VqaRecord("9", photo(9), (ask("90"),), "s.tar:9")], tmp_path)
    assert (mixed["num_questions"], mixed["num_scored"]) == (7, 6)
    unknown = [VqaRecord("9", photo(9), (ask("90"), ask("91")), "s.tar:9")]
    figures, answers = measure(model, unknown, tmp_path)
    assert figures == {"num_questions": 2} and [entry["question_id"] for entry in answers] == [90, 91]
    assert all(entry["answer"] in CANDIDATES for entry in answers)


def test_a_list_of_one_answer_and_both_ways(model: TripsForQuestionAnswering, tmp_path: Path) -> None:
    figures, answers = measure(model, make_records(), tmp_path, candidates=["blue"], answer="both", metric="exact")
    assert {entry["answer"] for entry in answers} == {"blue"}
    assert figures["accuracy"] == pytest.approx((0.6 + 0.6 + 0.6) / 6) == figures["accuracy_blank_images"]
    assert figures["answer_coverage"] == 3 / 6 and "answer_coverage" not in figures["generated"]
    written = json.loads((tmp_path / "answers_test_generated.json").read_text())
    alone, again = measure(model, make_records(), tmp_path / "..", answer="generate", candidates=["blue"])
    assert again == written and alone["metric"] == "official"
    assert figures["generated"].keys() == alone.keys()


# Whole runs


def write_tar(path: Path, first: int, people: int) -> str:
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + 4):
            asked = [
                {"question_id": 10 * i + j, "question": "what is it ?", "answers": [["red", "10:30"][i % 2]] * people}
                for j in range(2)
            ]
            for suffix, content in (("png", photo(i)), ("json", json.dumps({"questions": asked}).encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def tiny(folder: Path, **changes: Any) -> Recipe:
    tars = [write_tar(folder / "train.tar", 0, 10), write_tar(folder / "test.tar", 4, 10)]
    values = {
        "data.train": tars[:1],
        "data.test": tars[1:],
        "data.image_size": 32,
        "data.cache_images": False,
        "optim.batch_size": 2,
        "optim.steps": 2,
        "run.precision": "fp32",
        "run.save_every": 0,
        "run.trackers": [],
        "run.out": str(folder / "run"),
    }
    return load_recipe("debug/vqa_tiny", {**values, **changes})


def test_a_run_measures_as_its_recipe_says_and_another_evaluation_writes_only_where_told(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, **{"run.answer": "both", "data.augment": "randaugment", "data.crop_scale": [0.5, 1.0]})
    results = run_recipe(recipe)
    out, files = tmp_path / "run", ("answers_test.json", "answers_test_generated.json")
    assert results["metric"] == results["generated"]["metric"] == "official"
    assert results["answer_coverage"] == 1.0 and results["majority"] == 0.5  # two answers, each half the time
    written = {}
    for name in files:
        written[name] = json.loads((out / name).read_text())
        assert [entry["question_id"] for entry in written[name]] == [40, 41, 50, 51, 60, 61, 70, 71]
        (out / name).unlink()
    again = evaluate_run(out)
    assert again["accuracy"] == results["accuracy"] and not any((out / name).exists() for name in files)
    evaluate_run(out, {"run.answer": "rank"}, tmp_path / "new" / "folder")
    assert json.loads((tmp_path / "new" / "folder" / files[0]).read_text()) == written[files[0]]
    assert not (tmp_path / "new" / "folder" / files[1]).exists()
    with pytest.raises(ConfigError, match="train.tar.*no folder can be made"):
        evaluate_run(out, out=tmp_path / "train.tar")
    with pytest.raises(CheckpointError):
        evaluate_run(tmp_path)


def test_loss_weights_replace_those_of_the_files(tmp_path: Path) -> None:
    lists = []
    for name, dataset in (("a", "vqa"), ("b", "vg")):
        (tmp_path / f"{name}.png").write_bytes(photo(1))
        lists.append(tmp_path / f"{name}.json")
        entry = {"question_id": ord(name), "question": "what ?", "answer": ["red"], "image": f"{name}.png"}
        lists[-1].write_text(json.dumps([{**entry, "dataset": dataset}]))

    def weights(**changes: Any) -> list[float]:
        data = tiny(tmp_path, **{"data.train": [str(path) for path in lists], **changes}).data
        return [q.loss_weight for record in read_records(data, "train", BadSamples()) for q in record.questions]

    assert weights() == [1.0, 0.5]  # ALBEF's mark of Visual Genome
    assert weights(**{"data.loss_weights": [2.0, 0.25]}) == [2.0, 0.25]
    with pytest.raises(ConfigError, match=r"data\.loss_weights.*positive"):
        weights(**{"data.loss_weights": [1.0, -1.0]})


def test_mistakes_are_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "COCO_test2015_000000000001.jpg").write_bytes(photo(1))
    asked = {"questions": [{"image_id": 1, "question": "what ?", "question_id": 10}], "data_subtype": "test2015"}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    single = write_tar(tmp_path / "single.tar", 20, 1)
    for changes, kind, message in [
        ({"data.train": [str(tmp_path / "asked.json")]}, DataError, "question 10 has no answers to learn from"),
        ({"data.min_answer_count": 99}, DataError, "min_answer_count.*99"),
        ({"data.augment": "crop", "data.cache_images": True}, ConfigError, "cache_images"),
        ({"data.test": [single], "run.metric": "official"}, ConfigError, r"run\.metric.*question 200"),
        ({"data.test": []}, ConfigError, r"data\.test: no files given"),
        ({"data.test": [single, single]}, DataError, "question id occurs twice.*200"),
    ]:
        with pytest.raises(kind, match=message):
            run_recipe(tiny(tmp_path, **changes))


def test_the_recipe_of_the_paper() -> None:
    recipe = load_recipe("vqa/paper")
    assert (recipe.optim.lr, recipe.optim.vision_lr, recipe.optim.weight_decay, recipe.optim.epochs) == (
        *(2e-5, 5e-6, 0.05, 8),
    )
    assert (recipe.data.image_size, recipe.data.augment, recipe.data.crop_scale) == (384, "randaugment", (0.5, 1.0))
    assert recipe.data.loss_weights == (1.0, 1.0, 0.5) and recipe.model.start_from == "runs/pretrain_base/model"
    assert recipe.model.selection.layers == (5, 10) and recipe.model.selection.rates == (0.7, 0.7)
    # 443,757 + 214,354 + 1,445,322 questions about 82,783 + 40,504 + 108,077 images
    assert recipe.optim.batch_size * 2_103_433 / 231_364 == pytest.approx(1024, rel=0.01)
