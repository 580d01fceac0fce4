"""Compressed clusters: packed behind each other, read through a cache that never shows what is gone."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from blocklayer.base.errors import CorruptImageError, IOFailedError, NoSpaceError, OptionError
from blocklayer.drivers.qcow2.allocator import Clusters
from tests.helpers.qcow2_disk import assert_sound, file_of, new_image, opened, qcow2
from tests.helpers.scripted import Gate, fail_on
from tests.helpers.virtual_time import virtual_time

CLUSTER = 4096
SIZE = 64 * CLUSTER


def text(number: int) -> bytes:
    """A cluster that shrinks to about 100 bytes."""
    return (f"cluster {number} " * 1000).encode()[:CLUSTER]


@virtual_time
async def test_several_compressed_clusters_share_a_host_cluster() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    before = len(content)
    async with opened(content) as disk:
        for number in range(16):
            await disk.write_compressed(number * CLUSTER, text(number))
        assert await disk.read(0, 16 * CLUSTER) == b"".join(map(text, range(16)))
    assert len(content) <= before + 3 * CLUSTER  # an L2 table and the packed bytes
    assert_sound(content)


@virtual_time
async def test_many_at_once_are_packed_too() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await asyncio.gather(*(disk.write_compressed(number * CLUSTER, text(number)) for number in range(40)))
        assert await disk.read(0, 40 * CLUSTER) == b"".join(map(text, range(40)))
    assert_sound(content)


@virtual_time
async def test_what_does_not_shrink_is_stored_plain() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    noise = random.Random(1).randbytes(CLUSTER)
    async with opened(content) as disk:
        await disk.write_compressed(0, noise)
        assert await disk.read(0, CLUSTER) == noise
        assert not (await disk.block_status(0, CLUSTER)).compressed
    assert_sound(content)


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, CLUSTER), (0, 2 * CLUSTER), (CLUSTER, CLUSTER - 1)])
@virtual_time
async def test_a_compressed_write_takes_one_whole_cluster(offset: int, length: int) -> None:
    async with opened(new_image(SIZE, cluster_size=CLUSTER)) as disk:
        with pytest.raises(OptionError, match=f"compressed writes take one cluster of {CLUSTER} bytes"):
            await disk.write_compressed(offset, bytes(length))


@virtual_time
async def test_the_last_cluster_may_be_a_part() -> None:
    content = new_image(SIZE + 512, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write_compressed(SIZE, b"z" * 512)
        assert await disk.read(SIZE, 512) == b"z" * 512
        await disk.truncate(SIZE + CLUSTER)
        assert await disk.read(SIZE, CLUSTER) == b"z" * 512 + bytes(CLUSTER - 512)
    assert_sound(content)


@virtual_time
async def test_a_part_of_a_compressed_cluster_is_overwritten_with_the_rest_kept() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write_compressed(0, text(0))
        await disk.write_compressed(CLUSTER, text(1))
        await disk.write(1000, b"!")
        assert await disk.read(0, CLUSTER) == text(0)[:1000] + b"!" + text(0)[1001:]
        assert await disk.read(CLUSTER, CLUSTER) == text(1)
    assert_sound(content)


@virtual_time
async def test_space_of_overwritten_compressed_clusters_is_used_again() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        for turn in range(50):
            await disk.write_compressed(0, text(turn))
            await disk.flush()
        assert await disk.read(0, CLUSTER) == text(49)
    assert len(content) < 16 * CLUSTER
    assert_sound(content)


@virtual_time
async def test_a_read_that_was_overtaken_leaves_nothing_in_the_cache_for_whoever_gets_the_place() -> None:
    """The read starts, the cluster is overwritten, the read ends; then another cluster is packed into the same place."""
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write_compressed(0, text(0))
        await disk.flush()
        place = qcow2(disk).l2.cached[0].words[0]
        gate = file_of(disk).script = Gate("read")
        reading = asyncio.create_task(disk.read(0, CLUSTER))
        await gate.reached.wait()
        await disk.write_zeroes(0, CLUSTER)
        gate.opened.set()
        assert await reading == text(0)
        file_of(disk).script = None
        for offset in (8, 9):
            await disk.write(offset * CLUSTER, b"x")
            await disk.flush()
        await disk.write_compressed(CLUSTER, text(1))
        assert qcow2(disk).l2.cached[0].words[1] == place, "the test is about a place that is used again"
        assert await disk.read(CLUSTER, CLUSTER) == text(1)


@virtual_time
async def test_a_failed_write_leaves_the_old_data_and_no_leak() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write_compressed(0, text(0))
        file_of(disk).script = fail_on("write")
        with pytest.raises(IOFailedError):
            await disk.write_compressed(0, text(1))
        assert await disk.read(0, CLUSTER) == text(0)
        await disk.write_compressed(CLUSTER, text(2))
        assert await disk.read(0, 2 * CLUSTER) == text(0) + text(2)
    assert_sound(content)


@virtual_time
async def test_when_there_is_no_room_the_shared_cluster_loses_its_new_reference(monkeypatch) -> None:
    """The new run would begin in the last one's cluster: its count is raised, then room for the rest is looked for."""
    content = new_image(SIZE, cluster_size=512)

    async def full(_count: int) -> Clusters:
        raise NoSpaceError("full", errno=errno.ENOSPC)

    async with opened(content) as disk:
        await disk.write_compressed(0, b"y" * 512)
        driver = qcow2(disk)
        driver.compressed._tail += 500 - driver.compressed._tail % 512
        with monkeypatch.context() as patch:
            patch.setattr(driver.allocator, "take_exactly", full)
            with pytest.raises(NoSpaceError):
                await disk.write_compressed(512, bytes(range(128)) * 4)
        await disk.write_compressed(512, bytes(range(128)) * 4)
        assert await disk.read(0, 1024) == b"y" * 512 + bytes(range(128)) * 4
    assert_sound(content)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@virtual_time
async def test_bytes_that_cannot_be_decompressed_are_an_error_and_the_rest_stays_readable(kind: str) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER, compression_type=kind)
    async with opened(content) as disk:
        await disk.write_compressed(0, text(0))
        await disk.write(CLUSTER, text(1))
        place = qcow2(disk).l2.cached[0].words[0] & 0xFFFF_FFFF
    content[place : place + 40] = b"\xff" * 40
    async with opened(content) as disk:
        with pytest.raises(CorruptImageError, match="cannot be decompressed|holds"):
            await disk.read(0, CLUSTER)
        assert await disk.read(CLUSTER, CLUSTER) == text(1)
        await disk.write(0, text(2))
        assert await disk.read(0, CLUSTER) == text(2)


@virtual_time
async def test_a_counter_that_is_full_starts_a_new_host_cluster() -> None:
    """With two bits a host cluster is shared by at most three."""
    content = new_image(SIZE, cluster_size=CLUSTER, refcount_bits=2)
    async with opened(content) as disk:
        for number in range(10):
            await disk.write_compressed(number * CLUSTER, text(number))
        assert await disk.read(0, 10 * CLUSTER) == b"".join(map(text, range(10)))
    assert_sound(content)
