"""What the quick-start shows: the table, what it means, the figure, the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from trips.config import SelectionConfig
from trips.data.scene_batches import TEST_START, SceneBatcher
from trips.data.scenes import QUESTION_TYPES, Scene, SceneConfig, SceneCorpus, SceneText, text_prior
from trips.paper.figures import draw_selection, selection_row
from trips.quickstart.plan import QuickstartPlan
from trips.tasks.vqa import TripsForQuestionAnswering


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Accuracy in per cent, relevance as shares at the last location, operations, pairs per second."""
    locations = list(rows[0]["relevance_recall"])
    last = locations[-1]
    table = Table(title=f"Questions about scenes, patches selected in layers {' and '.join(locations)}")
    for name in ("guide", "keep", "overall", *QUESTION_TYPES, "recall", "gain", "GFLOPs", "pairs/s"):
        table.add_column(name, justify="left" if name == "guide" else "right")
    for row in rows:
        accuracy = row["accuracy"]
        table.add_row(
            row["guide"],
            " x ".join(f"{rate:g}" for rate in row["keep_rates"]),
            *(f"{100 * accuracy[kind]:.1f}" if kind in accuracy else "-" for kind in ("overall", *QUESTION_TYPES)),
            f"{row['relevance_recall'][last]:.2f}",
            f"{row['relevance_gain'][last]:+.2f}",
            f"{row['flops_g']:.4f}",
            f"{row['throughput']:.0f}",
        )
    return table


def answerable_types(full: dict[str, Any]) -> list[str]:
    """Question types that the model without selection answers: 20 points above the best guess without the picture.

    Args:
        full: the row "none".
    """
    return [kind for kind in QUESTION_TYPES if full["accuracy"].get(kind, 0.0) > text_prior(kind) + 0.2]


def answerable_gain(row: dict[str, Any], full: dict[str, Any]) -> float:
    """Relevance gain at the last location over questions of `answerable_types`, in the shares of the corpus.

    Args:
        row: any row. full: the row "none".
    Returns:
        the mean, 0 where no type can be answered or the row selects nothing. Where the model does not look for the
        answer there is nothing to be learnt about what to keep: these types would measure the model, not the guide.
    """
    shares = {kind: share for kind, share in SceneConfig().mixture if kind in answerable_types(full)}
    gains = row["relevance_gain_by_type"]
    return sum(share * gains.get(kind, 0.0) for kind, share in shares.items()) / (sum(shares.values()) or 1.0)


def findings(rows: list[dict[str, Any]], plan: QuickstartPlan) -> list[str]:
    """The paper's claims against the table: each sentence says whether the claim holds here."""
    by_guide, last = {row["guide"]: row for row in rows}, str(plan.layers[-1])
    overall = {guide: 100 * row["accuracy"]["overall"] for guide, row in by_guide.items()}
    texts = [guide for guide in overall if guide.startswith("text_")]
    best = max(texts, key=overall.get)
    lines = []
    for other, name in (("image_cls", "image [CLS]"), ("random", "random")):
        for guide in dict.fromkeys(("text_literal", best)):
            lead = overall[guide] - overall[other]
            lines.append(
                f"{'holds' if lead > 0 else 'DOES NOT HOLD'}: {guide} ahead of {name} guidance by {lead:+.1f} points"
            )
    lead = overall[best] - overall["none"]
    lines.append(
        f"{'holds' if lead >= -1 else 'DOES NOT HOLD'}: within one point of no selection: {best} {lead:+.1f} points"
    )
    answerable = " and ".join(answerable_types(by_guide["none"])) or "nothing"
    for name, gain_of in (
        ("all questions", lambda row: row["relevance_gain"][last]),
        (f"questions that can be answered ({answerable})", lambda row: answerable_gain(row, by_guide["none"])),
        ("questions about objects", lambda row: row["relevance_gain_by_type"]["object"]),
    ):
        gains = {guide: gain_of(by_guide[guide]) for guide in texts}
        shown = ", ".join(f"{guide} {gain:+.2f}" for guide, gain in gains.items())
        lines.append(f"relevance gain at layer {last} (0: the text is ignored), {name}: {shown}")
    operations = by_guide["none"]["flops_g"] / by_guide[best]["flops_g"]
    measured = by_guide[best]["throughput"] / by_guide["none"]["throughput"]
    lines.append(
        f"{'holds' if measured > 1 else 'DOES NOT HOLD'}: faster than no selection: {operations:.2f}x fewer operations,"
        f" {measured:.2f}x measured (a model this small spends much of its time outside the products)"
    )
    return lines


def pictured(corpus: SceneCorpus) -> tuple[Scene, list[SceneText]]:
    """The test scene that pictures show, and five questions about it."""
    scene = corpus.scene(TEST_START)
    kinds = ("object", "object", "existence", "counting", "background")
    return scene, [corpus.questions(scene, 2 + i, types=(kind,))[-1] for i, kind in enumerate(kinds)]


@torch.no_grad()
def draw_kept_patches(
    model: TripsForQuestionAnswering, batcher: SceneBatcher, selection: SelectionConfig, path: Path, title: str
) -> Path:
    """One test scene under several questions: what is kept behind every location."""
    scene, questions = pictured(batcher.corpus)
    device = next(model.parameters()).device
    encoded = batcher.processor(text=[question.text for question in questions])
    pixels = batcher.pixels([scene]).to(device)
    output = model.eval()(
        pixel_values=pixels,
        input_ids=encoded["input_ids"].to(device),
        attention_mask=encoded["attention_mask"].to(device),
        image_index=torch.zeros(len(questions), dtype=torch.long, device=device),
        selection=selection,
    )
    grid = model.trips.vision.grid_of(pixels)
    rows = [
        selection_row(f"{question.text}\n({question.answer})", scene.image, output.selections, i, grid[0] * grid[1])
        for i, question in enumerate(questions)
    ]
    return draw_selection(rows, grid, path, title)
