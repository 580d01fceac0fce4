"""A bounded pool of 1 MiB buffers: what one job's copies can pin in memory, whatever the disk's size.

The buffer given back last is taken first, because it is still in the processor's cache.
"""

from __future__ import annotations

from blocklayer.base.buffers import aligned_buffer
from blocklayer.base.units import MIB
from blocklayer.jobs.signal import Signal

BUFFER_LENGTH = MIB
"""QEMU's largest buffered copy request; larger ones gain nothing and cost cache."""

BUFFERS_MAX = 128
"""128 MiB in flight a job, as in QEMU. Background work uses a fraction; the rest is for guests' writes."""


class BufferPool:
    """Buffers are page-aligned, for O_DIRECT; made when first needed, by the page."""

    __slots__ = ("_free", "_freed", "_made")

    def __init__(self) -> None:
        """Start without any."""
        self._free: list[memoryview] = []
        self._made = 0
        self._freed = Signal()

    async def take(self) -> memoryview:
        """A buffer of ``BUFFER_LENGTH`` bytes of any content; waits while ``BUFFERS_MAX`` are taken."""
        while not self._free:
            if self._made < BUFFERS_MAX:
                self._made += 1
                return aligned_buffer(BUFFER_LENGTH)
            await self._freed.wait()
        return self._free.pop()

    def give(self, buffer: memoryview) -> None:
        """Give a buffer back; nobody may be using it any more."""
        self._free.append(buffer)
        self._freed.notify()
