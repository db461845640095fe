"""How the processes of a run share a model: whole in each (DDP), or sharded over them (FSDP2).

The loop sees one thing either way: a module to call that returns losses, a module whose parameters are trained, whole
states for checkpoints and evaluation. Parameters stay in float32 and the forward runs under autocast in both, so both
compute the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trips.config import SelectionConfig
from trips.errors import ConfigError, TripsError
from trips.fusion import FusionEncoder
from trips.train.checkpoint import gathered
from trips.train.settings import TrainSettings
from trips.vision import VisionEncoder

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
COMPILE_BACKEND = "inductor"
_SYNC_BUFFERS = next(  # the newer name first; the older one warns where both exist
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class ParallelModel:
    """A model on the processes of a run.

    Args:
        model: the caller's, alike in every process or not: all start from the first process's values.
        settings: ``parallel``, ``gradient_checkpointing`` and ``compile`` count here.
        accelerator: knows device and processes.
        selections: settings that the forward may be given besides the model's own.
    Attributes:
        trained: the module whose parameters are trained: the caller's, or under FSDP a sharded copy of it. The
            caller's then takes part in evaluation, and has the result after `finish`.
        sharded: whether it is FSDP.
    Raises:
        ConfigError: gradient checkpointing of a model that has no layers for it.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        accelerator: Accelerator,
        selections: Iterable[SelectionConfig] = (),
    ) -> None:
        self.model, self.settings, self.accelerator = model, settings, accelerator
        several, device = accelerator.num_processes > 1, accelerator.device
        self.sharded = several and (
            settings.parallel == "fsdp"
            or (settings.parallel == "auto" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true")
        )
        self.trained = (copy.deepcopy(model) if self.sharded else model.to(device)).train()
        if several:
            _synchronise(self.trained, device)
        if settings.gradient_checkpointing:
            checkpoint_layers(self.trained, True)
        if settings.compile:
            self.trained.compile(backend=COMPILE_BACKEND)
        self.losses: nn.Module = _Losses(self.trained)
        if self.sharded:
            shard(self.losses, device, selections)
        elif several:
            self.losses = DistributedDataParallel(
                self.losses,
                device_ids=[device] if device.type != "cpu" else None,
                # Pre-trained towers have parameters without a use here (mask tokens).
                find_unused_parameters=True,
                # What the loop trains keeps its buffers alike by itself; a queue of features is too big to send along.
                **{_SYNC_BUFFERS: False},
            )

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """For a backward pass that is not the last of its step: DDP sends nothing yet.

        FSDP sums into its shards at once, since whole gradients are what it has no room for.
        """
        ddp = isinstance(self.losses, DistributedDataParallel)
        return self.losses.no_sync() if ddp else contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        """Parameters and buffers, whole; all processes call it, under FSDP only the first gets values."""
        if not self.sharded:
            return self.trained.state_dict()
        return gathered(self.trained.state_dict(keep_vars=True), keep=self.accelerator.is_main_process)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole state of an optimizer over `trained`, called and returned as `state` is."""
        state = optimizer.state_dict()
        return gathered(state, keep=self.accelerator.is_main_process) if self.sharded else state

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The whole model with the present values on the first process's device, for an evaluation there."""
        if self.sharded:
            state = self.state()
            if self.accelerator.is_main_process:
                self.model.load_state_dict(state)
                self.model.to(self.accelerator.device).train()
        yield self.model
        if self.sharded:
            self.model.cpu()  # beside the shards there may be no room for it in the next step

    def finish(self) -> None:
        """Give the caller's model its result, in all processes, and leave nothing of this run on it."""
        if self.settings.gradient_checkpointing:
            checkpoint_layers(self.trained, False)
        if self.settings.compile:
            self.trained._compiled_call_impl = None
        if self.sharded:
            self.model.load_state_dict(gathered(self.trained.state_dict(keep_vars=True)))
            self.model.to(self.accelerator.device).train()


class _Losses(nn.Module):
    """The model, reduced to what DDP and FSDP look for gradients in: a plain dict of scalar losses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        return scalar_losses(self.model(**batch), self.model)


def scalar_losses(output: Any, model: nn.Module) -> dict[str, Tensor]:
    """``loss`` and the other ``loss_*`` scalars of an output; `ConfigError` if it has no loss."""
    fields = output if isinstance(output, Mapping) else vars(output)
    losses = {
        name: value
        for name, value in fields.items()
        if (name == "loss" or name.startswith("loss_")) and isinstance(value, Tensor) and value.ndim == 0
    }
    if "loss" not in losses:
        raise ConfigError("its forward returned no scalar loss", item=type(model).__name__, found=sorted(fields))
    return losses


def shard(root: nn.Module, device: torch.device, selections: Iterable[SelectionConfig] = ()) -> None:
    """Shard a module over all processes by FSDP2: each transformer layer by itself, the rest with the root.

    Layers are the modules that ``_no_split_modules`` names, of the outermost class that has such a list: a tower's own
    names embeddings too, whose weights serve elsewhere as output weights. A layer whose parts are called
    from outside its forward, where FSDP would not notice, stays with the root, which is whole during the whole pass:
    those that may select, and the fusion's where guidance is distilled from its attention.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    selections = tuple(selections)
    # Of the class: transformers adds the towers' names to those of the instance.
    lists = (getattr(type(module), "_no_split_modules", None) for module in root.modules())
    classes = set(next(filter(None, lists), ()))
    outside: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, VisionEncoder):
            layers = module.reader.layers
            settings = [setting for setting in (module.selection, *selections) if setting.active]
            outside.update(layers[i - 1] for setting in settings for i in setting.layers if i <= len(layers))
        elif isinstance(module, FusionEncoder) and any(setting.learning == "distill" for setting in selections):
            outside.update(module.layer)
    for module in list(root.modules()):
        if type(module).__name__ in classes and module not in outside:
            fully_shard(module, mesh=mesh)
    fully_shard(root, mesh=mesh)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip to a global norm in place; returns the norm before it, a scalar, the same in all processes."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result | None:
    """Do something on the first process alone; an error of it is raised in all, so that none waits for another.

    Returns:
        What the action returned, None on the other processes.
    Raises:
        TripsError: the action's.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except TripsError as caught:
            error = caught
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        received = broadcast_object_list([error])
        error = error or received[0]
    if error is not None:
        raise error
    return result


@torch.no_grad()
def _synchronise(model: nn.Module, device: torch.device) -> None:
    """Give every process the first one's parameters and buffers."""
    for tensor in (*model.parameters(), *model.buffers()):
        sent = tensor.detach().to(device).contiguous()
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


def checkpoint_layers(model: nn.Module, enable: bool) -> None:
    """Switch the checkpointing of transformers' layers, by the attributes that all its releases read."""
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not layers:
        raise ConfigError("has no layers that can be checkpointed", item=type(model).__name__)
    for layer in layers:
        layer.gradient_checkpointing = enable
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
