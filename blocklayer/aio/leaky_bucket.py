"""LeakyBucket: an average rate with bursts, as QEMU's throttling counts it.

A bucket leaks ``average`` units per second and holds ``average`` / 10 without a burst. With ``burst_max`` it takes that
rate for ``burst_length_s`` seconds before it is full; if that is longer than a second, a second bucket that leaks
``burst_max`` and holds a tenth of it keeps the burst at its rate. Who pours into a full bucket waits until enough has
leaked. Units are bytes or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blocklayer.base.errors import OptionError

BASE_S: Final = 0.1
"""Without a burst a bucket holds what leaks in this time."""

TICK_S: Final = 1e-6
"""Waits shorter than this are none: rounding leaves such rests, and no sleep is that short."""


@dataclass(frozen=True, slots=True)
class BucketLimits:
    """Units per second; ``average`` 0 means no limit. ``burst_max`` 0 means no bursts."""

    average: float = 0
    burst_max: float = 0
    burst_length_s: int = 1

    def __post_init__(self) -> None:
        """Check what QEMU checks."""
        if self.average < 0 or self.burst_max < 0:
            raise OptionError("limits must be 0 (none) or positive")
        if self.burst_length_s < 1:
            raise OptionError("the length of a burst must be at least one second")
        if self.burst_max and not self.average:
            raise OptionError("a burst limit needs an average limit")
        if self.burst_max and self.burst_max < self.average:
            raise OptionError("a burst limit must not be lower than the average limit")
        if self.burst_length_s > 1 and not self.burst_max:
            raise OptionError("a burst length needs a burst limit")


class LeakyBucket:
    """Pure arithmetic: the caller tells the time in seconds, and waits."""

    __slots__ = ("_burst", "_level", "_limits", "_then")

    def __init__(self, limits: BucketLimits) -> None:
        """Start empty."""
        self._limits = limits
        self._level = 0.0
        self._burst = 0.0
        self._then = 0.0

    @property
    def limits(self) -> BucketLimits:
        """What holds now."""
        return self._limits

    def change(self, limits: BucketLimits, now: float) -> None:
        """Other limits from now on; what is in the bucket stays."""
        self._leak(now)
        self._limits = limits

    def delay(self, now: float) -> float:
        """Seconds until the next request may pass; 0 if it may now."""
        limits = self._limits
        if not limits.average:
            return 0.0
        self._leak(now)
        capacity = limits.average * BASE_S
        if limits.burst_max:
            capacity = limits.burst_max * limits.burst_length_s
        wait = (self._level - capacity) / limits.average
        if limits.burst_length_s > 1:
            wait = max(wait, (self._burst - limits.burst_max * BASE_S) / limits.burst_max)
        return wait if wait > TICK_S else 0.0

    def pour(self, units: float, now: float) -> None:
        """A request of ``units`` passes."""
        if self._limits.average:
            self._leak(now)
            self._level += units
            self._burst += units

    def _leak(self, now: float) -> None:
        self._level = max(0.0, self._level - (now - self._then) * self._limits.average)
        self._burst = max(0.0, self._burst - (now - self._then) * self._limits.burst_max)
        self._then = now
