"""The buffer pool is bounded."""

from __future__ import annotations

import asyncio

import anyio

from blocklayer.jobs.buffers import BUFFER_LENGTH, BUFFERS_MAX, BufferPool
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_who_comes_when_all_buffers_are_taken_waits_for_one() -> None:
    pool = BufferPool()
    taken = [await pool.take() for _ in range(BUFFERS_MAX)]
    assert {len(buffer) for buffer in taken} == {BUFFER_LENGTH}
    late = asyncio.ensure_future(pool.take())
    await anyio.sleep(1)
    assert not late.done()
    pool.give(taken[5])
    assert await late is taken[5]


@virtual_time
async def test_the_buffer_given_back_last_is_taken_first() -> None:
    pool = BufferPool()
    first, second = await pool.take(), await pool.take()
    pool.give(first)
    pool.give(second)
    assert await pool.take() is second
