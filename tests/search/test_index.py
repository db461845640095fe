"""Building, refreshing and searching an index: against brute force, and against an index made at once."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import picture, tiny_processor
from search.collections_of_noise import features_of, fill, save_picture, similarities, tiny_pipeline, write_tar
from tiny import tiny_vqa_model

from trips.errors import CheckpointError, ConfigError, DataError, MissingDependencyError, UnsupportedModelError
from trips.pipeline import TripsPipeline
from trips.search import build, vectors
from trips.search.index import ImageIndex
from trips.search.vectors import open_vectors, write_vectors

WORDS = ["a red bus on the road", "cat", "two big green lamp"]


@pytest.fixture(scope="module")
def trained() -> TripsPipeline:
    return tiny_pipeline()


def all_pictures(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}


# --- both stages


@pytest.mark.parametrize("workers", [0, 2])
def test_first_stage_is_brute_force(trained, tmp_path: Path, workers: int) -> None:
    index = trained.index(fill(tmp_path, 9), workers=workers)
    assert len(index) == 9 and index.report.computed == 9
    for words in WORDS:
        expected = similarities(trained, all_pictures(tmp_path), words)
        hits = index.search(words, top_k=20, rerank=0)
        assert [Path(hit.path).relative_to(tmp_path).as_posix() for hit in hits] == [key for _, key in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [score for score, _ in expected], atol=2e-3)  # float16
        assert [hit.first_stage_rank for hit in hits] == list(range(1, 10)) and not hits[0].selection
        assert [hit.path for hit in index.search(words, top_k=3, rerank=0)] == [hit.path for hit in hits[:3]]


def test_reranked_hits_are_scored_as_the_pipeline_scores(trained, tmp_path: Path) -> None:
    index = trained.index(fill(tmp_path, 9))
    for words in WORDS:
        first = index.search(words, top_k=6, rerank=0)
        hits = index.search(words, top_k=4, rerank=6, rank_by="match")
        scores = dict(
            zip([hit.path for hit in first], trained.score([hit.path for hit in first], words)[:, 0].tolist())
        )
        assert [hit.path for hit in hits] == sorted(scores, key=lambda path: -scores[path])[:4]
        ranks = {hit.path: hit.first_stage_rank for hit in first}
        for hit in hits:
            assert hit.score == pytest.approx(scores[hit.path], abs=1e-5)
            assert hit.first_stage_rank == ranks[hit.path]
            expected = trained.explain(hit.path, words)
            assert [record.layer for record in hit.selection] == [2, 3]
            for record, location in zip(hit.selection, expected.locations, strict=True):
                assert sorted(place for place in record.kept[0].tolist() if place >= 0) == list(location.kept)


def test_both_stages_together_are_a_product_of_experts(tmp_path: Path) -> None:
    """The order of p / (1 - p) times exp(similarity / temperature), as logarithms, from the scores of either stage."""
    trained = tiny_pipeline()  # its own, since the temperature changes
    index, orders = trained.index(fill(tmp_path, 9)), {}
    for temperature in (0.5, 1e-7, 1e3):
        with torch.no_grad():
            trained.model.temperature.fill_(temperature)
        for words in WORDS:
            paths = [hit.path for hit in index.search(words, top_k=9, rerank=0)]
            similar = {hit.path: hit.similarity for hit in index.search(words, top_k=9, rerank=0)}
            match = dict(zip(paths, trained.score(paths, words)[:, 0].double().tolist(), strict=True))
            odds = {path: math.log(match[path] / (1 - match[path])) for path in paths}
            expected = {path: odds[path] + similar[path] / temperature for path in paths}
            hits = index.search(words, top_k=9, rerank=9)
            weights = [expected[hit.path] for hit in hits]
            assert all(a >= b - 1e-4 for a, b in itertools.pairwise(weights))
            assert [hit.score for hit in hits] == pytest.approx([match[hit.path] for hit in hits], abs=1e-5)
            orders[temperature, words] = [hit.path for hit in hits]
            if temperature == 1e-7:
                assert orders[temperature, words] == paths  # the features decide
            if temperature == 1e3:
                assert orders[temperature, words] == sorted(paths, key=lambda path: -match[path])
    assert any(orders[0.5, words] != orders[1e-7, words] for words in WORDS)


def test_more_than_the_limit_goes_to_cells_that_find_the_same_when_all_are_read(
    trained, tmp_path: Path, monkeypatch
) -> None:
    exact = trained.index(fill(tmp_path, 12)).search("cat", top_k=12, rerank=0)
    monkeypatch.setattr(vectors, "EXACT_LIMIT", 5)
    monkeypatch.setattr(vectors, "PROBED", 1.0)
    index = trained.index(tmp_path, out=tmp_path / "other")
    hits = index.search("cat", top_k=12, rerank=0)
    assert [hit.path for hit in hits] == [hit.path for hit in exact]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in exact], abs=1e-6)


def test_cells_read_a_part_and_find_most(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vectors, "EXACT_LIMIT", 100)
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((20, 16))
    rows = centres[generator.integers(0, 20, 2000)] + 0.3 * generator.standard_normal((2000, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    names = [(f"{i}", "1:1", -1) for i in range(2000)]
    shards = [build.write_shard(tmp_path, "m", names[i : i + 500], rows[i : i + 500]) for i in range(0, 2000, 500)]
    kept = write_vectors(tmp_path / "vectors-1.faiss", shards)
    assert kept["kind"] == "cells"
    found = open_vectors(tmp_path / kept.pop("name"), **kept)
    queries = rows[::97]
    shares = []
    for query in queries:
        truth = set(np.argsort(-(rows @ query))[:10].tolist())
        shares.append(len(truth & set(found.nearest(query, 10)[1].tolist())) / 10)
    assert np.mean(shares) > 0.8


# --- up to date

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["save", "delete", "tar"]), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=4
)


@settings(max_examples=8)
@given(st.lists(ACTIONS, min_size=1, max_size=3), st.booleans(), st.sampled_from([2, 4096]))
def test_refreshed_index_is_a_fresh_one(trained, rounds, hashed: bool, shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SHARD_SIZE", shard_size)
        folder, clock = fill(Path(name, "photos"), 4), 1_700_000_000
        index = trained.index(folder, hashed=hashed)
        for actions in rounds:
            before = features_of(index)
            for action, place, seed in actions:
                clock += 10
                path = folder / ("sub" if place % 2 else "") / f"{place}.png"
                if action == "tar":
                    path = write_tar(folder / "more.tar", [seed, seed + 1])
                elif action == "save":
                    save_picture(path, seed)
                elif path.exists() and len(list(folder.rglob("*.png"))) > 1:
                    path.unlink()
                if path.exists():
                    os.utime(path, (clock, clock))  # the file system's clock is too coarse for a test
            report = index.refresh()
            fresh = trained.index(folder, out=Path(name, "fresh"), hashed=hashed)
            now, expected = features_of(index), features_of(fresh)
            assert now.keys() == expected.keys() and len(index) == len(fresh) == report.total
            for key, feature in now.items():
                np.testing.assert_allclose(feature, expected[key], atol=1e-3)
            assert report.removed == len(before.keys() - now.keys())
            assert report.computed + report.kept == report.total
            asked = [index.search("cat", 9, rerank=0), fresh.search("cat", 9, rerank=0)]
            # Scores and not paths: some pictures are alike, and batches of other pictures round otherwise.
            assert [hit.score for hit in asked[0]] == pytest.approx([hit.score for hit in asked[1]], abs=1e-3)
            shutil.rmtree(Path(name, "fresh"))


def test_nothing_new_computes_nothing_and_one_new_file_only_itself(trained, tmp_path: Path, monkeypatch) -> None:
    index = trained.index(fill(tmp_path, 5))
    names = sorted(path.name for path in index.folder.rglob("*.*"))
    assert (index.refresh().computed, index.report.kept) == (0, 5)
    assert sorted(path.name for path in index.folder.rglob("*.*")) == names  # not even the vectors
    save_picture(tmp_path / "new.png", 50)
    (tmp_path / "0.png").unlink()
    report = index.refresh()
    assert (report.total, report.computed, report.kept, report.removed) == (5, 1, 4, 1)
    assert len(list((index.folder / "shards").iterdir())) == 1 and len(list(index.folder.glob("vectors-*"))) == 1


def test_content_tells_changes_where_the_time_does_not(trained, tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", 3)
    by_time, by_content = (
        trained.index(folder, out=tmp_path / "a"),
        trained.index(folder, out=tmp_path / "b", hashed=True),
    )
    path = tmp_path / "photos" / "0.png"
    status, size = path.stat(), path.stat().st_size
    image = np.asarray(picture(0)).copy()
    image[0, 0] = 255 - image[0, 0]
    Image.fromarray(image).save(path)
    if path.stat().st_size != size:  # noise compresses alike but for a few bytes
        data = bytearray(path.read_bytes())
        path.write_bytes(data[:size].ljust(size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert by_time.refresh().computed == 0
    report = by_content.refresh()  # `hashed` is remembered
    assert report.computed + len(report.bad) == 1
    os.utime(path, (1, 1))
    assert by_content.refresh().computed + len(by_content.report.bad) == len(report.bad)


def test_an_index_in_its_folder_moves_with_it(trained, tmp_path: Path) -> None:
    found = trained.index(fill(tmp_path / "here", 4)).search("cat", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    index = ImageIndex.open(tmp_path / "there", trained)
    assert index.search("cat", 1)[0].path == found[0].path.replace("here", "there")
    assert index.refresh().computed == 0


def test_tar_alone_and_tars_in_a_folder(trained, tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", 3)
    tar = write_tar(folder / "sub" / "more.tar", [7, 8, 9])
    pictures = {**all_pictures(folder), **{f"sub/more.tar:photo{seed}": picture(seed) for seed in (7, 8, 9)}}
    expected = similarities(trained, pictures, "cat")
    index = trained.index(folder)
    hits = index.search("cat", 6, rerank=0)
    assert [hit.path for hit in hits] == [str(folder / key) for _, key in expected]
    assert {hit.path for hit in index.search("cat", 6, rerank=6)} == {hit.path for hit in hits}
    alone = trained.index(tar)
    assert alone.folder == tar.with_name("more.tar.trips-index") and len(alone) == 3
    asked = [hit.path for hit in alone.search("cat", 3)]
    assert sorted(asked) == [f"{tar}:photo{seed}" for seed in (7, 8, 9)]
    assert ImageIndex.open(tar, trained).search("cat", 3)[0].path == asked[0]


# --- what can go wrong


def test_bad_pictures_are_named_and_the_others_indexed(trained, tmp_path: Path, caplog) -> None:
    fill(tmp_path, 4)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.tar").write_bytes(b"x" * 100)
    (tmp_path / "notes.txt").write_text("no picture")
    index = trained.index(tmp_path)
    assert len(index) == 4 and sorted(index.report.bad) == ["bad.jpg", "cut.tar", "empty.png"]
    assert "empty (0 bytes)" in index.report.bad["empty.png"]
    save_picture(tmp_path / "empty.png", 3)
    assert (index.refresh().computed, sorted(index.report.bad)) == (1, ["bad.jpg", "cut.tar"])
    Path(index.search("cat", 1)[0].path).unlink()
    with caplog.at_level("WARNING", "trips"):
        assert len(index.search("cat", 9)) == 4 and "does not exist" in caplog.text


@pytest.mark.parametrize("kind", ["empty folder", "no folder", "a file", "only bad"])
def test_nothing_to_index(trained, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "photos"
    if kind != "no folder":
        folder.mkdir()
    if kind == "only bad":
        (folder / "bad.jpg").write_bytes(b"no picture")
    if kind == "a file":
        folder = folder / "a.jpg"
        folder.write_bytes(b"x")
    words = {"empty folder": "holds no images", "no folder": "does not exist", "a file": "is a file",
             "only bad": "no image can be read"}  # fmt: skip
    with pytest.raises(DataError, match=words[kind]):
        trained.index(folder, out=tmp_path / "index")
    with pytest.raises(CheckpointError, match="no image index"):
        ImageIndex.open(tmp_path / "index", trained)


def test_another_model_is_refused(trained, tmp_path: Path) -> None:
    trained.index(fill(tmp_path, 3))
    same, other, setting = tiny_pipeline(), tiny_pipeline(), tiny_pipeline(keep_rate=0.4)
    other.model.image_projection.weight.data[0, 0] += 1e-3
    assert len(ImageIndex.open(tmp_path, same)) == 3
    for model in (other, setting):
        with pytest.raises(CheckpointError, match="made by another model"):
            ImageIndex.open(tmp_path, model)
        with pytest.raises(CheckpointError, match="made by another model"):
            model.index(tmp_path)
    assert len(other.index(tmp_path, out=tmp_path / "other")) == 3


def test_models_without_text_free_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="selected by a text"):
        tiny_pipeline(pretraining={"itc_guide": "text"}).index(fill(tmp_path, 2))
    assert len(tiny_pipeline(pretraining={"itc_guide": "text"}, guide="none").index(tmp_path)) == 2  # nothing selects
    answering = TripsPipeline(tiny_vqa_model(), tiny_processor())
    with pytest.raises(ConfigError, match=r"no index\(\)"):
        answering.index(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no contrastive features"):
        ImageIndex.build(tmp_path, answering)


@pytest.mark.parametrize("part", ["shards/*", "vectors-*"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_named_and_repaired(trained, tmp_path: Path, part: str, damage: str, monkeypatch) -> None:
    monkeypatch.setattr(build, "SHARD_SIZE", 4)
    index = trained.index(fill(tmp_path, 8))
    expected = [hit.path for hit in index.search("cat", 8)]
    path = sorted(index.folder.glob(part))[0]
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[-3] ^= 0xFF
        path.write_bytes(data[:-5] if damage == "cut" else data)
    if (part, damage) != ("shards/*", "changed"):  # features of a shard are not read before the next indexing run
        with pytest.raises(CheckpointError, match=f"{path.name}: .*missing or damaged"):
            ImageIndex.open(tmp_path, trained)
    again = trained.index(tmp_path)
    assert again.report.computed == (4 if part == "shards/*" else 0)
    assert [hit.path for hit in again.search("cat", 8)] == expected
    assert [hit.path for hit in ImageIndex.open(tmp_path, trained).search("cat", 8)] == expected


def test_broken_manifest_is_named(trained, tmp_path: Path) -> None:
    index = trained.index(fill(tmp_path, 3))
    (index.folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest.json: cannot be read.*delete it"):
        trained.index(tmp_path)
    (index.folder / "manifest.json").unlink()
    assert trained.index(tmp_path).report.kept == 3  # as the message says


def test_one_run_at_a_time(trained, tmp_path: Path) -> None:
    fill(tmp_path, 3)

    def second(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another run is writing"):
            trained.index(tmp_path)

    assert len(trained.index(tmp_path, progress=second)) == 3
    assert trained.index(tmp_path).report.kept == 3


def test_without_faiss(trained, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (trained.index, lambda path: ImageIndex.open(path, trained)):
        with pytest.raises(MissingDependencyError, match=r"trips-vlm\[search\]"):
            call(fill(tmp_path, 1))


def test_bad_arguments(trained, tmp_path: Path) -> None:
    index = trained.index(fill(tmp_path, 2))
    for arguments in ({"top_k": 0}, {"rerank": -1}, {"rerank": 1.5}, {"rank_by": "sum"}, {"text": 3}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            index.search(**{"text": "cat", **arguments})
    with pytest.raises(DataError, match="is empty"):
        index.search(" ")
    with pytest.raises(ConfigError, match="workers"):
        trained.index(tmp_path, workers=-1)
    assert torch.is_grad_enabled()
