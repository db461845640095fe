"""Training checkpoints: one file each, written so that a crash at any moment leaves the previous one valid.

A checkpoint holds everything that a run needs to go on bitwise: parameters and buffers, optimizer, schedule, the
states of all random generators, the step, and the settings. It is read without executing anything from the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trips.errors import CheckpointError

logger = logging.getLogger("trips")

FORMAT = 1
_PATTERN = "step-*.pt"
_PARTIAL = ".partial"


def rng_state() -> dict[str, Any]:
    """States of the generators of python, numpy, torch and all CUDA devices, in types safe to load."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA states only if the number of devices is the same."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def checkpoint_path(folder: Path, step: int) -> Path:
    """File of a step, named so that names sort as steps do."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    return sorted(folder.glob(_PATTERN))


def save_checkpoint(folder: Path, state: Mapping[str, Any], *, keep_last: int = 2) -> Path:
    """Write the checkpoint of ``state["step"]`` atomically, then drop all but the newest ``keep_last``.

    The bytes go to a file beside the target, are forced to the disk, and only then take the target's name.

    Raises:
        CheckpointError: the file cannot be written; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, state["step"])
    partial = target.with_suffix(_PARTIAL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError("cannot be written", item=target, found=str(error)) from error
    for old in list_checkpoints(folder)[:-keep_last]:
        old.unlink(missing_ok=True)
    return target


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk; systems that cannot open a folder need it not."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU.

    Raises:
        CheckpointError: missing, damaged, or not a training checkpoint of this library.
    """
    if not path.is_file():
        raise CheckpointError("no such checkpoint", item=path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage surfaces as any of half a dozen types
        reason = str(error).strip().split(". ")[0].splitlines()[:1] or [type(error).__name__]
        raise CheckpointError("cannot be read", item=path, found=reason[0], hint="the file is damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            "is not a training checkpoint of this version",
            item=path,
            found=state.get("format") if isinstance(state, dict) else type(state).__name__,
            expected=f"format {FORMAT}",
        )
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint of a folder, or None if it holds none.

    A damaged file is passed over with a warning as long as an older one can be read.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    failure: CheckpointError | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            failure = failure or error
            logger.warning("%s; trying the one before", error)
    if failure is not None:
        raise failure
    return None


def clear_checkpoints(folder: Path) -> None:
    """Remove all checkpoints and what an interrupted write left behind."""
    for path in [*folder.glob(_PATTERN), *folder.glob(f"step-*{_PARTIAL}")]:
        path.unlink(missing_ok=True)


def gathered(value: Any, keep: bool = True) -> Any:
    """A state with every sharded tensor whole and on the CPU; other values as they are.

    Whole tensors make a checkpoint independent of how it was sharded. All processes must call it alike.

    Args:
        value: tensors in dicts and lists.
        keep: False takes part in the gathering, one tensor at a time, and keeps None in place of the sharded ones.
    """
    return _gathered(value, keep, {})


def _gathered(value: Any, keep: bool, seen: dict[int, Tensor | None]) -> Any:
    if isinstance(value, DTensor):
        if id(value) not in seen:  # tied parameters are gathered once, and stay tied in the file
            whole = value.detach().full_tensor()
            seen[id(value)] = whole.cpu() if keep else None
        return seen[id(value)]
    if isinstance(value, Mapping):
        return {key: _gathered(part, keep, seen) for key, part in value.items()}
    if isinstance(value, list):
        return [_gathered(part, keep, seen) for part in value]
    return value.detach() if isinstance(value, Tensor) else value


def like(value: Any, target: Any) -> Any:
    """This process's part of a whole tensor where the target of the same shape is sharded; else the value itself."""
    if not (isinstance(target, DTensor) and isinstance(value, Tensor) and value.shape == target.shape):
        return value
    value = value.to(target.device)
    # Every process has read the whole: no messages.
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole optimizer state, each process its shards where the parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def state_problems(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state from the place of another, a few words for each name: missing, unexpected, another shape."""
    problems = [f"{name} missing" for name in own if name not in state]
    problems += [f"{name} unexpected" for name in state if name not in own]
    problems += [
        f"{name} of shape {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and isinstance(value, Tensor) and state[name].shape != value.shape
    ]
    return problems


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], item: Path) -> None:
    """Load parameters and buffers, after checking that names and shapes are the model's own.

    Raises:
        CheckpointError: names the first parameters that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    problems = state_problems(own, state)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            "belongs to another model",
            item=item,
            found="; ".join(problems[:3]) + more,
            hint="resume with the settings of that run, or choose another output folder",
        )
    model.load_state_dict({name: like(state[name], value) for name, value in own.items()})
