"""Resizing the guest's disk: L1 grows by moving, shrinking drops what is cut. Also the room that growing may preallocate."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklayer.base.buffers import ZEROES
from blocklayer.base.errors import LimitError, OptionError, UnsupportedError
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.ranges import align_up, split
from blocklayer.base.units import SECTOR
from blocklayer.codec.qcow2.features import Autoclear
from blocklayer.codec.qcow2.plan import Role
from blocklayer.drivers.qcow2 import changes
from blocklayer.drivers.qcow2.dirty import WordTable
from blocklayer.graph.format_driver import ALLOCATE_MAX, MapKind

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.driver import Qcow2Driver
    from blocklayer.graph.format_driver import Allocation


async def resize(driver: Qcow2Driver, size: int, preallocation: Preallocation) -> None:
    """Set the size; durable when this returns. After an error the disk has its old size or the new one.

    The node holds off all requests on what is cut or added, so that no cluster there needs a lock.
    """
    if size % SECTOR:
        raise OptionError(f"the size of a qcow2 image is a multiple of {SECTOR} bytes, not {size}")
    if driver.image.header.nb_snapshots:
        raise UnsupportedError("the image has internal snapshots, which keep the size")
    old = driver.size
    if size < old:
        if preallocation is not Preallocation.OFF:
            raise OptionError(f"a disk that shrinks cannot be resized with preallocation={preallocation.value}")
        await _shrink(driver, size, old)
    elif size > old:
        await _grow(driver, size, old, preallocation)


async def _shrink(driver: Qcow2Driver, size: int, old: int) -> None:
    """First the size, durably; then what was cut is given back. Whoever grows the disk looks for what a crash left."""
    driver.image.change_header(size=size)
    try:
        await driver.flush()
    except BaseException:
        driver.image.change_header(size=old)
        raise
    driver.set_size(size)
    async with driver.judged:
        await changes.forget_range(driver, align_up(size, driver.unit), align_up(old, driver.unit))
    await driver.flush()
    if driver.geometry.data_file:
        await driver.image.data.truncate(size)


async def _grow(driver: Qcow2Driver, size: int, old: int, preallocation: Preallocation) -> None:
    """What is added is made zero durably before the size changes.

    Neither the backing node may show through, nor what lies behind the old end: in its cluster, or after a crash.
    """
    if size > driver.geometry.size_max:
        raise LimitError(f"{size} bytes need an L1 table of more than 32 MiB; use larger clusters")
    if Autoclear.DATA_FILE_RAW in driver.image.header.autoclear and preallocation is Preallocation.OFF:
        preallocation = Preallocation.METADATA  # the data file is the disk: all of it must be mapped
    await _grow_l1(driver, size)
    if driver.geometry.data_file and driver.image.data.size < size:
        await driver.image.data.truncate(size)
    whole = align_up(old, driver.unit)
    driver.set_size(size)
    try:
        async with driver.judged:
            await changes.forget_range(driver, whole, align_up(size, driver.unit))
        backing = driver.backing
        stale_end = max(whole, 0 if backing is None else backing.size)
        if stale_end > old:
            await driver.write_zeroes(old, min(size, stale_end) - old, WriteFlags.NONE)
        if preallocation is not Preallocation.OFF:
            await _preallocate(driver, whole, size, preallocation)
        await driver.flush()
    except BaseException:
        driver.set_size(old)
        raise
    driver.image.change_header(size=size)
    await driver.flush()


async def _grow_l1(driver: Qcow2Driver, size: int) -> None:
    """Move L1 to a larger place if it is too short."""
    geometry = driver.geometry
    needed = geometry.l1_entries_for(size)
    table = driver.l2.l1
    if needed <= len(table.words):
        return
    async with driver.judged:
        taken = await driver.allocator.take_exactly(geometry.clusters_for(8 * needed))
    words = array("Q", table.words)
    words.extend(array("Q", bytes(8 * (needed - len(words)))))
    driver.l2.l1 = WordTable(Role.MAPPING, taken.offset, words, fresh=True)
    driver.image.change_header(l1_table_offset=taken.offset, l1_size=needed)
    driver.image.note_metadata(taken.offset, taken.count)
    if len(table.words):
        old_count = geometry.clusters_for(8 * len(table.words))
        driver.image.forget_metadata(table.offset, old_count)
        driver.allocator.free(table.offset, old_count)


async def _preallocate(driver: Qcow2Driver, start: int, end: int, preallocation: Preallocation) -> None:
    """Give each cluster of a range that has none a place that reads as zeroes."""
    while start < end:
        mapping = await driver.map(start, end - start)
        if mapping.kind in (MapKind.DATA, MapKind.SPECIAL):
            start += mapping.length
            continue
        room = await driver.allocate(start, min(mapping.length, ALLOCATE_MAX))
        try:
            await _fill_with_zeroes(room, preallocation)
        except BaseException:
            room.abort()
            raise
        room.publish()
        start = room.offset + room.length


async def _fill_with_zeroes(room: Allocation, preallocation: Preallocation) -> None:
    if preallocation is Preallocation.FULL:
        for piece in split(room.host_offset, room.length, length_max=len(ZEROES)):
            await room.child.write(piece.offset, ZEROES[: piece.length])
    elif preallocation is Preallocation.FALLOC or not room.zeroed:
        await room.child.write_zeroes(room.host_offset, room.length)
    else:  # the file must reach as far as the clusters
        await room.child.write(room.host_offset + room.length - SECTOR, ZEROES[:SECTOR])
