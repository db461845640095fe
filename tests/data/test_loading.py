"""trips.data.loading: batches against loops over the records, skipping of bad samples, caching, the answer list."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import trips.processor
from trips.data.loading import AnswerList, VqaCollator, VqaDataset
from trips.data.records import BadSamples, Question, VqaRecord, normalise_answer, read_vqa_shards
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError
from trips.images import FileSlice
from trips.processor import TripsProcessor
from trips.tasks.vqa import predicted_tokens

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] , what is this how many red dark blue bus one two three".split()


def make_processor() -> TripsProcessor:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return TripsProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), image_size=16, patch_size=8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(name: str, text: str = "what is this", **answers: float) -> Question:
    answers = answers or {"red": 1.0}
    return Question(name, text, tuple(answers), tuple(answers.values()))


def record(name: str, *questions: Question, image: bytes | Path | None = None) -> VqaRecord:
    image = png(len(name) * 9) if image is None else image
    return VqaRecord(name, image, questions or (ask(f"{name}-0"),), f"s.tar:{name}")


def collate(records: list[VqaRecord], bad: BadSamples | None = None, **options) -> dict:
    dataset = VqaDataset(records, make_processor(), bad, **options)
    return VqaCollator(dataset.processor)([dataset[i] for i in range(len(dataset))])


def words(row: torch.Tensor) -> str:
    return " ".join(WORDS[i] for i in row if i)


def check_answer_tokens(batch: dict) -> None:
    """Exactly the places in front of a token of an answer, which is what the model would find in the mask."""
    width, expected = batch["answer_ids"].shape[1] - 1, []
    for a, row in enumerate(batch["answer_ids"].tolist()):
        expected += [a * width + place for place in range(width) if row[place + 1]]
    assert batch["answer_tokens"].tolist() == expected
    assert torch.equal(batch["answer_tokens"], predicted_tokens(batch["answer_mask"]))


def test_a_batch_by_hand() -> None:
    batch = collate(
        [
            record("a", ask("a0", red=0.6, dark_red=0.4), ask("a1", "how many", two=1.0)),
            record("bb", ask("b0", "what is", **{"red, dark_red": 0.5, "Dark red,red": 0.25, "blue": 0.25})),
        ]
    )
    assert set(batch) == {
        *("pixel_values", "image_index", "input_ids", "attention_mask", "answer_ids", "answer_mask", "answer_index"),
        *("answer_tokens", "answer_weights", "question_ids", "sources", "skipped"),
    }
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    assert batch["image_index"].tolist() == [0, 0, 1] and batch["answer_index"].tolist() == [0, 0, 1, 2, 2]
    assert [words(row) for row in batch["input_ids"]] == ["[CLS] what is this", "[CLS] how many", "[CLS] what is"]
    assert [words(row) for row in batch["answer_ids"]] == [
        *("[CLS] red [SEP]", "[CLS] dark red [SEP]", "[CLS] two [SEP]"),
        *("[CLS] dark red , red [SEP]", "[CLS] blue [SEP]"),  # two spellings of one set, joined
    ]
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([0.6, 0.4, 1.0, 0.75, 0.25]))
    # five places a row can predict: "red" and [SEP], "dark" "red" [SEP], "two" [SEP] and so on
    assert batch["answer_tokens"].tolist() == [0, 1, 5, 6, 7, 10, 11, 15, 16, 17, 18, 19, 20, 21]
    for ids, mask in (("input_ids", "attention_mask"), ("answer_ids", "answer_mask")):
        assert torch.equal(batch[mask], (batch[ids] != 0).long()) and batch[ids].dtype == torch.long
    assert batch["image_index"].dtype == batch["answer_index"].dtype == batch["answer_tokens"].dtype == torch.long
    assert batch["answer_weights"].dtype == torch.float32
    assert batch["question_ids"] == ["a0", "a1", "b0"] and batch["sources"] == ["s.tar:a", "s.tar:bb"]
    assert batch["skipped"] == []


def test_pixels_equal_the_processor_and_batch_of_one_equals_row() -> None:
    records = [record("a"), record("bb", ask("x"), ask("y", "how many red bus")), record("ccc")]
    batch, processor = collate(records), make_processor()
    assert torch.equal(batch["pixel_values"], processor(images=[r.image for r in records])["pixel_values"])
    for i, one in enumerate(records):
        alone = collate([one])
        assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][i])
        rows = (batch["image_index"] == i).nonzero().flatten().tolist()
        length = alone["input_ids"].shape[1]
        assert torch.equal(alone["input_ids"], batch["input_ids"][rows, :length])


@given(
    st.lists(
        st.lists(
            st.lists(st.sampled_from(["red", "dark_red", "blue", "one, two"]), min_size=1, unique=True), min_size=1
        ),
        min_size=1,
        max_size=5,
    )
)
def test_indices_tie_every_answer_to_its_question_and_image(plan: list[list[list[str]]]) -> None:
    records = [
        record(f"{i}", *(ask(f"{i}-{j}", **dict.fromkeys(a, 1 / len(a))) for j, a in enumerate(questions)))
        for i, questions in enumerate(plan)
    ]
    batch = collate(records)
    triples = {
        (batch["sources"][batch["image_index"][b]], batch["question_ids"][b], words(row[1:-1]).replace(" [SEP]", ""))
        for b, row in zip(batch["answer_index"].tolist(), batch["answer_ids"])
    }
    expected = {
        (f"s.tar:{i}", f"{i}-{j}", normalise_answer(a).replace(",", " ,"))
        for i, questions in enumerate(plan)
        for j, answers in enumerate(questions)
        for a in answers
    }
    assert triples == {(s, q, a) for s, q, a in expected}
    sums = torch.zeros(len(batch["question_ids"])).index_add(0, batch["answer_index"], batch["answer_weights"])
    torch.testing.assert_close(sums, torch.ones_like(sums))
    check_answer_tokens(batch)


@pytest.mark.parametrize(("multiple", "length"), [(8, 16), (None, 10)])
def test_questions_fill_a_multiple_and_answers_do_not(multiple: int | None, length: int) -> None:
    dataset = VqaDataset([record("a", ask("q", "what " * 9))], make_processor())
    collator = VqaCollator(dataset.processor, multiple) if multiple is None else VqaCollator(dataset.processor)
    batch = collator([dataset[0]])
    assert batch["input_ids"].shape == (1, length) and batch["answer_ids"].shape == (1, 3)
    assert batch["answer_tokens"].tolist() == [0, 1]
    check_answer_tokens(batch)


# Bad samples


def test_bad_samples_are_skipped_counted_and_passed_on(tmp_path: Path) -> None:
    records = [
        record("a"),
        record("cut", image=png(3)[:40]),
        record("gone", image=tmp_path / "gone.jpg"),
        record("mute", ask("m", "\u0301")),  # an accent alone: the normaliser leaves nothing
        record("bb"),
    ]
    bad = BadSamples(limit=3)
    batch = collate(records, bad)
    assert batch["sources"] == ["s.tar:a", "s.tar:bb"] and batch["image_index"].tolist() == [0, 1]
    assert [source for source, _ in batch["skipped"]] == ["s.tar:cut", "s.tar:gone", "s.tar:mute"] == list(bad.errors)
    reasons = [reason for _, reason in batch["skipped"]]
    assert "s.tar:cut" in reasons[0] and "gone.jpg" in reasons[1] and "text[0]: is empty" in reasons[2]
    assert bad.num_seen == 5
    with pytest.raises(DataError, match="too many bad samples.*s.tar:cut"):
        collate(records, BadSamples(limit=2))
    with pytest.raises(DataError, match="s.tar:cut: "):
        collate(records)


def test_a_bad_sample_is_read_once(tmp_path: Path) -> None:
    dataset = VqaDataset([record("gone", image=tmp_path / "late.png")], make_processor(), BadSamples())
    assert dataset[0].pixel_values is None
    (tmp_path / "late.png").write_bytes(png(1))  # a run must not depend on when a file appears
    assert dataset[0].pixel_values is None and "does not exist" in dataset[0].error


def test_a_batch_of_bad_samples_is_empty_but_whole() -> None:
    full, empty = collate([record("a")]), collate([record("x", image=b"x")], BadSamples())
    assert set(full) == set(empty) and len(empty["skipped"]) == 1
    for key, value in full.items():
        if isinstance(value, torch.Tensor):
            assert len(empty[key]) == 0 and empty[key].dtype == value.dtype and empty[key].ndim == value.ndim


def test_worker_processes_give_the_same_batches_and_report_what_they_skip() -> None:
    records = [record("a", *(ask(f"a{i}") for i in range(5))), record("cut", image=b"x"), record("bb"), record("ccc")]

    def batches(workers: int) -> list[dict]:
        dataset = VqaDataset(records, make_processor(), BadSamples(), max_questions_per_image=2, seed=3)
        return list(DataLoader(dataset, 2, collate_fn=VqaCollator(dataset.processor), num_workers=workers))

    for here, there in zip(batches(0), batches(1), strict=True):
        for key, value in here.items():
            assert torch.equal(value, there[key]) if isinstance(value, torch.Tensor) else value == there[key]
    dataset = VqaDataset(records, make_processor(), BadSamples(limit=0))
    iterator = iter(DataLoader(dataset, 4, collate_fn=VqaCollator(dataset.processor), num_workers=1))
    with pytest.raises(DataError, match="too many bad samples"):
        next(iterator)
    assert next(iterator, None) is None  # an exhausted iterator ends its worker at once, a forgotten one later


# Draws and cache


def test_draws_depend_on_seed_epoch_and_index_only() -> None:
    records = [record(name, *(ask(f"{name}{i}") for i in range(12))) for name in ("a", "b")]

    def draw(seed: int, epoch: int, order: tuple[int, ...] = (0, 1)) -> list[list[str]]:
        dataset = VqaDataset(records, make_processor(), max_questions_per_image=4, seed=seed)
        dataset.set_epoch(epoch)
        drawn = {i: [q.question_id for q in dataset[i].questions] for i in order}
        return [drawn[0], drawn[1]]

    assert draw(0, 0) == draw(0, 0, order=(1, 0))  # a fresh dataset, read in another order
    assert draw(0, 0) != draw(0, 1) and draw(0, 0) != draw(1, 0)
    assert [name[1:] for name in draw(0, 0)[0]] != [name[1:] for name in draw(0, 0)[1]]
    dataset, seen = VqaDataset(records, make_processor(), max_questions_per_image=4, cache_images=True), Counter()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        seen.update(question.question_id for question in dataset[0].questions)
    assert len(seen) == 12 and min(seen.values()) >= 8  # each is expected 20 times


def test_the_cache_decodes_each_image_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, load_image = [], trips.processor.load_image

    def counted(*args, **kwargs):
        reads.append(kwargs["name"])
        return load_image(*args, **kwargs)

    monkeypatch.setattr(trips.processor, "load_image", counted)
    records = [record("a"), record("bb")]
    plain = VqaDataset(records, make_processor())
    cached = VqaDataset(records, make_processor(), cache_images=True)
    for _ in range(3):
        for i in range(2):
            assert torch.equal(plain[i].pixel_values, cached[i].pixel_values)
    assert Counter(reads) == {"s.tar:a": 4, "s.tar:bb": 4}  # three without the cache and one with it


def noise_png(seed: int, height: int = 40, width: int = 60) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(noise_png(0))
    records = [record("a", image=path), record("b", image=noise_png(0))]
    records.append(record("c", image=FileSlice(path, 0, path.stat().st_size)))
    transform = TrainTransform((16, 16), scale=(0.5, 1.0))

    def pixels(seed: int, epoch: int, index: int) -> torch.Tensor:
        dataset = VqaDataset(records, make_processor(), seed=seed, transform=transform)
        dataset.set_epoch(epoch)
        return dataset[index].pixel_values

    chosen = [pixels(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2))]
    for i, one in enumerate(chosen):
        assert all(not torch.equal(one, other) for other in chosen[i + 1 :])  # one picture, another draw each time
    assert torch.equal(pixels(0, 1, 0), chosen[2])
    # By hand: the generator of (seed, epoch, index), the transform, the processor's normalisation.
    array, _ = transform(Image.open(path).convert("RGB"), np.random.default_rng((0, 1, 0)), "")
    assert torch.equal(chosen[2], make_processor().normalise([array])[0])
    drafted = make_processor()
    drafted.jpeg_draft = True  # of a PNG it changes nothing, but it goes another way
    for index in range(3):
        assert torch.equal(VqaDataset(records, drafted, transform=transform)[index].pixel_values, pixels(0, 0, index))


def test_an_augmented_image_that_cannot_be_read_is_a_bad_sample(tmp_path: Path) -> None:
    records = [record("cut", image=png(3)[:40]), record("gone", image=tmp_path / "gone.png"), record("a")]
    for draft in (False, True):
        processor, bad = make_processor(), BadSamples()
        processor.jpeg_draft = draft
        dataset = VqaDataset(records, processor, bad, transform=TrainTransform((16, 16)))
        assert [dataset[i].pixel_values is None for i in range(3)] == [True, True, False]
        assert list(bad.errors) == ["s.tar:cut", "s.tar:gone"]


def test_weights_and_unanswered_questions() -> None:
    light = dataclasses.replace(ask("a1", red=0.75, blue=0.25), loss_weight=0.5)
    unanswered = Question("a2", "what is this", (), ())
    batch = collate([record("a", ask("a0"), light, unanswered), record("b", unanswered)])
    assert batch["question_ids"] == ["a0", "a1", "a2", "a2"]
    assert batch["answer_index"].tolist() == [0, 1, 1]
    assert batch["answer_weights"].tolist() == [1.0, 0.375, 0.125]
    alone = collate([record("b", unanswered)])
    assert (
        alone["input_ids"].shape == (1, 8) and alone["answer_ids"].shape == (0, 0) and not len(alone["answer_tokens"])
    )


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="cache_images.*data.augment"):
        VqaDataset([record("a")], make_processor(), cache_images=True, transform=TrainTransform((16, 16)))
    with pytest.raises(ConfigError, match="flip.*'swap'"):
        VqaDataset([record("a")], make_processor(), transform=TrainTransform((16, 16), flip="swap"))
    with pytest.raises(DataError, match="no records"):
        VqaDataset([], make_processor())
    with pytest.raises(ConfigError, match="max_questions_per_image"):
        VqaDataset([record("a")], make_processor(), max_questions_per_image=0)


# Answer list


def test_answer_list_counts_questions_and_finds_any_spelling() -> None:
    records = [
        record("a", ask("1", blue=1.0), ask("2", **{"red": 0.5, "RED": 0.5}), ask("3", **{"red_bus": 1.0})),
        record("b", ask("4", **{"two, one": 1.0}), ask("5", **{"one,two": 1.0}), ask("6", red=1.0)),
    ]
    answers = AnswerList.from_records(records)
    assert list(answers) == ["one, two", "red", "blue", "red bus"]  # by count, then alphabetical
    assert list(AnswerList.from_records(records, min_count=2)) == ["one, two", "red"]
    assert AnswerList.from_records(records, min_count=2).coverage(records) == 4 / 6
    assert answers.find("Two, one") == 0 and answers.find("Red_Bus") == 3 and answers.find("green") is None
    assert "RED" in answers and "green" not in answers and 3 not in answers
    assert len(answers) == 4 and answers[1] == "red" and answers[:2] == ["one, two", "red"]


def test_answer_list_survives_a_file_and_names_a_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    AnswerList(["\u00fcber", "red, black"]).save(path)
    assert list(AnswerList.load(path)) == ["\u00fcber", "black, red"]
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        (json.dumps({"answers": "red"}), "not a list"),
        (json.dumps({"answers": []}), "no answers"),
        (json.dumps({"answers": ["red", "Red"]}), r"answers\[1\]: occurs twice"),
        (json.dumps({"answers": [3]}), r"answers\[0\]: is not text"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=f"answers.json: .*{message}"):
            AnswerList.load(path)
    with pytest.raises(DataError, match="none.json: answer list cannot be read"):
        AnswerList.load(tmp_path / "none.json")
    with pytest.raises(DataError, match="min_answer_count: no answer occurs so often; found 2; expected at most 1"):
        AnswerList.from_records([record("a")], min_count=2)


def test_real_daquar(daquar_tars: dict[str, list[Path]], minilm_dir: Path) -> None:
    pytest.importorskip("webdataset")
    train, test = (list(read_vqa_shards(daquar_tars[split])) for split in ("train", "test"))
    answers = AnswerList.from_records(train)
    counts = Counter(normalise_answer(a) for r in train for q in r.questions for a in q.answers)
    assert len(answers) == len(counts) and counts[answers[0]] == max(counts.values()) and "garbage_bin" in answers
    missing = [q for r in test for q in r.questions if normalise_answer(q.answers[0]) not in counts]
    total = sum(len(r.questions) for r in test)
    assert answers.coverage(test) == pytest.approx(1 - len(missing) / total)
    assert 0.08 < len(missing) / total < 0.1  # 9.7 % as written; a little less once sets have no order

    bad = BadSamples(limit=0)
    processor = TripsProcessor(AutoTokenizer.from_pretrained(minilm_dir), image_size=224, patch_size=16)
    dataset = VqaDataset(train[:24], processor, bad, max_questions_per_image=4, cache_images=True)
    batches = list(DataLoader(dataset, 8, collate_fn=VqaCollator(processor)))
    assert len(batches) == 3 and len(bad) == 0 and bad.num_seen == 24
    first, image = batches[0], Image.open(io.BytesIO(train[0].image.read_bytes())).convert("RGB")
    resized = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (resized - np.array(processor.image_mean)) / np.array(processor.image_std)
    np.testing.assert_allclose(first["pixel_values"][0].permute(1, 2, 0).numpy(), expected, atol=3e-6)
    texts = {q.question_id: q for r in train[:24] for q in r.questions}
    for name, row in zip(first["question_ids"], first["input_ids"]):
        decoded = processor.decode(row, skip_special_tokens=True)
        assert decoded.replace(" ", "") == texts[name].text.replace(" ", "")
    for b, row in zip(first["answer_index"].tolist(), first["answer_ids"]):
        decoded = processor.decode(row, skip_special_tokens=True)
        answer = normalise_answer(texts[first["question_ids"][b]].answers[0])
        assert decoded.replace(" ", "") == answer.replace(" ", "")
