"""One photo and one text under several guides, beside no selection: what is said, what is kept, what it costs.

Section 3.2 with the ablations of its guide. Every guide answers and is drawn from the same noise, so that the patches
drawn are those that the answer was made of. Dimension: N patches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from trips.answering import Answer
from trips.architecture import check_single_stream
from trips.bench.flops import count_flops
from trips.config import SelectionConfig, check_locations
from trips.errors import ConfigError, TripsError, UnsupportedModelError
from trips.explanation import Explanation, explain_records
from trips.images import ImageSource
from trips.options import Guide
from trips.pipeline import TripsPipeline
from trips.selection import Selection

GUIDES: tuple[Guide, ...] = ("text", "image", "random", "similarity")
_ROUNDS, _SECONDS = (2, 9), 1.0  # of timing: at least so many, then as many as fit, at most so many
_ANSWERS = 3


@dataclass(frozen=True)
class Outcome:
    """What came of one guide.

    Attributes:
        guide: as in `SelectionConfig`; "none" keeps every patch.
        said: answers, best first; of a model that matches, how probable "match" is.
        explanation: what was kept; None where every patch was, or where there is a `problem`.
        seconds: median of the pass through both towers and what joins them; answers, which come behind it, cost the
            same under every guide. None before it is measured.
        gflops: of the same pass, in units of 1e9.
        problem: why the model cannot be asked in this way.
    """

    guide: Guide
    said: tuple[Answer, ...] = ()
    explanation: Explanation | None = field(default=None, repr=False)
    seconds: float | None = None
    gflops: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What came of all guides.

    Attributes:
        text: question or caption. photo: upright and in full.
        num_patches: N. layers: 1-based, behind whose attention patches were selected; none where all are kept.
        outcomes: in the order asked for, "none" last.
    """

    text: str
    photo: Image.Image = field(repr=False)
    num_patches: int
    layers: tuple[int, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def baseline(self) -> Outcome:
        """Without selection."""
        return self.outcomes[-1]


def check_shown(pipeline: TripsPipeline) -> None:
    """Raise `UnsupportedModelError` for a model that does not speak about one picture and one text."""
    if not {"ask", "score"} & set(pipeline.verbs):
        raise UnsupportedModelError(
            "reads several pictures at once, which the page does not offer",
            item=type(pipeline.model).__name__,
            expected="a model for questions, retrieval or pre-training",
        )


def guides_of(pipeline: TripsPipeline) -> tuple[Guide, ...]:
    """Those of `GUIDES` that have a meaning in the model's architecture."""
    if pipeline.model.config.architecture == "dual":
        return GUIDES
    return tuple(guide for guide in GUIDES if _in_single_stream(guide))


def settings_of(pipeline: TripsPipeline) -> SelectionConfig:
    """Where the page begins: the model's own selection; of a baseline model the paper's, as far as its depth allows."""
    own, depth = pipeline.model.config.selection, pipeline.model.config.vision_config.num_hidden_layers
    if own.active:
        return own
    layers = own.layers or tuple(layer for layer in SelectionConfig().layers if layer <= depth) or (depth,)
    return own.replace(guide="text", layers=layers, keep_rate=own.keep_rate if own.layers else 0.7)


def compare(
    pipeline: TripsPipeline,
    photo: Image.Image,
    text: str,
    *,
    guides: Sequence[Guide],
    layers: Sequence[int],
    keep_rate: float,
    source: ImageSource | None = None,
) -> Iterator[Comparison]:
    """Ask the model about a photo under several guides and under none, and say more with every guide that is ready.

    Args:
        pipeline: answers or matches (`check_shown`).
        photo: upright and in full. text: question or caption.
        guides: in the order of the outcomes; one that this model does not know gives an outcome with a problem.
        layers: 1-based, in any order. keep_rate: at each.
        source: the photo's file or bytes, for models whose processor decodes large ones at a fraction.
    Yields:
        first without selection alone, last with all guides and with times.
    Raises:
        ConfigError: unknown guide, bad layers or keep rate. DataError: a blank text.
    """
    if unknown := [guide for guide in guides if guide not in GUIDES]:
        raise ConfigError("unknown value", item="guide", found=unknown[0], expected=" | ".join(GUIDES))
    processor = pipeline.processor
    pixels = processor.resize(source if processor.jpeg_draft and source is not None else photo)
    grid = tuple(side // processor.patch_size for side in processor.image_size)
    model, encoded = pipeline.model, processor(text=[text]).to(pipeline.model.device)
    tensors = processor.normalise([pixels]).to(model.device, model.dtype)
    base = settings_of(pipeline).replace(layers=tuple(sorted(set(layers))), keep_rate=keep_rate)
    check_locations(base, model.config.vision_config.num_hidden_layers)
    keeps_all = not base.layers or keep_rate == 1 or not guides
    common = (text, photo, grid[0] * grid[1], () if keeps_all else base.layers)
    outcomes: list[Outcome] = []
    passes: dict[Guide, Callable[[], tuple[Selection, ...]]] = {}
    for guide in ("none", *(() if keeps_all else dict.fromkeys(guides))):
        selection = base.replace(guide=guide)
        try:
            said = _say(pipeline, pixels, text, selection)
            one_pass = partial(_pass, pipeline, tensors, encoded, selection)
            with _fixed_noise():
                records = one_pass()
            explanation = explain_records(records, photo, text, selection, grid) if records else None
            gflops = count_flops(model.config, grid, encoded["input_ids"].shape[1], selection).total
            outcome = Outcome(guide, said, explanation, gflops=gflops)
            passes[guide] = one_pass
        except TripsError as error:
            if guide == "none":
                raise
            outcome = Outcome(guide, problem=str(error))
        outcomes.append(outcome)
        yield Comparison(*common, (*outcomes[1:], outcomes[0]))
    with _fixed_noise():
        seconds = _medians(passes)
    timed = [replace(one, seconds=seconds.get(one.guide)) for one in outcomes]
    yield Comparison(*common, (*timed[1:], timed[0]))


def _say(pipeline: TripsPipeline, pixels: ImageSource, text: str, selection: SelectionConfig) -> tuple[Answer, ...]:
    with _fixed_noise():
        if "ask" in pipeline.verbs:
            return tuple(pipeline.ask(pixels, text, _ANSWERS, selection=selection))
        return (Answer("match", pipeline.score(pixels, text, selection=selection).item()),)


@torch.no_grad()
def _pass(
    pipeline: TripsPipeline, tensors: Tensor, encoded: BatchFeature, selection: SelectionConfig
) -> tuple[Selection, ...]:
    """Both towers and what joins them, until the result is on this side of a GPU: what was kept."""
    output = pipeline.model.trips(
        encoded["input_ids"], encoded["attention_mask"], pixel_values=tensors, selection=selection
    )
    output.last_hidden_state[0, 0, 0].item()
    return output.selections or ()


@contextmanager
def _fixed_noise() -> Iterator[None]:
    """The random guide's noise is that of one seed; the caller's generators stay as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _medians(calls: dict[Guide, Callable[[], object]]) -> dict[Guide, float]:
    """Seconds of each call, which has been made before, taken in turn so that a busy machine slows all alike."""
    taken: dict[Guide, list[float]] = {guide: [] for guide in calls}
    begun = time.perf_counter()
    for done in range(1, _ROUNDS[1] + 1):
        for guide, call in calls.items():
            start = time.perf_counter()
            call()
            taken[guide].append(time.perf_counter() - start)
        if done >= _ROUNDS[0] and time.perf_counter() - begun > _SECONDS:
            break
    return {guide: statistics.median(times) for guide, times in taken.items()}


def _in_single_stream(guide: Guide) -> bool:
    try:
        check_single_stream(SelectionConfig(guide=guide))
    except ConfigError:
        return False
    return True
