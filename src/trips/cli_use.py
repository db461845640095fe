"""Use a trained model (trips ask, trips score), and write the page of a run anew (trips report)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def ask(
    image: str,
    question: str,
    *,
    model: str,
    top_k: int = 3,
    answers: list[str] | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Ask a question about a picture.

    The probability of an answer is its share among the candidates; a model without candidates writes its answers, and
    says how probable each is as a whole.

    Args:
        image: the picture.
        question: in quotes.
        model: output folder of "trips train", a saved model's folder, or a name on the hub.
        top_k: answers to show.
        answers: candidates in place of those that the run has learnt.
        as_json: print one JSON object for machines.
    """
    from trips.pipeline import load

    found = load(model).ask(image, question, top_k, answers)
    rows = [{"text": answer.text, "probability": answer.probability} for answer in found]
    return {"image": image, "question": question, "answers": rows}


def score(images: list[str], texts: list[str], *, model: str, as_json: bool = False) -> dict[str, Any]:
    """Say how probable it is that each text describes each picture.

    Args:
        images: pictures.
        texts: in quotes.
        model: output folder of "trips train" (pre-training or retrieval), a saved model's folder, or a name on the hub.
        as_json: print one JSON object for machines.
    """
    from trips.pipeline import load

    found = load(model).score(images, texts)
    return {"images": images, "texts": texts, "probabilities": found.tolist()}


def report(run_dir: str, *, examples: int = 8, as_json: bool = False) -> dict[str, Any]:
    """Write the page of a run anew: report.html, one file with configuration, curves, results and examples.

    Every run writes it at its end. Anew it can be of a run that was interrupted, or of an older one.

    Args:
        run_dir: output folder of "trips train" or "trips quickstart".
        examples: test samples to show with what was kept of them (of a quick-start always the same); 0 opens no model.
        as_json: print one JSON object for machines.
    """
    from trips.quickstart.page import is_quickstart, write_quickstart_report
    from trips.train.run_report import write_run_report

    if is_quickstart(run_dir):
        path = write_quickstart_report(run_dir)
    else:
        path = write_run_report(run_dir, num_examples=examples)
    return {"written to": str(path), "bytes": path.stat().st_size}


VERBS: dict[str, Callable[..., Any]] = {"ask": ask, "score": score, "report": report}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`: what it is about as words, what it is done with as options."""
    if name == "report":
        command.add_argument("run_dir", type=str, help='output folder of "trips train" or "trips quickstart"')
        words = "test samples to show with what was kept of them; 0 opens no model"
        command.add_argument("--examples", type=int, default=8, help=words)
        return
    if name == "ask":
        command.add_argument("image", type=str, help="picture")
        command.add_argument("question", type=str, help="in quotes")
        command.add_argument("--top_k", type=int, default=3, help="answers to show")
        words = "candidates in place of those that the run has learnt"
        command.add_argument("--answers", type=str, nargs="+", metavar="ANSWER", help=words)
    else:
        command.add_argument("--images", type=str, nargs="+", required=True, metavar="IMAGE", help="pictures")
        command.add_argument("--texts", type=str, nargs="+", required=True, metavar="TEXT", help="each in quotes")
    words = 'output folder of "trips train", a saved model\'s folder, or a name on the hub'
    command.add_argument("--model", type=str, required=True, metavar="MODEL", help=words)


def render(name: str, result: dict[str, Any]) -> RenderableType:
    """What a verb has found as a table for people."""
    if name == "ask":
        table = Table("answer", "probability", title=Text(result["question"]), title_justify="left")
        for answer in result["answers"]:
            table.add_row(Text(answer["text"]), f"{answer['probability']:.3f}")
        return table
    if name == "report":
        return Text(f"{result['written to']} ({result['bytes'] / 1000:.0f} kB)")
    table = Table(title="match", title_justify="left")
    table.add_column("text", overflow="fold")
    for image in result["images"]:
        table.add_column(Text(os.path.basename(image)), justify="right")
    for text, row in zip(result["texts"], zip(*result["probabilities"])):
        table.add_row(Text(text), *(f"{probability:.3f}" for probability in row))
    return table
