"""The speed limit of a job, as arithmetic: how long to wait before the next chunk.

A job may be ahead of its speed by one slice of 100 ms, as with QEMU; a chunk may overdraw that, and the next one waits
until it is paid. Nothing sleeps here; the job does, and wakes up when the speed changes.
"""

from __future__ import annotations

from blocklayer.base.errors import OptionError

SLICE_S = 0.1
"""QEMU's slice: short enough that pauses and cancels look immediate, long enough for chunks of 1 MiB at 10 MiB/s."""

RESOLUTION_S = 1e-6
"""Shorter waits are none: a timer would not be that exact."""


class SpeedLimit:
    """``speed`` in bytes per second; 0 means no limit."""

    __slots__ = ("_paid_until", "speed")

    def __init__(self, speed: int = 0) -> None:
        """Start with nothing owed. Raises ``OptionError`` if ``speed`` is negative."""
        self.speed = check_speed(speed)
        self._paid_until = 0.0

    def set(self, speed: int) -> None:
        """Change the limit; what is owed at the old speed is forgiven."""
        self.speed = check_speed(speed)
        self._paid_until = 0.0

    def charge(self, length: int, now: float) -> None:
        """``length`` bytes are on their way."""
        if self.speed:
            self._paid_until = max(self._paid_until, now) + length / self.speed

    def delay(self, now: float) -> float:
        """Seconds until the next chunk may start; 0 for at once."""
        if not self.speed:
            return 0.0
        ahead = self._paid_until - now - SLICE_S
        return ahead if ahead > RESOLUTION_S else 0.0


def check_speed(speed: int) -> int:
    """Answer ``speed``, or raise ``OptionError`` if it is negative."""
    if speed < 0:
        raise OptionError("parameter 'speed' expects a non-negative value")
    return speed
