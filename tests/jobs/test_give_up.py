"""A block that is given up ends quietly; a cancellation from elsewhere goes through it."""

from __future__ import annotations

import asyncio

import pytest

from blocklayer.jobs.give_up import GiveUp
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_the_block_ends_and_the_task_goes_on() -> None:
    work = GiveUp()
    asyncio.get_running_loop().call_soon(work.now)
    with work:
        await asyncio.sleep(3600)
        raise AssertionError("it was given up")
    assert work.given_up
    await asyncio.sleep(1)


@virtual_time
async def test_nothing_happens_to_a_block_that_has_ended() -> None:
    with GiveUp() as work:
        await asyncio.sleep(1)
    work.now()
    await asyncio.sleep(1)
    assert not work.given_up


@virtual_time
async def test_an_error_inside_is_raised() -> None:
    with pytest.raises(ValueError, match="inside"), GiveUp():
        raise ValueError("inside")


@pytest.mark.parametrize("too", ["given up first", "cancelled first", "not given up"])
@virtual_time
async def test_a_cancellation_from_elsewhere_goes_on(too: str) -> None:
    work = GiveUp()

    async def run() -> None:
        with work:
            await asyncio.sleep(3600)

    task = asyncio.ensure_future(run())
    await asyncio.sleep(1)
    if too == "given up first":
        work.now()
    task.cancel()
    if too == "cancelled first":
        work.now()
    with pytest.raises(asyncio.CancelledError):
        await task
