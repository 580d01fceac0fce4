"""Workers: tasks that are used again, never more than ``size``, gone with their group."""

from __future__ import annotations

import asyncio
import gc
import weakref

import anyio
import pytest

from blocklayer.aio.workers import Workers
from tests.helpers.blocking import turns


class Work:
    """Items wait at ``gate``; ``tasks`` says which task had which item."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.tasks = {}
        self.done = []

    async def __call__(self, item):
        self.tasks[item] = asyncio.current_task()
        await self.gate.wait()
        self.done.append(item)


@pytest.fixture
def work():
    return Work()


async def test_nothing_runs_before_there_is_work(work):
    before = asyncio.all_tasks()
    async with anyio.create_task_group() as group:
        workers = Workers(group, work, size=4, name="worker")
        await turns()
        assert (asyncio.all_tasks(), workers.busy) == (before, 0)


async def test_items_run_side_by_side_and_are_counted(work):
    async with anyio.create_task_group() as group:
        workers = Workers(group, work, size=3, name="worker")
        for item in range(3):
            workers.give(item)
        assert workers.busy == 3
        await turns()
        assert len(set(work.tasks.values())) == 3
        work.gate.set()
        await turns()
        assert (sorted(work.done), workers.busy) == ([0, 1, 2], 0)
        group.cancel_scope.cancel()


async def test_a_worker_is_used_again(work):
    work.gate.set()
    async with anyio.create_task_group() as group:
        workers = Workers(group, work, size=4, name="worker")
        for item in range(50):
            workers.give(item)
            await turns(3)
        assert work.done == list(range(50))
        assert len(set(work.tasks.values())) == 1
        group.cancel_scope.cancel()


async def test_no_more_tasks_than_were_busy_at_once(work):
    async with anyio.create_task_group() as group:
        workers = Workers(group, work, size=8, name="worker")
        for turn in range(10):
            work.gate.clear()
            for item in range(8):
                workers.give((turn, item))
            await turns()
            work.gate.set()
            await turns()
        assert len(work.done) == 80
        assert len(set(work.tasks.values())) == 8
        group.cancel_scope.cancel()


async def test_the_tasks_end_with_their_group(work):
    before = asyncio.all_tasks()
    async with anyio.create_task_group() as group:
        workers = Workers(group, work, size=4, name="worker")
        work.gate.set()
        workers.give("idle afterwards")
        await turns()
        work.gate.clear()
        workers.give("at work")
        workers.give("not begun")
        group.cancel_scope.cancel()
    assert asyncio.all_tasks() == before
    assert work.done == ["idle afterwards"]


async def test_an_item_is_not_kept_by_a_worker_that_waits():
    class Item:
        pass

    async def work(_item):
        await asyncio.sleep(0)

    async with anyio.create_task_group() as group:
        workers = Workers(group, work, size=1, name="worker")
        for _ in range(3):
            item = Item()
            gone = weakref.ref(item)
            workers.give(item)
            del item
            await turns()
            gc.collect()
            assert gone() is None
        group.cancel_scope.cancel()
