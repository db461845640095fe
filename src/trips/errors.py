"""Typed errors of trips.

Every error names the thing it is about (`item`), what was found, what was expected and, where one is known, a
way out (`hint`). Each also derives from the built-in that a caller would expect, so that ``except ValueError``
keeps working.
"""

from __future__ import annotations


class TripsError(Exception):
    """Root of all errors that trips raises on purpose.

    Args:
        message: what is wrong, in one sentence without a final full stop.
        item: the file, key, sample id or argument that the error is about.
        found: the offending value.
        expected: what would have been right.
        hint: what the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        item: object = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.item, self.found, self.expected, self.hint = message, item, found, expected, hint
        text = f"{item}: {message}" if item is not None else message
        if found is not None:
            text += f"; found {found!r}"
        if expected is not None:
            text += f"; expected {expected}"
        if hint is not None:
            text += f" ({hint})"
        super().__init__(text)

    def __reduce__(self) -> tuple:
        # The default would call cls(text) and lose the fields when an error crosses a worker process.
        return _rebuild, (type(self), self.message, self.item, self.found, self.expected, self.hint)


def _rebuild(cls: type[TripsError], message: str, item: object, found: object, expected: object, hint: str | None):
    return cls(message, item=item, found=found, expected=expected, hint=hint)


class ConfigError(TripsError, ValueError):
    """A value in a configuration, a recipe or an argument is not one that trips can act on."""


class ShapeError(TripsError, ValueError):
    """Tensors that must fit each other do not."""


class DataError(TripsError, ValueError):
    """A file, sample or annotation cannot be read or does not hold what it should."""


class CheckpointError(TripsError, ValueError):
    """A checkpoint does not belong to this architecture, or is damaged."""


class UnsupportedModelError(TripsError, TypeError):
    """A model family or form that trips does not know how to handle."""


class MissingDependencyError(TripsError, ImportError):
    """An optional library is needed for what was asked."""
