"""What is timed: a part of the model, in a mode, on inputs that rotate.

Parts: the forward pass of a pair (text, vision, fusion), the vision pass alone under a ready t_cls, a training step
(forward, backward, AdamW). Inference runs with weights cast to the precision, as its users do; training keeps float32
weights under autocast. Both sides of a comparison share one model, one precision and one mode.

Dimensions: B pairs, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BertConfig, CLIPVisionConfig

from trips.bench.methods import Method
from trips.bench.timing import Subject
from trips.config import SelectionConfig, TripsConfig
from trips.errors import ConfigError, UnsupportedModelError
from trips.model import TripsModel
from trips.multi_image import MultiImageModel
from trips.single_stream import SingleStreamMultiImageModel

Part = Literal["forward", "vision", "train"]
Mode = Literal["eager", "compiled", "graphs"]
Precision = Literal["fp32", "bf16", "fp16"]
RandomModel = Literal["paper", "small"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POOL = 3  # inputs that rotate


@dataclass(frozen=True)
class Inputs:
    """A random batch.

    Attributes:
        pixel_values: (B, 3, H, W) noise.
        input_ids: (B, L), no padding.
        text_cls: (B, D) for the vision pass alone.
    """

    pixel_values: Tensor
    input_ids: Tensor
    text_cls: Tensor

    def seen_by(self, method: Method, patch_size: int) -> Inputs:
        """The batch at the method's resolution; loading would have made it so, and its time is not counted."""
        return replace(self, pixel_values=method.pixels(self.pixel_values, patch_size))


def random_model(name: RandomModel = "paper") -> TripsModel:
    """Random weights: "paper" is ViT-B/16 with BERT-base 6 + 6, "small" a width of 64 to see that things run."""
    config = TripsConfig()
    if name == "small":
        small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = TripsConfig(
            vision_config=CLIPVisionConfig(**small, num_hidden_layers=12, patch_size=16, image_size=64),
            text_config=BertConfig(**small, num_hidden_layers=2, vocab_size=1000),
        )
    return TripsModel(config).eval()


def pair_model(model: Any) -> nn.Module:
    """The encoder of pairs inside a pipeline, a task model, or given as it is.

    Raises:
        UnsupportedModelError: a model of another kind, or one that reads several images with a text.
    """
    inner = getattr(model, "model", model)  # of a pipeline
    inner = getattr(inner, "trips", inner)  # of a task model
    if not isinstance(inner, nn.Module) or not isinstance(getattr(inner, "config", None), TripsConfig):
        raise UnsupportedModelError("not a model of trips", item="model", found=type(model).__name__)
    if isinstance(inner, (MultiImageModel, SingleStreamMultiImageModel)):
        raise UnsupportedModelError(
            "only pairs of one image and one text are timed", item="model", found=type(model).__name__
        )
    return inner


def check_precision(precision: str, part: str, device: torch.device) -> None:
    """Raise `ConfigError` for half precision where it does not run, or cannot train."""
    if precision == "fp16" and (device.type != "cuda" or part == "train"):
        raise ConfigError(
            "float16 is for inference on a GPU", item="precision", found=f"{precision}, {part} on {device.type}"
        )


def make_inputs(
    model: nn.Module, image_size: int, batch: int, text_length: int, count: int = POOL, seed: int = 0
) -> list[Inputs]:
    """Different random batches, in the precision and on the device of a model."""
    config, weight = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    channels, text = config.vision_config.num_channels, config.text_config
    if text_length > text.max_position_embeddings:
        raise ConfigError(
            "longer than the text encoder's positions",
            item="text_length",
            found=text_length,
            expected=f"at most {text.max_position_embeddings}",
        )
    made = []
    for _ in range(count):
        pixels = torch.randn(batch, channels, image_size, image_size, generator=generator)
        ids = torch.randint(text.vocab_size // 2, text.vocab_size, (batch, text_length), generator=generator)
        text_cls = torch.randn(batch, text.hidden_size, generator=generator)
        kind = {"device": weight.device, "dtype": weight.dtype}
        made.append(Inputs(pixels.to(**kind), ids.to(weight.device), text_cls.to(**kind)))
    return made


def build_subject(
    model: nn.Module,
    selection: SelectionConfig,
    inputs: Sequence[Inputs],
    *,
    part: Part = "forward",
    mode: Mode = "eager",
    autocast: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Subject:
    """One side of a comparison, ready to be called with the number of an input.

    Args:
        model: of pairs, see `pair_model`.
        selection: of its calls.
        inputs: what it runs on in turn.
        part, mode: see the module.
        autocast: precision of products in a training step.
        optimizer: of a training step, one for all subjects of a model; see `idle_adamw`.
    Raises:
        ConfigError: CUDA graphs without a GPU or for training; torch.compile that does not work here.
        UnsupportedModelError: a vision pass of a model that has no vision encoder.
    """
    if part == "vision" and model.config.architecture == "single":
        raise UnsupportedModelError("has no vision encoder of its own", item="part", found=part)
    function, arguments = _function(model, selection, part, autocast), [_arguments(each, part) for each in inputs]
    if part != "train":
        return inference(function, arguments, mode)
    if mode == "graphs":
        raise ConfigError("CUDA graphs are for inference", item="modes", found=part)
    if mode == "compiled":
        function = _compiled(function)
    optimizer = optimizer or idle_adamw(model)

    def step(number: int) -> None:
        function(*arguments[number]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(function: Callable[..., Tensor], pool: Sequence[tuple[Tensor, ...]], mode: Mode) -> Subject:
    """A function of tensors without gradients, ready to be called with the number of its arguments in a pool.

    Raises:
        ConfigError: see `build_subject`.
    """
    if mode == "compiled":
        function = _compiled(function)
    elif mode == "graphs":
        if pool[0][0].device.type != "cuda":
            raise ConfigError("CUDA graphs need a GPU", item="modes", found=pool[0][0].device.type)
        with torch.no_grad():
            function = _captured(function, pool[0])

    @torch.no_grad()
    def run(number: int) -> Any:
        return function(*pool[number])

    return run


def idle_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW at a learning rate of 0: it does all its work, and every round meets the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0)


def _function(
    model: nn.Module, selection: SelectionConfig, part: Part, autocast: torch.dtype | None
) -> Callable[..., Tensor]:
    """The part as a function of tensors."""
    if part == "vision":
        return lambda pixels, text_cls: model.vision(pixels, text_cls, selection).last_hidden_state

    def forward(pixels: Tensor, ids: Tensor) -> Tensor:
        return model(ids, None, pixels, selection=selection).last_hidden_state

    if part == "forward":
        return forward

    def loss(pixels: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, autocast, enabled=autocast is not None):
            return forward(pixels, ids)[:, 0].float().square().mean()

    return loss


def _arguments(inputs: Inputs, part: Part) -> tuple[Tensor, ...]:
    return (inputs.pixel_values, inputs.text_cls if part == "vision" else inputs.input_ids)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One graph for one shape: the number of tokens kept is known beforehand.

    torch counts the graphs of a code object and runs all beyond the eighth eagerly. All subjects come from the same
    lines, so each gets a code object of its own.
    """

    def outer(*arguments: Tensor) -> Tensor:
        return function(*arguments)

    own = FunctionType(outer.__code__.replace(), outer.__globals__, outer.__name__, None, outer.__closure__)
    compiled = torch.compile(own, dynamic=False)

    def run(*arguments: Tensor) -> Tensor:
        try:
            return compiled(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler on this machine, or a device that it does not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(f"torch.compile does not work here ({reason})", item="modes", found="compiled") from error

    return run


def _captured(function: Callable[..., Tensor], example: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A function recorded as one CUDA graph, whose replay launches all its kernels at once.

    A replay reads the tensors of its recording, so inputs are copied into them: that is part of its time.
    """
    held = [tensor.clone() for tensor in example]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside the recording
        for _ in range(3):
            function(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = function(*held)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # something in it waits for the device
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(f"cannot be recorded as a CUDA graph ({reason})", item="modes", found="graphs") from error

    def run(*arguments: Tensor) -> Tensor:
        for own, given in zip(held, arguments):
            own.copy_(given)
        graph.replay()
        return output

    return run
