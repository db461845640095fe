"""The typed errors: what they say, what they are, and that they survive a worker process."""

from __future__ import annotations

import copy
import pickle

import pytest

from trips import errors
from trips.errors import ConfigError, DataError, MissingDependencyError, TripsError

BUILT_IN = {
    "ConfigError": ValueError,
    "ShapeError": ValueError,
    "DataError": ValueError,
    "CheckpointError": ValueError,
    "UnsupportedModelError": TypeError,
    "MissingDependencyError": ImportError,
}


@pytest.mark.parametrize(("name", "built_in"), BUILT_IN.items())
def test_every_error_is_a_trips_error_and_the_expected_built_in(name: str, built_in: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), TripsError)
    assert issubclass(getattr(errors, name), built_in)


def test_the_table_above_is_complete() -> None:
    children = {cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and TripsError in cls.__bases__}
    assert children == set(BUILT_IN)


def test_message_joins_item_finding_expectation_and_hint() -> None:
    error = ConfigError("not a rate", item="keep_rate", found=0.0, expected="0 < r <= 1", hint="try 0.7")
    assert str(error) == "keep_rate: not a rate; found 0.0; expected 0 < r <= 1 (try 0.7)"
    assert str(DataError("file is empty")) == "file is empty"


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_fields_survive_pickling_and_copying(again) -> None:
    error = MissingDependencyError("matplotlib is needed", item="figures", found=None, expected="matplotlib", hint="x")
    twin = again(error)
    assert type(twin) is MissingDependencyError and str(twin) == str(error)
    fields = ("message", "item", "found", "expected", "hint")
    assert [getattr(twin, f) for f in fields] == [getattr(error, f) for f in fields]
