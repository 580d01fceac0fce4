"""A cancelled request leaves old bytes, new bytes or a mixture, in its range only, and a disk that works on."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

import blocklayer
from blocklayer.base.modes import WriteFlags
from tests.conformance.suite import KIB, Can, bench, drivers_that, either, every_driver, noise

STEPS = range(8)
"""How often the event loop goes round before a request is cancelled."""


async def cancelled(request, steps):
    """Start ``request``, cancel it after ``steps`` rounds of the loop, and wait for it to end."""
    task = asyncio.ensure_future(request)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@drivers_that(Can.WRITE)
async def test_a_cancelled_write_leaves_old_or_new_bytes_in_its_range_only(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for steps in STEPS:
            data = noise(100_000, steps)
            old = bytes(b.model[3000:103_000])
            await cancelled(b.disk.write(3000, data), steps)
            now = await b.disk.read(3000, 100_000)
            assert either(now, old, data)
            b.model[3000:103_000] = now
            await b.agree()
        await b.fill()
        await b.agree()


@drivers_that(Can.WRITE)
async def test_cancelled_zeroes_and_discards_leave_old_bytes_or_zeroes_in_their_range_only(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for steps in STEPS:
            await b.fill(steps)
            old = bytes(b.model[3000:203_000])
            for request in (b.disk.write_zeroes(3000, 200_000, WriteFlags.MAY_UNMAP), b.disk.discard(3000, 200_000)):
                await cancelled(request, steps)
                now = await b.disk.read(3000, 200_000)
                assert either(now, old, bytes(200_000))
                b.model[3000:203_000] = now
                await b.agree()


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_a_cancelled_flush_can_be_made_up_for(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for steps in STEPS:
            await b.write(steps * 5000, noise(70_000, steps))
            await cancelled(b.disk.flush(), steps)
            await b.agree()
        await b.disk.flush()
        await b.reopen()
        await b.agree()


@drivers_that(Can.RESIZE)
async def test_a_cancelled_truncate_leaves_the_old_or_the_new_size(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        sizes = [b.size // 2 // KIB * KIB, 400 * KIB]
        for steps in STEPS:
            wanted = sizes[steps % 2]
            was = b.disk.size
            await cancelled(b.disk.truncate(wanted), steps)
            assert b.disk.size in (was, wanted)
            now = await b.disk.read(0, b.disk.size)
            kept = min(len(now), b.size)
            assert either(now[:kept], b.model[:kept], bytes(kept))
            assert not any(now[kept:])
            b.model[:] = now
        await b.fill()
        await b.agree()


@every_driver
async def test_nobody_writes_to_the_buffer_of_a_cancelled_read(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for steps in STEPS:
            buffer = bytearray(b.size)
            await cancelled(b.disk.read_into(0, buffer), steps)
            buffer[:] = b"\xa5" * b.size
            await b.disk.read(0, b.size)
            assert buffer == b"\xa5" * b.size
            del buffer[:]  # nobody holds on to it either
        await b.agree()


@drivers_that(Can.WRITE)
async def test_whoever_waits_for_a_cancelled_request_goes_on(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for steps in STEPS:
            first = asyncio.ensure_future(b.disk.write(0, noise(100_000, 1), WriteFlags.SERIALISING))
            second = asyncio.ensure_future(b.disk.write(0, noise(100_000, 2), WriteFlags.SERIALISING))
            third = asyncio.ensure_future(b.write(0, noise(100_000, steps), WriteFlags.SERIALISING))
            for _ in range(steps):
                await asyncio.sleep(0)
            first.cancel()
            second.cancel()
            await asyncio.wait([first, second])
            await third
            await b.agree()
            assert len(b.disk.path.requests) == 0


@every_driver
async def test_an_opening_that_is_cancelled_leaves_nothing_open(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.disk.close()
        for steps in (*STEPS, 16, 20, 30, 40):
            opening = asyncio.ensure_future(b.open())
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            try:
                disk = await opening
            except asyncio.CancelledError:
                assert b.graph.nodes == {}
            else:
                await disk.close()
        await b.open()
        await b.agree()


@drivers_that(Can.WRITE)
async def test_a_time_limit_is_a_cancellation(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        hook = b.disk.before_write(lambda _request: asyncio.Event().wait())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await b.disk.write(0, b"never")
        hook.remove()
        await b.agree()
        assert len(b.disk.path.requests) == 0
        async with blocklayer.Graph():
            await b.disk.flush()
