"""Workers: tasks that live on between pieces of work, for work that comes in small pieces at a high rate.

To start a task costs more than to wake one. A worker that has nothing to do waits; ``give`` wakes one, or starts one if
there are fewer than ``size``. Structured: the tasks belong to the group that was passed and end with it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import anyio.abc

T = TypeVar("T")


class Workers(Generic[T]):
    """At most ``size`` tasks that await ``work(item)``, which must not raise."""

    __slots__ = ("_group", "_idle", "_name", "_work", "busy", "size")

    def __init__(
        self, group: anyio.abc.TaskGroup, work: Callable[[T], Awaitable[None]], *, size: int, name: str
    ) -> None:
        """Start nothing yet."""
        self.size = size
        self.busy = 0
        self._group = group
        self._work = work
        self._name = name
        self._idle: list[asyncio.Future[T]] = []

    def give(self, item: T) -> None:
        """Work on ``item``; only if ``busy`` is below ``size``."""
        self.busy += 1
        while self._idle:
            idle = self._idle.pop()
            if not idle.done():
                idle.set_result(item)
                return
        self._group.start_soon(self._live, item, name=self._name)

    async def _live(self, item: T) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._work(item)
            finally:
                self.busy -= 1
            del item  # its buffers are not kept while there is nothing to do
            idle: asyncio.Future[T] = loop.create_future()
            self._idle.append(idle)
            item = await idle
