"""Zeroes read as zeroes however they came about; what was discarded reads as before or as zeroes."""

from __future__ import annotations

import pytest

import blocklayer
from blocklayer.base.modes import WriteFlags
from tests.conformance.suite import KIB, Can, bench, drivers_that, noise

RANGES = [
    (0, 64 * KIB),
    (64 * KIB, 128 * KIB),
    (1, 1),
    (511, 1026),
    (4096, 512),
    (60_000, 150_000),
    (-1, 1),
    (-70_001, 70_001),
]
"""Offset and length; negative offsets count from the end."""


@drivers_that(Can.WRITE)
async def test_a_zeroed_range_reads_as_zeroes_and_the_rest_stays(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, length in RANGES:
            await b.write_zeroes(offset % b.size, length)
            await b.agree()
        for offset, length in RANGES:
            for flags in (WriteFlags.NONE, WriteFlags.MAY_UNMAP):
                await b.fill()
                await b.write_zeroes(offset % b.size, length, flags)
                await b.agree()


@drivers_that(Can.WRITE)
async def test_a_whole_disk_can_be_zeroed_and_written_again(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.write_zeroes(0, b.size, WriteFlags.MAY_UNMAP)
        await b.agree()
        for offset in range(100, b.size - 1000, 40_000):
            await b.write(offset, noise(1000, offset))
        await b.agree()


@drivers_that(Can.WRITE)
async def test_zeroes_without_fallback_are_zeroes_or_nothing(factory, tmp_path):
    """A driver that has no fast way says so, and changes nothing then."""
    async with bench(factory, tmp_path) as b:
        await b.fill()
        offset, length = 0, b.size
        try:
            await b.write_zeroes(offset, length, WriteFlags.NO_FALLBACK)
        except blocklayer.UnsupportedError as error:
            assert error.node in b.graph.nodes
        await b.agree()


@drivers_that(Can.WRITE)
async def test_zeroes_and_discards_outside_of_the_disk_are_out_of_range(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        for request in (b.disk.write_zeroes, b.disk.discard):
            for offset, length in [(b.size, 1), (b.size - 1, 2), (-1, 1), (0, -1), (b.size + 1, 0)]:
                with pytest.raises(blocklayer.OutOfRangeError) as caught:
                    await request(offset, length)
                assert (caught.value.node, caught.value.offset, caught.value.length) == (b.disk.name, offset, length)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_zeroing_or_discarding_nothing_does_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        for at in (0, 1, b.size):
            await b.disk.write_zeroes(at, 0)
            await b.disk.discard(at, 0)
        counted = b.disk.statistics
        assert (counted.write_zeroes.operations, counted.discard.operations) == (0, 0)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_what_is_discarded_reads_as_before_or_as_zeroes_and_the_rest_stays(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, length in [*RANGES, (0, b.size)]:
            await b.fill()
            await b.discard(offset % b.size, length)
            await b.agree()


@drivers_that(Can.WRITE)
async def test_what_was_discarded_can_be_written_again_in_parts(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.discard(0, b.size)
        for offset in range(300, b.size - 5000, 30_000):
            await b.write(offset, noise(5000, offset))
            await b.agree()


@drivers_that(Can.WRITE)
async def test_a_new_disk_can_be_discarded(factory, tmp_path):
    """What a backing file holds does not change; whether it shows through afterwards is the driver's affair."""
    async with bench(factory, tmp_path) as b:
        await b.discard(0, b.size)
        await b.discard(70_000, 100_000)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_a_node_that_ignores_discards_changes_nothing(factory, tmp_path):
    async with bench(factory, tmp_path, discard="ignore") as b:
        await b.fill()
        await b.disk.discard(0, b.size)
        await b.agree()
        assert b.disk.statistics.discard.operations == 1
        await b.write_zeroes(0, b.size, WriteFlags.MAY_UNMAP)
        await b.agree()


@drivers_that(Can.WRITE)
@pytest.mark.parametrize("detect", ["on", "unmap"])
async def test_written_zeroes_that_are_detected_are_zeroes(factory, tmp_path, detect):
    async with bench(factory, tmp_path, detect_zeroes=detect) as b:
        await b.fill()
        await b.write(3000, bytes(200_000))
        await b.write(100, bytes(7))
        await b.write(0, noise(64 * KIB) + bytes(64 * KIB))
        await b.agree()
        assert b.disk.statistics.write_zeroes.operations == 2
