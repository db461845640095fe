"""Tensors out of a file that may come from anywhere: nothing in it is ever run.

safetensors hold nothing but tensors. Files of `torch.save` are pickles: they are read with ``weights_only=True``, and
only where the caller asks for it, which is ``trips import``.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from trips.errors import CheckpointError

SAFE, PICKLED = (".safetensors",), (".pth", ".pt", ".bin", ".ckpt")
# Under which name training scripts keep the weights, beside optimizer and settings.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "teacher")
_HEADS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x02": "a pickle, as torch.save wrote it of old",
}


@dataclass
class TensorFile:
    """What a file holds.

    Attributes:
        path: the file.
        tensors: by name; floating ones in float32.
        others: names of what lies beside the weights: optimizer, settings, single numbers.
    """

    path: Path
    tensors: dict[str, Tensor]
    others: list[str] = field(default_factory=list)


def read_tensors(path: str | Path, *, pickled: bool = False) -> TensorFile:
    """Every tensor of a .safetensors file, or of a .pth, .pt, .bin or .ckpt file of `torch.save`.

    Weights that a training script keeps under "model" or "state_dict" are taken out, and what data-parallel training
    ("module.") and compiling ("_orig_mod.") put before every name is removed.

    Args:
        path: the file.
        pickled: whether files of `torch.save` may be read.
    Raises:
        CheckpointError: no such file, another kind of file, damaged, a pickle that holds more than data, no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such file", item=path)
    if path.suffix in SAFE:
        content: object = _read_safe(path)
    elif path.suffix not in PICKLED:
        raise CheckpointError("not a file of weights", item=path, expected=" | ".join((*SAFE, *PICKLED)))
    elif pickled:
        content = _read_pickle(path)
    else:
        raise CheckpointError(
            "is a pickle, which is only read to be converted",
            item=path,
            expected=".safetensors",
            hint=f'"trips import {path.name} FOLDER" writes one',
        )
    return _unwrap(path, content)


def check_floating(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError`, with file and key, for integers, of which a quantised model consists.

    Without their scales they mean nothing. Position ids, which old files hold, are no weights.
    """
    for name, value in tensors.items():
        if not value.is_floating_point() and not name.endswith("position_ids"):
            raise _no_weights(path, name, str(value.dtype).removeprefix("torch."))


def check_floating_files(folder: Path) -> None:
    """`check_floating` of the .safetensors of a folder that transformers reads, by their headers alone."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        except SafetensorError:
            continue  # transformers says what is wrong with it
        for name, kind in types.items():
            if not kind.startswith(("F", "BF")) and not name.endswith("position_ids"):
                raise _no_weights(path, name, kind)


def _no_weights(path: Path, name: str, found: str) -> CheckpointError:
    return CheckpointError("holds no floating-point numbers", item=f"{path}: {name}", found=found)


def _read_safe(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has one error of its own and raises those of Python and torch too
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> object:
    try:
        # Settings of argparse lie in many a checkpoint; a namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of it then refuses, or reads none the worse
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        if not blocked:
            raise _unreadable(path, error) from error
        raise CheckpointError(
            f"holds objects that are no data, and may run code when read ({blocked[0][:200]})",
            item=path,
            expected="tensors, numbers, strings, lists and dictionaries",
            hint="nothing of it was run; if you trust its author, save its tensors alone as .safetensors",
        ) from error
    except Exception as error:  # torch raises many types for damaged files
        if "TorchScript" in str(error):
            raise CheckpointError(
                "is a TorchScript program, not a file of weights",
                item=path,
                hint="OpenAI's CLIP is on the hub as weights, e.g. openai/clip-vit-base-patch16",
            ) from error
        raise _unreadable(path, error) from error


def _unwrap(path: Path, content: object) -> TensorFile:
    others: list[str] = []
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((name for name in _WEIGHTS if isinstance(content.get(name), Mapping)), None)
        if inner is not None:
            others = [str(name) for name in content if name != inner]
            content = content[inner]
    if not isinstance(content, Mapping):
        raise CheckpointError("holds no named tensors", item=path, found=type(content).__name__)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    others += [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if not tensors:
        raise CheckpointError("holds no named tensors", item=path, found=sorted(map(str, content))[:8])
    for prefix in ("module.", "_orig_mod.", "module."):  # compiled and data-parallel, one in the other either way
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return TensorFile(path, tensors, sorted(others))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(f"weights cannot be read ({reason})", item=path, found=_looks_like(path))


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    for mark, meaning in _HEADS.items():
        if head.startswith(mark):
            return meaning
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: the download was one, not the file"
    printable = sum(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "text" if printable == len(head) else f"{path.stat().st_size} bytes"
