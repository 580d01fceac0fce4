"""The order in which an image's changes reach its file, and what of them waits, fails and comes back."""

from __future__ import annotations

import asyncio

import pytest

from blocklayer.base.errors import CorruptImageError, IOFailedError
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.qcow2.features import Incompatible
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
from tests.helpers.scripted import FailNth, Gate, fail_on
from tests.helpers.virtual_time import virtual_time

CLUSTER = 4096
SIZE = 4 * MIB


def epochs(disk) -> list[list[int]]:
    """Offsets of what was written between flushes of the file, since the log was cleared; a write per list entry."""
    found: list[list[int]] = [[]]
    for event in file_of(disk).log:
        if event[0] == "flush":
            found.append([])
        else:
            found[-1].append(event[1])
    return found


@virtual_time
async def test_an_overwrite_in_place_costs_one_flush_of_the_file() -> None:
    async with opened(new_image(SIZE, cluster_size=CLUSTER)) as disk:
        await disk.write(0, b"x" * CLUSTER)
        await disk.flush()
        file_of(disk).log.clear()
        await disk.write(0, b"y")
        await disk.flush()
        assert [len(epoch) for epoch in epochs(disk)] == [1, 0]


@virtual_time
async def test_data_then_counts_then_mappings_with_a_flush_between_them() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * CLUSTER)
        await disk.flush()
        file_of(disk).log.clear()
        await disk.write(CLUSTER, b"y" * CLUSTER)
        await disk.flush()
        table = qcow2(disk).l2.cached[0]
        header = header_of(content)
        data, counts, mapping, rest = epochs(disk)
        assert data == [table.words[1] & 0x00FF_FFFF_FFFF_FE00]
        assert counts == [header.refcount_table_offset + CLUSTER]
        assert mapping == [table.offset]
        assert rest == []


@virtual_time
async def test_a_flush_with_nothing_new_does_nothing() -> None:
    async with opened(new_image(SIZE, cluster_size=CLUSTER)) as disk:
        await disk.write(0, b"x")
        await disk.flush()
        file_of(disk).log.clear()
        await disk.flush()
        assert file_of(disk).log == []


@virtual_time
async def test_with_lazy_refcounts_a_flush_leaves_counts_in_memory_until_the_image_is_closed() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER, lazy_refcounts=True)
    block = header_of(content).refcount_table_offset + CLUSTER
    async with opened(content) as disk:
        before = bytes(content[block : block + CLUSTER])
        await disk.write(0, b"x" * CLUSTER)
        await disk.flush()
        assert content[block : block + CLUSTER] == before
    assert content[block : block + CLUSTER] != before
    assert not header_of(content).is_dirty
    assert_sound(content)


@pytest.mark.parametrize("nth", range(1, 9))
@virtual_time
async def test_a_flush_that_failed_somewhere_is_completed_by_the_next(nth: int) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        await disk.write(0, b"x" * CLUSTER)
        file_of(disk).script = FailNth("any", nth)
        try:
            await disk.flush()
        except IOFailedError:
            assert nth <= 7
        file_of(disk).script = None
        await disk.write(SIZE // 2, b"z")
        await disk.flush()
        crashed = bytearray(content)
        await disk.close()
    assert_sound(crashed)
    async with opened(crashed, read_only=True) as disk:
        assert await disk.read(0, CLUSTER) == b"x" * CLUSTER
        assert await disk.read(SIZE // 2, 1) == b"z"


@virtual_time
async def test_changes_during_a_flush_wait_for_the_next_and_are_not_lost() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"1" * CLUSTER)
        gate = file_of(disk).script = Gate("flush")
        flushing = asyncio.create_task(disk.flush())
        await gate.reached.wait()
        await disk.write(CLUSTER, b"2" * CLUSTER)
        await disk.write(0, b"3")
        gate.opened.set()
        await flushing
        file_of(disk).script = None
        await disk.flush()
        crashed = bytearray(content)
    async with opened(crashed, read_only=True) as disk:
        assert await disk.read(0, 2 * CLUSTER) == b"3" + b"1" * (CLUSTER - 1) + b"2" * CLUSTER


@virtual_time
async def test_feature_bits_do_not_drag_a_header_along_whose_tables_are_not_written() -> None:
    """The refcount table has moved in memory; then damage is met, and the corrupt bit is written at once."""
    content = new_image(SIZE, cluster_size=512, refcount_bits=64)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        await disk.write(0, b"k" * 512)
        await disk.flush()
        before = header_of(content)
        await disk.write(512, b"x" * (3 * MIB))
        driver = qcow2(disk)
        assert driver.image.header.refcount_table_offset != before.refcount_table_offset
        await driver.image.mark_corrupt(CorruptImageError("for the test"))
        crashed = bytearray(content)
        await disk.close()
    header = header_of(crashed)
    assert Incompatible.CORRUPT in header.incompatible
    assert header.refcount_table_offset == before.refcount_table_offset
    async with opened(crashed, read_only=True) as disk:
        assert await disk.read(0, 512) == b"k" * 512


@virtual_time
async def test_an_image_becomes_corrupt_once_and_even_if_that_cannot_be_written() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        image = qcow2(disk).image
        file_of(disk).script = fail_on("write", times=100)
        await image.mark_corrupt(CorruptImageError("first"))
        await image.mark_corrupt(CorruptImageError("second"))
        with pytest.raises(CorruptImageError, match=r"refuses writes \(first\)"):
            await disk.write(0, b"x")
    assert Incompatible.CORRUPT not in header_of(content).incompatible


@virtual_time
async def test_version_2_has_no_corrupt_bit_but_refuses_writes_too() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER, compat="0.10")
    before = bytes(content)
    async with opened(content) as disk:
        await qcow2(disk).image.mark_corrupt(CorruptImageError("damage"))
        with pytest.raises(CorruptImageError, match="refuses writes"):
            await disk.discard(0, CLUSTER)
    assert content == before


@virtual_time
async def test_what_was_written_before_damage_was_met_can_still_be_flushed() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * 64 * KIB)
        await qcow2(disk).image.mark_corrupt(CorruptImageError("damage"))
        await disk.flush()
        crashed = bytearray(content)
    async with opened(crashed, read_only=True) as disk:
        assert await disk.read(0, 64 * KIB) == b"x" * 64 * KIB


@virtual_time
async def test_an_external_data_file_is_flushed_before_the_mappings_are_written() -> None:
    content, order = new_image(SIZE, cluster_size=CLUSTER, data_file="d"), []

    def named(name: str):
        async def script(kind: str, _offset: int, _length: int) -> None:
            order.append(f"{kind} {name}")

        return script

    async with opened(content, data_file={"driver": "memfile", "content": bytearray(SIZE)}) as disk:
        file_of(disk).script = named("image")
        disk.children["data-file"].node.driver.script = named("data")
        await disk.write(0, b"x" * CLUSTER)
        await disk.flush()
    assert order.index("write data") < order.index("flush data") < order.index("write image")
