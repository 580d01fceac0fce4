"""Requests run at once: those that do not overlap never disturb each other, and those that do leave one of their results."""

from __future__ import annotations

import asyncio
import random

import blocklayer
from blocklayer.base.modes import WriteFlags
from tests.conformance.suite import KIB, Can, bench, drivers_that, either, every_driver, noise


@drivers_that(Can.WRITE)
async def test_writes_side_by_side_all_arrive(factory, tmp_path):
    """Pieces smaller than any cluster, in no order, all at once: each cluster is copied under several writers."""
    async with bench(factory, tmp_path) as b:
        pieces = [(at, min(700, b.size - at)) for at in range(0, b.size, 700)]
        random.Random(1).shuffle(pieces)
        async with asyncio.TaskGroup() as tasks:
            for offset, length in pieces:
                tasks.create_task(b.write(offset, noise(length, offset)))
        await b.agree()


@drivers_that(Can.WRITE)
async def test_changes_of_each_kind_side_by_side_all_arrive(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        requests = []
        for number, at in enumerate(range(0, b.size - 3000, 3000)):
            how = number % 4
            if how == 0:
                requests.append(b.write_zeroes(at, 3000, WriteFlags.MAY_UNMAP))
            elif how == 1:
                requests.append(b.write_zeroes(at, 3000))
            elif how == 2:
                requests.append(b.discard(at, 3000))
            else:
                requests.append(b.write(at, noise(3000, at)))
        await asyncio.gather(*requests, b.disk.flush())
        await b.agree()


@drivers_that(Can.WRITE)
async def test_of_overlapping_writes_each_byte_is_that_of_one(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        contents = [noise(100_000, seed) for seed in range(5)]
        await asyncio.gather(*(b.disk.write(1000, data) for data in contents))
        assert either(await b.disk.read(1000, 100_000), *contents)
        now = await b.disk.read(0, b.size)
        assert now[:1000] == b.model[:1000]
        assert now[101_000:] == b.model[101_000:]


@drivers_that(Can.WRITE)
async def test_a_read_during_a_write_sees_old_or_new_bytes(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        old = bytes(b.model)
        new = noise(b.size, 2)
        writing = asyncio.ensure_future(b.disk.write(0, new))
        seen = []
        while not writing.done():
            seen.append(await b.disk.read(0, b.size))
            await asyncio.sleep(0)
        await writing
        assert all(either(data, old, new) for data in seen)
        assert await b.disk.read(0, b.size) == new


@drivers_that(Can.WRITE)
async def test_a_read_during_a_discard_sees_what_was_there_or_zeroes(factory, tmp_path):
    """Freed room may not be used again while a read is on its way to it."""
    async with bench(factory, tmp_path) as b:
        await b.fill()
        half = b.size // 2 // KIB * KIB
        old = bytes(b.model[:half])

        async def free_and_use():
            await b.discard(0, half)
            await b.disk.flush()
            await b.write(half, noise(b.size - half, 2))
            await b.disk.flush()

        changing = asyncio.ensure_future(free_and_use())
        while not changing.done():
            assert either(await b.disk.read(0, half), old, bytes(half))
            await asyncio.sleep(0)
        await changing
        await b.agree()


@drivers_that(Can.WRITE)
async def test_zeroing_and_writing_one_range_leaves_zeroes_or_data(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        data = noise(100_000, 3)
        for flags in (WriteFlags.NONE, WriteFlags.MAY_UNMAP):
            await asyncio.gather(b.disk.write(3000, data), b.disk.write_zeroes(3000, 100_000, flags))
            assert either(await b.disk.read(3000, 100_000), data, bytes(100_000))
        await b.write(3000, data)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_flushes_run_beside_writes(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        async with asyncio.TaskGroup() as tasks:
            for at in range(0, b.size - 5000, 5000):
                tasks.create_task(b.write(at, noise(5000, at)))
                tasks.create_task(b.disk.flush())
        await b.agree()


@drivers_that(Can.WRITE)
async def test_serialising_writes_take_turns(factory, tmp_path):
    """Of writes that wait for each other the last to come stays, whole."""
    async with bench(factory, tmp_path) as b:
        contents = [noise(100_000, seed) for seed in range(4)]
        await asyncio.gather(*(b.write(777, data, WriteFlags.SERIALISING) for data in contents))
        assert await b.disk.read(777, 100_000) == contents[-1]


@drivers_that(Can.WRITE)
async def test_a_drained_disk_rests_until_the_section_ends(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        before = asyncio.gather(*(b.write(at, noise(1000, at)) for at in range(0, 100_000, 1000)))
        await asyncio.sleep(0)
        async with b.disk.drained():
            assert len(b.disk.path.requests) == 0
            later = asyncio.ensure_future(b.disk.write(0, b"later"))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not later.done()
            assert b.disk.try_read(0, 1) is None
        await before
        await later
        b.model[:5] = b"later"
        await b.agree()


@every_driver
async def test_many_reads_at_once_are_each_right(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        places = [(at, min(5000, b.size - at)) for at in range(0, b.size, 1111)]
        found = await asyncio.gather(*(b.disk.read(*place) for place in places))
        assert found == [bytes(b.model[offset : offset + length]) for offset, length in places]


@drivers_that(Can.RESIZE)
async def test_requests_that_meet_a_shrinking_disk_are_done_before_it_or_out_of_range(factory, tmp_path):
    """None of them may bring back what was cut, or write outside of the disk."""
    async with bench(factory, tmp_path) as b:
        await b.fill()
        size = 100 * KIB
        at, length = b.size - 10_000, 5000
        for request in (
            lambda: b.disk.write(at, noise(length)),
            lambda: b.disk.write_zeroes(at, length),
            lambda: b.disk.discard(at, length),
            lambda: b.disk.read(at, length),
        ):
            for first in (False, True):
                cutting = asyncio.ensure_future(b.disk.truncate(size)) if first else None
                await asyncio.sleep(0)
                requests = [asyncio.ensure_future(request()) for _ in range(3)]
                await asyncio.sleep(0)
                await (cutting or b.disk.truncate(size))
                results = await asyncio.gather(*requests, return_exceptions=True)
                assert {type(r) for r in results if isinstance(r, Exception)} <= {blocklayer.OutOfRangeError}
                assert b.disk.size == size
                await b.disk.truncate(b.size)
                del b.model[size:]
                b.model.extend(bytes(b.disk.size - size))
                await b.agree()
