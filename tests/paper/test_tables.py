"""The paper's tables: printed figures, both counts against closed forms written anew, the files."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.paper import cells
from trips.paper.cells import CellStore
from trips.paper.plots import draw_table
from trips.paper.published import NUMBERS, published_table
from trips.paper.remarks import UNEXPLAINED
from trips.paper.settings import Setting
from trips.paper.table_text import columns_of, markdown, rich_table, write_table
from trips.paper.tables import TableResult, paper_table, with_accuracy

PRINTED = json.loads((resources.files("trips.paper") / "paper_tables.json").read_text(encoding="utf-8"))
D2 = 768**2


class FakeAccuracy:
    """An accuracy that can be told by hand; keeps what it was asked."""

    name, unit = "fake", "accuracy, %"

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def measure(self, setting: Setting, seed: int) -> dict[str, float]:
        self.asked.append((setting.name, seed))
        return {"accuracy": len(setting.name) + seed**2, "seconds": 1.5}


def patch_tokens(side: int, layers: list[int], rate: float, fuse: bool = True) -> list[tuple[int, int]]:
    """Tokens with [CLS] in attention and FFN of each of 12 layers, counted in whole tenths."""
    n, found = (side // 16) ** 2, []
    for layer in range(1, 13):
        before = n
        if layer in layers:
            n = -(-n * round(10 * rate) // 10) + fuse
        found.append((before + 1, n + 1))
    return found


def convention(side: int, layers: list[int], rate: float, fuse: bool = True) -> float:
    behind = [after for _, after in patch_tokens(side, layers, rate, fuse)]
    return D2 * (16 * sum(behind) + 24 * behind[-1] + 2 * (side // 16) ** 2 + 3120) / 1e9


def exact(side: int, layers: list[int], rate: float, fuse: bool = True, text: int = 40) -> float:
    """Multiply-adds of the dual model, layer by layer; then the guide at each location."""
    counts = patch_tokens(side, layers, rate, fuse)
    total = (side // 16) ** 2 * D2
    for layer, (before, after) in enumerate(counts, start=1):
        total += 4 * before * D2 + 2 * before**2 * 768 + 8 * after * D2
        if layer in layers:
            total += D2 + (before - 1) * 768 * (1 + fuse)
    total += 6 * (12 * text * D2 + 2 * text**2 * 768)
    last = counts[-1][1]
    total += 6 * (14 * text * D2 + 2 * last * D2 + 2 * text**2 * 768 + 2 * text * last * 768)
    return 2 * total / 1e9


def printed_rows(number: int) -> list[tuple[int, dict[str, Any]]]:
    """Pixels and the file's row, of the rows with a setting."""
    table = PRINTED[f"table{number}"]
    side = 224 if number == 3 else 384
    return [(row.get("image_size", side), row) for row in table["rows"] if "fit" in row]


@pytest.fixture(scope="module")
def results() -> dict[int, TableResult]:
    return {number: paper_table(number) for number in NUMBERS}


def test_every_printed_figure_is_there(results):
    def leaves(values: dict[str, Any]) -> list[Any]:
        return [x for v in values.values() for x in (leaves(v) if isinstance(v, dict) else [v])]

    described = {"model", "locations", "keep_rate", "image_size", "guide", "fuse", "fit"}
    described |= {"convention_locations", "convention_g", "true_g"}
    for number in NUMBERS:
        rows = PRINTED[f"table{number}"]["rows"]
        assert len(published_table(number).rows) == len(results[number].rows) == len(rows)
        for ours, theirs in zip(published_table(number).rows, rows):
            figures = leaves({key: value for key, value in theirs.items() if key not in described})
            assert list(ours.figures.values()) == figures
            assert ours.name == theirs.get("model", ours.name)


def test_settings_of_the_rows():
    names = {number: [setting.name for setting in published_table(number).settings] for number in NUMBERS}
    assert [len(names[number]) for number in NUMBERS] == [0, 0, 2, 14, 6, 4, 3]
    assert all(len(set(listed)) == len(listed) for listed in names.values())
    by_name = {(number, s.name): s for number in NUMBERS for s in published_table(number).settings}
    assert by_name[4, "[2, 6, 10] x 0.7"] == Setting("[2, 6, 10] x 0.7", SelectionConfig(layers=(2, 6, 10)))
    assert by_name[4, "no selection"].selection.guide == "none"
    assert by_name[5, "[5, 10] x 0.7, 456 px"].image_size == 456
    assert by_name[6, "TRIPS-S"].architecture == "single" and by_name[6, "TRIPS"].architecture == "dual"
    assert not by_name[6, "TRIPS-S w/o PS"].selection.active
    assert by_name[7, "w/o ITF"].selection == SelectionConfig(inattentive="drop")
    assert by_name[7, "w/o TD-ATT"].selection == SelectionConfig(guide="image")
    assert {setting.image_size for setting in published_table(3).settings} == {224}


@pytest.mark.parametrize("number", [3, 4, 5, 6, 7])
def test_operations_in_both_ways_of_counting(number, results):
    rows = [row for row in results[number].rows if row.setting is not None]
    baselines = {row.setting.architecture: row for row in rows if not row.setting.selection.active}
    for row, (side, printed) in zip(rows, printed_rows(number), strict=True):
        if row.setting.architecture == "single":
            assert "convention_g" not in row.ours and row.unexplained
            continue
        fuse, rate = printed.get("fuse", True), printed.get("keep_rate") or 0.7
        if number == 3:
            locations = [5, 10] if printed["model"] == "TRIPS" else []
        else:
            locations = printed["locations"]
        fitting = printed["convention_locations"]
        fitting = locations if fitting is None else fitting
        counted = convention(side, fitting, rate, fuse)
        assert row.ours["convention_g"] == pytest.approx(counted, rel=1e-12)
        assert row.ours["convention_g"] == pytest.approx(printed["convention_g"], abs=6e-4)
        assert row.ours["convention_layers"] == fitting
        fits = abs(counted - printed["flops_g"]) <= 0.02
        assert fits == row.ours["convention_fits"] == (printed["fit"] == "within 0.02 G") == (row.unexplained is None)
        assert row.ours["exact_g"] == pytest.approx(exact(side, locations, rate, fuse), rel=1e-9)
        assert row.ours["exact_g"] == pytest.approx(printed["true_g"], abs=0.0051)
        baseline = exact(224 if number == 3 else 384, [], 1.0)
        assert row.ours["exact_speedup"] == pytest.approx(baseline / row.ours["exact_g"], rel=1e-9)
        against = baselines["dual"].paper["throughput"] if "dual" in baselines else 79.32
        assert row.paper["throughput_ratio"] == pytest.approx(row.paper["throughput"] / against)


def test_single_stream_is_counted_as_one_stack(results):
    def stack(layers: list[int], guide: int = 0) -> float:
        total = 576 * D2
        for layer, (before, after) in enumerate(patch_tokens(384, layers, 0.7), start=1):
            tokens, left = before + 39, after + 39  # the two [CLS] are one
            total += 4 * tokens * D2 + 2 * tokens**2 * 768 + 8 * left * D2
            if layer in layers:
                total += guide * D2 * before + 2 * (before - 1) * 768  # query and keys once more, if at all
        return 2 * total / 1e9

    rows = {row.name: row for row in results[6].rows}
    assert rows["TRIPS-S w/o PS"].ours["exact_g"] == pytest.approx(stack([]), rel=1e-4)
    assert stack([5, 10]) < rows["TRIPS-S"].ours["exact_g"] < 1.0001 * stack([5, 10], guide=1)
    assert rows["TRIPS-S"].ours["exact_speedup"] == pytest.approx(1.29, abs=0.015)


def test_five_figures_are_marked_with_a_reason(results):
    marked = {(number, row.name) for number in NUMBERS for row in results[number].rows if row.unexplained}
    assert marked == set(UNEXPLAINED)
    assert marked == {
        (3, "ALBEF-C"), (6, "TRIPS-S"), (6, "TRIPS-S w/o PS"), (7, "w/o ITF"), (7, "w/o TD-ATT")
    }  # fmt: skip
    for number, name in marked:
        assert f"- † {name}: " in markdown(results[number])


def test_remarks_are_true_of_the_printed_figures(results):
    table = {(number, row.name): row.paper for number in NUMBERS for row in results[number].rows}
    trips, base = table[1, "TRIPS"], table[1, "ALBEF-C"]
    behind = [key for key in trips if trips[key] < base[key]]
    assert behind == ["flickr30k_1k.IR.R@1", "mscoco_5k.IR.R@5"]
    chosen = [row for row in results[4].rows if row.setting.selection.active]
    gains = [row.paper["throughput_ratio"] / row.ours["exact_speedup"] for row in chosen]
    assert 1.055 < min(gains) and max(gains) < 1.205
    assert table[7, "TRIPS"]["throughput_ratio"] == pytest.approx(1.4099, abs=5e-5)
    assert table[4, "[5, 10] x 0.7"]["throughput_ratio"] == pytest.approx(1.450, abs=5e-4)
    assert {table[n, name]["nlvr2_dev"] for n, name in ((4, "no selection"), (5, "no selection, 384 px"))} == {82.35}
    assert {table[n, name]["nlvr2_dev"] for n, name in ((2, "ALBEF-C"), (6, "TRIPS w/o PS"))} == {82.21}
    big, small = results[5].rows[-1].ours, results[5].rows[0].ours
    assert big["convention_g"] / small["convention_g"] == pytest.approx(0.984, abs=0.001)
    assert big["exact_g"] / small["exact_g"] == pytest.approx(1.031, abs=0.001)


def test_location_notes(results):
    columns = {column.title: column.cells for column in columns_of(results[5])}
    assert columns["fits\nlayers"] == ("as printed", *["[6, 10], not [5, 10]"] * 3, "as printed", "as printed")
    assert set({c.title: c.cells for c in columns_of(results[4])}["fits\nlayers"]) == {"as printed"}
    columns = {column.title: column.cells for column in columns_of(results[7])}
    assert columns["fits\nlayers"] == ("[6, 10], not [5, 10]", "no: [6, 10] †", "no †")
    console = Console(width=160)
    with console.capture() as captured:
        console.print(rich_table(results[4]))
    text = captured.get()
    assert "55.60" in text and "95.44" in text and "[5, 10] x 0.7" in text


@pytest.mark.parametrize("number", NUMBERS)
def test_markdown_parses_back_to_the_rows(number, results, tmp_path):
    result = results[number]
    if number > 3:
        result = with_accuracy(result, FakeAccuracy(), CellStore(tmp_path, "x"), (0, 1))
    lines = [line for line in markdown(result).splitlines() if line.startswith("|")]
    head, rule, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(cells) for cells in (head, rule, *body)}) == 1
    parsed = {cells[0]: dict(zip(head, cells)) for cells in body}
    for row in result.rows:
        cells = parsed[row.name]
        if number == 1:
            assert cells["COCO IR R@5"] == (f"{row.paper['mscoco_5k.IR.R@5']:.1f}" if row.name != "E2E-VLP" else "-")
        elif number == 2:
            assert float(cells["VQA test-dev"]) == row.paper["vqa_test_dev"]
        else:
            assert float(cells["paper G"]) == row.paper["flops_g"]
            if row.setting and row.setting.architecture == "dual":
                assert float(cells["our G"]) == pytest.approx(row.ours["convention_g"], abs=0.0051)
            if row.setting:
                assert float(cells["exact G"]) == pytest.approx(row.ours["exact_g"], abs=0.0051)
        if number > 3:
            mean, spread = row.ours["accuracy"], row.ours["accuracy_sd"]
            assert cells["ours"] == f"{mean:.2f} ± {spread:.2f} (2)"
    if number > 3:
        assert "- ours: fake: accuracy, %, ± standard deviation (seeds)" in markdown(result)
    if number <= 2:
        assert set(list(parsed["TRIPS, ours"].values())[1:]) == {"-"}


def test_mean_and_deviation_by_hand(results, tmp_path):
    source = FakeAccuracy()
    result = with_accuracy(results[7], source, CellStore(tmp_path, "x"), (0, 1, 3))
    ours = result.rows[0].ours  # 5, 6, 14: mean 25/3, squares of differences 100/9 + 49/9 + 289/9
    assert ours["accuracy"] == pytest.approx(25 / 3)
    assert ours["accuracy_sd"] == pytest.approx(math.sqrt((100 + 49 + 289) / 9 / 2))
    assert ours["accuracy_by_seed"] == {"0": 5.0, "1": 6.0, "3": 14.0}
    assert source.asked[:4] == [("TRIPS", 0), ("w/o ITF", 0), ("w/o TD-ATT", 0), ("TRIPS", 1)]
    one = with_accuracy(results[7], source, CellStore(tmp_path, "x"), (3,)).rows[0].ours
    assert (one["accuracy"], one["accuracy_sd"]) == (14.0, None)
    assert len(source.asked) == 9, "the fourth sweep had everything"
    assert result.accuracy == "fake: accuracy, %" and result.ok


def test_files_hold_the_result(results, tmp_path):
    result = with_accuracy(results[5], FakeAccuracy(), CellStore(tmp_path / "cells", "x"), (0, 1))
    paths = write_table(result, tmp_path)
    assert [path.name for path in paths] == ["table.md", "rows.json"]
    read = json.loads(paths[1].read_text())
    assert read == json.loads(json.dumps(dataclasses.asdict(result)))
    assert read["rows"][1]["paper"]["flops_g"] == 20.89 and read["rows"][1]["ours"]["convention_layers"] == [6, 10]
    assert {"device", "torch", "commit", "date"} <= read["environment"].keys()
    assert paths[0].read_text() == markdown(result)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        write_table(result, tmp_path / "file" / "below")


@pytest.mark.parametrize("number", [0, 8, -1, True])
def test_no_such_table(number):
    with pytest.raises(ConfigError, match="no such table.*1 to 7"):
        paper_table(number)


def test_what_a_table_has_no_place_for(results, tmp_path):
    with pytest.raises(ConfigError, match="runs"):
        paper_table(4, ["runs/x"])
    with pytest.raises(ConfigError, match="accuracy"):
        with_accuracy(results[3], FakeAccuracy(), CellStore(tmp_path, "x"))
    with pytest.raises(ConfigError, match="seeds"):
        with_accuracy(results[4], FakeAccuracy(), CellStore(tmp_path, "x"), ())


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_table(results[1], tmp_path) == []
    plain = draw_table(results[4], tmp_path / "plain")
    measured = draw_table(
        with_accuracy(results[4], FakeAccuracy(), CellStore(tmp_path, "x"), (0, 1)), tmp_path / "measured"
    )
    assert [path.name for path in plain] == ["table_4.png", "table_4.svg"]
    assert Image.open(measured[0]).width > Image.open(plain[0]).width  # a panel more
    assert "<svg" in measured[1].read_text()


def test_cells_of_several_machines_are_told_apart(tmp_path, monkeypatch):
    where = {"device": "one", "commit": "abc"}
    monkeypatch.setattr(cells, "describe_environment", lambda: dict(where))
    store = CellStore(tmp_path, "x")
    result = with_accuracy(paper_table(7), FakeAccuracy(), store)
    assert result.measured_on == ("device one, commit abc",) and "different conditions" not in markdown(result)
    assert "Measured on: device one, commit abc." in markdown(result)
    next(tmp_path.glob("trips-*.json")).unlink()
    where["device"] = "two"
    result = with_accuracy(paper_table(7), FakeAccuracy(), store)
    assert set(result.measured_on) == {"device one, commit abc", "device two, commit abc"}
    assert "different conditions" in markdown(result)
