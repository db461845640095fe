"""Sweeps that are interrupted, fail and go on; times of two settings side by side."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bert_config, tiny_vision_config

from trips.config import SelectionConfig, TripsConfig
from trips.errors import ConfigError, DataError
from trips.model import TripsModel
from trips.paper import cells, tables
from trips.paper.cells import CellStore, sweep
from trips.paper.settings import Setting
from trips.paper.speed import SpeedSource
from trips.paper.table_text import footnotes

SETTINGS = [
    Setting("no selection", SelectionConfig(guide="none"), 32),
    Setting("[1, 3] x 0.5", SelectionConfig(layers=(1, 3), keep_rate=0.5), 32),
    Setting("[2] x 0.7", SelectionConfig(layers=(2,)), 32),
]


class Flaky:
    """Raises at the calls that it is told to; 1 is the first."""

    def __init__(self, errors: dict[int, BaseException]) -> None:
        self.errors, self.asked = errors, []

    def __call__(self, setting: Setting, seed: int) -> dict[str, float]:
        self.asked.append((setting.name, seed))
        if error := self.errors.get(len(self.asked)):
            raise error
        return {"accuracy": 10.0 * seed + SETTINGS.index(setting)}


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    first, store = Flaky({3: KeyboardInterrupt()}), CellStore(tmp_path / "new" / "cells", "x")
    with pytest.raises(KeyboardInterrupt):
        sweep(first, store, SETTINGS, (0, 1), "accuracy")
    assert len(list(store.folder.iterdir())) == 2
    second = Flaky({})
    found = sweep(second, CellStore(store.folder, "x"), SETTINGS, (0, 1), "accuracy")
    assert second.asked == [("[2] x 0.7", 0), *((setting.name, 1) for setting in SETTINGS)]
    assert [found.of(setting, "accuracy") for setting in SETTINGS] == [{0: 0, 1: 10}, {0: 1, 1: 11}, {0: 2, 1: 12}]
    assert not found.failures and not list(store.folder.glob("*.partial"))


def test_a_sweep_that_goes_on_elsewhere_says_so(tmp_path, monkeypatch):
    where = {"device": "one", "torch": "2", "commit": "abc", "trips-vlm": None, "date": "whenever"}
    monkeypatch.setattr(cells, "describe_environment", lambda: dict(where))
    store = CellStore(tmp_path, "x")
    found = sweep(Flaky({}), store, SETTINGS[:2], (0,), "accuracy")
    assert found.environments == ["device one, torch 2, commit abc"]
    where |= {"device": "two", "date": "later"}
    found = sweep(Flaky({}), store, SETTINGS, (0,), "accuracy")
    assert found.environments == ["device one, torch 2, commit abc", "device two, torch 2, commit abc"]


def test_a_failed_cell_is_recorded_and_tried_again(tmp_path, caplog):
    store = CellStore(tmp_path, "x")
    broken = Flaky({1: ZeroDivisionError("a\nbug"), 2: DataError("is gone", item="a.tar")})
    found = sweep(broken, store, SETTINGS, (0,), "accuracy")
    assert found.failures == {
        "no selection, seed 0": "ZeroDivisionError: a bug",
        "[1, 3] x 0.5, seed 0": "a.tar: is gone",
    }
    assert list(found.figures) == ["[2] x 0.7"] and "a.tar: is gone" in caplog.text
    cell = json.loads(store.path(SETTINGS[1], 0).read_text())
    assert (cell["state"], cell["error"], cell["seed"]) == ("failed", "a.tar: is gone", 0)
    assert cell["setting"]["selection"]["layers"] == [1, 3] and "commit" in cell["environment"]
    again = Flaky({})
    caplog.clear()
    found = sweep(again, store, SETTINGS, (0,), "accuracy")
    assert "no cell" not in caplog.text, "a failed cell is a whole file"
    assert [name for name, _ in again.asked] == ["no selection", "[1, 3] x 0.5"] and not found.failures


@pytest.mark.parametrize("figures", [{}, {"accuracy": float("nan")}, {"accuracy": "high"}, {"accuracy": None}])
def test_a_cell_without_its_figure_has_failed(figures, tmp_path):
    found = sweep(lambda setting, seed: figures, CellStore(tmp_path, "x"), SETTINGS[:1], (0,), "accuracy")
    assert found.figures == {} and list(found.failures) == ["no selection, seed 0"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": "done"}', '{"state": "done", "figures": {"accuracy": "x"}}']
)
def test_a_damaged_cell_is_measured_anew(text, tmp_path, caplog):
    store = CellStore(tmp_path, "x")
    store.path(SETTINGS[0], 0).write_text(text)
    source = Flaky({})
    assert sweep(source, store, SETTINGS[:1], (0,), "accuracy").figures == {"no selection": {0: {"accuracy": 0}}}
    assert len(source.asked) == 1 and store.path(SETTINGS[0], 0).name in caplog.text
    assert store.read(SETTINGS[0], 0) == {"accuracy": 0}


def test_a_write_that_breaks_off_leaves_the_old_cell(tmp_path, monkeypatch):
    store = CellStore(tmp_path, "x")
    store.write(SETTINGS[0], 0, 1.0, state="done", figures={"accuracy": 1.0})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trips.paper.cells.os.replace", fail)
    with pytest.raises(DataError, match="No space left"):
        store.write(SETTINGS[0], 0, 1.0, state="done", figures={"accuracy": 2.0})
    assert store.read(SETTINGS[0], 0) == {"accuracy": 1.0}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="folder"):
        CellStore(tmp_path / "file" / "x", "x")


@given(
    st.lists(
        st.tuples(
            st.sampled_from([(1,), (2,), (1, 3), (5, 10)]),
            st.sampled_from([0.3, 0.5, 1.0]),
            st.sampled_from(["text", "image", "none"]),
            st.sampled_from([224, 384]),
            st.integers(0, 2),
            st.sampled_from(["x", "y"]),
        ),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_cells_of_different_keys_never_meet(tmp_path_factory, keys):
    paths = {
        CellStore(tmp_path_factory.getbasetemp(), source).path(
            Setting("same", SelectionConfig(layers=layers, keep_rate=rate, guide=guide), side), seed
        )
        for layers, rate, guide, side, seed, source in keys
    }
    assert len(paths) == 2


def test_another_source_or_seed_finds_nothing(tmp_path):
    CellStore(tmp_path, "x").write(SETTINGS[0], 0, 1.0, state="done", figures={"accuracy": 1.0})
    assert CellStore(tmp_path, "x").read(SETTINGS[0], 0) == {"accuracy": 1.0}
    assert CellStore(tmp_path, "y").read(SETTINGS[0], 0) is None
    assert CellStore(tmp_path, "x").read(SETTINGS[0], 1) is None


def tiny_model(_: Setting) -> TripsModel:
    return TripsModel(TripsConfig(vision_config=tiny_vision_config(), text_config=tiny_bert_config(),
                                  selection={"layers": (2,)}))  # fmt: skip


def test_speed_beside_the_baseline(tmp_path):
    source = SpeedSource(lambda _: SETTINGS[0], tiny_model, batch_sizes=(2, 1), rounds=2, text_length=5)
    found = sweep(source.measure, CellStore(tmp_path, source.key), SETTINGS, (0,), "throughput_ratio")
    assert not found.failures
    for setting in SETTINGS:
        figures = found.figures[setting.name][0]
        assert figures.keys() == {"throughput", "throughput_ratio", "latency_ms", "latency_ratio"}
        assert min(figures.values()) > 0
    assert found.figures["no selection"][0]["throughput_ratio"] == 1
    other = SpeedSource(lambda _: SETTINGS[0], tiny_model, batch_sizes=(1,), rounds=2, text_length=5)
    assert other.key != source.key
    for wrong in ({"batch_sizes": ()}, {"batch_sizes": (0,)}, {"rounds": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SpeedSource(lambda _: SETTINGS[0], tiny_model, **wrong)


def test_the_arithmetic_of_speed(monkeypatch):
    """A clock that a pair of the baseline moves by 8 ms, one of the others by 2."""
    clock = [0.0]

    def subject(model: object, selection: SelectionConfig, inputs: list) -> object:
        def run(number: int) -> None:
            clock[0] += len(inputs[number].input_ids) * (0.008 if selection.guide == "none" else 0.002)

        return run

    monkeypatch.setattr("trips.paper.speed.build_subject", subject)
    monkeypatch.setattr("trips.paper.speed.device_clock", lambda _: lambda: clock[0])
    source = SpeedSource(lambda _: SETTINGS[0], tiny_model, batch_sizes=(1, 4), text_length=5)
    assert source.measure(SETTINGS[1], 0) == pytest.approx(
        {"throughput": 500, "throughput_ratio": 4, "latency_ms": 2, "latency_ratio": 4}
    )


def test_speed_in_a_table(tmp_path):
    class Fixed:
        name = "by a clock"

        def measure(self, setting: Setting, seed: int) -> dict[str, float]:
            return {"throughput": 2.0, "throughput_ratio": 1.25, "latency_ms": 500.0, "latency_ratio": 1.5}

    result = tables.with_speed(tables.paper_table(3), Fixed(), CellStore(tmp_path, "x"))
    assert "throughput" not in result.rows[0].ours
    assert (result.rows[-1].ours["throughput_ratio"], result.rows[-1].ours["latency_ms"]) == (1.25, 500.0)
    assert "our pairs/s and ms: by a clock" in footnotes(result)
    with pytest.raises(ConfigError, match="speed"):
        tables.with_speed(tables.paper_table(1), Fixed(), CellStore(tmp_path, "x"))
    baselines = {row.name: tables.speed_source(6).baseline(row.setting).name for row in tables.paper_table(6).rows}
    assert baselines["TRIPS-S"] == "TRIPS-S w/o PS" and baselines["TRIPS"] == "TRIPS w/o PS"
    assert tables.speed_source(7).baseline(tables.paper_table(7).rows[0].setting).name == "no selection"
