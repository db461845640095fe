"""How fast a pair goes through the model with and without selection: latency, throughput, memory, beside exact counts.

`measure_speed` does what a `SpeedPlan` says, `benchmark` what most users want; `trips.bench.measurement` works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from trips.bench.measurement import Bench, Variant
from trips.bench.methods import METHODS
from trips.bench.plan import SpeedPlan
from trips.bench.speed_report import SpeedReport
from trips.bench.subjects import DTYPES, Mode, Part, pair_model
from trips.config import SelectionConfig
from trips.environment import describe_environment
from trips.errors import ConfigError


def measure_speed(model: Any, plan: SpeedPlan) -> SpeedReport:
    """Time a model with and without selection as a plan says.

    Args:
        model: of pairs of one image and one text: a pipeline, a task model or a `TripsModel`. It is in the plan's
            precision already, on its device, and afterwards what it was before.
        plan: what to measure.
    Raises:
        ConfigError: a mode or precision that this device has not, a location beyond the last layer, a batch that fits
            nowhere. UnsupportedModelError: another kind of model.
    """
    inner = pair_model(model)
    return _report(inner, plan, None)


def benchmark(
    model: Any,
    baseline: Any = None,
    batch_sizes: Sequence[int | str] = (1, 32),
    *,
    image_size: int | None = None,
    text_length: int = 40,
    part: Part = "forward",
    modes: Sequence[Mode] = ("eager",),
    rounds: int = 7,
) -> SpeedReport:
    """Time a model against the same without selection, or against another, on its own device and in its precision.

    Args:
        model: a pipeline, a task model or a `TripsModel`, with the selection of its configuration.
        baseline: another model, or a `SelectionConfig` for the same one; None takes no selection.
        batch_sizes: pairs at once; "max" is the largest that fits.
        image_size: pixels of a side; else those of the vision tower.
        text_length: text tokens.
        part: "forward" (a pair's inference), "vision" (the vision pass alone), "train" (a training step).
        modes: "eager", "compiled", "graphs".
        rounds: calls of each that count.
    Returns:
        The rows; ``print(report.table())`` shows them.
    Raises:
        ConfigError, UnsupportedModelError: see `measure_speed`.
    """
    inner = pair_model(model)
    dtype = next(inner.parameters()).dtype
    precision = next((name for name, known in DTYPES.items() if known == dtype), None)
    if precision is None:
        raise ConfigError("unknown precision", item="model", found=dtype, expected=" | ".join(DTYPES))
    selection = inner.config.selection
    plan = SpeedPlan(
        selections=(selection,),
        image_sizes=(image_size or inner.config.vision_config.image_size,),
        methods=(selection.guide if selection.active else "none",),
        batch_sizes=tuple(batch_sizes),
        modes=tuple(modes),
        part=part,
        precision=precision,
        text_length=min(text_length, inner.config.text_config.max_position_embeddings),
        rounds=rounds,
    )
    return _report(inner, plan, None if baseline is None else _side(inner, baseline))


def _side(model: nn.Module, baseline: Any) -> Variant:
    """What the caller compares with."""
    if isinstance(baseline, SelectionConfig):
        selection = baseline
    else:
        model = _alike(model, pair_model(baseline))
        selection = model.config.selection
    return Variant(model, METHODS[selection.guide], selection)


def _alike(model: nn.Module, other: nn.Module) -> nn.Module:
    """Another model that runs on the same inputs; `ConfigError` if it cannot."""
    for name, of in (
        ("device", lambda one: str(next(one.parameters()).device)),
        ("dtype", lambda one: str(next(one.parameters()).dtype)),
        ("text_config.vocab_size", lambda one: one.config.text_config.vocab_size),
        ("vision_config.num_channels", lambda one: one.config.vision_config.num_channels),
    ):
        if of(other) != of(model):
            raise ConfigError("not that of the model", item=f"baseline: {name}", found=of(other), expected=of(model))
    return other


def _report(model: nn.Module, plan: SpeedPlan, baseline: Variant | None) -> SpeedReport:
    models = [model] if baseline is None else [model, baseline.model]
    modes = [one.training for one in models]
    for one in models:
        one.train(plan.part == "train")
    try:
        rows = tuple(Bench(model, plan, baseline).rows())
    finally:
        for one, training in zip(models, modes):
            one.train(training)
    environment = describe_environment(next(model.parameters()).device)
    told = "no selection" if baseline is None else describe_side(baseline)
    return SpeedReport(environment, environment["commit"], describe_model(model), told, asdict(plan), rows)


def describe_side(side: Variant) -> str:
    """A baseline of the caller's in a few words."""
    if not side.base.active:
        return f"{type(side.model).__name__} without selection"
    places, rates = (",".join(f"{value:g}" for value in values) for values in (side.base.layers, side.base.rates))
    return f"{type(side.model).__name__}, {side.base.guide} [{places}] x {rates}"


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class and sizes, so that a figure says what it is of."""
    config = model.config
    vision, text, fusion = config.vision_config, config.text_config, config.fusion_encoder_config
    return {
        "class": type(model).__name__,
        "device": str(next(model.parameters()).device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vision": {"type": vision.model_type, "width": vision.hidden_size, "layers": vision.num_hidden_layers}
        | {"patch_size": vision.patch_size},
        "text": {"width": text.hidden_size, "layers": text.num_hidden_layers},
        "fusion": {"width": fusion.hidden_size, "layers": fusion.num_hidden_layers},
    }
