"""Cleaning up is not interrupted, neither by a cancel scope nor by a task's ``cancel``."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from blocklayer.aio.shield import to_the_end
from tests.helpers.virtual_time import virtual_time


async def clean_up(log: list[str], error: Exception | None = None) -> str:
    await anyio.sleep(2)
    log.append("cleaned up")
    if error is not None:
        raise error
    return "result"


@virtual_time
async def test_without_a_cancellation_the_result_comes_back() -> None:
    assert await to_the_end(clean_up([])) == "result"
    with pytest.raises(OSError, match="disk"):
        await to_the_end(clean_up([], OSError("disk")))


@pytest.mark.parametrize("error", [None, OSError("disk")])
def test_a_cancelled_task_cleans_up_first(error: Exception | None) -> None:
    @virtual_time
    async def main() -> None:
        log: list[str] = []
        task = asyncio.ensure_future(to_the_end(clean_up(log, error)))
        for _ in range(3):
            await anyio.sleep(0.5)
            task.cancel()
        await asyncio.wait([task])
        assert log == ["cleaned up"]
        assert task.cancelled()

    main()


@virtual_time
async def test_a_cancelled_scope_is_left_after_the_cleaning_up() -> None:
    log: list[str] = []
    with anyio.move_on_after(1) as scope:
        await to_the_end(clean_up(log))
        await anyio.sleep(10)
        log.append("not reached")
    assert scope.cancelled_caught
    assert log == ["cleaned up"]
    assert asyncio.get_running_loop().time() == 2


@virtual_time
async def test_a_timeout_of_asyncio_is_a_timeout_still() -> None:
    log: list[str] = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await to_the_end(clean_up(log))
    assert log == ["cleaned up"]
