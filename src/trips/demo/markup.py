"""What the page says, as HTML: everything that a visitor or a model wrote is escaped, pictures are inlined.

Classes are those of page.css, which takes its colours from the page's scheme, bright or dark.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from html import escape

import numpy as np
from PIL import Image

from trips.demo.comparison import Comparison, Outcome
from trips.drawing import enlarged, kept_picture
from trips.options import Guide

NAMES = {
    "text": "Text",
    "image": "Image [CLS]",
    "random": "Random",
    "similarity": "Merging",
    "none": "No selection",
}
_MEANINGS = {
    "text": "the words choose (TRIPS)",
    "image": "the picture chooses, without the words",
    "random": "chance chooses",
    "similarity": "patches that are alike become one",
    "none": "every patch stays",
}
_REMAINS = {
    "fused": "the others are fused into one token",
    "dropped": "the others are dropped",
    "merged": "the others are merged into these",
}
_QUALITY, _SIDE = 85, 512  # of JPEG; pixels of the longer side, which page.css shows at half that


def note(text: str) -> str:
    """A line that says what to do next."""
    return f'<div class="trips-note">{escape(text)}</div>'


def alert(text: str) -> str:
    """What went wrong, for people: read out by screen readers at once."""
    return f'<div class="trips-alert" role="alert">{escape(text)}</div>'


def comparison_html(stages: Iterable[Comparison]) -> Iterator[str]:
    """A section for every guide, anew at every stage: what is said, what it costs, the photo behind every location.

    Args:
        stages: of one photo, text and setting, as `compare` yields them; pictures are drawn once for all of them.
    """
    photo, drawn = None, {}
    for found in stages:
        photo = enlarged(np.asarray(found.photo), side=_SIDE)[0] if photo is None else photo
        for outcome in found.outcomes:
            if outcome.guide not in drawn and outcome.problem is None:
                drawn[outcome.guide] = _pictures(outcome, photo, found.num_patches)
        yield _page(found, drawn)


def _page(found: Comparison, drawn: dict[Guide, str]) -> str:
    said = f'<p class="trips-text">{escape(found.text)}</p>'
    if not found.layers:
        said += note("Nothing is selected: choose guides, layers and a keep rate below 1.")
    rows = "".join(_section(outcome, found.baseline, drawn) for outcome in found.outcomes)
    costs = (
        "Time (median of a few runs on this machine) and operations (billions; one multiply-add is two) are those of "
        "the pass through both towers and what joins them. Kept patches are clear, all others dimmed."
    )
    return f'<div class="trips-found">{said}{rows}<p class="trips-small">{costs}</p></div>'


def hits_html(text: str, hits: Iterable[tuple[str, str, np.ndarray, np.ndarray | None]], grid: tuple[int, int]) -> str:
    """A card for every photo that a search has found.

    Args:
        text: searched for.
        hits: name, what is said of it, photo (H, W, 3) and mask (N,) of the patches that the words keep, None where
            all stay.
        grid: patches (down, across).
    """
    cards = []
    for place, (name, words, image, mask) in enumerate(hits, start=1):
        photo = enlarged(image, side=_SIDE)[0]
        pictures = [_picture(photo, f"photo {name}", "")]
        if mask is not None:
            kept = kept_picture(photo, mask, grid)
            pictures.append(_picture(kept, f"{name}: {mask.sum()} of {mask.size} patches kept", ""))
        label = f"<b>{place}.</b> {escape(name)}<br><span>{escape(words)}</span>"
        cards.append(
            f'<figure class="trips-hit"><div class="trips-pictures">{"".join(pictures)}</div>'
            f"<figcaption>{label}</figcaption></figure>"
        )
    body = "".join(cards) or note("No photo of the index can be shown.")
    return (
        f'<div class="trips-found"><p class="trips-text">{escape(text)}</p><div class="trips-hits">{body}</div></div>'
    )


def _section(outcome: Outcome, baseline: Outcome, drawn: dict[Guide, str]) -> str:
    head = f"<h3>{NAMES[outcome.guide]}</h3><p>{_MEANINGS[outcome.guide]}</p>"
    if outcome.problem is not None:
        return f'<section class="trips-guide"><div class="trips-facts">{head}</div>{alert(outcome.problem)}</section>'
    facts = head + _bars(outcome) + _costs(outcome, baseline)
    if outcome.explanation is not None:
        facts += f'<p class="trips-small">{_REMAINS[outcome.explanation.fate]}</p>'
    return (
        f'<section class="trips-guide" data-guide="{outcome.guide}"><div class="trips-facts">{facts}</div>'
        f'<div class="trips-pictures">{drawn[outcome.guide]}</div></section>'
    )


def _pictures(outcome: Outcome, photo: np.ndarray, num_patches: int) -> str:
    explanation = outcome.explanation
    if explanation is None:
        return _picture(photo, "photo, every patch kept", f"all {num_patches} patches")
    pictures = []
    for i, location in enumerate(explanation.locations):
        mask = explanation.mask(i)
        words = f"layer {location.layer}: {mask.sum()} of {mask.size}"
        picture = kept_picture(photo, mask, explanation.grid)
        pictures.append(_picture(picture, f"{NAMES[outcome.guide]} guide, {words} patches kept", words))
    return "".join(pictures)


def _bars(outcome: Outcome) -> str:
    rows = []
    for answer in outcome.said:
        share = f"{100 * answer.probability:.1f} %"
        rows.append(
            f'<li><span class="trips-answer">{escape(answer.text) or "(nothing)"}</span><span>{share}</span>'
            f'<i style="width:{100 * answer.probability:.1f}%"></i></li>'
        )
    return f'<ul class="trips-said">{"".join(rows)}</ul>'


def _costs(outcome: Outcome, baseline: Outcome) -> str:
    time = "being measured" if outcome.seconds is None else f"{1000 * outcome.seconds:.1f} ms"
    operations = f"{outcome.gflops:.3g} G"
    if outcome is not baseline:
        if outcome.seconds:
            time += f" <span>({baseline.seconds / outcome.seconds:.2f}&times; as fast)</span>"
        operations += f" <span>({100 * outcome.gflops / baseline.gflops:.0f} %)</span>"
    return f'<dl class="trips-costs"><dt>time</dt><dd>{time}</dd><dt>operations</dt><dd>{operations}</dd></dl>'


def _picture(picture: np.ndarray, description: str, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(description)}">{below}</figure>'
