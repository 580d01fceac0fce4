"""Host clusters: counted before they are referred to, free only when nobody can be using them, and found again."""

from __future__ import annotations

import asyncio
import random

import pytest

from blocklayer.base.errors import CorruptImageError, IOFailedError
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.qcow2.features import Incompatible
from tests.helpers.qcow2_disk import (
    assert_sound,
    check_bytes,
    file_of,
    header_of,
    new_image,
    opened,
    qcow2,
)
from tests.helpers.scripted import FailNth, Gate, fail_on
from tests.helpers.virtual_time import virtual_time

CLUSTER = 512
SIZE = 4 * MIB


def places(disk, number: int, count: int = 1) -> list[int]:
    """Host offsets of guest clusters in the first L2 table."""
    words = qcow2(disk).l2.cached[0].words[number : number + count]
    return [word & 0x00FF_FFFF_FFFF_FE00 for word in words]


@virtual_time
async def test_a_long_write_gets_clusters_in_a_row() -> None:
    async with opened(new_image(SIZE, cluster_size=CLUSTER)) as disk:
        await disk.write(0, b"x" * 20 * CLUSTER)
        first, *rest = places(disk, 0, 20)
        assert rest == [first + CLUSTER * number for number in range(1, 20)]


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@virtual_time
async def test_the_refcount_table_grows_by_moving(refcount_bits: int) -> None:
    """With 64 bits it takes 2 MiB of clusters to fill the first table of 64 entries."""
    content = new_image(12 * MIB, cluster_size=CLUSTER, refcount_bits=refcount_bits)
    before = header_of(content)
    async with opened(content) as disk:
        for offset in range(0, 12 * MIB, MIB):
            await disk.write(offset, bytes([offset >> 20 | 0x40]) * MIB)
        for offset in range(0, 12 * MIB, MIB):
            assert await disk.read(offset, MIB) == bytes([offset >> 20 | 0x40]) * MIB
    after = header_of(content)
    moved = after.refcount_table_offset != before.refcount_table_offset
    assert moved is (refcount_bits != 1)
    assert_sound(content)


@virtual_time
async def test_a_freed_cluster_is_taken_again_after_two_flushes_and_not_before() -> None:
    """The first makes the new mapping durable, the second lowers the count."""
    async with opened(new_image(SIZE, cluster_size=CLUSTER)) as disk:
        await disk.write(0, b"old" * 170 + b"o!")
        (old,) = places(disk, 0)
        await disk.discard(0, CLUSTER)
        await disk.write(CLUSTER, b"1" * CLUSTER)
        await disk.flush()
        await disk.write(2 * CLUSTER, b"2" * CLUSTER)
        assert old not in places(disk, 1, 2)
        await disk.flush()
        await disk.write(3 * CLUSTER, b"3" * CLUSTER)
        assert places(disk, 3) == [old]


@virtual_time
async def test_a_freed_cluster_waits_for_a_read_that_may_be_using_it() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"a" * CLUSTER)
        await disk.flush()
        (old,) = places(disk, 0)
        gate = file_of(disk).script = Gate("read")
        reading = asyncio.create_task(disk.read(0, CLUSTER))
        await gate.reached.wait()
        await disk.discard(0, CLUSTER)
        for number in range(1, 6):
            await disk.write(number * CLUSTER, b"n" * CLUSTER)
            await disk.flush()
        assert old not in places(disk, 1, 5)
        gate.opened.set()
        assert await reading == b"a" * CLUSTER
        for number in range(6, 9):
            await disk.write(number * CLUSTER, b"n" * CLUSTER)
            await disk.flush()
        assert old in places(disk, 6, 3)
    assert_sound(content)


@virtual_time
async def test_freed_space_is_given_back_to_the_file_only_when_nothing_durable_refers_to_it() -> None:
    async with opened(new_image(SIZE, cluster_size=CLUSTER)) as disk:
        await disk.write(0, b"x" * 8 * CLUSTER)
        await disk.flush()
        start = places(disk, 0)[0]
        seen: list[tuple[str, int, int]] = []

        async def script(kind: str, offset: int, length: int) -> None:
            seen.append((kind, offset, length))

        file_of(disk).script = script
        await disk.discard(0, 8 * CLUSTER)
        await disk.flush()
        assert ("discard", start, 8 * CLUSTER) not in seen
        await disk.write(16 * CLUSTER, b"y")
        await disk.flush()
        assert ("discard", start, 8 * CLUSTER) in seen


@virtual_time
async def test_without_pass_discard_request_the_file_keeps_its_space() -> None:
    async with opened(new_image(SIZE, cluster_size=CLUSTER), pass_discard_request=False) as disk:
        await disk.write(0, b"x" * 8 * CLUSTER)
        file_of(disk).script = fail_on("discard")
        await disk.discard(0, 8 * CLUSTER)
        for number in range(3):
            await disk.write((20 + number) * CLUSTER, b"y")
            await disk.flush()


@virtual_time
async def test_a_file_that_cannot_discard_does_not_hold_up_flushes() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * 8 * CLUSTER)
        file_of(disk).script = fail_on("discard", times=1000)
        await disk.discard(0, 8 * CLUSTER)
        for number in range(3):
            await disk.write((20 + number) * CLUSTER, b"y")
            await disk.flush()
    assert_sound(content)


@virtual_time
async def test_counts_are_lowered_once_even_if_reading_a_block_fails_in_between() -> None:
    """The clusters that are freed are counted by several blocks; the second cannot be read at first."""
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * MIB)
        await disk.write(2 * MIB, b"k" * MIB)
        await disk.flush()
        await disk.discard(0, MIB)
        await disk.flush()
        allocator = qcow2(disk).allocator
        for nth in range(1, 9):
            allocator._forget_clean(-1)
            for key in [key for key, block in allocator._blocks.items() if block.can_be_dropped]:
                del allocator._blocks[key]
            file_of(disk).script = FailNth("read", nth)
            try:
                await disk.write(3 * MIB + nth * CLUSTER, b"z")
                await disk.flush()
            except IOFailedError:
                pass
            file_of(disk).script = None
        assert await disk.read(2 * MIB, MIB) == b"k" * MIB
    assert_sound(content)


@virtual_time
async def test_an_allocation_that_was_given_up_is_free_again() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x")
        file_of(disk).script = fail_on("write", times=5)
        for number in range(5):
            with pytest.raises(IOFailedError):
                await disk.write((5 + number) * CLUSTER, b"lost" * 1000)
        file_of(disk).script = None
        assert await disk.read(5 * CLUSTER, 10 * CLUSTER) == bytes(10 * CLUSTER)
    assert_sound(content)
    assert len(content) < 64 * KIB


@virtual_time
async def test_the_cache_of_refcount_blocks_is_bounded_also_without_flushes() -> None:
    content = new_image(32 * MIB, cluster_size=CLUSTER, refcount_bits=64)
    source = random.Random(3)
    async with opened(content, refcount_cache_size=8 * CLUSTER, l2_cache_size=MIB) as disk:
        allocator = qcow2(disk).allocator
        most = 0
        for _ in range(400):
            await disk.write(source.randrange(32 * MIB - 8192), b"r" * source.randrange(1, 8192))
            most = max(most, len(allocator._blocks))
        assert most <= 2 * 8 + 2
    assert_sound(content)


@pytest.mark.parametrize("what", ["header", "L1", "L2", "refcount table", "refcount block"])
@virtual_time
async def test_metadata_that_count_as_free_are_not_handed_out_and_mark_the_image_corrupt(what: str) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * CLUSTER)
        l2 = qcow2(disk).l2.cached[0].offset
    header = header_of(content)
    place = {
        "header": 0,
        "L1": header.l1_table_offset,
        "L2": l2,
        "refcount table": header.refcount_table_offset,
        "refcount block": header.refcount_table_offset + CLUSTER,
    }[what]
    counter = header.refcount_table_offset + CLUSTER + place // CLUSTER * 2
    content[counter : counter + 2] = bytes(2)
    async with opened(content) as disk:
        with pytest.raises(CorruptImageError, match="clusters with metadata are free"):
            await disk.write(SIZE // 2, b"y" * 8 * CLUSTER)
        assert Incompatible.CORRUPT in header_of(content).incompatible
        with pytest.raises(CorruptImageError, match="marked corrupt and refuses writes"):
            await disk.write(0, b"z")
        assert await disk.read(0, CLUSTER) == b"x" * CLUSTER


@virtual_time
async def test_a_count_that_would_fall_below_zero_marks_the_image_corrupt_and_flushes_go_on() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"x" * 2 * CLUSTER)
        (place, _) = places(disk, 0, 2)
    counter = header_of(content).refcount_table_offset + CLUSTER + place // CLUSTER * 2
    content[counter : counter + 2] = bytes(2)
    async with opened(content) as disk:
        await disk.discard(0, CLUSTER)
        await disk.write(CLUSTER, b"y")
        await disk.flush()
        await disk.write(CLUSTER, b"z")
        with pytest.raises(CorruptImageError, match="below zero"):
            await disk.flush()
        await disk.flush()
        assert await disk.read(CLUSTER, 1) == b"z"
    assert Incompatible.CORRUPT in header_of(content).incompatible


@virtual_time
async def test_many_allocations_at_once_never_share_a_cluster() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    source = random.Random(5)
    order = list(range(600))
    source.shuffle(order)
    async with opened(content) as disk:
        file_of(disk).script = FailNth("any", -1)
        await asyncio.gather(*(disk.write(number * 2 * CLUSTER, number.to_bytes(4, "big") * 200) for number in order))
        for number in range(600):
            assert await disk.read(number * 2 * CLUSTER, 800) == number.to_bytes(4, "big") * 200
    assert_sound(content)
    assert check_bytes(content).allocated_clusters == 1200
