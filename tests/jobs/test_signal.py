"""Signal: wakes who waits, and remembers nothing."""

from __future__ import annotations

import asyncio

import anyio

from blocklayer.jobs.signal import Signal
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_all_who_wait_are_woken() -> None:
    signal = Signal()
    woken: list[int] = []

    async def wait(number: int) -> None:
        await signal.wait()
        woken.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(wait, number)
        await anyio.sleep(1)
        signal.notify()
    assert sorted(woken) == [0, 1, 2]


@virtual_time
async def test_one_who_is_cancelled_does_not_take_the_others_along() -> None:
    signal = Signal()
    first, second = asyncio.ensure_future(signal.wait()), asyncio.ensure_future(signal.wait())
    await anyio.sleep(1)
    first.cancel()
    await anyio.sleep(1)
    signal.notify()
    await second
    assert first.cancelled()


@virtual_time
async def test_waiting_can_be_bounded_and_a_notification_before_it_does_not_count() -> None:
    signal = Signal()
    signal.notify()
    await signal.wait_at_most(2.5)
    assert asyncio.get_running_loop().time() == 2.5
