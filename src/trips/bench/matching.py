"""The setting of a method at which it takes as long as another: methods compared at equal measured time."""

from __future__ import annotations

import math
from collections.abc import Callable

from trips.errors import ConfigError


def match_time(speed: Callable[[int], float], low: int, high: int) -> int:
    """The setting, of a range of whole numbers, at which a method is as fast as its reference.

    Bisection, since more tokens take longer; of all settings that it has measured the nearest counts, so that a noisy
    step costs accuracy but no more.

    Args:
        speed: how many times as fast as the reference a setting is, measured anew at each call; falls as it rises.
        low, high: smallest and largest setting, both allowed.
    Raises:
        ConfigError: an empty range.
    """
    if low > high:
        raise ConfigError("no setting to choose from", item="match_time", found=(low, high))
    measured: dict[int, float] = {}

    def faster(setting: int) -> bool:
        if setting not in measured:
            measured[setting] = speed(setting)
        return measured[setting] > 1

    left, right = low, high
    if faster(left) and not faster(right):
        while right - left > 1:
            middle = (left + right) // 2
            if faster(middle):
                left = middle
            else:
                right = middle
    return min(measured, key=lambda setting: abs(math.log(measured[setting])))
