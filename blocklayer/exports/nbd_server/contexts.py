"""Metadata contexts: what BLOCK_STATUS tells about a disk. One class for each; a dirty bitmap is one more.

A context answers with runs (length, flags), from the start of the range on, without gaps.
Source: NBD, "Metadata querying"; the qemu: contexts are QEMU's (docs/interop/nbd.txt).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from blocklayer.aio.breath import Breather
from blocklayer.codec.nbd.protocol import ALLOCATION_DEPTH, BASE_ALLOCATION, AllocationState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blocklayer.base.extents import Extent
    from blocklayer.exports.nbd_server.disk import Disk


class Run(NamedTuple):
    """``length`` bytes with the same ``flags``; what these mean is up to the context."""

    length: int
    flags: int


class MetaContext(Protocol):
    """One context of one export."""

    @property
    def name(self) -> str:
        """As clients ask for it, like ``base:allocation``."""

    def runs(self, offset: int, length: int) -> AsyncIterator[Run]:
        """The range from its start on, without gaps; neighbours may be alike."""


class BaseAllocation:
    """``base:allocation``: where the holes are, and what reads as zeroes."""

    name = BASE_ALLOCATION

    def __init__(self, disk: Disk) -> None:
        """Of ``disk``."""
        self._disk = disk

    async def runs(self, offset: int, length: int) -> AsyncIterator[Run]:
        """See ``MetaContext``."""
        async for extent in self._disk.extents(offset, length):
            yield Run(extent.length, allocation_flags(extent))


class AllocationDepth:
    """``qemu:allocation-depth``: which layer of the chain holds the range; 1 is the top, 0 is none."""

    name = ALLOCATION_DEPTH

    def __init__(self, disk: Disk) -> None:
        """Of ``disk``."""
        self._disk = disk

    async def runs(self, offset: int, length: int) -> AsyncIterator[Run]:
        """See ``MetaContext``."""
        async for extent in self._disk.extents(offset, length):
            yield Run(extent.length, extent.depth + 1 if extent.present and extent.is_allocated else 0)


def allocation_flags(extent: Extent) -> int:
    """An extent in the words of ``base:allocation``."""
    if not extent.is_zero:
        return 0
    return AllocationState.ZERO if extent.unwritten else AllocationState.ZERO | AllocationState.HOLE


async def joined_runs(context: MetaContext, offset: int, length: int, *, count_max: int) -> list[Run]:
    """The first ``count_max`` runs of a range, neighbours with the same flags made one."""
    found: list[Run] = []
    breather = Breather()
    async for run in context.runs(offset, length):
        await breather.breathe()
        if found and found[-1].flags == run.flags:
            found[-1] = Run(found[-1].length + run.length, run.flags)
        elif len(found) == count_max:
            break
        else:
            found.append(run)
    return found
