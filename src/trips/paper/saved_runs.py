"""Tables 1 and 2 from the results of a user's finished runs.

A run's figures belong into a column of the paper only if they were measured on its data: a test file that is named
after it, with as many images or statements. Everything else is shown apart, as measured on own data. The questions of
VQA 2.0 that the paper reports are scored by a server, so no results file holds those figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trips.errors import CheckpointError, ConfigError, DataError

RESULTS_FILE = "results.json"

# Key of the column, what the name of the test file holds, how many images or statements there are.
_RETRIEVAL = (("flickr30k_1k", ("flickr30k",), 1000), ("mscoco_5k", ("coco",), 5000))
_REASONING = (("nlvr2_dev", ("dev",), 6982), ("nlvr2_test_p", ("test1", "test_p", "test-p"), 6967))


@dataclass(frozen=True)
class SavedRun:
    """What a finished run says about a table.

    Attributes:
        folder: of the run.
        model: "TRIPS" where the text selects, "ALBEF-C" without selection, else TRIPS and who selects.
        on_paper_data: whether `figures` have keys of the table; else those of the data's own.
        figures: in per cent.
    """

    folder: str
    model: str
    on_paper_data: bool
    figures: dict[str, float]


def figures_of_runs(number: int, folders: Sequence[str]) -> list[SavedRun]:
    """Read the results of finished runs.

    Args:
        number: 1 takes retrieval runs, 2 those of question answering and of statements about images.
        folders: output folders of "trips train".
    Raises:
        CheckpointError: not the folder of a finished run.
        ConfigError: a run of another task. DataError: a results file that does not hold what it should.
    """
    return [_read(number, Path(folder)) for folder in folders]


def _read(number: int, folder: Path) -> SavedRun:
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise CheckpointError("is not the folder of a finished run", item=folder, expected=f"{RESULTS_FILE} in it")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        recipe = results["recipe"]
        task, tested = recipe["task"], " ".join(recipe["data"]["test"]).lower()
        tasks = ("retrieval",) if number == 1 else ("vqa", "nlvr2")
        if task not in tasks:
            raise ConfigError(
                f"table {number} has no place for its task", item=folder, found=task, expected=" or ".join(tasks)
            )
        model = _model_name(recipe["model"]["selection"])
        if task == "retrieval":
            column = _column(_RETRIEVAL, tested, results["num_images"])
            figures = _recalls(results["reranked"])
            figures = {f"{column}.{key}" if column else key: value for key, value in figures.items()}
        else:
            column = _column(_REASONING, tested, results["num_statements"]) if task == "nlvr2" else None
            name = task if task == "nlvr2" else f"vqa_{results['metric']}"
            figures = {column or name: 100 * float(results["accuracy"])}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else "cannot be read"
        raise DataError(missing, item=path, hint="is it the results file of a run with test data?") from error
    return SavedRun(str(folder), model, column is not None, figures)


def _model_name(selection: Mapping[str, Any]) -> str:
    if selection["guide"] == "none" or not selection["layers"]:
        return "ALBEF-C"
    return "TRIPS" if selection["guide"] == "text" else f"TRIPS, guided by {selection['guide']}"


def _column(columns: Sequence[tuple[str, tuple[str, ...], int]], tested: str, count: int) -> str | None:
    for key, words, size in columns:
        if any(word in tested for word in words) and count == size:
            return key
    return None


def _recalls(reranked: Mapping[str, Any]) -> dict[str, float]:
    """Of the second stage, which the paper reports; guided by the text where it was measured."""
    figures = reranked["text"] if "text" in reranked else next(iter(reranked.values()))
    sides = (("TR", figures["text_recall"]), ("IR", figures["image_recall"]))
    return {f"{side}.R@{k}": 100 * float(recall[str(k)]) for side, recall in sides for k in (1, 5, 10)}
