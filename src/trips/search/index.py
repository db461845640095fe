"""ImageIndex: photos indexed once, kept up to date, and searched in two stages (section 5.1.3).

First the contrastive features, which have seen no text and so lie ready; then the best hits matched with the words,
which select the patches of each.

An indexing run computes what is new or changed and forgets what is gone. Several processes (torchrun, accelerate)
share the work: each writes shards of its own part, the first makes one index of all. One run at a time writes; killed
at any moment, it leaves the last index whole and its finished shards for the next run.

Dimensions: n pictures, P projection width, W processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from trips.data.records import BadSamples
from trips.errors import CheckpointError, ConfigError, TripsError
from trips.options import RankBy
from trips.processor_checks import positive_int
from trips.search import files
from trips.search.build import add_features
from trips.search.features import Trained, check_searchable, fingerprint_of
from trips.search.processes import joined
from trips.search.query import Hit, encode_words, rerank_hits
from trips.search.run import IndexingRun, IndexReport, check_model, default_folder, find_index
from trips.search.sources import Row, locate
from trips.search.vectors import Vectors, need_faiss, open_vectors


class ImageIndex:
    """A collection of pictures that can be searched; from `build` or `open`.

    Attributes:
        folder: of the index. source: of the pictures.
        report: of the run that built it, None if it was opened.
    """

    def __init__(
        self, folder: Path, source: Path, trained: Trained, rows: list[Row], vectors: Vectors, hashed: bool
    ) -> None:
        self.folder, self.source, self.trained, self.hashed = folder, source, trained, hashed
        self._rows, self._vectors = rows, vectors
        self.report: IndexReport | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def build(
        cls,
        source: str | Path,
        model: Trained,
        *,
        out: str | Path | None = None,
        hashed: bool | None = None,
        workers: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> ImageIndex:
        """Index a collection, or bring its index up to date.

        Args:
            source: folder of images, its folders and the WebDataset tars in them; or one tar.
            model: as `trips.load` gives it, of a pre-training or retrieval class; alike in all processes.
            out: folder of the index; by default ``.trips-index`` in the folder, ``NAME.tar.trips-index`` beside a tar.
            hashed: tell changes by content, not by size and time; None is as before, at first by size and time. Where
                it changes, everything is computed anew.
            workers: threads that decode, besides the one that computes.
            progress: called with the pictures done and in all, of the first process's part.
        Raises:
            DataError: no picture, or none that can be read. ConfigError: a model whose features a text guides.
            CheckpointError: an index of another model, one that another run is writing, or a folder that cannot be
                written. UnsupportedModelError: a model without features. MissingDependencyError: no faiss.
        """
        begun = time.perf_counter()
        need_faiss()
        check_searchable(model)
        root, fingerprint = Path(os.path.abspath(source)), fingerprint_of(model)
        folder = default_folder(root) if out is None else Path(os.path.abspath(out))
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ConfigError("not a count", item="workers", found=workers, expected="0 or more")
        bad = BadSamples(1.0)  # a collection of photos is what it is: all are named, none stops the run
        with joined() as processes:
            run = IndexingRun(root, folder, model, fingerprint, hashed, bad)
            try:
                todo = processes.first(run.start)
                mine = processes.part(todo)
                done = 0

                def advance(count: int) -> None:
                    nonlocal done
                    done += count
                    if progress is not None and processes.rank == 0:
                        progress(done, len(mine))

                problem = None
                try:
                    add_features(folder, fingerprint, model, mine, bad, workers=workers, on_done=advance)
                except TripsError as error:
                    problem = error
                told = processes.gather((problem, bad.errors))
                for problem, _ in told:
                    if problem is not None:
                        raise problem
                found = {name: reason for _, errors in told for name, reason in errors.items()}
                report = processes.first(lambda: run.finish(found, begun))
            finally:
                run.release()
            index = cls._open(folder, model, fingerprint)
        index.report = report
        return index

    @classmethod
    def open(cls, path: str | Path, model: Trained) -> ImageIndex:
        """Open an index.

        Args:
            path: its folder, or the folder or tar that was indexed.
            model: the one that made it.
        Raises:
            CheckpointError: no index, one of another model, or a damaged one. MissingDependencyError: no faiss.
        """
        need_faiss()
        check_searchable(model)
        return cls._open(find_index(path), model, fingerprint_of(model))

    @classmethod
    def _open(cls, folder: Path, model: Trained, fingerprint: str) -> ImageIndex:
        manifest = files.read_manifest(folder)
        if manifest is None:
            raise CheckpointError("no image index", item=folder, expected=files.MANIFEST_FILE)
        check_model(folder, manifest, fingerprint)
        rows: list[Row] = []
        for name in manifest["shards"]:
            rows += files.read_shard(folder / files.SHARDS_FOLDER / name).rows
        kept = manifest["vectors"]
        path = folder / kept["name"]
        vectors = open_vectors(path, kept["size"], kept["checksum"], kept["kind"])
        if len(vectors) != len(rows):
            raise files.damaged(path, f"{len(vectors)} vectors of {len(rows)} pictures")
        source = Path(os.path.normpath(folder / manifest["source"]))
        return cls(folder, source, model, rows, vectors, manifest["hashed"])

    def refresh(self, *, workers: int = 0, progress: Callable[[int, int], None] | None = None) -> IndexReport:
        """Bring the index up to date with its collection; see `build`."""
        fresh = ImageIndex.build(self.source, self.trained, out=self.folder, workers=workers, progress=progress)
        self._rows, self._vectors, self.report = fresh._rows, fresh._vectors, fresh.report
        return fresh.report

    def search(self, text: str, top_k: int = 10, rerank: int = 64, rank_by: RankBy = "both") -> list[Hit]:
        """The pictures that words describe best.

        Args:
            text: in the user's words.
            top_k: hits to return; fewer if there are not so many.
            rerank: best of the first stage that are matched with the words, at least `top_k`; 0 ranks by the features.
            rank_by: what orders those; see `rerank_hits`.
        Returns:
            best first; a picture that is gone since the index was made is named in the log and left out.
        Raises:
            ConfigError: counts out of range, another `rank_by`. DataError: a blank text.
        """
        positive_int(top_k, "top_k")
        if isinstance(rerank, bool) or not isinstance(rerank, int) or rerank < 0:
            raise ConfigError("not a count", item="rerank", found=rerank, expected="0 or more")
        if rank_by not in get_args(RankBy):
            raise ConfigError("unknown value", item="rank_by", found=rank_by, expected=" | ".join(get_args(RankBy)))
        if not isinstance(text, str):
            raise ConfigError("is no text", item="text", found=type(text).__name__, expected="a str")
        products, places = self._vectors.nearest(
            encode_words(self.trained, text), max(top_k, rerank) if rerank else top_k
        )
        order = sorted(range(len(places)), key=lambda i: (-products[i], self._rows[places[i]]))
        hits = []
        for rank, i in enumerate(order, start=1):
            path, image = locate(self.source, self._rows[places[i]])
            hits.append(Hit(path, float(products[i]), rank, float(products[i]), image))
        return (rerank_hits(self.trained, text, hits, rank_by) if rerank else hits)[:top_k]
