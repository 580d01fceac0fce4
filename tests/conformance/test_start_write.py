"""Writes that begin without a task do what ``write`` does, or say that they cannot, and then have done nothing."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from blocklayer.base.errors import NoSpaceError, StateError
from tests.conformance.suite import KIB, Can, bench, drivers_that, every_driver, noise


async def start(disk, offset, data):
    """None if it did not begin; else the error that it ended with, or "done"."""
    ended = asyncio.get_running_loop().create_future()
    if not disk.start_write(offset, memoryview(data), ended.set_result):
        await asyncio.sleep(0)
        assert not ended.done()
        return None
    assert not ended.done(), "the caller has to know that it began before it is told that it ended"
    return await ended or "done"


async def start_or_write(b, offset, data):
    """Write by whichever way there is; the model follows."""
    if await start(b.disk, offset, data) is None:
        await b.disk.write(offset, data)
    b.model[offset : offset + len(data)] = data


@drivers_that(Can.WRITE)
async def test_what_began_is_written_when_it_has_ended(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        for number, (offset, length) in enumerate([(0, 4096), (70_000, 512), (64 * KIB - 512, 1024), (1, 3)]):
            await start_or_write(b, offset, noise(length, number))
            await b.agree()


@drivers_that(Can.WRITE)
async def test_many_at_once_all_end(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await asyncio.gather(*(start_or_write(b, at, noise(512, at)) for at in range(0, b.size - 511, 7 * 512)))
        await b.agree()


@drivers_that(Can.WRITE | Can.PERSIST)
async def test_a_flush_makes_it_durable(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await start_or_write(b, 8192, noise(4096, 9))
        await b.disk.flush()
        await b.reopen()
        await b.agree()


@every_driver
async def test_nothing_begins_outside_of_the_disk(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, length in [(-1, 1), (b.size, 1), (b.size - 1, 2), (0, 0)]:
            assert await start(b.disk, offset, bytes(length)) is None


@drivers_that(Can.WRITE)
async def test_nothing_begins_past_a_notifier_or_a_closed_door(factory, tmp_path):
    """Copy-before-write and drained sections hold for these writes too: they take the long way."""
    async with bench(factory, tmp_path) as b:
        await b.fill()
        with b.disk.before_write(lambda _request: None):
            assert await start(b.disk, 0, bytes(512)) is None
        async with b.disk.drained():
            assert await start(b.disk, 0, bytes(512)) is None
        await b.agree()


@drivers_that(Can.PERSIST)
async def test_nothing_begins_on_a_disk_for_reading(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.reopen(read_only=True)
        assert await start(b.disk, 0, bytes(512)) is None


@drivers_that(Can.WRITE)
async def test_a_write_under_way_holds_a_drained_section_back(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        ended = []
        if b.disk.start_write(0, memoryview(noise(4096, 5)), ended.append):
            async with b.disk.drained():
                assert ended == [None]


@drivers_that(Can.PERSIST)
async def test_a_failure_is_told_and_counted(factory, tmp_path, monkeypatch):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.disk.flush()
        real = os.pwritev

        def full(*arguments):
            if len(arguments[1][0]) == 4096:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            error = await start(b.disk, 0, bytes(4096))
        if error is not None:
            assert isinstance(error, NoSpaceError)
            assert error.node is not None
            assert b.disk.statistics.write.errors == 1


@drivers_that(Can.WRITE)
async def test_nothing_begins_on_a_closed_disk(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.disk.close()
        assert await start(b.disk, 0, bytes(512)) is None
        with pytest.raises(StateError):
            await b.disk.write(0, bytes(512))
        await b.open()
