"""The copy bitmap of a job: one bit a cluster, 1 = still to copy.

Owned by layer ``bitmap``: no I/O, no tasks. Indices are clusters, never bytes; runs are half-open ``[first, last)``.
All operations work on whole runs (memset, memcmp, popcount inside ``bitarray``), so that a run of a million clusters
costs microseconds.

Invariants
- ``remaining`` is the number of set bits; it is kept, not counted.
- Bits are cleared when a copy starts (``clear``) and set again if it failed (``restore``).
"""

from __future__ import annotations

from bitarray import bitarray

from blocklayer.base.errors import LimitError

CLUSTERS_MAX = 1 << 32
"""512 MiB of memory: disks up to 256 TiB at 64 KiB a cluster. A larger disk needs larger clusters."""


class CopyBitmap:
    """``clusters`` bits, all set at first."""

    __slots__ = ("_bits", "clusters", "remaining")

    def __init__(self, clusters: int) -> None:
        """Ask for every cluster. Raises ``LimitError`` for more than ``CLUSTERS_MAX``."""
        if clusters > CLUSTERS_MAX:
            message = f"{clusters} clusters are more than a copy bitmap may have ({CLUSTERS_MAX}); use larger clusters"
            raise LimitError(message)
        self._bits = bitarray(clusters)
        self._bits.setall(1)
        self.clusters = clusters
        self.remaining = clusters

    def __getitem__(self, cluster: int) -> bool:
        """Whether ``cluster`` is still to copy."""
        return bool(self._bits[cluster])

    def first_set(self, first: int, last: int) -> int:
        """The first cluster in ``[first, last)`` that is still to copy, or -1."""
        return self._bits.find(1, first, last)

    def first_clear(self, first: int, last: int) -> int:
        """The first cluster in ``[first, last)`` that needs no copy, or ``last``."""
        found = self._bits.find(0, first, last)
        return last if found < 0 else found

    def next_run(self, first: int, last: int, *, length_max: int) -> tuple[int, int] | None:
        """The first run of set bits in ``[first, last)``, cut at ``length_max`` clusters, or None."""
        start = self._bits.find(1, first, last)
        if start < 0:
            return None
        return start, self.first_clear(start, min(last, start + length_max))

    def count(self, first: int, last: int) -> int:
        """How many clusters in ``[first, last)`` are still to copy."""
        return self._bits.count(1, first, last)

    def clear(self, first: int, last: int) -> int:
        """Ask no more for ``[first, last)``; answers how many bits that cleared."""
        cleared = self._bits.count(1, first, last)
        self._bits[first:last] = 0
        self.remaining -= cleared
        return cleared

    def restore(self, first: int, last: int) -> None:
        """Ask for ``[first, last)`` again."""
        self.remaining += (last - first) - self._bits.count(1, first, last)
        self._bits[first:last] = 1
