"""Resizing the guest's disk: L1 grows by moving, shrinking drops what is cut."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklayer.base.errors import LimitError, OptionError, UnsupportedError
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.ranges import align_up
from blocklayer.base.units import SECTOR
from blocklayer.codec.qcow2.plan import Role
from blocklayer.drivers.qcow2.dirty import WordTable

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.driver import Qcow2Driver


async def resize(driver: Qcow2Driver, size: int, preallocation: Preallocation) -> None:
    """Set the size; durable when this returns."""
    if size % SECTOR:
        raise OptionError(f"the size of a qcow2 image is a multiple of {SECTOR} bytes, not {size}")
    if preallocation is not Preallocation.OFF:
        raise UnsupportedError(f"a qcow2 image cannot be resized with preallocation={preallocation.value}")
    if driver.image.header.nb_snapshots:
        raise UnsupportedError("the image has internal snapshots, which keep the size")
    old = driver.size
    if size < old:
        await _shrink(driver, size, old)
    elif size > old:
        await _grow(driver, size, old)


async def _shrink(driver: Qcow2Driver, size: int, old: int) -> None:
    start = align_up(size, driver.unit)
    end = align_up(old, driver.unit)
    if size % driver.unit:
        await driver.write_zeroes(size, min(start, old) - size, WriteFlags.NONE)
    if end > start:
        await driver.discard_range(start, end - start)
    driver.image.change_header(size=size)
    driver.set_size(size)
    await driver.flush()


async def _grow(driver: Qcow2Driver, size: int, old: int) -> None:
    geometry = driver.geometry
    if size > geometry.size_max:
        raise LimitError(f"{size} bytes need an L1 table of more than 32 MiB; use larger clusters")
    needed = geometry.l1_entries_for(size)
    table = driver.l2.l1
    if needed > len(table.words):
        old_offset, count = table.offset, geometry.clusters_for(8 * max(1, len(table.words)))
        taken = await driver.allocator.take_exactly(geometry.clusters_for(8 * needed))
        words = array("Q", table.words)
        words.extend(array("Q", bytes(8 * (needed - len(words)))))
        driver.l2.l1 = WordTable(Role.MAPPING, taken.offset, words, fresh=True)
        driver.image.change_header(l1_table_offset=taken.offset, l1_size=needed)
        if len(table.words):
            driver.allocator.free(old_offset, count)
    driver.image.change_header(size=size)
    driver.set_size(size)
    backing = driver.backing
    if backing is not None and backing.size > old:
        await driver.write_zeroes(old, min(size, backing.size) - old, WriteFlags.NONE)
    await driver.flush()
