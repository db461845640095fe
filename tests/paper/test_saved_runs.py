"""Tables 1 and 2 from results files of a user's runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trips.errors import CheckpointError, ConfigError, DataError
from trips.paper.table_text import columns_of, markdown
from trips.paper.tables import paper_table

RECALLS = {"1": 0.5, "5": 0.75, "10": 1.0}


def saved_run(folder: Path, task: str, test: str, selection: dict[str, Any] | None = None, **figures: Any) -> str:
    """A folder with the results of a finished run."""
    folder.mkdir()
    chosen = {"guide": "text", "layers": [5, 10]} | (selection or {})
    recipe = {"task": task, "data": {"test": [test]}, "model": {"selection": chosen}}
    (folder / "results.json").write_text(json.dumps({"recipe": recipe, **figures}))
    return str(folder)


def test_runs_fill_tables_1_and_2(tmp_path):
    both = {"text_recall": RECALLS, "image_recall": {"1": 0.25, "5": 0.5, "10": 0.6}}
    other = {"text_recall": dict.fromkeys(RECALLS, 0.0), "image_recall": dict.fromkeys(RECALLS, 0.0)}
    flickr = "data/flickr30k/dataset_flickr30k.json#test"
    runs = [
        saved_run(tmp_path / "a", "retrieval", flickr, num_images=1000, reranked={"image": other, "text": both}),
        saved_run(
            tmp_path / "b", "retrieval", "coco.json", {"guide": "none"}, num_images=5000, reranked={"text": both}
        ),
        saved_run(tmp_path / "c", "retrieval", "flickr30k.tar", num_images=20, reranked={"image": both}),
    ]
    result = paper_table(1, runs)
    rows = {row.name: row for row in result.rows}
    assert rows["TRIPS"].ours == {
        "flickr30k_1k.TR.R@1": 50.0, "flickr30k_1k.TR.R@5": 75.0, "flickr30k_1k.TR.R@10": 100.0,
        "flickr30k_1k.IR.R@1": 25.0, "flickr30k_1k.IR.R@5": 50.0, "flickr30k_1k.IR.R@10": 60.0,
    }  # fmt: skip
    assert rows["ALBEF-C"].ours["mscoco_5k.TR.R@1"] == 50.0 and len(rows["ALBEF-C"].ours) == 6
    own = rows[f"TRIPS, {runs[2]}"]
    assert own.ours["own_data.IR.R@1"] == 25.0 and own.paper == {}
    columns = {column.title: column.cells for column in columns_of(result)}
    assert columns["own data\nTR R@1"] == (*["-"] * 10, "50.0")
    assert columns["Flickr30K\nTR R@1"][-2:] == ("50.0", "-")
    with pytest.raises(ConfigError, match="flickr30k_1k.IR.R@1 already"):
        paper_table(1, [runs[0], runs[0]])

    runs = [
        saved_run(tmp_path / "d", "nlvr2", "data/nlvr2/dev.json", num_statements=6982, accuracy=0.5),
        saved_run(tmp_path / "e", "nlvr2", "data/nlvr2/test1.json", num_statements=6967, accuracy=0.75),
        saved_run(tmp_path / "f", "nlvr2", "nlvr1-dev.tar", {"layers": []}, num_statements=100, accuracy=0.125),
        saved_run(tmp_path / "g", "vqa", "daquar.tar", {"guide": "image"}, accuracy=0.25, metric="exact"),
    ]
    result = paper_table(2, runs)
    rows = {row.name: row.ours for row in result.rows}
    assert rows["TRIPS"] == {"nlvr2_dev": 50.0, "nlvr2_test_p": 75.0}
    assert rows[f"ALBEF-C, {runs[2]}"] == {"own_data.nlvr2": 12.5}
    assert rows[f"TRIPS, guided by image, {runs[3]}"] == {"own_data.vqa_exact": 25.0}
    assert "| TRIPS, ours | - | - | 50.00 | 75.00 |" in markdown(result)


def test_runs_that_do_not_serve(tmp_path):
    with pytest.raises(CheckpointError, match=r"finished run.*results.json"):
        paper_table(1, [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"no place.*'vqa'.*retrieval"):
        paper_table(1, [saved_run(tmp_path / "a", "vqa", "x", accuracy=0.5, metric="exact")])
    with pytest.raises(DataError, match=r"results.json: has no accuracy"):
        paper_table(2, [saved_run(tmp_path / "b", "vqa", "x", metric="exact")])
    (tmp_path / "b" / "results.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        paper_table(2, [str(tmp_path / "b")])
    (tmp_path / "b" / "results.json").write_text("[]")
    with pytest.raises(DataError, match="cannot be read"):
        paper_table(2, [str(tmp_path / "b")])
