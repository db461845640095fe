"""Indexing in processes of their own: killed and taken up again, and two that do the work of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from search.collections_of_noise import fill, save_picture, tiny_pipeline
from search.runs import run

from trips.search import files

SCRIPT, SOURCE = Path(__file__).with_name("runs.py"), Path(__file__).resolve().parents[2] / "src"
SHARED = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **SHARED, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def found(process: subprocess.Popen[str]) -> dict:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output)


def check_same(one: dict, other: dict) -> None:
    assert [path for path, _ in one["hits"]] == [path for path, _ in other["hits"]] and one["total"] == other["total"]
    assert [score for _, score in one["hits"]] == pytest.approx([score for _, score in other["hits"]], abs=1e-3)


def test_killed_run_loses_nothing_that_was_finished_and_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", 15)
    (folder / "bad.jpg").write_bytes(b"no picture")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    killed = start(folder, tmp_path / "killed", 5)  # batches of 2 in shards of 4: two shards are written
    pair = [start(folder, tmp_path / "pair", RANK=str(rank), LOCAL_RANK=str(rank), **together) for rank in range(2)]
    assert killed.wait(120) == -9 and not (tmp_path / "killed" / "manifest.json").exists()
    assert len(list((tmp_path / "killed" / "shards").iterdir())) == 2
    whole = run(folder, tmp_path / "whole")
    assert (whole["total"], whole["computed"], list(whole["bad"])) == (15, 15, ["bad.jpg"])
    both = [found(process) for process in pair]
    assert both[0] == both[1]
    check_same(both[0], whole)
    assert both[0]["bad"] == whole["bad"]
    again = run(folder, tmp_path / "killed")
    assert again["kept"] >= 7 and again["computed"] == 15 - again["kept"]  # 8, one of which may be the bad one
    check_same(again, whole)
    left = {path.suffix for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert left <= {".safetensors", ".json", ".faiss", ".lock"}


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_killed_between_shards_and_manifest_no_picture_is_found_twice(tmp_path: Path, monkeypatch) -> None:
    """The old shards and the one that joins them then lie side by side."""
    trained = tiny_pipeline()
    trained.index(fill(tmp_path, 3))
    for number in range(3, 6):
        save_picture(tmp_path / f"{number}.png", number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write_manifest", killed)
        trained.index(tmp_path)
    assert len(list((tmp_path / ".trips-index" / "shards").iterdir())) == 3
    index = trained.index(tmp_path)
    assert (len(index), index.report.kept, index.report.computed) == (6, 6, 0)
    assert len({hit.path for hit in index.search("cat", 9)}) == 6
    assert len(list((tmp_path / ".trips-index" / "shards").iterdir())) == 1


def test_shards_that_a_killed_run_of_another_model_left_do_not_count(tmp_path: Path, monkeypatch) -> None:
    trained, other = tiny_pipeline(), tiny_pipeline()
    with torch.no_grad():
        other.model.image_projection.weight.mul_(-1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write_manifest", killed)
        trained.index(fill(tmp_path, 3))
    assert len(list((tmp_path / ".trips-index" / "shards").iterdir())) == 1
    report = other.index(tmp_path).report
    assert (report.total, report.computed, report.kept) == (3, 3, 0)
