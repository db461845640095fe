"""What a trained model looked at: questions about photos, its answers, the patches behind every selection."""

from __future__ import annotations

from pathlib import Path

import torch

from trips.data.loading import AnswerList
from trips.data.records import BadSamples
from trips.errors import ConfigError
from trips.paper.figures import draw_selection, selection_row
from trips.saved import ANSWERS_FILE
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.recipe_io import Overrides, load_recipe
from trips.train.run import RECIPE_FILE
from trips.train.task import load_trained
from trips.train.vqa import read_records


@torch.no_grad()
def explain_run(run_dir: str | Path, out: str | Path, overrides: Overrides = (), count: int = 6) -> Path:
    """Draw what a finished question answering run keeps on the first photos of its test data.

    Args:
        run_dir: output folder of "trips train".
        out: picture to write; its suffix decides the format.
        overrides: as for `evaluate_run`; ``data.test`` and ``model.selection.*`` have an effect.
        count: photos; the first question of each is asked.
    Returns:
        `out`.
    Raises:
        ConfigError: a run without selection or of another task, or a count below 1. CheckpointError, DataError: see
            `evaluate_run`.
    """
    run_dir = Path(run_dir)
    recipe = load_recipe(run_dir / RECIPE_FILE, overrides)
    selection = recipe.model.selection
    if recipe.task != "vqa" or not selection.active or count < 1:
        raise ConfigError(
            "has nothing to draw",
            item=run_dir,
            found=f"task {recipe.task}, guide {selection.guide}, {count} photos",
            expected="a question answering run with selection, and at least one photo",
        )
    model, processor = load_trained(TripsForQuestionAnswering, run_dir)
    model.eval()
    device = next(model.parameters()).device
    answers = AnswerList.load(run_dir / ANSWERS_FILE)
    encoded = processor.encode_answers(list(answers)).to(device)
    rows = []
    for record in read_records(recipe.data, "test", BadSamples(recipe.data.max_bad_share))[:count]:
        question = record.questions[0]
        array = processor.resize(record.image, name=record.source)
        batch = processor(text=[question.text]).to(device)
        pixels = processor.normalise([array]).to(device)
        output = model(pixels, batch["input_ids"], batch["attention_mask"], selection=selection)
        ranked, _ = model.rank_answers(
            output.question_states, batch["attention_mask"], encoded["input_ids"], encoded["attention_mask"]
        )
        grid = model.trips.vision.grid_of(pixels)
        true = question.answers[0] if question.answers else "not known"
        said = f"{question.text}\nsaid: {answers[int(ranked[0, 0])]}\ntrue: {true}"
        rows.append(selection_row(said, array, output.selections, 0, grid[0] * grid[1]))
    rates = ", ".join(f"{rate:g}" for rate in selection.rates)
    title = f"{selection.guide} guide, keep rates {rates} at layers {', '.join(map(str, selection.layers))}"
    return draw_selection(rows, grid, out, title)
