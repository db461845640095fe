"""ONNX files of exported programs, written by torch and read again by onnxruntime.

All that selection needs beyond ordinary operators is its stable sort, so that ties go to the lowest index: TopK of
ONNX promises that order, and stands for it here.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trips.errors import ConfigError, MissingDependencyError, UnsupportedModelError

OLDEST_OPSET = 18  # the first that torch writes
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx(opset: int) -> None:
    """Refuse what cannot be written before anything is computed.

    Raises:
        MissingDependencyError: a package of the extra is absent. ConfigError: an opset that torch or onnx do not know.
    """
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError("is not installed", item=name, hint='pip install "trips-vlm[export]"')
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not isinstance(opset, int) or isinstance(opset, bool) or not OLDEST_OPSET <= opset <= newest:
        raise ConfigError("no such opset", item="opset", found=opset, expected=f"{OLDEST_OPSET} to {newest}")


def write_onnx(
    program: torch.export.ExportedProgram, file: Path, inputs: list[str], outputs: list[str], opset: int
) -> None:
    """Translate a program; weights lie in a file beside it, under its name with ".data".

    Raises:
        UnsupportedModelError: torch has no translation for something in it.
    """
    try:
        with _quiet():
            torch.onnx.export(
                program,
                (),
                file,
                dynamo=True,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            )
    except Exception as error:  # torch wraps whatever a translation raises
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UnsupportedModelError(f"cannot be translated to ONNX ({reason})", item=f"opset {opset}") from error


def open_onnx(file: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A file as a function of named tensors, on the CPU.

    Raises:
        UnsupportedModelError: this onnxruntime cannot read it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common type
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"onnxruntime cannot read it ({reason})", item=file.name, hint="an older opset"
        ) from error
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        # A graph that has no use for an input, such as the mask of features of images, does not name it.
        values = session.run(outputs, {name: value.numpy() for name, value in batch.items() if name in inputs})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}

    return run


def _stable_sort() -> Callable[..., Any]:
    """Translation of aten.sort.stable: TopK over everything, which gives equals in the order of their indices."""
    from onnxscript import opset18 as op

    def stable_sort(self, stable: bool = True, dim: int = -1, descending: bool = False):  # the operator's own names
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        values, indices = op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
        return values, indices

    return stable_sort


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on operators of torchvision, which nothing has here, and on what cannot be folded."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
