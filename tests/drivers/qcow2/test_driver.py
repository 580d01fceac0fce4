"""The qcow2 driver as a node: what it tells, maps and checks, deep chains, reads without waiting, and closing."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

import blocklayer
from blocklayer.base.errors import ChainError, IOFailedError, ReadOnlyError
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, MIB
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

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 4096
SIZE = MIB


@virtual_time
async def test_what_a_node_tells_of_itself() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER, backing_file="below.raw", backing_fmt="raw")
    async with opened(content, backing=None) as disk:
        driver = disk.driver
        assert (driver.size, driver.cluster_size, driver.can_compress, driver.zero_init) == (SIZE, CLUSTER, True, True)
        assert (driver.backing_reference, driver.backing_format) == ("below.raw", "raw")
        assert driver.probe(bytes(content[:512]))
        assert not driver.probe(bytes(512))


@virtual_time
async def test_block_status_tells_each_kind_with_its_place() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(CLUSTER, b"d" * 2 * CLUSTER)
        await disk.write_compressed(3 * CLUSTER, b"c" * CLUSTER)
        await disk.write_zeroes(CLUSTER, CLUSTER)
        place = qcow2(disk).l2.cached[0].words[2] & 0x00FF_FFFF_FFFF_FE00
        found = [
            (extent.offset, extent.length, extent.kind, extent.host_offset, extent.compressed, extent.present)
            async for extent in disk.extents(0, 5 * CLUSTER)
        ]
        assert found == [
            (0, CLUSTER, ExtentKind.ZERO, None, False, False),
            (CLUSTER, CLUSTER, ExtentKind.ZERO, place - CLUSTER, False, True),
            (2 * CLUSTER, CLUSTER, ExtentKind.DATA, place, False, True),
            (3 * CLUSTER, CLUSTER, ExtentKind.DATA, None, True, True),
            (4 * CLUSTER, CLUSTER, ExtentKind.ZERO, None, False, False),
        ]


@virtual_time
async def test_what_is_mapped_from_cached_tables_is_read_without_waiting() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"d" * CLUSTER)
        await disk.write_compressed(CLUSTER, b"c" * CLUSTER)
        await disk.write_zeroes(2 * CLUSTER, CLUSTER)
        await disk.write(3 * CLUSTER, b"e" * CLUSTER)
        assert disk.try_read(10, 20) == b"d" * 20
        assert disk.try_read(2 * CLUSTER - 5, 10) is None, "compressed clusters have to be unpacked"
        assert disk.try_read(2 * CLUSTER + 5, CLUSTER) == bytes(CLUSTER - 5) + b"e" * 5
    async with opened(content, read_only=True) as disk:
        assert disk.try_read(0, 10) is None, "the table is not there yet"
        await disk.read(0, 1)
        assert disk.try_read(0, 10) == b"d" * 10


@pytest.mark.parametrize("extended", [False, True])
@virtual_time
async def test_waiting_or_not_a_read_gives_the_same(extended: bool) -> None:
    size = 32 * KIB if extended else CLUSTER
    content = new_image(SIZE, cluster_size=size, extended_l2=extended)
    source, model = random.Random(7), bytearray(b"\xba" * SIZE)
    base = {"driver": "memfile", "content": bytearray(model)}
    async with opened(content, backing=base) as disk:
        for _ in range(200):
            offset = source.randrange(SIZE - 3 * size)
            length = source.randrange(1, 3 * size)
            if source.random() < 0.3:
                data = source.randbytes(length)
                await disk.write(offset, data)
                model[offset : offset + length] = data
            elif source.random() < 0.5:
                await disk.write_zeroes(offset, length, WriteFlags.MAY_UNMAP)
                model[offset : offset + length] = bytes(length)
            wanted = model[offset : offset + length]
            assert disk.try_read(offset, length) in (None, wanted)
            assert await disk.read(offset, length) == wanted
            await disk.block_status(offset, length)
            assert disk.try_read(offset, 1) == wanted[:1]


@virtual_time
async def test_check_finds_leaks_and_flushes_first() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * 10 * CLUSTER)
        result = await qcow2(disk).check()
        assert (result.corruptions, result.leaks.count, result.allocated_clusters) == (0, 0, 10)
        content.extend(bytes(101 * CLUSTER - len(content)))
        counter = header_of(content).refcount_table_offset + CLUSTER + 2 * 100
        content[counter : counter + 2] = (1).to_bytes(2, "big")
        result = await qcow2(disk).check()
        assert (result.corruptions, result.leaks.count) == (0, 1)


@virtual_time
async def test_closing_writes_everything_back_and_frees_what_was_dropped() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        await disk.write(0, b"x" * 20 * CLUSTER)
        await disk.discard(CLUSTER, 10 * CLUSTER)
        await disk.close()
    assert_sound(content)


@pytest.mark.parametrize("nth", range(1, 12))
@virtual_time
async def test_closing_that_fails_raises_and_leaves_at_worst_leaks(nth: int) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        await disk.write(0, b"x" * 20 * CLUSTER)
        await disk.flush()
        await disk.discard(CLUSTER, 10 * CLUSTER)
        await disk.write(30 * CLUSTER, b"y" * CLUSTER)
        script = file_of(disk).script = FailNth("any", nth)
        try:
            await disk.close()
        except IOFailedError:
            assert script.seen >= nth
        assert not graph.nodes
    assert_sound(content, leaks=True)
    async with opened(content, read_only=True) as disk:
        assert await disk.read(0, CLUSTER) == b"x" * CLUSTER


@virtual_time
async def test_a_read_only_disk_cannot_be_made_to_write() -> None:
    async with opened(new_image(SIZE), read_only=True) as disk:
        with pytest.raises(ReadOnlyError):
            await disk.driver.write(0, memoryview(b"x"), WriteFlags.NONE)
        with pytest.raises(ReadOnlyError):
            await disk.driver.discard(0, SIZE)


@virtual_time
async def test_an_error_of_the_backing_file_is_not_damage_of_the_image() -> None:
    content, damaged = new_image(SIZE, cluster_size=CLUSTER), new_image(SIZE, cluster_size=CLUSTER)
    header = header_of(damaged)
    damaged[header.l1_table_offset : header.l1_table_offset + 8] = b"\xff" * 8
    base = {"driver": "qcow2", "file": {"driver": "memfile", "content": damaged}}
    async with opened(content, backing=base) as disk:
        for request in (lambda: disk.read(0, 1), lambda: disk.write(0, b"part")):
            with pytest.raises(blocklayer.CorruptImageError):
                await request()
        await disk.write(0, b"w" * CLUSTER)
        assert await disk.read(0, CLUSTER) == b"w" * CLUSTER
    assert header_of(content).incompatible.value == 0
    assert_sound(content)


@pytest.mark.parametrize("depth", [100])
async def test_a_chain_of_a_hundred_images_is_opened_read_written_and_closed(tmp_path: Path, depth: int) -> None:
    """One more is refused. Each layer holds a sector of its own."""
    async with blocklayer.Graph() as graph:
        for number in range(depth + 1):
            path, options = tmp_path / f"{number}.qcow2", {}
            if number:
                options = {"backing_file": f"{number - 1}.qcow2", "backing_fmt": "qcow2"}
            await graph.create(path, format="qcow2", size=128 * KIB, cluster_size=512, **options)
        for number in range(depth):
            disk = await graph.open(tmp_path / f"{number}.qcow2", backing=None, cache="unsafe")
            await disk.write(512 * number, bytes([number]) * 512)
            await disk.close()
        disk = await graph.open(tmp_path / f"{depth - 1}.qcow2")
        assert disk.chain_depth == depth - 1
        wanted = b"".join(bytes([number]) * 512 for number in range(depth)) + bytes(128 * KIB - 512 * depth)
        assert await disk.read(0, disk.size) == wanted
        await disk.write(100, b"x")
        assert await disk.read(0, 512) == bytes(100) + b"x" + bytes(411)
        statuses = [extent.depth async for extent in disk.extents(0, 512 * depth)]
        assert statuses == [0, *range(depth - 2, -1, -1)]
        await asyncio.gather(*(disk.read(512 * number, 1024) for number in range(depth - 1)))
        await disk.close()
        with pytest.raises(ChainError, match="deeper than 100"):
            await graph.open(tmp_path / f"{depth}.qcow2")
        assert not graph.nodes


@virtual_time
async def test_a_failed_open_leaves_nothing_behind() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    for nth in range(1, 5):
        script = FailNth("read", nth)
        async with memory_graph() as graph:
            with pytest.raises(IOFailedError):
                await graph.open(
                    {"driver": "qcow2", "file": {"driver": "memfile", "content": content, "script": script}}
                )
            assert not graph.nodes
        assert script.seen == nth


@virtual_time
async def test_writes_fail_with_the_files_error_and_name_the_node() -> None:
    async with opened(new_image(SIZE), node_name="top") as disk:
        file_of(disk).script = fail_on("write")
        with pytest.raises(IOFailedError, match="bad medium") as caught:
            await disk.write(0, b"x")
        assert caught.value.node is not None
