"""Time a model on this machine: trips speed, trips advise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trips.config import SelectionConfig
from trips.errors import ConfigError

_PARTS, _MODES, _PRECISIONS = ("forward", "vision", "train"), ("eager", "compiled", "graphs"), ("fp32", "bf16", "fp16")
_METHODS = ("text", "image", "random", "similarity", "downscale", "none")
_PEERS = ("vilt", "blip", "clip", "transformers")
_SIZES = {"paper": 384, "small": 64}  # pixels of a side


def speed(
    *,
    model: str | None = None,
    config: str = "paper",
    image_size: list[int] | None = None,
    layers: list[int] | None = None,
    keep_rate: list[float] | None = None,
    settings: list[str] | None = None,
    text_length: int | None = None,
    batch_sizes: list[str] | None = None,
    modes: list[str] | None = None,
    precision: str = "fp32",
    methods: list[str] | None = None,
    peers: list[str] | None = None,
    part: str = "forward",
    rounds: int = 5,
    max_batch: int | None = None,
    equal_time: bool = False,
    device: str | None = None,
    threads: int | None = None,
    plot: str | None = None,
    as_json: bool = False,
) -> Any:
    """Time a model with and without selection on this machine, beside the exact ratio of operations.

    Both sides take turns in one process, with the same weights, precision and mode, and a ratio is the median over the
    turns. In inference weights are cast to the precision; training keeps float32 weights under autocast.
    """
    from trips.bench.plan import SpeedPlan
    from trips.bench.speed import measure_speed
    from trips.bench.speed_report import check_picture

    if plot is not None:
        check_picture(plot)
    opened, size, length = _open(model, config, device, threads, precision, part)
    plan = SpeedPlan(
        selections=_selections(opened.config.selection, layers, keep_rate, settings),
        image_sizes=tuple(image_size or [size]),
        methods=tuple(methods or ["text"]),
        peers=tuple(peers or []),
        batch_sizes=tuple(_batch_size(value) for value in batch_sizes or ["1", "2", "4", "8", "max"]),
        modes=tuple(modes or ["eager"]),
        part=part,
        precision=precision,
        text_length=length if text_length is None else text_length,
        rounds=rounds,
        max_batch=max_batch,
        equal_time=equal_time,
    )
    report = measure_speed(opened, plan)
    if plot is not None:
        report.plot(plot)
    return report


def advise(
    *,
    model: str | None = None,
    config: str = "paper",
    image_size: int | None = None,
    settings: list[str] | None = None,
    batch_size: int = 1,
    latency_ms: float | None = None,
    throughput: float | None = None,
    text_length: int | None = None,
    modes: list[str] | None = None,
    precision: str = "fp32",
    rounds: int = 9,
    device: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
) -> Any:
    """Say which selections reach a wanted speed on this machine, and refuse those that are slower than none.

    Every setting is timed in every mode, and stands against no selection in its fastest mode. The exit code is 1 if
    nothing reaches the goal.
    """
    from trips.bench.advise import PRESETS, Goal
    from trips.bench.advise import advise as find

    goal = Goal(batch_size, latency_ms, throughput)
    opened, size, length = _open(model, config, device, threads, precision, "forward")
    own, depth = opened.config.selection, opened.config.vision_config.num_hidden_layers
    own = own if own.active else own.replace(guide="text")
    if settings:
        presets = [_setting(own, text) for text in settings]
    else:
        presets = _presets(own, PRESETS, depth)
    return find(
        opened,
        goal,
        presets,
        image_size=size if image_size is None else image_size,
        text_length=length if text_length is None else text_length,
        modes=modes,
        precision=precision,
        rounds=rounds,
    )


VERBS: dict[str, Callable[..., Any]] = {"speed": speed, "advise": advise}


def add_arguments(name: str, command: ArgumentParser) -> None:
    """Add the arguments of one of `VERBS`."""
    words = 'output folder of "trips train", a saved model\'s folder, or a name on the hub; random weights if none'
    command.add_argument("--model", type=str, metavar="MODEL", help=words)
    words = "sizes of the random weights: those of the paper, or small ones to see that it runs"
    command.add_argument("--config", type=str, choices=tuple(_SIZES), default="paper", help=words)
    several = {"nargs": "+", "metavar": "PX"} if name == "speed" else {"metavar": "PX"}
    words = "pixels of a side; by default the model's own, or 384"
    command.add_argument("--image_size", type=int, help=words, **several)
    if name == "speed":
        words = "vision layers that select, the first is 1; by default the model's own"
        command.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help=words)
        words = "share of the tokens kept, one for all layers or one for each"
        command.add_argument("--keep_rate", type=float, nargs="+", metavar="R", help=words)
        words = "several at once, in place of the two above: 5,10x0.7 4,8x0.7,0.5"
        command.add_argument("--settings", type=str, nargs="+", metavar="LAYERSxRATES", help=words)
        words = "pairs at once; max is the largest batch that fits; by default 1 2 4 8 max"
        command.add_argument("--batch_sizes", type=str, nargs="+", metavar="B", help=words)
        words = "where the search for max ends; by default 4096 on a GPU and 16 on a CPU"
        command.add_argument("--max_batch", type=int, metavar="B", help=words)
        words = "what is timed: inference of a pair, its vision pass alone, or a training step"
        command.add_argument("--part", type=str, choices=_PARTS, default="forward", help=words)
        words = "ways to choose the patches, or to have fewer; by default text"
        command.add_argument("--methods", type=str, nargs="+", choices=_METHODS, help=words)
        words = "also find the setting at which each other method takes as long as the text-guided one"
        command.add_argument("--equal_time", action="store_true", help=words)
        words = "other models of the same size beside, with random weights: vilt blip clip; or transformers' own parts"
        command.add_argument("--peers", type=str, nargs="+", choices=_PEERS, help=words)
        command.add_argument("--plot", type=str, metavar="FILE", help="picture to write")
    else:
        words = "to try, such as 5,10x0.7 4,8x0.5; by default those of the paper's tables"
        command.add_argument("--settings", type=str, nargs="+", metavar="LAYERSxRATES", help=words)
        command.add_argument("--batch_size", type=int, default=1, metavar="B", help="pairs at once")
        command.add_argument("--latency_ms", type=float, metavar="MS", help="most that a batch may take, in median")
        command.add_argument("--throughput", type=float, metavar="N", help="fewest pairs per second")
    words = "text tokens; by default the most that the model takes, or 40"
    command.add_argument("--text_length", type=int, metavar="L", help=words)
    words = "eager, compiled by torch.compile, or CUDA graphs; by default eager" + (
        "" if name == "speed" else ", and on a GPU graphs"
    )
    command.add_argument("--modes", type=str, nargs="+", choices=_MODES, help=words)
    words = "of the weights; in training of the products"
    command.add_argument("--precision", type=str, choices=_PRECISIONS, default="fp32", help=words)
    words = "calls of each side that count"
    command.add_argument("--rounds", type=int, default=5 if name == "speed" else 9, metavar="N", help=words)
    command.add_argument("--device", type=str, help="where to compute; the GPU where there is one")
    command.add_argument("--threads", type=int, metavar="N", help="of a CPU")


def render(name: str, result: Any) -> RenderableType:
    """What a verb has found as a table for people."""
    if name == "advise":
        return _advice_table(result)
    lines = dict.fromkeys(f"{row.px} px, {row.method} {row.setting}: {row.tokens_line}" for row in result.rows)
    return Group(result.rich_table(), *(Text(line) for line in lines))


def _open(
    model: str | None, config: str, device: str | None, threads: int | None, precision: str, part: str
) -> tuple[Any, int, int]:
    """A model of pairs in its precision, pixels of a side and text tokens."""
    import torch

    from trips.bench.subjects import DTYPES, check_precision, pair_model, random_model
    from trips.environment import choose_device
    from trips.saved import open_saved

    if threads is not None:
        if threads < 1:
            raise ConfigError("must be positive", item="threads", found=threads)
        torch.set_num_threads(threads)
    if model is None:
        opened, size, length = random_model(config).to(choose_device(device)), _SIZES[config], 40
    else:
        saved = open_saved(model, device)
        sides = saved.processor.image_size
        opened, size, length = pair_model(saved.model), max(sides), saved.processor.max_text_length or 40
    check_precision(precision, part, next(opened.parameters()).device)
    if part != "train":
        opened.to(DTYPES[precision])
    return opened, size, length


def _selections(
    own: SelectionConfig, layers: Sequence[int] | None, rates: Sequence[float] | None, settings: Sequence[str] | None
) -> tuple[SelectionConfig, ...]:
    """The model's own setting with what the user wants changed, or several."""
    if settings:
        if layers or rates:
            raise ConfigError("stands in place of layers and keep_rate", item="settings", found=list(settings))
        return tuple(_setting(own, text) for text in settings)
    changes: dict[str, Any] = {} if layers is None else {"layers": tuple(layers)}
    if rates is not None:
        changes["keep_rate"] = rates[0] if len(rates) == 1 else tuple(rates)
    return (own.replace(**changes),)


def _setting(own: SelectionConfig, text: str) -> SelectionConfig:
    """``5,10x0.7`` or ``5,10x0.7,0.5``."""
    layers, cross, rates = text.partition("x")
    try:
        found = [float(rate) for rate in rates.split(",")]
        places = tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        cross = ""
    if not cross:
        raise ConfigError("not a setting", item="settings", found=text, expected="layers x rates, such as 5,10x0.7")
    return own.replace(layers=places, keep_rate=found[0] if len(found) == 1 else tuple(found))


def _presets(
    own: SelectionConfig, presets: Sequence[tuple[tuple[int, ...], float]], depth: int
) -> list[SelectionConfig]:
    """In a tower of this depth; those whose locations would fall together are left out."""
    from trips.paper.settings import Setting

    found = []
    for layers, rate in presets:
        try:
            found.append(Setting("", own.replace(layers=layers, keep_rate=rate)).selection_in(depth))
        except ConfigError:
            continue
    return list(dict.fromkeys(found))


def _batch_size(text: str) -> int | str:
    if text == "max":
        return text
    if not text.isdecimal():
        raise ConfigError("not a batch size", item="batch_sizes", found=text, expected='>= 1 or "max"')
    return int(text)


def _advice_table(advice: Any) -> RenderableType:
    goal = advice.goal
    wanted = [f"batch {goal.batch_size}", f"{advice.image_size} px", str(advice.environment.get("device"))]
    if goal.latency_ms is not None:
        wanted.insert(0, f"at most {goal.latency_ms:g} ms")
    if goal.throughput is not None:
        wanted.insert(0, f"at least {goal.throughput:g} pairs/s")
    table = Table(title=", ".join(wanted), title_justify="left")
    for name in ("setting", "mode", "ms (95 %)", "pairs/s", "x no selection", "mean tokens", "verdict"):
        table.add_column(name, justify="left" if name in ("setting", "mode", "verdict") else "right")
    groups = {"reaches it": advice.offered, "misses it": advice.missed, "refused: slower": advice.refused}
    for verdict, choices in groups.items():
        for choice in choices:
            rates = dict.fromkeys(choice.keep_rates) if len(set(choice.keep_rates)) == 1 else choice.keep_rates
            layers = ",".join(map(str, choice.locations))
            table.add_row(
                f"[{layers}] x {','.join(f'{rate:g}' for rate in rates)}" if layers else "no selection",
                choice.mode,
                f"{choice.latency_ms:.4g} ({choice.p95_ms:.4g})",
                f"{choice.pairs_per_second:.4g}",
                f"{choice.measured_ratio:.3f} ({choice.ratio_low:.2f}-{choice.ratio_high:.2f})",
                f"{choice.mean_tokens:.0f}",
                verdict,
            )
    best = f"fastest: {advice.best.latency_ms:.4g} ms, {advice.best.pairs_per_second:.4g} pairs/s"
    return Group(table, Text(best if advice.ok else f"nothing reaches it; {best}"))
