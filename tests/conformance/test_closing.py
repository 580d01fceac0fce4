"""Closing waits for what is in flight, makes it durable, lets go of everything, and says so to whoever comes later."""

from __future__ import annotations

import asyncio
import os

import pytest

import blocklayer
from tests.conformance.suite import Can, bench, drivers_that, every_driver, noise


def open_files():
    """What this process has open, but for the way to look."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sorted(name for name in found if name.startswith("/"))


@every_driver
async def test_a_closed_disk_refuses_everything_and_can_be_closed_again(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.disk.close()
        assert b.disk.closed
        for request in (
            lambda: b.disk.read(0, 1),
            lambda: b.disk.write(0, b"x"),
            lambda: b.disk.write_zeroes(0, 512),
            lambda: b.disk.discard(0, 512),
            lambda: b.disk.flush(),
            lambda: b.disk.truncate(0),
            lambda: b.disk.write_compressed(0, b"x"),
        ):
            with pytest.raises(blocklayer.StateError, match="it is closed") as caught:
                await request()
            assert caught.value.node == b.disk.name
        with pytest.raises(blocklayer.StateError, match="it is closed"):
            await b.disk.block_status(0, 1)
        await b.disk.close()


@every_driver
async def test_a_disk_that_is_closed_takes_its_children_and_files_along(factory, tmp_path):
    async with blocklayer.Graph():  # whatever a first graph opens for good
        before = open_files()
    async with bench(factory, tmp_path) as b:
        await b.disk.close()
        assert b.graph.nodes == {}
        assert open_files() == before


@every_driver
async def test_a_graph_that_is_closed_closes_its_disks(factory, tmp_path):
    before = open_files()
    async with bench(factory, tmp_path) as b:
        disk = b.disk
    assert disk.closed
    assert b.graph.nodes == {}
    assert open_files() == before


@every_driver
async def test_a_disk_lives_while_somebody_else_holds_it(factory, tmp_path):
    async with bench(factory, tmp_path, read_only=True) as b:
        user = await b.graph.open({"driver": "raw", "file": b.disk}, read_only=True)
        await b.disk.close()
        assert not b.disk.closed
        assert await user.read(0, b.size) == b.model
        await user.close()
        assert b.disk.closed


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_closing_waits_for_writes_in_flight(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        writes = asyncio.gather(*(b.write(at, noise(3000, at)) for at in range(0, 200_000, 5000)))
        await asyncio.sleep(0)
        await b.disk.close()
        await writes
        await b.open()
        await b.agree()


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_a_request_that_meets_a_closing_disk_is_done_or_told(factory, tmp_path):
    """At no moment of the closing does it reach a driver, or a file, that is closed."""
    async with bench(factory, tmp_path) as b:
        for steps in range(14):
            await b.write(0, noise(5000, steps))
            closing = asyncio.ensure_future(b.disk.close())
            for _ in range(steps):
                await asyncio.sleep(0)
            data = noise(100_000, steps)
            try:
                await b.disk.write(9000, data)
                assert await b.disk.read(9000, 100_000) == data
                b.model[9000:109_000] = data
            except blocklayer.StateError:
                await closing
                await b.open()
                now = await b.disk.read(9000, 100_000)
                assert now in (data, bytes(b.model[9000:109_000]))
                b.model[9000:109_000] = now
            else:
                await closing
                await b.open()
            await b.agree()


@every_driver
async def test_an_unknown_option_is_refused_and_leaves_nothing_open(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.disk.close()
        before = open_files()
        with pytest.raises(blocklayer.OptionError, match="seize"):
            await b.open(seize="1M")
        assert b.graph.nodes == {}
        assert open_files() == before
