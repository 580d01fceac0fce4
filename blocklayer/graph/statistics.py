"""Counters of one node, as a cheap mutable record and a frozen snapshot for callers.

Latency is counted in buckets whose upper bounds are powers of four from 16 us on; requests that ``try_read`` answered
at once are in the first bucket, because nobody waited for them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

LATENCY_BOUNDS_S: tuple[float, ...] = tuple(16e-6 * 4**power for power in range(9))
"""Upper bounds in seconds: 16 us, 64 us, ... about 1 s; one more bucket holds what took longer."""


@dataclass(slots=True)
class OperationCounters:
    """One kind of request: ``operations`` that succeeded, their ``bytes``, ``errors``, and latency buckets."""

    operations: int = 0
    bytes: int = 0
    errors: int = 0
    seconds: float = 0.0
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))

    def record(self, length: int, seconds: float) -> None:
        """Count one that succeeded."""
        self.operations += 1
        self.bytes += length
        self.seconds += seconds
        self.latency[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1

    def copy(self) -> OperationCounters:
        """An independent copy."""
        return OperationCounters(self.operations, self.bytes, self.errors, self.seconds, list(self.latency))


@dataclass(slots=True)
class Statistics:
    """All counters of a node; ``write_end_max`` is the highest offset written so far, in bytes."""

    read: OperationCounters = field(default_factory=OperationCounters)
    write: OperationCounters = field(default_factory=OperationCounters)
    write_zeroes: OperationCounters = field(default_factory=OperationCounters)
    discard: OperationCounters = field(default_factory=OperationCounters)
    flush: OperationCounters = field(default_factory=OperationCounters)
    truncate: OperationCounters = field(default_factory=OperationCounters)
    write_end_max: int = 0

    def wrote(self, end: int) -> None:
        """A write, of any kind, reached up to ``end``."""
        self.write_end_max = max(self.write_end_max, end)

    def snapshot(self) -> Statistics:
        """The counters as they are now, independent of what comes."""
        return Statistics(
            read=self.read.copy(),
            write=self.write.copy(),
            write_zeroes=self.write_zeroes.copy(),
            discard=self.discard.copy(),
            flush=self.flush.copy(),
            truncate=self.truncate.copy(),
            write_end_max=self.write_end_max,
        )
