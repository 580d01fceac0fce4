"""L2 tables: loaded once, kept within bounds, never lost while they are dirty or needed, copied when a snapshot shares them."""

from __future__ import annotations

import asyncio
import random
import tracemalloc

import pytest

from blocklayer.base.errors import IOFailedError
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.qcow2.entries import COPIED
from blocklayer.drivers.qcow2.l2_tables import TABLES_MIN
from tests.helpers.qcow2_disk import (
    assert_sound,
    file_of,
    header_of,
    memory_graph,
    new_image,
    open_image,
    opened,
    qcow2,
)
from tests.helpers.scripted import FailNth, fail_on
from tests.helpers.virtual_time import virtual_time

CLUSTER = 512
COVERAGE = CLUSTER * CLUSTER // 8
SIZE = 64 * COVERAGE


@virtual_time
async def test_a_table_is_read_once_however_many_want_it() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * CLUSTER)
    async with opened(content) as disk:
        script = file_of(disk).script = FailNth("read", -1)
        await asyncio.gather(*(disk.block_status(CLUSTER * number, CLUSTER) for number in range(20)))
        assert script.seen == 1
        assert await disk.block_status(SIZE // 2, CLUSTER)
        assert script.seen == 1, "where L1 has no table nothing is read"


@pytest.mark.parametrize(("cache_bytes", "tables"), [(0, TABLES_MIN), (8 * CLUSTER, 8)])
@virtual_time
async def test_the_cache_is_bounded_in_bytes_whatever_the_load(cache_bytes: int, tables: int) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    source, model = random.Random(1), bytearray(SIZE)
    async with opened(content, l2_cache_size=cache_bytes) as disk:
        for _ in range(600):
            offset, length = source.randrange(SIZE - 2000), source.randrange(1, 2000)
            if source.random() < 0.5:
                data = source.randbytes(length)
                await disk.write(offset, data)
                model[offset : offset + length] = data
            else:
                assert await disk.read(offset, length) == model[offset : offset + length]
            assert len(qcow2(disk).l2.cached) <= tables
        assert await disk.read(0, SIZE) == model
    assert_sound(content)


@virtual_time
async def test_memory_stays_bounded_under_a_large_random_load() -> None:
    """A disk whose tables would take 4 MiB: the caches were told to take a sixteenth."""
    content = new_image(256 * MIB, cluster_size=CLUSTER)
    source = random.Random(2)
    async with opened(content, l2_cache_size=256 * KIB, refcount_cache_size=64 * KIB) as disk:
        content.extend(bytes(4 * MIB))
        file_of(disk).log = Forgetful()
        tracemalloc.start()
        try:
            before = len(content)
            for _ in range(1500):
                await disk.write(source.randrange(256 * MIB // CLUSTER) * CLUSTER, b"x" * CLUSTER)
            held = tracemalloc.get_traced_memory()[1] - (len(content) - before)
        finally:
            tracemalloc.stop()
    assert held < 8 * MIB


class Forgetful(list):
    """A log that keeps nothing."""

    def append(self, _event: object) -> None:
        pass


@virtual_time
async def test_a_dirty_table_is_written_before_it_is_dropped_and_reads_back() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, l2_cache_size=0) as disk:
        for number in range(3 * TABLES_MIN):
            await disk.write(number * COVERAGE, bytes([number + 1]) * CLUSTER)
        for number in range(3 * TABLES_MIN):
            assert await disk.read(number * COVERAGE, CLUSTER) == bytes([number + 1]) * CLUSTER
    assert_sound(content)


@virtual_time
async def test_more_allocations_at_once_than_the_cache_has_tables_all_end_well() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, l2_cache_size=0, refcount_cache_size=0) as disk:
        file_of(disk).script = FailNth("any", -1)
        await asyncio.gather(*(disk.write(number * COVERAGE + 100, bytes([number + 1]) * 1000) for number in range(40)))
        for number in range(40):
            assert await disk.read(number * COVERAGE + 100, 1000) == bytes([number + 1]) * 1000
    assert_sound(content)


@virtual_time
async def test_when_dirty_tables_cannot_be_written_a_request_fails_and_nothing_is_lost() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, l2_cache_size=0) as disk:
        for number in range(TABLES_MIN):
            await disk.write(number * COVERAGE, bytes([number + 1]) * CLUSTER)
        file_of(disk).script = fail_on("write", times=1000)
        with pytest.raises(IOFailedError):
            await disk.write(20 * COVERAGE, b"x" * CLUSTER)
        file_of(disk).script = None
        for number in range(TABLES_MIN):
            assert await disk.read(number * COVERAGE, CLUSTER) == bytes([number + 1]) * CLUSTER
        await disk.write(20 * COVERAGE, b"x" * CLUSTER)
        assert await disk.read(20 * COVERAGE, CLUSTER) == b"x" * CLUSTER
    assert_sound(content)


@virtual_time
async def test_a_table_that_cannot_be_read_is_tried_again() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * CLUSTER)
    async with opened(content) as disk:
        file_of(disk).script = fail_on("read")
        with pytest.raises(IOFailedError):
            await disk.read(0, 1)
        assert await disk.read(0, 1) == b"x"


@virtual_time
async def test_a_table_that_a_snapshot_shares_is_copied_before_it_changes() -> None:
    """As QEMU leaves an image with a snapshot: flags cleared, counts of two."""
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"s" * 3 * CLUSTER)
        table = qcow2(disk).l2.cached[0].offset
        places = [word & ~COPIED for word in qcow2(disk).l2.cached[0].words[:3]]
    header = header_of(content)
    blocks = header.refcount_table_offset + CLUSTER
    clear_copied(content, header.l1_table_offset)
    for number in range(3):
        clear_copied(content, table + 8 * number)
    for place in (table, *places):
        counter = blocks + place // CLUSTER * 2
        content[counter : counter + 2] = (2).to_bytes(2, "big")
    before = bytes(content[table : table + CLUSTER])
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        await disk.write(CLUSTER, b"new")
        await disk.discard(0, CLUSTER)
        assert qcow2(disk).l2.cached[0].offset != table
        assert await disk.read(0, 3 * CLUSTER) == bytes(CLUSTER) + b"new" + b"s" * (2 * CLUSTER - 3)
        await disk.close()
    assert content[table : table + CLUSTER] == before
    for place in places:
        assert content[place : place + CLUSTER] == b"s" * CLUSTER, "the snapshot's data are as they were"
    counts = [int.from_bytes(content[at : at + 2], "big") for at in (blocks + place // CLUSTER * 2 for place in places)]
    assert counts == [1, 1, 2]


def clear_copied(content: bytearray, at: int) -> None:
    """Clear the COPIED flag of an entry."""
    content[at] &= 0x7F
