"""Ways to spend less on an image, side by side: text-relevant selection and the controls that it is compared with.

A method is a setting of the selection and a size of the image. All are compared at the same token count, and, where
`trips.bench.matching` finds their settings, at the same measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trips.bench.flops import FlopCount, count_flops
from trips.config import Guide, SelectionConfig, TripsConfig, num_kept, token_counts
from trips.errors import ConfigError
from trips.scaling import downscaled, scale_for_tokens, scaled_size


@dataclass(frozen=True)
class KeptTokens:
    """What a location does to the patch tokens, [CLS] not counted.

    Attributes:
        layer: 1-based.
        entered: candidates, a fused token of an earlier location among them.
        kept: of them; a fused token of this location comes on top.
        left: tokens that go on: kept and fused.
    """

    layer: int
    entered: int
    kept: int
    left: int


@dataclass(frozen=True)
class Method:
    """One way to spend less.

    Attributes:
        name: in tables and on the command line.
        guide: who chooses the tokens; "none" takes them all.
        scale: factor on both sides of the image, in (0, 1].
    """

    name: str
    guide: Guide
    scale: float = 1.0

    def selection(self, base: SelectionConfig) -> SelectionConfig:
        """The setting of a call: locations and rates of a base, this method's guide."""
        return base.replace(guide=self.guide)

    def pixels(self, pixel_values: Tensor, patch_size: int) -> Tensor:
        """(I, 3, H, W) as this method wants to see them."""
        return pixel_values if self.scale == 1 else downscaled(pixel_values, self.scale, patch_size)

    def grid(self, image_size: int, patch_size: int) -> tuple[int, int]:
        """Patches (down, across) of a square image."""
        if self.scale == 1:
            return (image_size // patch_size, image_size // patch_size)
        height, width = scaled_size((image_size, image_size), self.scale, patch_size)
        return (height // patch_size, width // patch_size)

    def count(self, config: TripsConfig, image_size: int, text_length: int, base: SelectionConfig) -> FlopCount:
        """Exact operations of a pair; what makes the image smaller belongs to its loading."""
        grid = self.grid(image_size, config.vision_config.patch_size)
        return count_flops(config, grid, text_length, self.selection(base))

    def tokens(self, config: TripsConfig, image_size: int, base: SelectionConfig) -> tuple[KeptTokens, ...]:
        """What every location keeps."""
        down, across = self.grid(image_size, config.vision_config.patch_size)
        return kept_tokens(config, down * across, self.selection(base))


def kept_tokens(config: TripsConfig, num_patches: int, selection: SelectionConfig) -> tuple[KeptTokens, ...]:
    """What every location of a setting keeps of N patches; nothing without selection."""
    if not selection.active:
        return ()
    counts, found = token_counts(num_patches, config.vision_config.num_hidden_layers, selection), []
    for layer, rate in zip(selection.layers, selection.rates):
        entered, left = (count - 1 for count in counts[layer - 1])
        found.append(KeptTokens(layer, entered, num_kept(entered, rate), left))
    return tuple(found)


NO_SELECTION = Method("none", "none")
_GUIDED = tuple(Method(guide, guide) for guide in ("text", "image", "random", "similarity"))
METHODS: dict[str, Method] = {method.name: method for method in (NO_SELECTION, *_GUIDED)}
DOWNSCALE = "downscale"  # what it is made of depends on the tokens that the others leave


def methods_for(
    names: Sequence[str], config: TripsConfig, image_size: int, base: SelectionConfig
) -> tuple[Method, ...]:
    """Methods by name; "downscale" at as many tokens as the base leaves on average over the layers.

    Raises:
        ConfigError: no such method.
    """
    found = []
    for name in names:
        if name == DOWNSCALE:
            patch = config.vision_config.patch_size
            tokens = max(1, round(mean_tokens(config, image_size // patch, base)))
            scale = scale_for_tokens(image_size, patch, tokens)
            found.append(replace(NO_SELECTION, name=DOWNSCALE, scale=scale))
        elif name in METHODS:
            found.append(METHODS[name])
        else:
            raise ConfigError("no such method", item="methods", found=name, expected=" | ".join((*METHODS, DOWNSCALE)))
    return tuple(found)


def downscaling(side: int, image_size: int, patch_size: int) -> Method:
    """The method that leaves a grid of (side, side) patches by resolution alone."""
    return replace(NO_SELECTION, name=DOWNSCALE, scale=side * patch_size / image_size)


def mean_tokens(config: TripsConfig, side: int, selection: SelectionConfig) -> float:
    """Patch tokens that a layer sees, on average over attention and FFN of all layers."""
    counts = token_counts(side * side, config.vision_config.num_hidden_layers, selection)
    return sum(before + after - 2 for before, after in counts) / (2 * len(counts))
