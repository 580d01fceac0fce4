"""TaskPool: at most so many tasks at once; ``spawn`` waits for a place.

Structured: leaving the block waits for all; the first error stops the pool and is raised as it is.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


class TaskPool:
    """Made by ``open_task_pool``."""

    def __init__(self, tasks: anyio.abc.TaskGroup, *, size: int) -> None:
        """``size`` places, all free."""
        self._tasks = tasks
        self._places = anyio.CapacityLimiter(size)
        self.error: Exception | None = None

    async def spawn(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run ``function(*args)`` in a task as soon as there is a place; returns when it has started."""
        token = object()
        await self._places.acquire_on_behalf_of(token)
        self._tasks.start_soon(self._run, token, function, args)

    async def _run(self, token: object, function: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            await function(*args)
        except Exception as error:  # noqa: BLE001 - raised by open_task_pool
            self.fail(error)
        finally:
            self._places.release_on_behalf_of(token)

    def fail(self, error: Exception) -> None:
        """Stop every task; ``error`` is raised at the end if it is the first one."""
        if self.error is None:
            self.error = error
        self._tasks.cancel_scope.cancel()


@asynccontextmanager
async def open_task_pool(size: int) -> AsyncIterator[TaskPool]:
    """At most ``size`` tasks at once: leaving the block waits for every task and raises the first error, be it the block's."""
    async with anyio.create_task_group() as tasks:
        pool = TaskPool(tasks, size=size)
        try:
            yield pool
        except Exception as error:  # noqa: BLE001 - raised below, and not in a group
            pool.fail(error)
    if pool.error is not None:
        raise pool.error
