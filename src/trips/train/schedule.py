"""What selection does at which training step: keep-rate warm-up and full-patch distillation steps.

Both go beyond the paper, whose recipe is the schedule that always answers with the base setting. The forward pass of
a step stays one of a few static shapes: the keep rate moves in a handful of levels, not continuously.
"""

from __future__ import annotations

from dataclasses import dataclass

from trips.config import SelectionConfig
from trips.errors import ConfigError


@dataclass(frozen=True)
class SelectionSchedule:
    """Selection setting per optimizer step, a pure function of the step.

    Attributes:
        base: the setting that training ends with.
        total_steps: optimizer steps of the whole run.
        keep_rate_warmup: share of the steps during which the keep rate falls from 1.0 to the base's; 0 is off.
        levels: distinct keep rates from 1.0 to the base's, both included.
        distill_every: distance of the full-patch distillation steps, where ``base.learning`` is "distill"; while the
            keep rate is still 1.0 every step is one, as it costs nothing more there.
    Raises:
        ConfigError: a value outside its range.
    """

    base: SelectionConfig
    total_steps: int
    keep_rate_warmup: float = 0.0
    levels: int = 4
    distill_every: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.keep_rate_warmup <= 1:
            raise ConfigError("not a share", item="keep_rate_warmup", found=self.keep_rate_warmup, expected="0 to 1")
        for name, least in (("total_steps", 0), ("levels", 2), ("distill_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError("too small", item=name, found=getattr(self, name), expected=f"at least {least}")

    @property
    def warmup_steps(self) -> int:
        """Steps before the keep rate has reached the base's."""
        return round(self.total_steps * self.keep_rate_warmup) if self.base.active else 0

    def level(self, step: int) -> int:
        """0 while all patches are kept, rising to ``levels - 1`` where the base setting is reached."""
        if step >= self.warmup_steps:
            return self.levels - 1
        return step * (self.levels - 1) // self.warmup_steps

    def at(self, step: int) -> tuple[SelectionConfig, bool]:
        """Setting of a step, and whether it is a full-patch step that distils the guide.

        Args:
            step: optimizer steps already done, 0 before the first.
        """
        level, last = self.level(step), self.levels - 1
        distils = self.base.active and self.base.learning == "distill"
        if level == last:
            return self.base, distils and step % self.distill_every == 0
        # Rounded, for the keep rate is read as the decimal that it prints as.
        rates = tuple(round(1 - (1 - rate) * level / last, 4) for rate in self.base.rates)
        rate = rates if isinstance(self.base.keep_rate, tuple) else rates[0]
        return self.base.replace(keep_rate=rate), distils and (level == 0 or step % self.distill_every == 0)
