"""`trips flops`: rows against the functions they come from, tables, JSON, and a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import randomise, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trips import cli
from trips.bench.answer_flops import count_answer_ranking_flops
from trips.bench.flops import count_flops, count_pretraining_flops, count_reasoning_flops
from trips.bench.flops_report import flop_report
from trips.bench.retrieval_flops import count_feature_flops, count_reranking_flops
from trips.config import SelectionConfig, TripsConfig
from trips.data.loading import AnswerList
from trips.processor import TripsProcessor
from trips.saved import open_settings
from trips.tasks.vqa import TripsForQuestionAnswering

NONE = SelectionConfig(guide="none")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["flops", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_main_setting_beside_the_baseline(capsys) -> None:
    report = told(capsys, "--image_size", "384", "224", "--text_length", "40")
    base, subject, small_base, small = report["rows"]
    assert [row["image_size"][0] for row in report["rows"]] == [384, 384, 224, 224]
    assert (base["guide"], base["layers"], base["kept"], base["exact_ratio"]) == ("none", [], [], 1)
    assert (base["exact_g"], subject["exact_g"]) == pytest.approx((126.98, 95.44), abs=0.006)
    assert (small_base["exact_g"], small["exact_g"]) == pytest.approx((45.48, 35.87), abs=0.006)
    assert subject["exact_ratio"] == pytest.approx(1.330, abs=0.001)
    assert (base["paper_convention_g"], subject["paper_convention_g"]) == pytest.approx((76.03, 55.60), abs=0.01)
    assert subject["kept"] == [
        {"layer": 5, "entered": 576, "kept": 404, "left": 405},
        {"layer": 10, "entered": 405, "kept": 284, "left": 285},
    ]
    assert subject["tokens"][3:6] == [[577, 577], [577, 406], [406, 406]]
    assert sum(subject["parts"].values()) == pytest.approx(subject["exact_g"])


def test_settings_from_the_command_line(capsys) -> None:
    options = ["--layers", "4", "8", "--keep_rate", "0.7", "0.5", "--guide", "image", "--image_size", "256"]
    _, row = told(capsys, *options)["rows"]
    assert (row["layers"], row["keep_rates"], row["guide"]) == ([4, 8], [0.7, 0.5], "image")
    selection = SelectionConfig(layers=(4, 8), keep_rate=(0.7, 0.5), guide="image")
    assert row["exact_g"] == count_flops(TripsConfig(), (16, 16), 40, selection).total
    (only,) = told(capsys, "--guide", "none")["rows"]
    assert only["guide"] == "none" and only["exact_ratio"] == 1


def test_people_see_exact_count_and_convention_apart(capsys) -> None:
    assert cli.main(["flops", "--tokens"]) == 0
    out = capsys.readouterr().out
    for words in ("exact", "paper's convention", "126.98", "95.44", "1.330", "76.03", "55.60", "577 / 406",
                  "layer 5: 576 tokens in, 404 kept and 1 fused; layer 10: 405 tokens in, 284 kept"):  # fmt: skip
        assert words in " ".join(out.split())
    assert cli.main(["flops", "--architecture", "single", "--guide", "similarity"]) == 0
    out = capsys.readouterr().out
    assert "convention" not in out and "fused" not in out and "119.31" in out and "577 / 406" not in out


def test_every_task_counts_what_its_function_counts() -> None:
    config, selection = TripsConfig(), SelectionConfig(layers=(4, 8))
    arguments = (config, (14, 14), 30)
    expected = {
        "pair": lambda one: count_flops(*arguments, one).total,
        "vqa": lambda one: count_answer_ranking_flops(*arguments, one, candidates=50, answer_length=4).total,
        "retrieval": lambda one: count_reranking_flops(*arguments, one).pair,
        "nlvr2": lambda one: count_reasoning_flops(*arguments, one).total,
        "pretraining": lambda one: count_pretraining_flops(*arguments, one).training,
    }
    for task, count in expected.items():
        report = flop_report(config, [224], 30, selection, task=task, candidates=50, answer_length=4)
        assert [row.exact_g for row in report.rows] == [count(NONE), count(selection)]
        assert report.rows[1].exact_ratio == count(NONE) / count(selection)
        assert (report.rows[1].paper_convention_g is not None) == (task == "pair")
    parts = flop_report(config, [224], 30, selection, task="retrieval").rows[1].parts
    stored = count_feature_flops(*arguments, selection)
    assert (parts["image feature"], parts["text feature"]) == (stored.image, stored.text)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a run of question answering."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    vocabulary = {piece: number for number, piece in enumerate([*special.values(), "what"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    TripsProcessor(tokenizer, (32, 48), patch_size=8, max_text_length=9).save_pretrained(tmp_path / "model")
    randomise(TripsForQuestionAnswering(tiny_config())).save_pretrained(tmp_path / "model")
    AnswerList(("yes", "no")).save(tmp_path / "answers.json")
    return tmp_path


def test_a_saved_model_is_counted_at_its_own_sizes(saved: Path, capsys) -> None:
    settings = open_settings(saved)
    assert list(settings.answers) == ["yes", "no"] and settings.processor.max_text_length == 9
    report = told(capsys, "--model", str(saved), "--task", "vqa")
    assert report["text_length"] == 9 and [row["image_size"] for row in report["rows"]] == [[32, 48]] * 2
    count = count_answer_ranking_flops(settings.config, (4, 6), 9, candidates=2)
    assert report["rows"][1]["exact_g"] == count.total
    report = told(capsys, "--model", str(saved / "model"), "--image_size", "64", "--text_length", "5", "--layers", "1")
    selection = SelectionConfig(layers=(1,), keep_rate=0.5)
    assert report["rows"][1]["exact_g"] == count_flops(settings.config, (8, 8), 5, selection).total
    assert report["rows"][1]["paper_convention_g"] is None
    assert cli.main(["flops", "--model", str(saved)]) == 0
    assert "48 x 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--layers", "5", "13"], ["selection.layers", "13", "1 to 12"]),
        (["--keep_rate", "0"], ["selection.keep_rate", "0.0"]),
        (["--keep_rate", "0.5", "0.5", "0.5"], ["one keep rate per location"]),
        (["--image_size", "8"], ["image_size", ">= 16"]),
        (["--text_length", "0"], ["text_length"]),
        (["--guide", "boat"], ["guide", "boat"]),
        (["--task", "boat"], ["task", "boat"]),
        (["--task", "vqa", "--answer_length", "1"], ["answer_length"]),
        (["--architecture", "single", "--guide", "image"], ["selection.guide", "single-stream"]),
        (["--model", "/no/such/run"], ["/no/such/run"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], parts: list[str], capsys) -> None:
    assert cli.main(["flops", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts)


def test_a_saved_model_keeps_its_architecture(saved: Path, capsys) -> None:
    assert cli.main(["flops", "--model", str(saved), "--architecture", "single"]) == 2
    assert "architecture" in capsys.readouterr().err
    damaged = {"model_type": "trips", "architectures": ["TripsForQuestionAnswering"], "vision_config": 3}
    (saved / "model" / "config.json").write_text(json.dumps(damaged))
    assert cli.main(["flops", "--model", str(saved)]) == 2
    assert "vision_config" in capsys.readouterr().err
