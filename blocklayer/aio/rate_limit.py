"""RateLimiter: bytes per second for a job, in slices of 100 ms as QEMU counts them.

Each slice has a quota. Who finds it used up waits for the next slices to pay for what was taken too much; so one request
larger than the quota goes through and is followed by a longer pause. A change of speed takes effect at once, also for
those who wait.
"""

from __future__ import annotations

from typing import Final

import anyio

from blocklayer.aio.clock import Clock, MonotonicClock, sleep_unless
from blocklayer.base.errors import OptionError

SLICE_S: Final = 0.1
"""Length of a slice: short enough to look smooth, long enough to be exact."""


class RateLimiter:
    """``speed`` in bytes per second; 0 is unlimited."""

    def __init__(self, speed: int = 0, *, clock: Clock | None = None) -> None:
        """Start with an unused slice."""
        self._clock = clock or MonotonicClock()
        self._changed = anyio.Event()
        self._speed = 0
        self._free_at = self._clock.now()
        self.set_speed(speed)

    @property
    def speed(self) -> int:
        """Bytes per second; 0 is unlimited."""
        return self._speed

    def set_speed(self, speed: int) -> None:
        """Change the speed. Raises ``OptionError`` if it is negative."""
        if speed < 0:
            raise OptionError(f"speed must be 0 (unlimited) or positive, not {speed}")
        self._speed = speed
        self._free_at = self._clock.now()
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self, length: int) -> None:
        """Return when ``length`` more bytes may pass."""
        while self._speed:
            delay = self._free_at - self._clock.now()
            if delay <= 0:
                start = max(self._free_at, self._clock.now() - SLICE_S)
                self._free_at = start + length / self._speed
                return
            await sleep_unless(self._changed, self._clock, delay)
