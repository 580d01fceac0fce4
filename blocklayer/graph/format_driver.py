"""FormatDriver: formats *map*, this base class does the I/O.

A format answers where guest bytes lie (``try_map``, ``load_map``), makes room for new ones (``allocate``), and drops
ranges (``zero_range``, ``discard_range``). Reading through to the backing node, splitting, copy-on-write of partial
clusters, and the locking between them exist here, once.

    read      map -> data from a child | backing node | zeroes | special (compressed)
    write     map -> in place, if the mapping says so
                  -> else under the cluster lock: map again, allocate, fill (old data around new), publish
    zero, discard   under the cluster lock

Invariants
- An allocating write, a zeroing and a discard of one cluster never run at once (``_locks``, whole clusters). Writes in
  place and reads take no lock; what they may still be using is protected by ``grace`` instead.
- A mapping is published only after the data it points to have been written; if that fails, the room is given back.
"""

from __future__ import annotations

import enum
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Protocol

from blocklayer.aio.range_lock import RangeLock
from blocklayer.base.buffers import ZEROES, fill_zero, is_zero
from blocklayer.base.errors import UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.ranges import Range, align_down, align_up, split
from blocklayer.base.units import MIB
from blocklayer.graph.driver import Driver
from blocklayer.graph.grace import GracePeriods

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklayer.base.errors import BlockError
    from blocklayer.graph.child import Child

ALLOCATE_MAX: Final = 2 * MIB
"""Longest range that one allocation covers (and that copy-on-write may have to join in memory), if clusters allow."""


class MapKind(enum.Enum):
    """Who answers for a range."""

    DATA = "data"
    BACKING = "backing"
    ZERO = "zero"
    SPECIAL = "special"


class Mapping(NamedTuple):
    """One answer for ``length`` bytes.

    DATA lie in ``child`` at ``host_offset``; ``in_place`` says that they may be overwritten there. SPECIAL data need
    ``read_special``, to which ``detail`` means something. A ZERO range with a ``host_offset`` keeps room there.
    """

    kind: MapKind
    length: int
    child: Child | None = None
    host_offset: int = 0
    in_place: bool = False
    detail: object = None


class Allocation(Protocol):
    """Room for guest bytes ``[offset, offset + length)`` at ``host_offset`` of ``child``, not visible yet.

    ``zeroed``: the room is known to read as zeroes. Exactly one of ``publish`` and ``abort`` is called; neither waits.
    """

    offset: int
    length: int
    child: Child
    host_offset: int
    zeroed: bool

    def publish(self) -> None:
        """Let the mapping point there."""

    def abort(self) -> None:
        """Give the room back."""


class FormatDriver(Driver):
    """Subclasses set ``backing`` and the ``geometry``-like attributes in their constructor."""

    is_format: ClassVar[bool] = True

    def __init__(self, *, backing: Child | None, unit: int, zero_unit: int) -> None:
        """``unit``: bytes that are allocated together; ``zero_unit``: bytes that can become zeroes together."""
        self.backing = backing
        self.unit = unit
        self.zero_unit = zero_unit
        self.grace = GracePeriods()
        self._locks = RangeLock()

    # -- what a format answers -----------------------------------------------------------------------------------

    @abstractmethod
    def try_map(self, offset: int, length: int) -> Mapping | None:
        """The longest run from ``offset``, at most ``length`` (> 0), or None if a table has to be loaded."""

    @abstractmethod
    async def load_map(self, offset: int, length: int) -> Mapping:
        """The same, loading what it takes."""

    async def read_special(self, mapping: Mapping, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, which lies inside one SPECIAL mapping."""
        raise UnsupportedError(
            f"driver {self.name!r} has no special data ({mapping.detail})", offset=offset, length=len(buffer)
        )

    @abstractmethod
    async def allocate(self, offset: int, length: int) -> Allocation:
        """Make room for a write of ``[offset, offset + length)``, which no mapping allows in place.

        Answers for a part that starts at or before ``offset`` and covers at least its first byte. Called under the lock.
        """

    @abstractmethod
    async def zero_range(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """Make whole zero units read as zeroes, or answer False if that takes writing. Called under the lock."""

    @abstractmethod
    async def discard_range(self, offset: int, length: int) -> None:
        """Drop whole units. Called under the lock."""

    async def prepare_write(self) -> None:
        """Called before anything is changed; may raise to refuse."""

    def is_prepared(self) -> bool:
        """Whether ``prepare_write`` would return at once."""
        return False

    # -- reading -------------------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """See ``Driver.try_read_into``: maps from cached tables, data from children that can."""
        length = len(buffer)
        mapping = self.try_map(offset, length)
        if mapping is None:
            return False
        if mapping.length >= length:
            return self._try_read_mapping(mapping, offset, buffer)
        done = 0
        while True:
            if not self._try_read_mapping(mapping, offset + done, buffer[done : done + mapping.length]):
                return False
            done += mapping.length
            if done >= length:
                return True
            following = self.try_map(offset + done, length - done)
            if following is None:
                return False
            mapping = following

    def _try_read_mapping(self, mapping: Mapping, offset: int, buffer: memoryview) -> bool:
        kind = mapping.kind
        if kind is MapKind.DATA and mapping.child is not None:
            return mapping.child.try_read_into(mapping.host_offset, buffer)
        if kind is MapKind.BACKING and self.backing is not None:
            return self.backing.try_read_into(offset, buffer)
        if kind is MapKind.SPECIAL:
            return False
        fill_zero(buffer)
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` run by run."""
        done, length = 0, len(buffer)
        token = self.grace.enter()
        try:
            while done < length:
                mapping = await self.map(offset + done, length - done)
                await self._read_mapping(mapping, offset + done, buffer[done : done + mapping.length])
                done += mapping.length
        finally:
            self.grace.leave(token)

    async def map(self, offset: int, length: int) -> Mapping:
        """``try_map``, or ``load_map``."""
        mapping = self.try_map(offset, length)
        return await self.load_map(offset, length) if mapping is None else mapping

    async def _read_mapping(self, mapping: Mapping, offset: int, buffer: memoryview) -> None:
        if mapping.kind is MapKind.DATA and mapping.child is not None:
            await mapping.child.read_into(mapping.host_offset, buffer)
        elif mapping.kind is MapKind.BACKING and self.backing is not None:
            await self.backing.read_into(offset, buffer)
        elif mapping.kind is MapKind.SPECIAL:
            await self.read_special(mapping, offset, buffer)
        else:
            fill_zero(buffer)

    # -- writing -------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Write run by run, in place where the mapping allows it."""
        await self.prepare_write()
        grace = self.grace
        while length := len(data):
            token = grace.enter()
            try:
                mapping = self.try_map(offset, length) or await self.load_map(offset, length)
                if mapping.in_place and mapping.child is not None:
                    done = mapping.length
                    await mapping.child.write(mapping.host_offset, data if done == length else data[:done])
                else:
                    done = 0
            finally:
                grace.leave(token)
            if not done:
                reach = min(length, max(ALLOCATE_MAX, self.unit) - offset % self.unit)
                done = await self._write_allocating(offset, data[:reach])
            if done == length:
                return
            offset, data = offset + done, data[done:]

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a write in place, in one run; see ``Driver.start_write``."""
        mapping = self.try_map(offset, len(data)) if self.is_prepared() else None
        if mapping is None or not mapping.in_place or mapping.length < len(data) or mapping.child is None:
            return False
        grace = self.grace
        token = grace.enter()

        def finished(error: BlockError | None) -> None:
            grace.leave(token)
            done(error)

        began = False
        try:
            began = mapping.child.start_write(mapping.host_offset, data, finished)
        finally:
            if not began:
                grace.leave(token)
        return began

    async def _write_allocating(self, offset: int, data: memoryview) -> int:
        """Write a first part of ``data`` to new room; answers its length, 0 if somebody made room while we waited."""
        start = align_down(offset, self.unit)
        length = align_up(offset + len(data), self.unit) - start
        hold = self._locks.try_hold(start, length)
        waited = hold is None
        if hold is None:
            hold = await self._locks.acquire(start, length)
        try:
            if waited and (await self.map(offset, len(data))).in_place:
                return 0
            token = self.grace.enter()
            try:
                return await self._write_to_new_room(offset, data)
            finally:
                self.grace.leave(token)
        finally:
            self._locks.release(hold)

    async def _write_to_new_room(self, offset: int, data: memoryview) -> int:
        allocation = await self.allocate(offset, len(data))
        try:
            room = allocation.offset + allocation.length - offset
            if room < len(data):
                data = data[:room]
            if room == len(data) and allocation.offset == offset:
                await allocation.child.write(allocation.host_offset, data)
            else:
                await self._fill(allocation, offset, data)
        except BaseException:
            allocation.abort()
            raise
        allocation.publish()
        return len(data)

    async def _fill(self, allocation: Allocation, offset: int, data: memoryview) -> None:
        """Write ``data`` and, around it, what the allocated range held before (copy-on-write)."""
        head = await self._old_data(Range(allocation.offset, offset - allocation.offset))
        behind = offset + len(data)
        tail = await self._old_data(Range(behind, allocation.offset + allocation.length - behind))
        if allocation.zeroed and is_zero(head) and is_zero(tail):
            await allocation.child.write(allocation.host_offset + len(head), data)
        else:
            await allocation.child.write(allocation.host_offset, memoryview(b"".join((head, data, tail))))

    async def _old_data(self, old: Range) -> bytearray:
        data = bytearray(old.length)
        inside = min(old.length, self.size - old.offset)
        if inside > 0:
            await self.read_into(old.offset, memoryview(data)[:inside])
        return data

    # -- zeroes and discards -------------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Whole zero units change their mapping; parts of units are written, unless they are zero already."""
        await self.prepare_write()
        inner = self._whole_units(offset, length, self.zero_unit)
        if not inner.length:
            await self._write_zero_data(offset, length)
            return
        await self._write_zero_data(offset, inner.offset - offset)
        await self._write_zero_data(inner.end, max(0, offset + length - inner.end))
        start, end = align_down(inner.offset, self.unit), align_up(inner.end, self.unit)
        async with self._locks.hold(start, end - start):
            done = await self.zero_range(inner.offset, inner.length, may_unmap=WriteFlags.MAY_UNMAP in flags)
        if not done:
            if WriteFlags.NO_FALLBACK in flags:
                raise UnsupportedError("this image has no fast way to write zeroes", offset=offset, length=length)
            await self._write_zero_data(inner.offset, inner.length)

    async def _write_zero_data(self, offset: int, length: int) -> None:
        for piece in split(offset, length, length_max=len(ZEROES)):
            if not await self._reads_as_zeroes(piece):
                await self.write(piece.offset, ZEROES[: piece.length], WriteFlags.NONE)

    async def _reads_as_zeroes(self, piece: Range) -> bool:
        """Whether the mapping alone says that the range is zero."""
        offset = piece.offset
        while offset < piece.end:
            mapping = await self.map(offset, piece.end - offset)
            through = mapping.kind is MapKind.BACKING and self.backing is not None and self.backing.size > offset
            if through or mapping.kind in (MapKind.DATA, MapKind.SPECIAL):
                return False
            offset += mapping.length
        return True

    async def discard(self, offset: int, length: int) -> None:
        """Drop whole units; parts of units stay as they are."""
        await self.prepare_write()
        inner = self._whole_units(offset, length, self.unit)
        if inner.length:
            async with self._locks.hold(inner.offset, inner.length):
                await self.discard_range(inner.offset, inner.length)

    def _whole_units(self, offset: int, length: int, unit: int) -> Range:
        """The whole units inside a range; the node's last unit is whole if the range reaches the end."""
        start = align_up(offset, unit)
        end = offset + length
        end = align_up(end, unit) if end == self.size else align_down(end, unit)
        return Range(start, max(0, end - start))

    # -- block status --------------------------------------------------------------------------------------------

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """From cached tables."""
        mapping = self.try_map(offset, length)
        return None if mapping is None else _extent(mapping, offset)

    async def block_status(self, offset: int, length: int) -> Extent:
        """From the mapping."""
        return _extent(await self.map(offset, length), offset)

    @property
    def cluster_size(self) -> int:
        """Bytes that are allocated together."""
        return self.unit


_EXTENT_KINDS: Final = {
    MapKind.DATA: ExtentKind.DATA,
    MapKind.SPECIAL: ExtentKind.DATA,
    MapKind.ZERO: ExtentKind.ZERO,
    MapKind.BACKING: ExtentKind.UNALLOCATED,
}


def _extent(mapping: Mapping, offset: int) -> Extent:
    child = mapping.child
    return Extent(
        offset,
        mapping.length,
        _EXTENT_KINDS[mapping.kind],
        host_offset=None if child is None else mapping.host_offset,
        host_node=None if child is None else child.node.name,
        compressed=mapping.kind is MapKind.SPECIAL,
    )
