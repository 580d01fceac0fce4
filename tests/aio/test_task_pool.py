"""TaskPool: never more tasks than places, the first error as it is, and nobody left behind."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from blocklayer.aio.task_pool import open_task_pool
from tests.helpers.blocking import turns
from tests.helpers.virtual_time import virtual_time


class Work:
    """Counts who is inside."""

    def __init__(self):
        self.inside = 0
        self.most = 0
        self.ended = []

    async def __call__(self, name, seconds=1.0):
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await anyio.sleep(seconds)
            self.ended.append(name)
        finally:
            self.inside -= 1


@pytest.mark.parametrize("size", [1, 3, 10])
def test_there_are_never_more_tasks_than_places(size):
    @virtual_time
    async def main():
        work = Work()
        async with open_task_pool(size) as pool:
            for name in range(10):
                await pool.spawn(work, name)
        assert (work.most, sorted(work.ended)) == (size, list(range(10)))
        assert asyncio.get_running_loop().time() == -(-10 // size)

    main()


@virtual_time
async def test_a_place_is_taken_as_soon_as_it_is_free():
    work = Work()
    loop = asyncio.get_running_loop()
    async with open_task_pool(2) as pool:
        await pool.spawn(work, "long", 10)
        for name in ("a", "b", "c"):
            await pool.spawn(work, name, 1)
        assert loop.time() == 2
    assert (loop.time(), work.ended) == (10, ["a", "b", "c", "long"])


@virtual_time
async def test_an_error_stops_the_others_and_is_raised_as_it_is():
    work = Work()
    error = KeyError("first")

    async def fail():
        await anyio.sleep(1)
        raise error

    with pytest.raises(KeyError) as caught:
        async with open_task_pool(5) as pool:
            await pool.spawn(work, "slow", 100)
            await pool.spawn(fail)
            await pool.spawn(fail)
    assert caught.value is error
    assert (work.inside, work.ended, asyncio.get_running_loop().time()) == (0, [], 1)


@virtual_time
async def test_an_error_also_stops_who_waits_for_a_place():
    async def fail():
        await anyio.sleep(1)
        raise ValueError("no")

    work = Work()
    spawned = []
    with pytest.raises(ValueError, match="no"):
        async with open_task_pool(2) as pool:
            await pool.spawn(work, "slow", 100)
            await pool.spawn(fail)
            for name in range(5):
                await pool.spawn(work, name, 100)
                spawned.append(name)
    assert spawned == []
    assert asyncio.get_running_loop().time() == 1


@virtual_time
async def test_of_two_errors_the_first_one_is_raised():
    async def fail(seconds):
        try:
            await anyio.sleep(seconds)
        finally:
            raise ValueError(seconds)

    with pytest.raises(ValueError) as caught:
        async with open_task_pool(3) as pool:
            for seconds in (3, 1, 2):
                await pool.spawn(fail, seconds)
    assert caught.value.args == (1,)


@virtual_time
async def test_an_error_of_the_block_itself_is_raised_as_it_is_and_stops_the_tasks():
    work = Work()
    error = ValueError("mine")
    with pytest.raises(ValueError) as caught:
        async with open_task_pool(2) as pool:
            await pool.spawn(work, "slow", 100)
            await turns()
            raise error
    assert caught.value is error
    assert (work.inside, work.ended, asyncio.get_running_loop().time()) == (0, [], 0)


@virtual_time
async def test_a_cancelled_pool_ends_its_tasks_before_it_says_so():
    work = Work()

    async def main():
        async with open_task_pool(2) as pool:
            for name in range(10):
                await pool.spawn(work, name, 10)

    task = asyncio.ensure_future(main())
    await anyio.sleep(15)
    assert work.inside == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (task.cancelled(), work.inside, sorted(work.ended)) == (True, 0, [0, 1])


@virtual_time
async def test_a_task_that_is_cancelled_while_it_cleans_up_is_waited_for():
    steps = []

    async def careful():
        try:
            await anyio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)
                steps.append("clean")

    async def fail():
        await anyio.sleep(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        async with open_task_pool(2) as pool:
            await pool.spawn(careful)
            await pool.spawn(fail)
    assert (steps, asyncio.get_running_loop().time()) == (["clean"], 4)


@virtual_time
async def test_an_empty_pool_ends_at_once():
    async with open_task_pool(1):
        pass
    assert asyncio.get_running_loop().time() == 0
