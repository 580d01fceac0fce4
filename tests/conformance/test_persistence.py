"""What was written is there when the disk is opened again: flushed or just closed, for writing or for reading only."""

from __future__ import annotations

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import SECTOR
from tests.conformance.suite import KIB, Can, bench, drivers_that, every_driver, noise


async def some_of_everything(b):
    await b.write(1000, noise(100_000))
    await b.write_zeroes(30_000, 40_000, WriteFlags.MAY_UNMAP)
    await b.discard(64 * KIB, 20_000)
    await b.write(b.size - 700, noise(700, 2))


@every_driver
async def test_flushing_what_did_not_change_changes_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for _ in range(3):
            await b.disk.flush()
        await b.agree()


@drivers_that(Can.WRITE)
async def test_a_flush_changes_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await some_of_everything(b)
        await b.disk.flush()
        await b.agree()
        await b.disk.flush()
        await some_of_everything(b)
        await b.agree()


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_what_was_written_is_there_after_reopening(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await some_of_everything(b)
        await b.disk.flush()
        await b.reopen()
        await b.agree()
        await b.fill(3)
        await b.reopen(read_only=True)  # without a flush: closing does it
        await b.agree()
        await b.reopen()
        await b.agree()


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_another_graph_finds_what_was_flushed(factory, tmp_path):
    """Reading while the writer still has the disk open: without locks, and only what was flushed counts."""
    async with bench(factory, tmp_path) as b:
        await some_of_everything(b)
        await b.disk.flush()
        gate = blocklayer.Gate.within(tmp_path)
        async with blocklayer.Graph(drivers=factory.drivers, gate=gate) as other:
            options = {**factory.options(tmp_path, b.size), "read-only": True, "force-share": True}
            disk = await other.open(options)
            assert await disk.read(0, b.size) == b.model


@drivers_that(Can.COMPRESS | Can.PERSIST)
async def test_compressed_clusters_are_there_after_reopening(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        unit = b.disk.driver.cluster_size
        for at in range(0, b.size - unit + 1, unit):
            if at >= 6 * unit:
                break
            data = (noise(64, at) * unit)[:unit]
            await b.disk.write_compressed(at, data)
            b.model[at : at + unit] = data
        await b.reopen()
        await b.agree()


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_status_is_the_same_after_reopening(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await some_of_everything(b)
        await b.disk.flush()
        before = await status(b.disk)
        await b.reopen()
        assert await status(b.disk) == before


async def status(disk):
    """Who answers for each sector, and how; data that were never written are data."""
    found = []
    async for extent in disk.extents():
        kind = ExtentKind.DATA if extent.unwritten else extent.kind
        found += [(extent.depth, kind)] * (extent.length // SECTOR)
    return found
