"""How far a job is: a frozen record for people, and the meter that makes it.

``current`` and ``total`` are bytes. ``total`` shrinks by areas that are skipped; ``current`` only grows. The rate
is that of the last ``WINDOW_S`` seconds, so that it follows a change of speed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 5.0
"""Long enough to smooth over single chunks, short enough to follow ``set_speed``."""

SAMPLE_S = 0.1
"""Samples are kept at most this often: about fifty of them."""


@dataclass(frozen=True, slots=True)
class Progress:
    """``current`` of ``total`` bytes done; ``rate`` in bytes per second; ``eta`` in seconds, None while unknown."""

    current: int
    total: int
    rate: float
    eta: float | None

    @property
    def fraction(self) -> float:
        """Between 0 and 1; a job with nothing to do is complete."""
        return self.current / self.total if self.total else 1.0


class ProgressMeter:
    """Counts bytes; times are those of the event loop, passed in."""

    __slots__ = ("_samples", "current", "total")

    def __init__(self, total: int, now: float) -> None:
        """Nothing of ``total`` bytes is done at ``now``."""
        self.current = 0
        self.total = total
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def advance(self, length: int, now: float) -> None:
        """``length`` more bytes are done."""
        self.current += length
        if now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, self.current))
            while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_S:
                self._samples.popleft()

    def drop(self, length: int) -> None:
        """``length`` bytes turned out to need no work."""
        self.total -= length

    def snapshot(self, now: float) -> Progress:
        """The record as of ``now``."""
        since, done = self._samples[0]
        rate = (self.current - done) / (now - since) if now > since else 0.0
        eta = (self.total - self.current) / rate if rate > 0 else None
        return Progress(self.current, self.total, rate, 0.0 if self.current >= self.total else eta)
