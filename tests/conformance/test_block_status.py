"""Block status covers the disk, never calls data zeroes, and says where data lie."""

from __future__ import annotations

import random

import pytest

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import WriteFlags
from tests.conformance.suite import KIB, Can, bench, drivers_that, every_driver, noise


async def extents_of(disk):
    return [extent async for extent in disk.extents()]


async def scribble(b, seed):
    """Writes, zeroes and discards here and there."""
    chance = random.Random(seed)
    for _ in range(30):
        offset = chance.randrange(b.size)
        length = min(b.size - offset, chance.choice([1, 512, 4 * KIB, 70 * KIB]))
        how = chance.randrange(4)
        if how == 0:
            await b.write_zeroes(offset, length, chance.choice([WriteFlags.NONE, WriteFlags.MAY_UNMAP]))
        elif how == 1:
            await b.discard(offset, length)
        else:
            await b.write(offset, noise(length, offset))


async def assert_status_is_true(b):
    extents = await extents_of(b.disk)
    assert [e.offset for e in extents] == [0, *(e.end for e in extents[:-1])]
    assert extents[-1].end == b.size
    for extent in extents:
        data = bytes(b.model[extent.offset : extent.end])
        if extent.kind is not ExtentKind.DATA:
            assert data == bytes(extent.length), extent
        elif extent.host_offset is not None and extent.host_node is not None:
            host = b.graph.node(extent.host_node)
            inside = min(extent.length, host.size - extent.host_offset)  # a file may end inside its last cluster
            assert await host.read(extent.host_offset, inside) == data[:inside], extent
            assert data[inside:] == bytes(extent.length - inside)


@every_driver
async def test_the_status_of_a_new_disk_is_true(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await assert_status_is_true(b)


@drivers_that(Can.WRITE)
async def test_the_status_of_a_disk_in_use_is_true(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for seed in range(6):
            await scribble(b, seed)
            await assert_status_is_true(b)


@every_driver
async def test_each_part_has_the_status_that_it_has_in_the_whole(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        if Can.WRITE in factory.can:
            await scribble(b, 5)
        whole = await extents_of(b.disk)
        for offset in [0, 1, 511, 4096, 65_535, 100_000, b.size - 1]:
            for length in [1, 512, 100_000]:
                length = min(length, b.size - offset)
                status = await b.disk.block_status(offset, length)
                around = next(e for e in whole if e.offset <= offset < e.end)
                assert status.offset == offset
                assert status.length <= length
                assert status == around.clipped(offset, status.length)


@every_driver
async def test_a_range_can_be_asked_for(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        found = [e async for e in b.disk.extents(1000, 100_000)]
        assert (found[0].offset, found[-1].end) == (1000, 101_000)
        assert [e async for e in b.disk.extents(b.size, 0)] == []
        assert [e async for e in b.disk.extents(b.size)] == []


@every_driver
async def test_the_status_of_nothing_or_outside_of_the_disk_is_out_of_range(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, length in [(0, 0), (b.size, 1), (-1, 1), (b.size - 1, 2), (0, -1)]:
            with pytest.raises(blocklayer.OutOfRangeError) as caught:
                await b.disk.block_status(offset, length)
            assert (caught.value.node, caught.value.offset, caught.value.length) == (b.disk.name, offset, length)


@drivers_that(Can.SPARSE)
async def test_a_new_sparse_disk_holds_no_data(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        assert {e.kind for e in await extents_of(b.disk)} == {ExtentKind.ZERO}


@drivers_that(Can.SPARSE | Can.WRITE)
async def test_a_sparse_disk_holds_data_about_where_they_were_written(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.write(200 * KIB, noise(1000))
        unit = max(4096, b.disk.driver.cluster_size or 0)
        data = [e for e in await extents_of(b.disk) if e.kind is ExtentKind.DATA]
        assert data[0].offset >= 200 * KIB // unit * unit
        assert data[-1].end <= min(b.size, -(-201 * KIB // unit) * unit)


@drivers_that(Can.WRITE)
async def test_what_was_written_is_allocated_in_this_layer(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        at = 0
        while at < b.size:
            allocated, length = await b.disk.is_allocated(at, b.size - at)
            assert allocated
            at += length
        assert at == b.size
        assert (await b.disk.is_allocated_above(0, 1, None))[0]


@every_driver
async def test_layers_are_named(factory, tmp_path):
    """``depth`` and ``node`` agree with the chain below the disk."""
    async with bench(factory, tmp_path) as b:
        chain = [b.disk]
        while chain[-1].backing is not None:
            chain.append(chain[-1].backing)
        for extent in await extents_of(b.disk):
            layer = chain[extent.depth]
            while layer.driver.is_filter:
                layer = layer.children["file"].node
            assert extent.node == layer.name
