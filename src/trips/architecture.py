"""What the two architectures allow: the dual-stream model of Figure 2 and TRIPS-S (end of section 3.2).

A table of settings that have no meaning where one stack reads words and patches, each with its reason.
"""

from __future__ import annotations

from typing import get_args

from trips.errors import ConfigError
from trips.options import Architecture, PretrainingConfig, ReasoningConfig, SelectionConfig

_NO_FUSION, _NO_STATES = "there is no fusion encoder", "an image has no states without the text of its pair"
# Section, field, value, reason, what serves.
_NOT_IN_SINGLE = (
    ("selection", "guide", "image", "an image has no [CLS] of its own", "text (the multimodal [CLS]) | random | "
     "similarity | none"),
    ("selection", "learning", "distill", f"{_NO_FUSION} to teach the guide", "literal | gate"),
    ("pretraining", "itc_guide", "text", "the joint [CLS] has read the caption", "image | none"),
    ("pretraining", "itm_guide", "reuse", _NO_STATES, "anew"),
    ("pretraining", "mlm_guide", "full", _NO_STATES, "masked"),
    ("reasoning", "fusion", "stacked", _NO_FUSION, "the default, merge"),
)  # fmt: skip


def check_architecture(architecture: str) -> None:
    """Raise `ConfigError` for one that does not exist."""
    if architecture not in get_args(Architecture):
        raise ConfigError(
            "unknown value", item="architecture", found=architecture, expected=" | ".join(get_args(Architecture))
        )


def check_single_stream(*options: SelectionConfig | PretrainingConfig | ReasoningConfig) -> None:
    """Raise `ConfigError` for a setting that has no meaning in a single-stream model; it names section and field."""
    for values in options:
        for section, name, refused, reason, expected in _NOT_IN_SINGLE:
            if values.section == section and getattr(values, name) == refused:
                raise ConfigError(
                    f"{reason} in a single-stream model", item=f"{section}.{name}", found=refused, expected=expected
                )
