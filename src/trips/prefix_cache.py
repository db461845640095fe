"""Prefixes of images that a frozen vision tower has seen before (3.2: the prefix has seen no text).

Where the tower does not learn and images are not augmented, the same pixels give the same prefix in every epoch. A run
that keeps them pays for an image once; without selection, or as long as nothing is removed, that is the whole tower.

Legend: I images of a batch, N patches, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


class PrefixCache:
    """A memory of prefix states by pixels and first location; it fills up and then keeps what it has.

    To know the pixels again they are read on the host: on a GPU every call waits for the device.

    Args:
        max_bytes: most memory for states; images beyond it are computed each time.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._states: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._states)

    @torch.no_grad()
    def states(self, pixel_values: Tensor, layer: int | None, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(I, 3, H, W) -> (I, 1 + N, D), without gradient.

        Args:
            pixel_values: the images; equal ones of a batch are computed once too.
            layer: first location, None without selection.
            compute: makes the states of those that are not known.
        """
        kind = f"{layer} {pixel_values.dtype} {tuple(pixel_values.shape[1:])} {_precision(pixel_values)} ".encode()
        host = pixel_values.detach().contiguous().cpu().view(torch.uint8).flatten(1).numpy()
        keys = [hashlib.blake2b(kind + row.tobytes(), digest_size=16).digest() for row in host]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        missing = [(key, row) for key, row in first.items() if key not in self._states]
        fresh: dict[bytes, Tensor] = {}
        if missing:
            rows = torch.tensor([row for _, row in missing], device=pixel_values.device)
            fresh = dict(zip([key for key, _ in missing], compute(pixel_values.index_select(0, rows)), strict=True))
            for key, states in fresh.items():
                size = states.numel() * states.element_size()
                if self.num_bytes + size <= self.max_bytes:
                    self._states[key] = states.clone()  # a view would keep the whole batch in memory
                    self.num_bytes += size
        return torch.stack([fresh[key] if key in fresh else self._states[key] for key in keys])


def _precision(tensor: Tensor) -> str:
    """What autocast would make of the tower's products."""
    kind = tensor.device.type
    return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "as it is"
