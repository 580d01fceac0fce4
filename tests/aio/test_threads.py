"""ThreadEngine: which requests share a batch, how many threads there are, and when they start and end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from blocklayer.aio.threads import LARGE, WORKERS, ThreadEngine
from tests.helpers.blocking import Blocking, turns

NAME = "blocklayer-io"


def io_threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture
async def engine():
    engine = ThreadEngine()
    yield engine
    await engine.close()


async def threads_of(engine, weights):
    """Which thread runs each of the calls that one tick makes."""
    return await asyncio.gather(*(engine.call(threading.get_ident, weight=weight) for weight in weights))


async def test_small_requests_of_one_tick_run_in_one_thread_in_their_order(engine):
    order = []
    await asyncio.gather(*(engine.call(order.append, index, weight=LARGE - 1) for index in range(100)))
    assert order == list(range(100))
    assert len(set(await threads_of(engine, [0] * 50))) == 1


async def test_a_batch_is_one_hand_over_and_one_way_back(engine, monkeypatch):
    calls = []
    loop = asyncio.get_running_loop()
    back = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(args), back(*args)))
    await asyncio.gather(*(engine.call(int) for _ in range(60)))
    assert len(calls) == 1


async def test_large_requests_of_one_tick_run_side_by_side(engine):
    barrier = threading.Barrier(WORKERS)
    calls = [engine.call(barrier.wait, 10, weight=LARGE) for _ in range(WORKERS)]
    assert sorted(await asyncio.gather(*calls)) == list(range(WORKERS))


async def test_a_large_request_does_not_wait_for_the_small_ones_of_its_tick(engine):
    blocking = Blocking()
    small = [asyncio.ensure_future(engine.call(blocking)) for _ in range(3)]
    assert await engine.call(int, "5", weight=LARGE) == 5
    assert not any(call.done() for call in small)
    blocking.let_go()
    await asyncio.gather(*small)


async def test_results_of_a_batch_come_together(engine):
    """One way back for all of them is what makes sixty as cheap as one."""
    blocking = Blocking()
    calls = [asyncio.ensure_future(engine.call(int)), asyncio.ensure_future(engine.call(blocking))]
    await blocking.reached.wait()
    await turns()
    assert [call.done() for call in calls] == [False, False]
    blocking.let_go()
    assert await asyncio.gather(*calls) == [0, None]


async def test_an_engine_without_work_has_no_threads(engine):
    before = io_threads()
    assert await engine.call(int) == 0
    assert len(io_threads()) == len(before) + 1


async def test_one_batch_after_the_other_needs_one_thread(engine):
    before = io_threads()
    threads = {await engine.call(threading.get_ident) for _ in range(20)}
    assert (len(threads), len(io_threads()) - len(before)) == (1, 1)


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_threads_are_bounded_and_what_finds_none_waits(workers):
    engine = ThreadEngine(workers=workers)
    before = io_threads()
    blocking = Blocking()
    calls = [asyncio.ensure_future(engine.call(blocking, weight=LARGE)) for _ in range(workers + 5)]
    await blocking.reached.wait()
    await turns()
    assert len(io_threads()) - len(before) == workers
    assert blocking.calls <= workers
    blocking.let_go()
    await asyncio.gather(*calls)
    assert blocking.done == workers + 5
    await engine.close()


async def test_closing_ends_the_threads():
    before = io_threads()
    engine = ThreadEngine()
    await asyncio.gather(*(engine.call(int, weight=LARGE) for _ in range(10)))
    await engine.close()
    assert io_threads() == before


async def test_engines_do_not_share_threads():
    first, second = ThreadEngine(), ThreadEngine()
    threads = {await engine.call(threading.get_ident) for engine in (first, second)}
    assert len(threads) == 2
    await first.close()
    assert await second.call(int, "3") == 3
    await second.close()


def test_an_engine_belongs_to_a_running_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        ThreadEngine()
