"""Reads that must not wait agree with those that may, or answer None."""

from __future__ import annotations

import random

from tests.conformance.suite import KIB, Can, bench, drivers_that, every_driver, noise


async def assert_tries_agree(b, seed):
    chance = random.Random(seed)
    answers = 0
    for _ in range(40):
        offset = chance.randrange(b.size)
        length = min(b.size - offset, chance.choice([1, 512, 4096, 5000, 70_000, 140_000]))
        expected = bytes(b.model[offset : offset + length])
        data = b.disk.try_read(offset, length)
        assert data in (None, expected)
        buffer = bytearray(b"?" * length)
        filled = b.disk.try_read_into(offset, memoryview(buffer))
        assert not filled or buffer == expected
        assert await b.disk.read(offset, length) == expected
        answers += (data is not None) + filled
    return answers


@every_driver
async def test_a_try_agrees_with_a_read_or_says_none(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await assert_tries_agree(b, 1)


@drivers_that(Can.WRITE)
async def test_a_try_sees_each_change_that_has_returned(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for seed in range(4):
            await b.write(seed * 30_000, noise(50_000, seed))
            await assert_tries_agree(b, seed)
            await b.write_zeroes(seed * 30_000 + 10_000, 20_000)
            await b.discard(seed * 50_000, 64 * KIB)
            await assert_tries_agree(b, seed)


@drivers_that(Can.NOWAIT)
async def test_a_disk_that_need_not_wait_answers_always(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        assert await assert_tries_agree(b, 2) == 80


@every_driver
async def test_a_try_outside_of_the_disk_says_none(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for offset, length in [(-1, 1), (b.size, 1), (b.size - 1, 2), (b.size + 1, 0)]:
            assert b.disk.try_read(offset, length) is None
            assert not b.disk.try_read_into(offset, memoryview(bytearray(length)))


@every_driver
async def test_nothing_is_read_without_asking_the_driver(factory, tmp_path, monkeypatch):
    async with bench(factory, tmp_path) as b:
        asked = []
        monkeypatch.setattr(b.disk.driver, "try_read_into", lambda *request: asked.append(request), raising=False)
        for at in (0, 1, b.size - 1, b.size):
            assert b.disk.try_read(at, 0) in (None, b"")
            assert await b.disk.read(at, 0) == b""
        assert asked == []
        assert b.disk.statistics.read.operations == 0


@every_driver
async def test_a_closed_disk_says_none(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.disk.read(0, b.size)
        await b.disk.close()
        assert b.disk.try_read(0, 1) is None
