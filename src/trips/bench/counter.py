"""Operations of a running model as torch counts them: the independent check of the closed forms of `trips.bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trips.errors import ConfigError


def counted_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Operations that run while a function or module is called, in units of 1e9; a multiply-add is two.

    Matrix products and convolutions are counted, attention products included; a backward pass counts if the function
    runs one. Fused attention is taken apart for it: torch knows no formula for that of a CPU, and would count what
    another kernel computes twice. That needs memory for the attention maps, unless everything lies on the meta device,
    where nothing is computed and a model of full size is counted in an instant:

        with torch.device("meta"):
            model, pixels = TripsModel(TripsConfig()).eval(), torch.empty(1, 3, 384, 384)
            ids = torch.zeros(1, 40, dtype=torch.long)
        counted_flops(model, ids, None, pixels)

    Args:
        function: a callable in eager mode; what torch.compile has made does not tell its operations.
        args, kwargs: handed to it.
    Raises:
        ConfigError: not callable.
    """
    if not callable(function):
        raise ConfigError("cannot be called", item="function", found=type(function).__name__)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops() / 1e9
