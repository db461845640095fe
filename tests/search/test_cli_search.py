"""`trips index` and `trips search` on a saved tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from search.collections_of_noise import fill, tiny_pipeline

from trips.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder, trained = tmp_path_factory.mktemp("model"), tiny_pipeline()
    trained.model.save_pretrained(folder)
    trained.processor.save_pretrained(folder)
    return folder


def test_index_then_search_then_a_picture_of_the_hits(saved: Path, tmp_path: Path, capsys) -> None:
    photos = fill(tmp_path / "photos", 5)
    (photos / "bad.jpg").write_bytes(b"no picture")
    assert main(["index", str(photos), f"--model={saved}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["total"], report["computed"], list(report["bad"])) == (5, 5, ["bad.jpg"])
    assert main(["index", str(photos), f"--model={saved}"]) == 0
    assert "bad.jpg" in capsys.readouterr().out
    out = tmp_path / "hits.png"
    arguments = ["search", "a red bus", f"--index={photos}", "--top_k=2", f"--out={out}", "--json"]  # knows its model
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    expected = tiny_pipeline().index(photos).search("a red bus", 2)
    assert [hit["path"] for hit in result["hits"]] == [hit.path for hit in expected]
    assert np.asarray(Image.open(out)).std() > 1
    assert main(["search", "a red bus", f"--index={photos}", f"--model={saved}", "--rerank=0"]) == 0
    shown = capsys.readouterr().out
    assert "similarity" in shown and expected[0].path.rsplit("/", 1)[1] in shown


def test_mistakes_are_one_line(saved: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["search", "a bus", f"--index={tmp_path}"], "no image index"),
        (["index", str(tmp_path / "none"), f"--model={saved}"], "none: does not exist"),
        (["index", str(tmp_path / "empty"), f"--model={saved}"], "holds no images"),
        (["search", "a bus", f"--index={tmp_path}", "--out=a.xyz"], "a.xyz"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
    assert not any((tmp_path / "none").parent.glob("none*"))
