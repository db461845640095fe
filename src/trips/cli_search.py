"""Search photos in words (trips index, trips search)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trips.cli_show import named_table
from trips.options import RankBy

if TYPE_CHECKING:
    from trips.pipeline import TripsPipeline
    from trips.search.query import Hit


def index(
    folder: str,
    *,
    model: str,
    out: str | None = None,
    hashed: bool | None = None,
    workers: int = 0,
    batch_size: int = 32,
    as_json: bool = False,
) -> dict[str, Any]:
    """Index a folder of photos for trips search, or bring its index up to date.

    What is new or changed is computed, what is gone is forgotten. A run that was killed goes on where it was. Large
    collections: torchrun --nproc_per_node 8 -m trips.cli index FOLDER --model MODEL.

    Args:
        folder: images, in folders and WebDataset tars; or one tar.
        model: output folder of "trips train" (pre-training or retrieval), a saved model's folder, or a name on the hub.
        out: folder of the index; by default FOLDER/.trips-index.
        hashed: tell changes by the content of every file, not by size and time; by default as the last time.
        workers: threads that decode, besides the one that computes.
        batch_size: photos computed at once.
        as_json: print one JSON object for machines.
    """
    from trips.search.index import ImageIndex

    trained = _open(model)
    trained.batch_size = batch_size
    with _progress() as progress:
        built = ImageIndex.build(folder, trained, out=out, hashed=hashed, workers=workers, progress=progress)
    return {"index": str(built.folder), **dataclasses.asdict(built.report)}


def search(
    text: str,
    *,
    index: str = ".",
    model: str | None = None,
    top_k: int = 10,
    rerank: int = 64,
    rank_by: RankBy = "both",
    out: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Find the photos of an index that words describe.

    The best by their features are matched with the words, which select the patches of each.

    Args:
        text: in quotes.
        index: folder that was indexed, or the folder of its index.
        model: the one that made the index; by default where it was then.
        top_k: photos to show.
        rerank: photos that are matched with the words; 0 goes by the features alone.
        rank_by: "both" adds the similarity of the features to the match, "match" goes by the match alone.
        out: picture to write: the hits, and the patches that the words keep.
        as_json: print one JSON object for machines.
    """
    from trips.errors import CheckpointError
    from trips.search.index import ImageIndex
    from trips.search.run import model_of
    from trips.sheets import check_path

    if out is not None:
        check_path(out)  # before the work
    name = model or model_of(index)
    if name is None:
        raise CheckpointError("does not say which model made it", item=index, hint="name it: --model=MODEL")
    trained = _open(name)
    hits = ImageIndex.open(index, trained).search(text, top_k, rerank, rank_by)
    names = ("path", "score", "first_stage_rank", "similarity")
    result: dict[str, Any] = {
        "text": text,
        "reranked": bool(rerank),
        "hits": [{field: getattr(hit, field) for field in names} for hit in hits],
    }
    if out is not None:
        _draw(trained, text, hits, out)
        result["written to"] = out
    return result


VERBS: dict[str, Callable[..., Any]] = {"index": index, "search": search}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`: what it is about as a word, the rest as options."""
    if name == "index":
        command.add_argument("folder", type=str, help="images, in folders and WebDataset tars; or one tar")
        words = 'output folder of "trips train", a saved model\'s folder, or a name on the hub'
        command.add_argument("--model", type=str, required=True, metavar="MODEL", help=words)
        command.add_function_arguments(index, as_group=False, skip={"folder", "model", "as_json"})
    else:
        command.add_argument("text", type=str, help="in quotes")
        command.add_function_arguments(search, as_group=False, skip={"text", "as_json"})


def render(name: str, result: dict[str, Any]) -> RenderableType:
    """What a verb has found as tables for people."""
    if name == "index":
        counts = Table(title="trips index", title_justify="left", show_header=False)
        for key in ("total", "computed", "kept", "removed"):
            counts.add_row(key, str(result[key]))
        counts.add_row("bad", str(len(result["bad"])))
        counts.add_row("seconds", f"{result['seconds']:.1f}")
        counts.add_row("index", Text(result["index"]))
        return Group(counts, named_table("bad", result["bad"])) if result["bad"] else counts
    table = Table(title=Text(result["text"]), title_justify="left")
    table.add_column("photo", overflow="fold")
    for column in ("match" if result["reranked"] else "similarity", "rank before"):
        table.add_column(column, justify="right")
    for hit in result["hits"]:
        table.add_row(Text(hit["path"]), f"{hit['score']:.3f}", str(hit["first_stage_rank"]))
    return Group(table, Text(f"written to {result['written to']}")) if "written to" in result else table


def _open(model: str) -> TripsPipeline:
    """On a GPU of its own where a launcher has started several processes."""
    import torch

    from trips.pipeline import load

    rank = os.environ.get("LOCAL_RANK")
    return load(model, device=f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar that begins with the first call, when the number of photos is known."""
    from trips.train.progress import progress_of

    with ExitStack() as stack:
        advance: Callable[[int], None] | None = None
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal advance, before
            if advance is None:
                advance = stack.enter_context(progress_of("photos", total))
            advance(done - before)
            before = done

        yield progress


def _draw(trained: TripsPipeline, text: str, hits: list[Hit], out: str) -> None:
    """The hits as a sheet, one row each: the photo, and what of it the words keep at each location."""
    import numpy as np

    from trips.drawing import selection_row
    from trips.errors import DataError
    from trips.images import load_image
    from trips.sheets import draw_selection

    if not hits:
        raise DataError("has found nothing to draw", item=out)
    processor = trained.processor
    grid = tuple(side // processor.patch_size for side in processor.image_size)
    rows = []
    for place, hit in enumerate(hits, start=1):
        label = f"{place}. {os.path.basename(hit.path)}\n{hit.score:.3f}, rank before {hit.first_stage_rank}"
        photo = np.asarray(load_image(hit.image, name=hit.path))
        rows.append(selection_row(label, photo, hit.selection, 0, grid[0] * grid[1]))
    draw_selection(rows, grid, out, text)
