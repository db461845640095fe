"""trips table: tables for people and machines, folders, mistakes, a sweep that fails in part."""

from __future__ import annotations

import json

import pytest

from trips import cli
from trips.errors import DataError
from trips.paper.settings import Setting
from trips.paper.speed import SpeedSource
from trips.quickstart import sweep


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["table"], ["number"]),
        (["table", "9"], ["table", "9", "1 to 7"]),
        (["table", "four"], ["four"]),
        (["table", "4", "--runs", "runs/x"], ["runs", "tables 1 and 2"]),
        (["table", "1", "--runs", "/no/run"], ["/no/run", "finished run"]),
        (["table", "1", "--speed"], ["speed", "tables 3 to 7"]),
        (["table", "3", "--accuracy=scenes"], ["accuracy", "tables 4 to 7"]),
        (["table", "4", "--accuracy=vqa/daquar_smal"], ["did you mean vqa/daquar_small?"]),
        (["table", "4", "--accuracy=debug/vqa_tiny", "--model.selection.guide=image"], ["decided by the table"]),
        (["table", "4", "--data.train=x.tar"], ["--data.train=x.tar", "--accuracy=RECIPE"]),
        (["table", "4", "--speed", "--batch_sizes", "0"], ["batch_sizes", "0"]),
        (["table", "3", "--speed", "--accuracy=scenes"], ["accuracy", "tables 4 to 7"]),
        (["table", "4", "--speed", "--accuracy=no/such"], ["no/such"]),
    ],
)
def test_mistakes(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SpeedSource, "measure", lambda *_: pytest.fail("timed before all was checked"))
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts)


def test_for_people_and_machines(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["table", "5"]) == 0
    out = capsys.readouterr().out
    assert "[6, 10], not [5, 10]" in out and "130.92" in out and max(map(len, out.splitlines())) <= 140
    assert cli.main(["table", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    row = told["rows"][1]
    assert (row["name"], row["paper"]["flops_g"]) == ("[5, 10] x 0.7, 224 px", 20.89)
    assert row["ours"]["convention_g"] == pytest.approx(20.899, abs=1e-3) and row["ours"]["convention_fits"]
    assert not list(tmp_path.iterdir()), "nothing was measured, nothing is written"
    assert cli.main(["table", "5", "--out=there", "--json"]) == 0
    written = json.loads((tmp_path / "there" / "rows.json").read_text())
    again = json.loads(capsys.readouterr().out)
    assert written == again and again["rows"] == told["rows"]


def test_a_sweep_over_scenes(capsys, tmp_path, monkeypatch):
    calls = []

    def measure(self: sweep.SceneAccuracy, setting: Setting, seed: int) -> dict[str, float]:
        calls.append((setting.name, seed))
        if len(calls) == 2:
            raise DataError("is gone", item="a scene")
        return {"accuracy": 50.0 + seed}

    monkeypatch.setattr(sweep.SceneAccuracy, "measure", measure)
    monkeypatch.chdir(tmp_path)
    argv = ["table", "7", "--accuracy=scenes", "--seeds", "0", "2", "--json"]
    assert cli.main(argv) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["failures"] == {"w/o ITF, seed 0": "a scene: is gone"}
    assert told["rows"][0]["ours"]["accuracy_by_seed"] == {"0": 50.0, "2": 52.0}
    assert "FAILED w/o ITF, seed 0: a scene: is gone" in (tmp_path / "runs/table_7/table.md").read_text()
    assert cli.main(argv[:-1]) == 0
    assert calls[6:] == [("w/o ITF", 0)] and "51.00 ± 1.41 (2)" in capsys.readouterr().out


def test_what_an_earlier_command_has_measured_stays(capsys, tmp_path, monkeypatch):
    """Speed, then accuracy, then neither: no column goes; another table or a damaged record adds none."""
    times = {"throughput": 8.0, "throughput_ratio": 1.25, "latency_ms": 31.5, "latency_ratio": 1.5}
    monkeypatch.setattr(SpeedSource, "measure", lambda *_: times)
    monkeypatch.setattr(sweep.SceneAccuracy, "measure", lambda *_: {"accuracy": 61.0})
    folder = tmp_path / "there"

    def rows(*options: str) -> list[dict]:
        assert cli.main(["table", "7", f"--out={folder}", "--json", *options]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told == json.loads((folder / "rows.json").read_text())
        return [row["ours"] for row in told["rows"]]

    assert all(times.items() <= row.items() and "accuracy" not in row for row in rows("--speed"))
    for options in (["--accuracy=scenes"], [], ["--speed", "--rounds=2"]):
        found = rows(*options)
        assert all(times.items() <= row.items() and row["accuracy"] == 61.0 for row in found), options
        page = (folder / "table.md").read_text()
        assert "our pairs/s and ms: " in page and "61.00" in page and "| our ms |" in page
    monkeypatch.setattr(SpeedSource, "measure", lambda *_: {**times, "latency_ms": 30.0})
    assert rows("--speed", "--rounds=4")[0]["latency_ms"] == 30.0, "what is asked for anew replaces the record"
    record = json.loads((folder / "rows.json").read_text())
    record["rows"][0]["setting"]["image_size"] += 16
    (folder / "rows.json").write_text(json.dumps(record))
    other, *same = rows()
    assert "latency_ms" not in other and all(row["latency_ms"] == 30.0 for row in same)
    for text in ("{", "[]", json.dumps({**record, "number": 6})):
        (folder / "rows.json").write_text(text)
        assert not any("latency_ms" in row or "accuracy" in row for row in rows())
