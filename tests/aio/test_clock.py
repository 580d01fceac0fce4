"""The system's clock goes forward, and waits as long as it is told by the event loop's time."""

from __future__ import annotations

import asyncio

import anyio

from blocklayer.aio.clock import MonotonicClock, sleep_unless
from tests.helpers.virtual_time import virtual_time


def test_time_does_not_go_back():
    clock = MonotonicClock()
    times = [clock.now() for _ in range(1000)]
    assert times == sorted(times)


@virtual_time
async def test_sleeping_takes_the_time_that_it_is_told():
    loop = asyncio.get_running_loop()
    moments = []
    for seconds in (0.25, 0, 1000):
        await MonotonicClock().sleep(seconds)
        moments.append(loop.time())
    assert moments == [0.25, 0.25, 1000.25]


@virtual_time
async def test_a_sleep_ends_early_if_something_changes():
    loop = asyncio.get_running_loop()
    changed = anyio.Event()
    loop.call_later(3, changed.set)
    moments = []
    for seconds in (2, 2, 2):
        await sleep_unless(changed, MonotonicClock(), seconds)
        moments.append(loop.time())
    assert moments == [2, 3, 3]
