"""The command line: exit codes, one line for a mistake, JSON on stdout and nothing else there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trips import cli, quickstart
from trips.errors import DataError


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["train", "vqa/daquar_smal"], ["vqa/daquar_smal", "did you mean vqa/daquar_small?"]),
        (["train", "debug/vqa_tiny", "--optim.lrr=1"], ["optim.lrr", "did you mean optim.lr?"]),
        (["train", "debug/vqa_tiny", "--optim.lr", "fast"], ["optim.lr", "'fast'", "number"]),
        (["train", "debug/vqa_tiny", "--optim.lr"], ["--optim.lr", "has no value"]),
        (["train", "debug/vqa_tiny", "--optim=recipe.yaml"], ["optim", "is a section"]),
        (["train", "debug/vqa_tiny", "--data.train=/none.tar"], ["no file matches", "/none.tar"]),
        (["train", "debug/vqa_tiny", "--fast"], ["--fast"]),
        (["train"], ["recipe"]),
        (["evaluate", "/no/such/run"], ["/no/such/run", "finished run"]),
        (["evaluate", "/no/such/run", "--data.test=x.tar"], ["/no/such/run"]),
        (["quickstart", "--scale=huge"], ["scale", "huge"]),
        (["ask", "photo.jpg"], ["question"]),
        (["score", "--images", "photo.jpg", "--model=runs/x"], ["texts"]),
        (["fly"], ["fly", "train"]),
        (["--json"], ["--json"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], parts: list[str], capsys) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("trips: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_debug_shows_the_traceback(capsys) -> None:
    assert cli.main(["train", "none.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_recipes(capsys) -> None:
    assert cli.main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "DAQUAR" in listed["vqa/daquar_small"]
    assert cli.main(["recipes"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in listed)


def test_help_explains_verbs_and_every_key(capsys) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    for verb in cli.VERBS:
        assert cli.main([verb, "--help"]) == 0
        help_text = " ".join(capsys.readouterr().out.split())
        assert " ".join(cli.VERBS[verb].__doc__.split("\n")[0].split()) in help_text
        if verb == "train":
            for words in ("--optim.vision_lr", "peak learning rate of the vision tower", "--model.selection.keep_rate",
                          "share r of the candidates kept", "--data.max_bad_share"):  # fmt: skip
                assert words in help_text


def test_quickstart_hands_on_its_options(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls: list[tuple] = []

    def run_quickstart(out: Any, seed: int, scale: str) -> dict[str, Any]:
        calls.append((str(out), seed, scale))
        if scale == "full":
            raise ZeroDivisionError("a bug")
        row = {"guide": "text_gate", "keep_rates": [0.5], "accuracy": {"overall": 0.75}, "relevance_recall": {"2": 0.5}}
        row |= {"relevance_gain": {"2": 0.25}, "flops_g": 0.5, "throughput": 80.0}
        return {"rows": [row], "findings": ["holds: so it is"], "seconds": 7.0, "out": Path(out)}

    monkeypatch.setattr(quickstart, "run_quickstart", run_quickstart)
    assert cli.main(["quickstart", "--scale=smoke", "--seed=3", "--out=x", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"][0]["accuracy"], told["out"]) == ({"overall": 0.75}, "x")
    assert cli.main(["quickstart", "--scale", "smoke"]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("text_gate", "75.0", "+0.25", "- holds: so it is", "runs/quickstart"))
    # An error of the library's own is told apart from a user's mistake.
    assert cli.main(["quickstart"]) == 1
    err = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: a bug" in err and "Traceback" not in err
    assert calls == [("x", 3, "smoke"), ("runs/quickstart", 0, "smoke"), ("runs/quickstart", 0, "full")]


def test_train_and_evaluate_hand_on_recipe_and_overrides(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from trips.train import run

    seen: list[Any] = []
    monkeypatch.setattr(run, "run_recipe", lambda recipe: seen.append(recipe) or {"accuracy": 0.25, "recipe": {"x": 1}})
    argv = ["train", "--optim.lr", "3e-4", "debug/vqa_tiny", "--json", "--run.out=there"]
    assert cli.main(argv) == 0
    assert (seen[0].optim.lr, seen[0].run.out) == (3e-4, "there")
    assert json.loads(capsys.readouterr().out) == {"accuracy": 0.25, "recipe": {"x": 1}}
    assert cli.main(["train", "debug/vqa_tiny", "--run.out=there"]) == 0
    out = capsys.readouterr().out
    assert "0.25" in out and "there" in out

    def fail(run_dir: str, overrides: list[str], out: str | None) -> dict:
        seen.append((run_dir, list(overrides), out))
        raise DataError("line one\nline two", item="data.test")

    monkeypatch.setattr(run, "evaluate_run", fail)
    assert cli.main(["evaluate", "runs/x", "--model.selection.keep_rate=0.5"]) == 2
    assert capsys.readouterr().err == "trips: data.test: line one line two\n"
    assert seen[-1] == ("runs/x", ["--model.selection.keep_rate=0.5"], None)


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert cli.main(["recipes"]) == 130
    assert capsys.readouterr().err == "trips: interrupted\n"


def test_as_a_process() -> None:
    source = Path(cli.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trips.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    good, bad = run("recipes", "--json"), run("train", "none")
    assert good.returncode == 0 and "debug/vqa_tiny" in json.loads(good.stdout)
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
