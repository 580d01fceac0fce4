"""Changes of mappings: room for writes, zero clusters, discards, compressed clusters. All run under the cluster lock.

What a mapping lets go of is only handed to ``Allocator.free``, which waits until the change is durable and nobody can be
using the old place any more.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from typing import TYPE_CHECKING

from blocklayer.base.errors import CorruptImageError, IOFailedError
from blocklayer.base.ranges import align_down, align_up, split_aligned
from blocklayer.codec.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COPIED,
    ZERO,
    Mapping,
    decode_l2,
    encode_compressed,
    encode_data,
    subcluster_bits,
)
from blocklayer.codec.qcow2.features import Autoclear

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.entries import Run
    from blocklayer.drivers.qcow2.allocator import Clusters
    from blocklayer.drivers.qcow2.dirty import WordTable
    from blocklayer.drivers.qcow2.driver import Qcow2Driver
    from blocklayer.graph.child import Child

_RESERVED_ROOM = frozenset({Mapping.ZERO_HOST, Mapping.UNALLOCATED_HOST})


class ClusterAllocation:
    """Room for guest bytes in ``count`` clusters from ``host`` on; see ``format_driver.Allocation``.

    ``taken`` are clusters that are new, None if the mapping had room reserved already.
    """

    __slots__ = ("_driver", "_first", "_host", "_table", "_taken", "child", "host_offset", "length", "offset", "zeroed")

    def __init__(
        self, driver: Qcow2Driver, table: WordTable, offset: int, length: int, *, host: int, taken: Clusters | None
    ) -> None:
        """``table`` is pinned; ``host`` is the place of the cluster that holds ``offset``."""
        self._driver = driver
        self._table = table
        self._taken = taken
        self._host = host
        self._first = offset >> driver.geometry.cluster_bits & driver.geometry.l2_mask
        self.offset = offset
        self.length = length
        self.child: Child = driver.image.data
        self.host_offset = host + (offset & driver.geometry.cluster_mask)
        self.zeroed = taken is not None and taken.virgin

    def abort(self) -> None:
        """The data were not written: nothing points here, nothing will."""
        if self._taken is not None and self._taken.count:
            self._driver.allocator.untake(self._taken.offset, self._taken.count)
        self._driver.l2.unpin(self._table)

    def publish(self) -> None:
        """Point the L2 entries here, and let go of what they pointed to."""
        geometry = self._driver.geometry
        end = self.offset + self.length
        count = geometry.clusters_for(end - align_down(self.offset, geometry.cluster_size))
        if geometry.extended_l2:
            self._publish_extended(count, end)
        else:
            self._publish_plain(count)
        self._driver.l2.unpin(self._table)

    def _publish_plain(self, count: int) -> None:
        words, first, size = self._table.words, self._first, self._driver.geometry.cluster_size
        if self._taken is not None:
            for word in words[first : first + count]:
                if word:
                    drop(self._driver, word)
        entry = encode_data(self._host)
        if count == 1:
            words[first] = entry
        else:
            words[first : first + count] = array("Q", range(entry, entry + count * size, size))
        self._table.touch(first, count)

    def _publish_extended(self, count: int, end: int) -> None:
        geometry, words = self._driver.geometry, self._table.words
        start = align_down(self.offset, geometry.cluster_size)
        for number in range(count):
            index = 2 * (self._first + number)
            lower = max(self.offset, start + number * geometry.cluster_size)
            upper = min(end, start + (number + 1) * geometry.cluster_size)
            bits = _bits(self._driver, lower, upper - lower)
            if self._taken is not None and words[index]:
                drop(self._driver, words[index])
                words[index + 1] = 0
            words[index] = encode_data(self._host + number * geometry.cluster_size)
            words[index + 1] = (words[index + 1] | bits) & ~(bits << 32)
            self._table.touch(index, 2)


def _bits(driver: Qcow2Driver, offset: int, length: int) -> int:
    """Allocation bits of the subclusters of one cluster's range."""
    first = (offset & driver.geometry.cluster_mask) >> driver.geometry.subcluster_bits
    return subcluster_bits(first, length >> driver.geometry.subcluster_bits)


def drop(driver: Qcow2Driver, entry: int) -> None:
    """An L2 entry is being replaced: its host clusters lose a reference."""
    found = decode_l2(driver.geometry, entry)
    if found.mapping is Mapping.COMPRESSED:
        driver.allocator.free(*driver.compressed.references(found.host_offset, found.compressed_length))
        driver.compressed.forget()
    elif found.mapping in (Mapping.DATA, Mapping.ZERO_HOST) and not driver.geometry.data_file:
        driver.allocator.free(found.host_offset, 1)


def try_allocate_one(driver: Qcow2Driver, offset: int, length: int) -> ClusterAllocation | None:
    """As ``allocate``, at once, for what nearly every request needs: room for one cluster that had none."""
    geometry = driver.geometry
    start = offset & ~geometry.cluster_mask
    if geometry.extended_l2 or geometry.data_file or offset + length - start > geometry.cluster_size:
        return None
    table = driver.l2.try_writable_table(offset >> geometry.l1_shift)
    if table is None:
        return None
    try:
        if not table.words[offset >> geometry.cluster_bits & geometry.l2_mask]:
            taken = driver.allocator.try_take(1)
            if taken is not None:
                size, host = geometry.cluster_size, taken.offset
                return ClusterAllocation(driver, table, start, size, host=host, taken=taken)
    except BaseException:
        driver.l2.unpin(table)
        raise
    driver.l2.unpin(table)
    return None


async def allocate(driver: Qcow2Driver, offset: int, length: int) -> ClusterAllocation:
    """Room for a write; reserved room is used where there is some."""
    l1_index = offset >> driver.geometry.l1_shift
    table = driver.l2.try_writable_table(l1_index) or await driver.l2.writable_table(l1_index)
    try:
        return await _allocate_in(driver, table, offset, length)
    except BaseException:
        driver.l2.unpin(table)
        raise


async def _allocate_in(driver: Qcow2Driver, table: WordTable, offset: int, length: int) -> ClusterAllocation:
    geometry = driver.geometry
    run = driver.run(table, offset, length)
    start = align_down(offset, geometry.cluster_size)
    if run.mapping in _RESERVED_ROOM and run.copied:
        low = align_down(offset, geometry.subcluster_size)
        high = align_up(offset + run.length, geometry.subcluster_size)
        host = align_down(run.host_offset, geometry.cluster_size)
        if driver.image.holds_metadata(host, geometry.clusters_for(high - start)):
            raise CorruptImageError(f"zero clusters keep room at {host:#x}, where metadata are", offset=host)
        return ClusterAllocation(driver, table, low, high - low, host=host, taken=None)
    unit = geometry.subcluster_size if run.mapping in (Mapping.UNALLOCATED, Mapping.ZERO) else geometry.cluster_size
    low, high = align_down(offset, unit), align_up(offset + run.length, unit)
    if geometry.extended_l2 and run.mapping is not Mapping.UNALLOCATED:
        low, high = start, min(high, start + geometry.cluster_size) if unit != geometry.cluster_size else high
        low, high = start, align_up(high, geometry.cluster_size)
    if geometry.data_file:
        return ClusterAllocation(driver, table, low, high - low, host=start, taken=None)
    count = geometry.clusters_for(high - start)
    taken = driver.allocator.try_take(count) or await driver.allocator.take(count)
    high = min(high, start + taken.count * geometry.cluster_size)
    return ClusterAllocation(driver, table, low, high - low, host=taken.offset, taken=taken)


# -- zeroes and discards -----------------------------------------------------------------------------------------


async def zero_range(driver: Qcow2Driver, offset: int, length: int, *, may_unmap: bool) -> bool:
    """Whole subclusters become zero; False if that needs writing."""
    if driver.geometry.version < 3 and driver.backing is not None:
        return False
    if Autoclear.DATA_FILE_RAW in driver.image.header.autoclear:
        return False
    if driver.geometry.extended_l2 and await _cuts_compressed(driver, offset, length):
        return False
    for piece in split_aligned(offset, length, unit=driver.geometry.l2_coverage):
        await _change_table(driver, piece.offset, piece.length, keep_room=not may_unmap, discard=False)
    return True


async def discard_range(driver: Qcow2Driver, offset: int, length: int) -> None:
    """Whole clusters are dropped; over a backing node they must read as zeroes, which version 2 cannot say.

    A raw data file must read like the image, so it keeps what it holds.
    """
    if driver.geometry.version < 3 and driver.backing is not None:
        return
    if Autoclear.DATA_FILE_RAW in driver.image.header.autoclear:
        return
    for piece in split_aligned(offset, length, unit=driver.geometry.l2_coverage):
        await _change_table(driver, piece.offset, piece.length, keep_room=False, discard=True)
    if driver.geometry.data_file and driver.pass_discard:
        await punch(driver.image.data, offset, length)


async def punch(child: Child, offset: int, length: int) -> None:
    """Give the space of a range back to the file. A hint: if that fails, the space stays taken and nothing is lost."""
    with suppress(IOFailedError):
        await child.discard(offset, length)


async def forget_range(driver: Qcow2Driver, offset: int, end: int) -> None:
    """Whole clusters become unallocated, whatever they were: behind the end of the disk nothing is to be found."""
    geometry, width = driver.geometry, driver.geometry.l2_entry_words
    tables = range(offset >> geometry.l1_shift, geometry.l1_entries_for(end))
    for l1_index in tables[: max(0, len(driver.l2.l1.words) - tables.start)]:
        if not driver.l2.l1.words[l1_index]:
            continue
        start = max(offset, l1_index << geometry.l1_shift)
        first = (start >> geometry.cluster_bits & geometry.l2_mask) * width
        count = geometry.clusters_for(min(end, l1_index + 1 << geometry.l1_shift) - start) * width
        known = await driver.l2.table(l1_index)
        if known is None or not any(known.words[first : first + count]):
            continue
        table = await driver.l2.writable_table(l1_index)
        for entry in filter(None, table.words[first : first + count : width]):
            drop(driver, entry)
        table.words[first : first + count] = array("Q", bytes(8 * count))
        table.touch(first, count)
        driver.l2.unpin(table)


async def _cuts_compressed(driver: Qcow2Driver, offset: int, length: int) -> bool:
    """Whether an end of the range lies inside a compressed cluster."""
    edges = [edge for edge in (offset, offset + length) if edge & driver.geometry.cluster_mask]
    for edge in edges:
        table = await driver.l2.table(edge >> driver.geometry.l1_shift)
        if table is not None and driver.run(table, edge, 1).mapping is Mapping.COMPRESSED:
            return True
    return False


async def _change_table(driver: Qcow2Driver, offset: int, length: int, *, keep_room: bool, discard: bool) -> None:
    """Zero or drop a range that lies in one L2 table, run by run: what reads as zeroes already costs nothing."""
    l1_index = offset >> driver.geometry.l1_shift
    if driver.backing is None and await driver.l2.table(l1_index) is None:
        return
    table = await driver.l2.writable_table(l1_index)
    try:
        end = offset + length
        while offset < end:
            run = driver.run(table, offset, end - offset)
            through = run.mapping is Mapping.UNALLOCATED and driver.backing is not None
            if driver.geometry.extended_l2:
                _zero_extended_run(driver, table, offset, run, keep_room=keep_room, through=through)
            elif through or run.mapping not in (Mapping.ZERO, Mapping.UNALLOCATED):
                _zero_plain_run(driver, table, offset, run, keep_room=keep_room and not discard)
            offset += run.length
    finally:
        driver.l2.unpin(table)


def _zero_plain_run(driver: Qcow2Driver, table: WordTable, offset: int, run: Run, *, keep_room: bool) -> None:
    """Entries of one run of whole clusters become zero clusters; version 2 has none and drops them."""
    geometry = driver.geometry
    first, count = offset >> geometry.cluster_bits & geometry.l2_mask, geometry.clusters_for(run.length)
    words, has_zero = table.words, geometry.version > 2
    if has_zero and run.mapping is not Mapping.COMPRESSED and run.copied and (keep_room or geometry.data_file):
        if run.mapping is Mapping.ZERO_HOST:
            return
        fresh = array("Q", (word | ZERO for word in words[first : first + count]))
    else:
        if run.mapping is Mapping.COMPRESSED:
            drop(driver, words[first])
        elif run.mapping is not Mapping.UNALLOCATED and not geometry.data_file:
            driver.allocator.free(run.host_offset, count)
        fresh = array("Q", [ZERO if has_zero else 0]) * count
    words[first : first + count] = fresh
    table.touch(first, count)


def _zero_extended_run(
    driver: Qcow2Driver, table: WordTable, offset: int, run: Run, *, keep_room: bool, through: bool
) -> None:
    """The same with subclusters, of which a run may hold some only."""
    if run.mapping is Mapping.ZERO or (run.mapping is Mapping.UNALLOCATED and not through):
        return
    geometry = driver.geometry
    for piece in split_aligned(offset, run.length, unit=geometry.cluster_size):
        index = piece.offset >> geometry.cluster_bits & geometry.l2_mask
        bits = _bits(driver, piece.offset, piece.length)
        whole = piece.length == geometry.cluster_size
        _zero_extended(driver, table, index, bits, keep_room=keep_room or not whole)


def _zero_extended(driver: Qcow2Driver, table: WordTable, index: int, bits: int, *, keep_room: bool) -> None:
    entry, bitmap = table.words[2 * index], table.words[2 * index + 1]
    found = decode_l2(driver.geometry, entry)
    whole = bits == ALL_ALLOCATED and not driver.geometry.data_file
    lets_go = found.mapping is Mapping.DATA and not (keep_room and found.copied)
    if whole and (lets_go or found.mapping is Mapping.COMPRESSED):
        drop(driver, entry)
        entry, bitmap = 0, ALL_ZERO
    bitmap = (bitmap & ~bits) | bits << 32
    if (entry, bitmap) != (table.words[2 * index], table.words[2 * index + 1]):
        table.words[2 * index], table.words[2 * index + 1] = entry, bitmap
        table.touch(2 * index, 2)


# -- compressed clusters -----------------------------------------------------------------------------------------


async def store_compressed(driver: Qcow2Driver, offset: int, packed: bytes) -> None:
    """Store one packed cluster and point the guest's cluster at it."""
    geometry = driver.geometry
    table = await driver.l2.writable_table(offset >> geometry.l1_shift)
    try:
        host = await driver.compressed.place(driver.allocator, len(packed))
        try:
            entry = encode_compressed(geometry, host, len(packed))
            await driver.image.file.write(host, memoryview(packed))
        except BaseException:
            driver.allocator.untake(*driver.compressed.references(host, len(packed)))
            driver.compressed.forget()
            raise
        index = (offset >> geometry.cluster_bits & geometry.l2_mask) * geometry.l2_entry_words
        if table.words[index]:
            drop(driver, table.words[index])
        table.words[index] = entry & ~COPIED
        if geometry.extended_l2:
            table.words[index + 1] = 0
        table.touch(index, geometry.l2_entry_words)
    finally:
        driver.l2.unpin(table)
