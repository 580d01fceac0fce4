"""Repair of an open image: counts and flags come to fit the references, bits are cleared when nothing wrong is left."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import CorruptImageError, IOFailedError, ReadOnlyError
from blocklayer.base.units import MIB
from blocklayer.codec.qcow2.entries import COPIED
from blocklayer.codec.qcow2.features import Incompatible
from tests.helpers.qcow2_disk import (
    assert_sound,
    check_bytes,
    file_of,
    header_of,
    memory_graph,
    new_image,
    open_image,
    opened,
    qcow2,
)
from tests.helpers.scripted import FailNth
from tests.helpers.virtual_time import virtual_time

CLUSTER = 4096
SIZE = MIB


async def image_with_data() -> tuple[bytearray, int, int]:
    """A closed image with ten data clusters; where its L2 table and its refcount block are."""
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * 10 * CLUSTER)
        table = qcow2(disk).l2.cached[0].offset
    return content, table, header_of(content).refcount_table_offset + CLUSTER


def set_count(content: bytearray, block: int, place: int, count: int) -> None:
    """Overwrite a 16-bit counter."""
    at = block + place // CLUSTER * 2
    content[at : at + 2] = count.to_bytes(2, "big")


def place_of(content: bytearray, table: int, number: int) -> int:
    """Host offset of a data cluster."""
    return int.from_bytes(content[table + 8 * number : table + 8 * number + 8], "big") & ~COPIED


@virtual_time
async def test_counts_that_are_wrong_both_ways_are_put_right() -> None:
    content, table, block = await image_with_data()
    set_count(content, block, place_of(content, table, 0), 0)
    set_count(content, block, place_of(content, table, 1), 5)
    content[79] |= Incompatible.CORRUPT.value
    async with opened(content, repairing=True) as disk:
        driver = qcow2(disk)
        result = await driver.check()
        assert (result.corruptions > 0, result.leaks.count > 0) == (True, True)
        leaks, corruptions = await driver.repair(result)
        assert leaks == 1
        assert corruptions >= 1
    assert not header_of(content).is_corrupt
    assert_sound(content)
    async with opened(content) as disk:
        assert await disk.read(0, 10 * CLUSTER) == b"x" * 10 * CLUSTER


@virtual_time
async def test_leaks_alone_leave_corruptions_and_the_bit_as_they_are() -> None:
    content, table, block = await image_with_data()
    set_count(content, block, place_of(content, table, 0), 0)
    set_count(content, block, 200 * CLUSTER, 1)
    content.extend(bytes(201 * CLUSTER - len(content)))
    content[79] |= Incompatible.CORRUPT.value
    async with opened(content, repairing=True) as disk:
        driver = qcow2(disk)
        assert await driver.repair(await driver.check(), leaks_only=True) == (1, 0)
    result = check_bytes(content)
    assert (result.leaks.count, result.corruptions > 0) == (0, True)
    assert header_of(content).is_corrupt


@virtual_time
async def test_a_lost_refcount_table_is_rebuilt() -> None:
    content, _, _ = await image_with_data()
    header = header_of(content)
    content[header.refcount_table_offset : header.refcount_table_offset + CLUSTER] = bytes(CLUSTER)
    content[79] |= Incompatible.DIRTY.value
    async with opened(content) as disk:
        assert_sound(content)
        assert await disk.read(0, 10 * CLUSTER) == b"x" * 10 * CLUSTER
        await disk.write(20 * CLUSTER, b"y" * CLUSTER)
    assert header_of(content).refcount_table_offset != header.refcount_table_offset
    assert_sound(content)


@virtual_time
async def test_broken_mappings_are_not_repaired_and_nothing_is_changed() -> None:
    content, table, _ = await image_with_data()
    content[table : table + 8] = b"\x80\x00\x00\x00\x00\x00\x01\x02"
    before = bytes(content)
    async with opened(content, repairing=True) as disk:
        driver = qcow2(disk)
        with pytest.raises(CorruptImageError, match="cannot repair"):
            await driver.repair(await driver.check())
    assert content == before


@virtual_time
async def test_a_disk_that_is_opened_for_repairing_refuses_guest_writes() -> None:
    content, _, _ = await image_with_data()
    content[79] |= Incompatible.CORRUPT.value | Incompatible.DIRTY.value
    before = bytes(content)
    async with opened(content, repairing=True) as disk:
        assert await disk.read(0, CLUSTER) == b"x" * CLUSTER
        with pytest.raises(ReadOnlyError, match="for repairing"):
            await disk.write(0, b"y")
    assert content == before


@virtual_time
async def test_a_repair_that_is_cut_off_anywhere_can_be_done_again() -> None:
    base, table, block = await image_with_data()
    set_count(base, block, place_of(base, table, 0), 0)
    header = header_of(base)
    rebuilt = bytearray(base)
    rebuilt[header.refcount_table_offset : header.refcount_table_offset + 8] = bytes(8)
    for damaged in (base, rebuilt):
        damaged[79] |= Incompatible.DIRTY.value
        nth, done = 1, False
        while not done:
            content = bytearray(damaged)
            async with memory_graph() as graph:
                script = FailNth("any", nth)
                options = {"driver": "memfile", "content": content, "script": script}
                try:
                    disk = await graph.open({"driver": "qcow2", "file": options})
                    await disk.close()
                except IOFailedError:
                    pass
                done = script.seen < nth
            async with opened(content) as disk:
                assert await disk.read(0, 10 * CLUSTER) == b"x" * 10 * CLUSTER
            assert_sound(content, leaks=True)
            nth += 1
        assert nth > 5


@virtual_time
async def test_a_reader_of_a_dirty_image_repairs_nothing() -> None:
    content, table, block = await image_with_data()
    set_count(content, block, place_of(content, table, 0), 0)
    content[79] |= Incompatible.DIRTY.value
    before = bytes(content)
    async with memory_graph() as graph:
        disk = await open_image(graph, content, read_only=True)
        assert await disk.read(0, 10 * CLUSTER) == b"x" * 10 * CLUSTER
        assert file_of(disk).log == []
        await disk.close()
    assert content == before
