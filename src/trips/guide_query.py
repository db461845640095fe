"""Calibrated queries of the text guide: what `trips.calibrate` has fitted, in place of W_q (beyond the paper).

The towers of a model that was never trained to select do not know each other's space, so t_cls through a vision
layer's own W_q asks for nothing in particular. To train W_q would change the layer itself. A map of the guide alone
does not: where no patch is removed nothing asks, and the outputs are those of the model as it was, bitwise.

Dimensions: B texts, D_t width of the text [CLS], D width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trips.errors import ConfigError


class CalibratedQueries(nn.Module):
    """One affine map from t_cls to the query of Eq. 2 for each calibrated layer; buffers, no parameters.

    Its product has the size of that with W_q, which it replaces: the operations stay the same where D_t = D.

    Args:
        layers: 1-based vision layers; each gets ``weight_N`` (D_t, D) and ``bias_N`` (D,), zeros until `set`.
        text_width: D_t. width: D.
    """

    def __init__(self, layers: Sequence[int], text_width: int, width: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        for layer in self.layers:
            self.register_buffer(f"weight_{layer}", torch.zeros(text_width, width))
            self.register_buffer(f"bias_{layer}", torch.zeros(width))

    @torch.no_grad()
    def set(self, layer: int, weight: Tensor, bias: Tensor) -> None:
        """Take over a fitted map; `ConfigError` if the layer has none."""
        self._check(layer)
        getattr(self, f"weight_{layer}").copy_(weight)
        getattr(self, f"bias_{layer}").copy_(bias)

    def forward(self, layer: int, text_cls: Tensor) -> Tensor:
        """(B, D_t) t_cls -> (B, D) query at a layer; `ConfigError` if it has no map."""
        self._check(layer)
        weight, bias = getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}")
        return torch.addmm(bias.to(text_cls.dtype), text_cls, weight.to(text_cls.dtype))

    def _check(self, layer: int) -> None:
        if layer not in self.layers:
            raise ConfigError(
                "this layer holds no calibrated query",
                item="selection.layers",
                found=layer,
                expected=self.layers,
                hint='trips.calibrate, or selection.guide_query="layer"',
            )
