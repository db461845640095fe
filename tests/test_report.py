"""The page of a run: what a reader takes off a curve is what was logged, pictures cover what was removed, no text from
data becomes markup, nothing is asked of a network, and every kind of run has one.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import visit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_runs import EVIL, Tags, photos, trained

from trips import cli
from trips.report.charts import Chart, Series, thinned
from trips.report.page import MOST_BYTES, Bars, Code, Note, Page, Section, Table, render
from trips.report.pictures import Example, Picture, edge_path, removed_path
from trips.train.monitor import METRICS_FILE, Monitor
from trips.train.recipe_io import load_recipe, recipe_values
from trips.train.recipe_origin import command_of, nearest_recipe
from trips.train.run_curves import read_metrics, training_curves
from trips.train.run_examples import choose

ANSWERS = ("red", "<b>green</b>")


def curve_points(svg: str) -> list[tuple[float, float]]:
    """Points of the first curve in the units of the axes, by the labels of the ticks as a reader would."""

    def scale(places: list[tuple[float, float]]) -> np.ndarray:
        return np.polyfit(*zip(*places), deg=1)

    def number(text: str) -> float:
        return float(text.replace(" ", ""))

    found = re.findall(r'<text class="([xy])" x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', svg)
    across = scale([(float(x), number(label)) for kind, x, _, label in found if kind == "x" and label != "step"])
    up = scale([(float(y) - 4, number(label)) for kind, _, y, label in found if kind == "y"])
    path = re.search(r'<path d="([^"]*)"', svg).group(1)
    pixels = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    return [(np.polyval(across, x), np.polyval(up, y)) for x, y in pixels]


@given(
    st.lists(st.floats(-1e4, 1e4).map(lambda value: round(value, 3)), min_size=2, max_size=30, unique=True),
    st.integers(1, 500),
)
def test_a_curve_reads_as_what_was_logged(values: list[float], every: int) -> None:
    points = tuple((every * (i + 1), value) for i, value in enumerate(values))
    read = curve_points(str(Chart("loss", (Series("loss", points),)).svg()))
    width, height = every * len(points), max(values) - min(values)
    assert len(read) == len(points)
    for (x, y), (step, value) in zip(read, points, strict=True):
        assert abs(x - step) <= 0.005 * width + 0.01 and abs(y - value) <= 0.02 * height + 1e-3


def test_a_gap_breaks_the_curve_and_a_curve_without_a_value_is_not_drawn() -> None:
    points = ((1, 2.0), (2, None), (3, 1.0), (4, 1.5), (5, None))
    svg = str(Chart("loss", (Series("loss", points), Series("empty", ((1, None),)))).svg())
    path = re.search(r'<path d="([^"]*)"', svg).group(1)
    assert re.findall("[ML]", path) == ["M", "M", "L"] and 'class="s1"' not in svg
    assert Chart("nothing", (Series("empty", ((1, None),)),)).svg() == ""


@given(st.lists(st.one_of(st.none(), st.floats(-100, 100)), min_size=1, max_size=300), st.integers(1, 50))
def test_thinning_keeps_mean_extremes_and_gaps(values: list[float | None], most: int) -> None:
    found = thinned(list(enumerate(values)), most)
    assert len(found) <= most and found[-1][0] == len(values) - 1
    start = 0
    for last, mean, least, greatest in found:
        known = [value for value in values[start : int(last) + 1] if value is not None]
        start = int(last) + 1
        assert (mean is None) == (not known)
        if known:
            assert mean == pytest.approx(sum(known) / len(known)) and (least, greatest) == (min(known), max(known))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_what_is_pale_is_what_was_removed(down: int, across: int, data: st.DataObject) -> None:
    """Against a loop over pixels, ten to a patch, and over neighbours."""
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=down * across, max_size=down * across)))
    size, pale = (10 * across, 10 * down), np.zeros((10 * down, 10 * across), int)
    number = r"([\d.]+)"
    for x, y, right, bottom in re.findall(
        rf"M{number} {number}H{number}V{number}H\1Z", removed_path(kept, (down, across), size)
    ):
        pale[int(float(y)) : int(float(bottom)), int(float(x)) : int(float(right))] += 1
    for row in range(10 * down):
        for column in range(10 * across):
            assert pale[row, column] == (not kept[row // 10 * across + column // 10])
    mask = kept.reshape(down, across)
    borders = sum(mask[r, c] != mask[r + 1, c] for r in range(down - 1) for c in range(across))
    borders += sum(mask[r, c] != mask[r, c + 1] for r in range(down) for c in range(across - 1))
    assert edge_path(kept, (down, across), size).count("M") == borders


def everything(text: str, pictures: int = 1, side: int = 40) -> Page:
    """A page with a text wherever one can stand."""
    noise = np.random.default_rng(0)
    examples = [
        Example(
            (Picture(Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8))),), ((text, text),), 0.5, text
        )
        for _ in range(pictures)
    ]
    blocks = (
        Table(((text, text),), (text, text), text, True),
        Table(((text, text),), title=text),
        Bars(((text, 0.5, text),)),
        Code(text, text),
        Note(text),
        Chart(text, (Series(text, ((1, 2.0),)), Series(text, ((1, 1.0), (2, 2.0)))), x_name=text, marks=((1, text),)),
    )
    return Page(text, text, text, ((text, text),), (Section(text, blocks), Section(text, tuple(examples))))


def test_no_text_becomes_markup() -> None:
    page, plain = (Tags(render(everything(text))) for text in (EVIL, "plain"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) == plain.text.count("plain") > 20
    addresses = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy


def test_a_page_is_bounded() -> None:
    """By giving up examples, and by cutting texts."""
    full = render(everything("x" * 100_000, pictures=150, side=400))
    assert len(full.encode()) <= MOST_BYTES and "Not all examples fit" in full
    assert 20 < full.count("data:image/jpeg") < 150 and "more characters" in full


@given(st.lists(st.sampled_from((0.0, 0.4, 1.0, None)), max_size=40), st.integers(0, 10))
def test_examples_are_half_right_ones_where_there_are(verdicts: list[float | None], count: int) -> None:
    found = choose(range(len(verdicts)), lambda item: verdicts[item], count)
    right = [item for item in found if verdicts[item] == 1.0]
    wrong = [item for item in found if verdicts[item] in (0.0, 0.4)]
    all_right, all_wrong = verdicts.count(1.0), verdicts.count(0.0) + verdicts.count(0.4)
    assert len(set(found)) == len(found) == min(count, len(verdicts))
    assert len(right) >= min(all_right, count // 2) and len(wrong) >= min(all_wrong, count // 2)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optim.lr": 3e-4, "purpose": "it's: mine #1", "data.train": ["a b.tar", "$HOME/*.tar"]},
        {"model.selection.keep_rate": [0.5, 0.7], "model.selection.layers": [1, 3], "data.columns": {"image": "file"}},
        {"run.resume": "never", "optim.clip_norm": None, "data.cache_images": False, "run.out": "runs/ü &"},
    ],
)
def test_the_command_repeats_the_recipe(overrides: dict[str, Any]) -> None:
    recipe = load_recipe("debug/vqa_tiny", overrides)
    name, differing = nearest_recipe(recipe)
    assert name == "debug/vqa_tiny" and set(differing) == set(overrides)
    program, verb, again, *words = shlex.split(command_of(recipe).replace("\\\n", " "))
    assert (program, verb, again) == ("trips", "train", name)
    assert recipe_values(load_recipe(name, words)) == recipe_values(recipe)


def test_a_run_that_was_interrupted_is_one_curve(tmp_path: Path) -> None:
    with Monitor(tmp_path, 10, 0) as monitor:
        for step in (2, 4, 6):
            monitor.log(step, {"loss": float(step)})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')  # killed in the middle of a line
    with Monitor(tmp_path, 10, 4) as monitor:
        for step in (6, 8, 10):
            monitor.log(step, {"loss": 10.0 * step})
    recipe, rows = load_recipe("debug/vqa_tiny"), read_metrics(tmp_path / METRICS_FILE)
    loss = training_curves(recipe, rows)[0]
    assert loss.series[0].points == ((2, 2.0), (4, 4.0), (6, 60.0), (8, 80.0), (10, 100.0))
    assert [step for step, _ in loss.marks] == [4] and str(loss.svg()).count('class="mark"') == 1


def test_keep_rates_are_those_of_the_schedule() -> None:
    overrides = {"schedule.keep_rate_warmup": 0.5, "schedule.levels": 3, "model.selection.keep_rate": [0.5, 0.7]}
    recipe = load_recipe("debug/vqa_tiny", {**overrides, "optim.steps": 40})
    rows = [{"kind": "train", "step": step, "loss": 1.0} for step in (20, 40)]
    chart = next(block for block in training_curves(recipe, rows) if getattr(block, "title", "") == "keep rate")
    assert [one.name for one in chart.series] == ["layer 2", "layer 3"]
    assert chart.series[0].points == ((0, 1.0), (10, 0.75), (20, 0.5), (40, 0.5))
    assert [y for _, y in chart.series[1].points] == [1.0, 0.85, 0.7, 0.7]


@pytest.fixture(scope="module")
def vqa_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose questions and answers try to be markup."""
    folder = tmp_path_factory.mktemp("vqa")
    rows = [
        {
            "image": name,
            "question_id": f"q{i}",
            "question": f"{EVIL} {i % 3}?",
            "answer": ("red", "<b>green</b>")[i % 2],
        }
        for i, name in enumerate(photos(folder, 12))
    ]
    return trained(folder, "debug/vqa_tiny", rows, **{"optim.steps": 6, "purpose": EVIL})


def test_a_question_answering_run_leaves_its_page(vqa_run: Path) -> None:
    page = Tags((vqa_run / "report.html").read_text(encoding="utf-8"))
    results = json.loads((vqa_run / "results.json").read_text())
    said = {row["question_id"]: row["answer"] for row in json.loads((vqa_run / "answers_test.json").read_text())}
    assert f"accuracy {100 * results['accuracy']:.1f} %" in page.text and results["environment"]["torch"] in page.text
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    for heading in ("Results", "Examples", "Training", "Throughput and memory", "Configuration", "To repeat it"):
        assert heading in page.text
    cards = re.findall(r"([✓✗]) (right|wrong) .*? question (.*?) said (.*?) true (.*?) list\.csv:(\d+)\.png", page.text)
    assert len(cards) == 8
    for mark, verdict, question, answer, true, name in cards:
        number = int(name)
        assert question == f"{EVIL} {number % 3}?" and true == ANSWERS[number % 2]
        assert answer == said[f"q{number}"] and (verdict == "right") == (mark == "✓") == (answer == true)
    grid = [attributes["d"] for _, attributes in page.tags if attributes.get("class") == "gone"]
    assert len(grid) == 16 and "layer 2: 8 of 16 kept" in page.text and "layer 3: 4 of 16 kept" in page.text
    assert len((vqa_run / "report.html").read_bytes()) < MOST_BYTES


def test_the_page_says_what_is_not_there(vqa_run: Path, tmp_path: Path, capsys) -> None:
    for name in ("recipe.yaml", "results.json", METRICS_FILE):
        (tmp_path / name).write_bytes((vqa_run / name).read_bytes())
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written to"] == str(tmp_path / "report.html")
    assert "There are no examples: no model" in (tmp_path / "report.html").read_text()
    for name in ("results.json", METRICS_FILE):
        (tmp_path / name).unlink()
    assert cli.main(["report", str(tmp_path), "--examples=0"]) == 0
    text = Tags((tmp_path / "report.html").read_text()).text
    assert "has not ended" in text and "no curves" in text and "no record" in text and "not asked for" in text


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, content: str, capsys) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "recipe.yaml" in (error := capsys.readouterr().err) and error.count("\n") == 1
    (tmp_path / "results.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "results.json" in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_a_run_over_captions_leaves_its_page(tmp_path: Path, task: str) -> None:
    names = photos(tmp_path, 9)
    rows = [{"image": name, "caption": f"photo {i} of {EVIL}"} for i, name in enumerate(names)]
    out = trained(tmp_path, f"debug/{task}_tiny", rows, **{"optim.steps": 2})
    page = Tags((out / "report.html").read_text(encoding="utf-8"))
    cards = re.findall(r"[✓✗] (right|wrong) .*? caption found photo (\d) of .*? its own photo (\d) of", page.text)
    assert len(cards) == 8 and all((verdict == "right") == (found == own) for verdict, found, own in cards)
    assert "among those of 9 test images" in page.text and "loss: itc" in page.text and "mean recall" in page.text


def test_a_reasoning_run_leaves_its_page(tmp_path: Path) -> None:
    names = photos(tmp_path, 8)
    rows = [
        {"identifier": f"s-{i}", "image1": name, "image2": names[i - 1], "sentence": f"{EVIL} {i}", "label": i % 2 == 0}
        for i, name in enumerate(names)
    ]
    changes = {"model.reasoning.num_images": 2, "data.shuffle_images": False, "optim.steps": 2, "optim.batch_size": 4}
    out = trained(tmp_path, "debug/nlvr_tiny", rows, **{**changes, "model.selection.guide": "none"})
    page = Tags((out / "report.html").read_text(encoding="utf-8"))
    said = dict(csv.reader((out / "verdicts_test.csv").open()))
    cards = re.findall(r"[✓✗] (right|wrong) input input statement .*? (\d) said (\w+) true (\w+)", page.text)
    assert len(cards) == 8 and "keeps every patch" in page.text
    assert all((verdict == "right") == (answer == true) for verdict, _, answer, true in cards)
    assert sorted(said.values()) == sorted(answer for _, _, answer, _ in cards)


@pytest.mark.browser
def test_a_browser_shows_it_and_asks_for_nothing(vqa_run: Path, tmp_path: Path, browser) -> None:
    papers = []
    for scheme in ("light", "dark"):
        with visit(browser, vqa_run / "report.html", scheme=scheme) as seen:
            page = seen.page
            assert seen.outside() == [] and seen.errors == [] and seen.dialogs == []
            assert page.locator(".card svg.chart").count() >= 5 and page.locator("figure svg.photo").count() == 24
            assert page.locator("text=<script>").first.is_visible() and page.locator("main script").count() == 0
            sizes = page.evaluate("[...document.querySelectorAll('svg use')].map(e => e.getBBox().width)")
            assert len(sizes) == 16 and min(sizes) > 100  # the later pictures do show the photo
            papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            with Image.open(seen.screenshot(tmp_path / f"{scheme}.png")) as picture:
                assert picture.height > 1500
    assert papers[0] == "rgb(255, 255, 255)" and papers[1] != papers[0]
    with visit(browser, vqa_run / "report.html", width=380) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 380


@pytest.mark.browser
def test_the_record_of_requests_sees_one(tmp_path: Path, browser) -> None:
    """The helper itself: a page that does ask, complain and alert is not passed over."""
    path = tmp_path / "page.html"
    path.write_text('<img src="http://127.0.0.1:1/x.png"><script>alert("hello"); throw Error("oh")</script>')
    with visit(browser, path, offline=True) as seen:
        assert seen.outside() == ["http://127.0.0.1:1/x.png"] and seen.outside("http://127.0.0.1:1/") == []
        assert seen.dialogs == ["hello"] and any("oh" in error for error in seen.errors)
