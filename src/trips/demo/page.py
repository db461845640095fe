"""The page: photo, words and settings at the left, what every guide makes of them at the right; a tab to search.

Nothing is kept between two requests: all that a visitor chose comes with each of them, so visitors at the same time
share the model and nothing else. One request computes at a time, the others wait in a queue.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trips.demo.comparison import compare, guides_of, settings_of
from trips.demo.examples import write_examples
from trips.demo.markup import NAMES, alert, comparison_html, hits_html, note
from trips.demo.models import Shown
from trips.demo.uploads import checked_text, open_photo, uploaded_path
from trips.errors import ConfigError, DataError, MissingDependencyError, TripsError
from trips.images import load_image
from trips.metrics import kept_mask

if TYPE_CHECKING:
    from trips.search.index import ImageIndex

logger = logging.getLogger("trips")

_WELCOME = "Hand in a photo, or pick a scene, and ask about it: then you see which patches each guide keeps."
_WAITING = 32  # requests in the queue; more are told to come back
# One computation at a time, whoever asks and for what.
_QUEUED = {"show_progress": "minimal", "concurrency_limit": 1, "concurrency_id": "model"}
_MOST_HITS = 24
# Files of visitors are deleted when they are an hour old, looked for every ten minutes, and when the page ends.
_KEPT_FOR = (600, 3600)


def import_gradio() -> Any:
    """gradio, told not to report to anyone; `MissingDependencyError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError("is not installed", item="gradio", hint='pip install "trips-vlm[demo]"') from error
    return gradio


@dataclass(frozen=True)
class Said:
    """What the page says next.

    Attributes:
        found: what came of the question, as HTML.
        trouble: what went wrong, as HTML, shown beside what was typed; empty where nothing did.
        keep_photo: whether the photo can stay on the page.
    """

    found: str = ""
    trouble: str = ""
    keep_photo: bool = True


def look(
    shown: Shown, photo: str | None, text: str, keep_rate: float, layers: Sequence[int], guides: Sequence[str]
) -> Iterator[Said]:
    """What a visitor asks for: more with every guide that has answered.

    Args:
        shown: the model.
        photo: path of the upload.
        text: question or caption. keep_rate, layers, guides: see `compare`.
    """
    if not photo:
        yield Said(note(_WELCOME))
        return
    try:
        image = open_photo(photo)
    except DataError as error:
        yield Said(note(_WELCOME), alert(str(error)), keep_photo=False)
        return
    if text is None or not str(text).strip():
        yield Said(note("The photo is there. Now type some words about it."))
        return

    def ask() -> Iterator[str]:
        settings = {"guides": list(guides or ()), "layers": _whole(layers or ()), "keep_rate": keep_rate}
        yield from comparison_html(compare(shown.pipeline, image, checked_text(text), source=photo, **settings))

    yield from _said(ask())


def find(index: ImageIndex, text: str, count: int) -> Said:
    """Photos of an index that words describe."""

    def search() -> Iterator[str]:
        words = checked_text(text)
        if not 1 <= count <= _MOST_HITS:
            raise ConfigError("out of range", item="photos to show", found=count, expected=f"1 to {_MOST_HITS}")
        processor = index.trained.processor
        grid = tuple(side // processor.patch_size for side in processor.image_size)
        root = index.source if index.source.is_dir() else index.source.parent
        cards = []
        for hit in index.search(words, int(count)):
            image = np.asarray(load_image(hit.image, name=hit.path))
            kept = kept_mask(hit.selection[-1].kept, grid[0] * grid[1])[0].numpy() if hit.selection else None
            # Visitors need not know where on the server the photos are.
            name, said = hit.path.removeprefix(f"{root}{os.sep}"), f"match {100 * hit.score:.1f} %"
            cards.append((name, f"{said}, similarity {hit.similarity:.2f}", image, kept))
        yield hits_html(words, cards, grid)

    return next(_said(search()))


def build_page(shown: Shown, folder: str | Path) -> Any:
    """The page as `gradio.Blocks`, ready to be launched.

    Args:
        shown: model and index.
        folder: where pictures to begin with are written; it must last as long as the page.
    Raises:
        MissingDependencyError: gradio is not installed.
    """
    gradio = import_gradio()
    model = type(shown.pipeline.model).__name__
    with gradio.Blocks(title="TRIPS", analytics_enabled=False, delete_cache=_KEPT_FOR, fill_width=True) as page:
        gradio.HTML(
            "<div class='trips-head'><h1>Which patches do the words need?</h1><p>Text-relevant image patch selection "
            f"&middot; {escape(shown.name)} &middot; {escape(model)}</p></div>"
        )
        if shown.index is None:
            _look_part(gradio, shown, folder)
        else:
            with gradio.Tab("Ask"):
                _look_part(gradio, shown, folder)
            with gradio.Tab("Search"):
                _search_part(gradio, shown.index)
    return page.queue(default_concurrency_limit=1, max_size=_WAITING)


def _look_part(gradio: Any, shown: Shown, folder: str | Path) -> None:
    asks, start = "ask" in shown.pipeline.verbs, settings_of(shown.pipeline)
    depth, guides = shown.pipeline.model.config.vision_config.num_hidden_layers, guides_of(shown.pipeline)
    with gradio.Row():
        with gradio.Column(scale=1, min_width=300):
            photo = gradio.Image(
                label="Photo",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=260,
                buttons=["fullscreen"],
                elem_id="photo",
            )
            words = gradio.Textbox(
                label="Question" if asks else "Caption",
                placeholder="what colour is the bus?" if asks else "a red bus in a street",
                max_length=500,
                elem_id="words",
            )
            button = gradio.Button("Ask" if asks else "Match", variant="primary", elem_id="go")
            trouble = gradio.HTML(elem_id="trouble", apply_default_css=False)
            scenes = gradio.Examples(
                [list(example) for example in write_examples(folder, questions=asks)],
                [photo, words],
                label="Scenes to begin with",
                cache_examples=False,
                visible_columns=[0],
                api_visibility="private",
                elem_id="scenes",
            )
            keep = gradio.Slider(0.05, 1, start.rates[0], step=0.05, label="Keep rate at each layer", elem_id="keep")
            layers = gradio.CheckboxGroup(
                [str(layer) for layer in range(1, depth + 1)],
                value=[str(layer) for layer in start.layers],
                label="Layers that select",
                elem_id="layers",
            )
            chosen = gradio.CheckboxGroup(
                [(NAMES[guide], guide) for guide in guides],
                value=[guide for guide in guides if guide != "similarity"],
                label="Guides",
                elem_id="guides",
            )
        with gradio.Column(scale=3, min_width=320):
            found = gradio.HTML(note(_WELCOME), elem_id="found", apply_default_css=False)
    inputs, outputs = [photo, words, keep, layers, chosen], [photo, trouble, found]

    def run(upload: dict[str, Any] | None, *values: Any) -> Iterator[tuple[Any, str, str]]:
        for said in look(shown, uploaded_path(upload, photo.GRADIO_CACHE), *values):
            yield gradio.skip() if said.keep_photo else None, said.trouble, said.found

    # Without preprocess: gradio's would open the file before any check of ours.
    common = {"fn": run, "inputs": inputs, "outputs": outputs, "preprocess": False, **_QUEUED}
    triggers = [button.click, words.submit, photo.upload, keep.change, layers.change, chosen.change]
    gradio.on(triggers, trigger_mode="always_last", show_progress_on=[found], api_name="look", **common)
    scenes.load_input_event.then(show_progress_on=[found], api_visibility="private", **common)


def _search_part(gradio: Any, index: ImageIndex) -> None:
    with gradio.Row():
        words = gradio.Textbox(
            label=f"What to look for among {len(index)} photos", max_length=500, elem_id="search-words", scale=3
        )
        count = gradio.Slider(1, _MOST_HITS, 6, step=1, label="Photos to show", elem_id="search-count", scale=1)
    button = gradio.Button("Search", variant="primary", elem_id="search-go")
    trouble = gradio.HTML(elem_id="search-trouble", apply_default_css=False)
    found = gradio.HTML(
        note("Words choose photos, and of each photo its patches."), elem_id="hits", apply_default_css=False
    )

    def run(text: str, number: int) -> tuple[str, str]:
        said = find(index, text, number)
        return said.trouble, said.found

    gradio.on(
        [button.click, words.submit],
        run,
        [words, count],
        [trouble, found],
        trigger_mode="always_last",
        api_name="search",
        **_QUEUED,
    )


def _whole(layers: Sequence[Any]) -> list[int]:
    return [int(layer) for layer in layers if str(layer).isdecimal()]


def _said(parts: Iterator[str]) -> Iterator[Said]:
    """What was found, part by part; what goes wrong is said too, and a fault of ours is in the log alone."""
    try:
        for part in parts:
            yield Said(part)
    except TripsError as error:
        yield Said(trouble=alert(str(error)))
    except Exception:
        logger.exception("the page could not answer")
        yield Said(trouble=alert("Something went wrong on the server; its log says what."))
