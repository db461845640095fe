"""The command ``trips``: each verb is a typed function here, its help the function's docstring.

Results go to stdout, as tables for people or with ``--json`` as one JSON object; logs and progress go to stderr. A
user's mistake is one line and exit code 2; ``--debug`` adds the traceback. Heavy imports wait until a verb needs them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from trips import (
    cli_bench,
    cli_calibrate,
    cli_data,
    cli_demo,
    cli_figures,
    cli_models,
    cli_search,
    cli_speed,
    cli_tables,
    cli_use,
)
from trips.cli_show import show
from trips.errors import ConfigError, TripsError

# A key of a recipe, or a section alone, which `load_recipe` then refuses by name.
_OVERRIDE = re.compile(r"--([A-Za-z_][\w-]*\.[\w.-]+|model|data|optim|schedule|run|task|purpose)(=.*)?", re.DOTALL)


def train(recipe: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> dict[str, Any]:
    """Train a model as a recipe says, measure it, and write everything into the recipe's run.out.

    Any key of the recipe can be replaced: --optim.lr=1e-4 --model.selection.layers=[5,10].

    Args:
        recipe: name of a packaged recipe ("trips recipes" lists them) or path of a YAML file.
        overrides: keys of the recipe to replace.
        as_json: print one JSON object for machines.
    """
    from trips.train.recipe_io import load_recipe
    from trips.train.run import run_recipe

    loaded = load_recipe(recipe, overrides)
    results = run_recipe(loaded)
    if results and not as_json:  # empty on all processes but the first
        results = {key: value for key, value in results.items() if key not in ("environment", "recipe")}
        results["written to"] = loaded.run.out
    return results


def evaluate(
    run_dir: str, overrides: Sequence[str] = (), *, out: str | None = None, as_json: bool = False
) -> dict[str, Any]:
    """Measure the model of a finished run again, on other data or with another selection if asked.

    For example --data.test=other.tar or --model.selection.keep_rate=0.5.

    Args:
        run_dir: output folder of "trips train".
        overrides: keys of the run's recipe to replace.
        out: folder for what the model said (answers_test.json of a question answering run).
        as_json: print one JSON object for machines.
    """
    from trips.train.run import evaluate_run

    return evaluate_run(run_dir, overrides, out)


def recipes(*, as_json: bool = False) -> dict[str, str]:
    """List the recipes that come with the package.

    Args:
        as_json: print one JSON object for machines.
    """
    from trips.train.recipe_io import list_recipes

    return list_recipes()


def quickstart(
    *, out: str = "runs/quickstart", seed: int = 0, scale: Literal["full", "smoke"] = "full", as_json: bool = False
) -> Any:
    """Train a small model on generated scenes on this machine and show which patches it keeps for which question.

    Args:
        out: folder for what it writes.
        seed: of scenes, weights and order.
        scale: "full" for the real thing, "smoke" for a check that it runs.
        as_json: print one JSON object for machines.
    """
    from trips.quickstart import run_quickstart

    return run_quickstart(out, seed, scale)


VERBS: dict[str, Callable[..., Any] | ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    **cli_use.VERBS,
    **cli_search.VERBS,
    **cli_figures.VERBS,
    **cli_models.VERBS,
    **cli_calibrate.VERBS,
    **cli_bench.VERBS,
    **cli_speed.VERBS,
    **cli_tables.VERBS,
    **cli_demo.VERBS,
    "data": cli_data,  # a module is a group of verbs
    "recipes": recipes,
    "quickstart": quickstart,
}
# Modules of verbs that say how their arguments and results look.
_GROUPS = (cli_use, cli_search, cli_figures, cli_models, cli_calibrate, cli_bench, cli_speed, cli_tables, cli_demo)
_POSITIONAL = {"train": "RECIPE", "evaluate": "RUN_DIR", "explain": "RUN_DIR", "table": "NUMBER"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: arguments behind the program's name; None takes those of the process.
    Returns:
        Exit code: 0, 2 for a user's mistake, 1 for an error of the library's own or a check that is not passed, 130 if
        interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments, debug)
    except SystemExit as exit_:  # help
        return exit_.code if isinstance(exit_.code, int) else 0
    except KeyboardInterrupt:
        print("trips: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        mistake = isinstance(error, (TripsError, ArgumentError))
        if not mistake:
            text = f"unexpected {type(error).__name__}: {text}; --debug shows where"
        print(f"trips: {text}", file=sys.stderr)
        return 2 if mistake else 1


def _run(arguments: list[str], debug: bool) -> int:
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    overrides: list[str] = []
    if verb in _POSITIONAL:
        arguments, overrides = _split_overrides(arguments)
    parser = _parser(verb)
    if not arguments:
        parser.print_help()
        return 0
    chosen = parser.parse_args(arguments)
    function, values = VERBS[chosen.verb], chosen[chosen.verb]
    if isinstance(function, ModuleType):
        function, values = function.VERBS[values.verb], values[values.verb]
    # The recipe's keys stand in the parser for its help only; what was given is in the overrides.
    options = {name: values[name] for name in inspect.signature(function).parameters if name in values}
    as_json = options["as_json"] = values["json"]
    if overrides:
        options["overrides"] = overrides
    with _logging(debug):
        result = function(**options)
    if os.environ.get("RANK", "0") == "0":  # of several processes under a launcher the first alone speaks
        group = cli_data if chosen.verb == "data" else _group_of(chosen.verb)
        show(chosen.verb, result, as_json, group and group.render)
    return 0 if getattr(result, "ok", True) else 1


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part ``--section.key=value`` and ``--section.key value`` from the verb's own arguments."""
    rest, overrides = [], []
    items = iter(arguments)
    for item in items:
        if not _OVERRIDE.fullmatch(item):
            rest.append(item)
        elif "=" in item:
            overrides.append(item)
        else:
            value = next(items, None)
            if value is None:
                raise ConfigError("has no value", item=item, expected=f"{item}=VALUE")
            overrides.append(f"{item}={value}")
    return rest, overrides


def _parser(verb: str | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog="trips", description="Text-relevant image patch selection for vision-language models.", exit_on_error=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subcommands(dest="verb", required=True)
    for name, function in VERBS.items():
        if isinstance(function, ModuleType):
            group = ArgumentParser(description=_summary(function), exit_on_error=False)
            commands.add_subcommand(name, group, help=_summary(function).splitlines()[0])
            function.add_verbs(group)
            continue
        takes_keys = "overrides" in inspect.signature(function).parameters
        command = ArgumentParser(
            description=_summary(function),
            usage=f"trips {name} [options] {_POSITIONAL[name]} [--SECTION.KEY=VALUE ...]" if takes_keys else None,
            exit_on_error=False,
        )
        if group := _group_of(name):
            group.add_arguments(name, command)
        else:
            command.add_function_arguments(function, as_group=False, as_positional=True, skip={"overrides", "as_json"})
        command.add_argument("--json", action="store_true", help="print one JSON object for machines")
        if name == "train" and verb == "train":
            from trips.train.recipe_io import add_recipe_arguments

            add_recipe_arguments(command)
        commands.add_subcommand(name, command, help=_summary(function).splitlines()[0])
    return parser


def _group_of(verb: str) -> ModuleType | None:
    """The one of `_GROUPS` that a verb belongs to."""
    return next((group for group in _GROUPS if verb in group.VERBS), None)


def _summary(function: Callable[..., Any] | ModuleType) -> str:
    """Docstring without its list of arguments."""
    return inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()


@contextlib.contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Log lines of trips to stderr; the bars and reports of transformers only to a terminal or for debugging."""
    from transformers.utils import logging as transformers_logging

    logger, handler = logging.getLogger("trips"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if sys.stderr.isatty():
        from rich.logging import RichHandler  # knows how to write above a progress bar

        handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        transformers_logging.disable_progress_bar()
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


if __name__ == "__main__":
    sys.exit(main())
