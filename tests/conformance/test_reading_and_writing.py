"""What is written reads back, at any offset and of any length, and nothing else changes."""

from __future__ import annotations

from array import array

import pytest

import blocklayer
from blocklayer.base.modes import WriteFlags
from tests.conformance.suite import KIB, Can, bench, difference, drivers_that, every_driver, noise

PLACES = [
    (0, 1),
    (0, 512),
    (1, 510),
    (511, 2),
    (4 * KIB, 4 * KIB),
    (64 * KIB - 1, 2),
    (100, 200 * KIB),
    (-1, 1),
    (-513, 513),
    (-70_000, 70_000),
    (0, None),
]
"""Offset and length; a negative offset counts from the end, and None is the rest of the disk."""


def place(size: int, offset: int, length: int | None) -> tuple[int, int]:
    """An entry of ``PLACES`` on a disk of ``size`` bytes."""
    start = offset % size
    return start, size - start if length is None else length


@every_driver
async def test_a_new_disk_has_its_size_and_its_first_content(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.agree()


@every_driver
async def test_a_part_reads_as_in_the_whole(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, length in (place(b.size, *p) for p in PLACES):
            actual = await b.disk.read(offset, length)
            assert difference(actual, bytes(b.model[offset : offset + length])) is None, (offset, length)


@every_driver
async def test_nothing_can_be_read_anywhere_inside(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        assert [await b.disk.read(at, 0) for at in (0, 1, b.size - 1, b.size)] == [b""] * 4


@every_driver
async def test_a_read_outside_of_the_disk_is_out_of_range(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        outside = [
            (-1, 1),
            (-2, 1),
            (0, -1),
            (b.size, 1),
            (b.size - 1, 2),
            (b.size + 1, 0),
            (0, b.size + 1),
            (1 << 62, 1),
        ]
        for offset, length in outside:
            with pytest.raises(blocklayer.OutOfRangeError, match=f"outside the node's {b.size} bytes") as caught:
                await b.disk.read(offset, length)
            assert (caught.value.node, caught.value.offset, caught.value.length) == (b.disk.name, offset, length)
            with pytest.raises(blocklayer.OutOfRangeError):
                await b.disk.read_into(offset if length >= 0 else b.size, bytearray(abs(length)))
        assert b.disk.statistics.read.operations == 0


@every_driver
async def test_any_flat_buffer_is_filled(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for buffer in (bytearray(4096), memoryview(bytearray(4096)), array("I", bytes(4096))):
            memoryview(buffer).cast("B")[:] = b"x" * 4096
            await b.disk.read_into(512, buffer)
            assert bytes(buffer) == b.model[512 : 512 + 4096]


@every_driver
async def test_a_disk_opened_read_only_refuses_each_change_and_reads_on(factory, tmp_path):
    async with bench(factory, tmp_path, read_only=True) as b:
        for change in (
            b.disk.write(0, b"x"),
            b.disk.write_zeroes(0, 512),
            b.disk.discard(0, 512),
            b.disk.truncate(0),
            b.disk.write_compressed(0, bytes(512)),
        ):
            with pytest.raises(blocklayer.ReadOnlyError) as caught:
                await change
            assert caught.value.node == b.disk.name
        await b.disk.flush()
        await b.agree()


@drivers_that(Can.WRITE)
@pytest.mark.parametrize("filled", [False, True], ids=["new", "filled"])
async def test_what_is_written_reads_back_and_the_rest_stays(factory, tmp_path, filled):
    async with bench(factory, tmp_path) as b:
        if filled:
            await b.fill()
        for seed, (offset, length) in enumerate(place(b.size, *p) for p in PLACES):
            await b.write(offset, noise(length, seed))
            await b.agree()


@drivers_that(Can.WRITE)
async def test_the_last_of_several_writes_wins(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for seed in range(4):
            await b.write(1000 * seed, noise(100_000, seed))
        await b.agree()


@drivers_that(Can.WRITE)
async def test_zeroes_can_be_written_as_data(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.write(3000, bytes(100_000))
        await b.agree()


@drivers_that(Can.WRITE)
async def test_a_write_past_the_end_is_out_of_range_and_changes_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, data in [(b.size, b"x"), (b.size - 1, b"xy"), (-1, b"x"), (b.size + 1, b"")]:
            with pytest.raises(blocklayer.OutOfRangeError) as caught:
                await b.disk.write(offset, data)
            assert (caught.value.node, caught.value.offset, caught.value.length) == (b.disk.name, offset, len(data))
        await b.agree()


@drivers_that(Can.WRITE)
async def test_an_empty_write_does_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for at in (0, 1, b.size):
            await b.disk.write(at, b"")
        assert b.disk.statistics.write.operations == 0
        await b.agree()


@drivers_that(Can.WRITE)
async def test_any_flat_buffer_can_be_written(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for seed, kind in enumerate([bytes, bytearray, memoryview, lambda data: array("H", data)]):
            data = noise(4096, seed)
            await b.disk.write(700, kind(data))
            b.model[700 : 700 + 4096] = data
            await b.agree()


@drivers_that(Can.WRITE)
async def test_the_callers_buffers_are_its_own_when_a_request_has_returned(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        data = bytearray(noise(100_000))
        await b.write(5000, data)
        data[:] = bytes(100_000)
        await b.agree()
        await b.disk.read_into(5000, data)
        data[:] = bytes(100_000)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_a_durable_write_reads_back(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.write(700, noise(70_000), WriteFlags.FUA)
        await b.write_zeroes(1700, 30_000, WriteFlags.FUA)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_a_disk_that_makes_each_write_durable_reads_back(factory, tmp_path):
    async with bench(factory, tmp_path, cache="writethrough") as b:
        await b.write(700, noise(70_000))
        await b.write_zeroes(1700, 30_000)
        await b.discard(64 * KIB, 64 * KIB)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_each_request_counts_once_however_it_is_split(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.disk.read(0, b.size)
        await b.disk.write_zeroes(1, 100_000)
        await b.disk.discard(1, 100_000)
        counted = b.disk.statistics
        kinds = (counted.read, counted.write, counted.write_zeroes, counted.discard)
        assert [(kind.operations, kind.bytes, kind.errors) for kind in kinds] == [
            (1, b.size, 0),
            (1, b.size, 0),
            (1, 100_000, 0),
            (1, 100_000, 0),
        ]
        assert counted.write_end_max == b.size


@drivers_that(Can.COMPRESS)
async def test_compressed_clusters_read_back(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        assert b.disk.driver.can_compress
        unit = b.disk.driver.cluster_size
        at = 0
        for seed, data in enumerate([bytes(unit), b"ab" * (unit // 2), noise(unit)]):
            if at + unit > b.size:
                break
            await b.disk.write_compressed(at, data)
            b.model[at : at + unit] = data
            at += unit
        start = b.size - b.size % unit
        tail = b"tail" * ((b.size - start) // 4)
        await b.disk.write_compressed(start, tail)
        b.model[start:] = tail
        await b.agree()
        await b.write(min(at, unit) // 2, noise(1000, 9))  # copies the compressed cluster
        await b.agree()


@drivers_that(Can.WRITE)
async def test_an_empty_compressed_write_does_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for at in (0, b.size):
            await b.disk.write_compressed(at, b"")
        await b.agree()
