"""What became of every tensor of a checkpoint, and of every tensor of the model that was built from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class ImportReport:
    """What became of every tensor.

    Attributes:
        loaded: names in the new model that hold public weights; cross-attention those of its layer's self-attention.
        resized: names in the new model that hold public weights interpolated to another size.
        initialised: names in the new model that no public tower has; they start at random.
        ignored: names in the checkpoints that this model has no place for, as "vision: name", "text: name" or
            "file: name".
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            "loaded": self.loaded,
            "resized": self.resized,
            "initialised": self.initialised,
            "ignored": self.ignored,
        }
        parts = [f"{len(names)} {word}" for word, names in counts.items() if names or word != "resized"]
        return ", ".join(parts).replace(" loaded", " tensors loaded", 1)


def first_names(keys: Iterable[object], limit: int = 8) -> list[str]:
    """The first names in order, for a message; the last entry counts those left out."""
    names = sorted(str(key) for key in keys)
    return names if len(names) <= limit else [*names[:limit], f"... {len(names) - limit} more"]
