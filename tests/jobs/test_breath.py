"""Work that never waits gives others a turn about every millisecond."""

from __future__ import annotations

import asyncio
from time import perf_counter

from blocklayer.jobs.breath import BREATH_S, Breather


async def test_others_get_turns_while_somebody_works() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    breather, started = Breather(), perf_counter()
    while perf_counter() - started < 10 * BREATH_S:
        await breather.breathe()
    task.cancel()
    assert turns >= 5


async def test_nobody_breathes_before_it_is_time() -> None:
    ran = False

    async def other() -> None:
        nonlocal ran
        ran = True

    breather = Breather()
    task = asyncio.ensure_future(other())
    await breather.breathe()
    assert not ran
    await task
