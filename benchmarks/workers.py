"""A fixed number of requests in flight: as many tasks as the depth, each takes the next offset when it is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from benchmarks import loops

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


async def rate(offsets: Iterable[int], depth: int, request: Callable[[int], Awaitable[object]]) -> float:
    """Requests per second when ``request(offset)`` is awaited for all ``offsets`` with ``depth`` in flight."""
    places = list(offsets)
    rest = iter(places)

    async def worker() -> None:
        for offset in rest:
            await request(offset)

    with loops.timed() as watch:
        async with anyio.create_task_group() as group:
            for _ in range(depth):
                group.start_soon(worker)
    return len(places) / watch.seconds
