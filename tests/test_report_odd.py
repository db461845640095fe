"""The page of a run whose folder, log, results, recipe or photos are not as they should be; and pages side by side."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from report_runs import Tags, trained

from trips import cli
from trips.report import page as page_module
from trips.report.charts import Chart, Series
from trips.report.page import Code, Note, Page, Section, write_page
from trips.report.pictures import Picture, data_uri
from trips.train import run, run_examples
from trips.train.monitor import METRICS_FILE, Monitor
from trips.train.recipe_io import load_recipe
from trips.train.run_curves import read_metrics, training_curves
from trips.train.run_examples import choose
from trips.train.run_report import write_run_report
from trips.train.schedule import SelectionSchedule


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over grey, CMYK, wide and large photos, and questions from right to left; its page fails at the end."""
    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    pictures = {
        "grey.png": Image.fromarray(rng.integers(0, 256, (90, 70), np.uint8)),
        "cmyk.jpg": Image.fromarray(rng.integers(0, 256, (90, 70, 4), np.uint8), "CMYK"),
        "wide.png": Image.new("RGB", (3000, 2), "red"),
        "large.jpg": Image.new("RGB", (2400, 1800), "blue"),
    }
    rows = []
    for name, picture in pictures.items():
        picture.save(folder / name)
        rows.append({"image": name, "question_id": name, "question": f"\u0645\u0627 {name}?", "answer": "red"})
    return trained(folder, "debug/vqa_tiny", rows, **{"optim.steps": 2, "optim.batch_size": 4})


@pytest.fixture
def copied(odd_run: Path, tmp_path: Path) -> Path:
    """What the page needs of that run, without its model."""
    for name in ("recipe.yaml", "results.json", METRICS_FILE):
        shutil.copy(odd_run / name, tmp_path / name)
    return tmp_path


def text_of(folder: Path, **options: Any) -> str:
    return Tags(write_run_report(folder, num_examples=0, **options).read_text(encoding="utf-8")).text


def test_odd_photos_are_shown(odd_run: Path) -> None:
    page = Tags((odd_run / "report.html").read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "image"]
    assert sorted((int(one["width"]), int(one["height"])) for one in images) == [
        (249, 320),
        (249, 320),
        (320, 1),
        (320, 240),
    ]
    assert all(name in page.text for name in ("grey.png", "cmyk.jpg", "wide.png", "large.jpg"))
    assert sum(attributes.get("dir") == "auto" for tag, attributes in page.tags if tag == "dd") == 12


def test_a_picture_holds_no_large_photo() -> None:
    held = Picture(Image.new("RGB", (4000, 1000), "red")).image
    assert held.size == (320, 80) and held.getpixel((100, 40)) == (255, 0, 0)
    small = Image.new("RGB", (64, 64))
    assert Picture(small).image is small and data_uri(small).startswith("data:image/png")


@given(st.lists(st.floats() | st.integers() | st.none() | st.text(max_size=2) | st.booleans(), min_size=1, max_size=20))
def test_whatever_was_logged_can_be_drawn(values: list[Any]) -> None:
    """Only what float32 can hold is a point; the labels are finite numbers."""
    chart = Chart("loss", (Series("loss", tuple(enumerate(values))),))
    svg = str(chart.svg())
    assert "nan" not in svg and "inf" not in svg and len(chart.legend) == len(chart.drawn)
    plain = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 3.4e38]
    assert bool(svg) == bool(plain)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e-6))
@example(904.0, 1.2e-13)
@example(0.0, 1e-310)
@example(1e-310, 0.0)
def test_a_curve_that_hardly_rises_can_be_drawn(low: float, rise: float) -> None:
    assert Chart("loss", (Series("loss", ((1, low), (2, low + rise))),)).svg()


def test_a_damaged_log_is_read_as_far_as_it_goes(copied: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, math.nan), (3, math.inf))]
    text = (
        "".join(json.dumps(line) + "\n" for line in lines) + '[]\nnull\n{"step": 1}\n{"kind": "train", "step": "x"}\n'
    )
    (copied / METRICS_FILE).write_bytes(text.encode() + b'{"kind": "tr\xff\xfe\n{"kind": "train", "st')
    rows = read_metrics(copied / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 1, 2, 3]
    assert "loss last: 3" in text_of(copied)
    with Monitor(copied, 10, 2):  # and a run goes on behind it
        pass
    assert [row["step"] for row in read_metrics(copied / METRICS_FILE)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("environment", "a machine"),
        ("bad_samples", [1]),
        ("bad_samples", {"count": 2, "named": ["a"]}),
        ("accuracy", math.nan),
        ("note", "a lone \ud800"),
    ],
)
def test_odd_results_are_told_as_far_as_they_go(copied: Path, name: str, value: Any) -> None:
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps({**results, name: value}))
    assert "steps 2" in (text := text_of(copied)) and "nan %" not in text


def test_a_folder_of_a_broken_name_has_its_page(copied: Path) -> None:
    folder = copied / b"\xff<b>".decode("utf-8", "surrogateescape")
    folder.mkdir()
    for name in ("recipe.yaml", "results.json"):
        shutil.copy(copied / name, folder / name)
    assert "vqa run ?<b>" in text_of(folder)


def test_a_recipe_of_another_version_is_told(copied: Path) -> None:
    with (copied / "recipe.yaml").open("a") as file:
        file.write("gone: 3\nhidden:\n  rate: 1\n")
    recipe = (copied / "recipe.yaml").read_text().replace("optim:\n", "optim:\n  momentum: 0.5\n")
    (copied / "recipe.yaml").write_text(recipe)
    text = text_of(copied)
    assert "does not know these keys of recipe.yaml: optim.momentum, gone, hidden." in text
    assert "vqa run" in text and "trips train" not in text and "Only the version that made it" in text


def test_a_run_of_several_processes_is_repeated_by_as_many(copied: Path) -> None:
    assert "torchrun" not in (alone := text_of(copied)) and "trips train debug/vqa_tiny" in alone
    results = json.loads((copied / "results.json").read_text())
    results["environment"]["processes"] = 2
    (copied / "results.json").write_text(json.dumps(results))
    text = text_of(copied)
    assert text.count("torchrun --nproc-per-node 2 -m trips.cli train ") == 2 and "ran as 2 processes" in text


def test_the_folder_to_repeat_in_is_another(copied: Path) -> None:
    recipe = load_recipe(copied / "recipe.yaml")
    text = (copied / "recipe.yaml").read_text().replace(f"out: {recipe.run.out}", "out: runs/mine/")
    (copied / "recipe.yaml").write_text(text)
    assert text_of(copied).count("--run.out=runs/mine_again") == 2


@pytest.mark.parametrize("rows", [[], [{"guide": "text_cls"}], 3])
def test_results_that_no_quick_start_wrote_are_one_line(tmp_path: Path, rows: Any, capsys) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows, "findings": []}))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not what a quick-start writes" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert cli.main(["report", str(tmp_path / "results.json")]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


@given(st.integers(1, 60), st.integers(2, 6), st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_keep_rates_turn_where_the_schedule_does(steps: int, levels: int, warmup: float) -> None:
    """Against the schedule, asked step by step."""
    keys = {"schedule.keep_rate_warmup": warmup, "schedule.levels": levels, "optim.steps": steps}
    recipe = load_recipe("debug/vqa_tiny", keys)
    rows = [{"kind": "train", "step": steps, "loss": 1.0}]
    (one,) = next(block for block in training_curves(recipe, rows) if getattr(block, "title", "") == "keep rate").drawn
    assert one.name == "layers 2, 3"  # which keep the same share: one curve
    schedule = SelectionSchedule(recipe.model.selection, steps, warmup, levels)
    for step in range(steps):
        assert [y for x, y in one.points if x <= step][-1] == schedule.at(step)[0].rates[0]


def test_no_schedule_is_drawn_whose_length_is_unknown() -> None:
    rows = [{"kind": "train", "step": 7, "loss": 1.0}]
    for warmup, ended, drawn in ((0.5, True, True), (0.5, False, False), (0.0, False, True)):
        keys = {"schedule.keep_rate_warmup": warmup, "optim.steps": None, "optim.epochs": 3}
        blocks = training_curves(load_recipe("debug/vqa_tiny", keys), rows, ended=ended)
        assert drawn == any(getattr(block, "title", "") == "keep rate" for block in blocks)
        assert drawn != any(isinstance(block, Note) and "Keep rates" in block.text for block in blocks)


def test_several_may_write_a_page_at_once(tmp_path: Path, monkeypatch) -> None:
    """Both have written before either renames."""
    barrier, replace, failed = threading.Barrier(2, timeout=20), page_module.os.replace, []

    def meet(*paths: Any) -> None:
        barrier.wait()
        replace(*paths)

    def write(word: str) -> None:
        try:
            write_page(Page(word, "", "", (), (Section("s", (Code(word * 500),)),)), tmp_path / "page.html")
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(page_module.os, "replace", meet)
    writers = [threading.Thread(target=write, args=(word,)) for word in "ab"]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["page.html"]
    text = Tags((tmp_path / "page.html").read_text()).text
    assert ("a" * 500 in text) != ("b" * 500 in text)


def test_a_page_that_cannot_be_written_leaves_nothing(copied: Path, capsys) -> None:
    (copied / "report.html").mkdir()
    before = sorted(copied.iterdir())
    assert cli.main(["report", str(copied)]) == 2
    assert "cannot be written" in capsys.readouterr().err and sorted(copied.iterdir()) == before


def test_a_mistake_in_a_page_does_not_spoil_a_run(odd_run: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of the page")

    monkeypatch.setattr(run, "write_run_report", fail)
    with caplog.at_level(logging.WARNING, "trips"):
        results = run.run_recipe(load_recipe(odd_run / "recipe.yaml", {"run.out": str(tmp_path / "again")}))
    assert results["steps"] == 2 and "ZeroDivisionError: of the page" in caplog.text


def test_each_item_is_judged_once() -> None:
    asked: list[int] = []
    choose(range(50), lambda item: asked.append(item) or None, 3)
    assert asked == list(range(50))


def test_an_image_id_means_one_image_within_an_entry_only(tmp_path: Path, monkeypatch) -> None:
    """And no more of a corpus is read than is shown."""
    entries = []
    for name, count in (("a", 2), ("b", 40)):
        for i in range(count):
            Image.new("RGB", (9, 9)).save(tmp_path / f"{name}{i}.png")
        rows = [f"{name}{i}.png,{name} {i},{i}" for i in range(count)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,caption,image_id", *rows]))
        entries.append(str(tmp_path / f"{name}.csv"))
    monkeypatch.setattr(run_examples, "_READ", 8)
    recipe = load_recipe("debug/pretrain_tiny", {"data.test": entries})
    found = run_examples._first_images(recipe, run_examples.BadSamples(1.0))
    assert [record.texts for record in found] == [("a 0",), ("a 1",), *((f"b {i}",) for i in range(8))]
