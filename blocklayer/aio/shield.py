"""Cleaning up to the end, although whoever waits for it is cancelled.

``anyio.CancelScope(shield=True)`` alone holds off cancel scopes, but not ``Task.cancel`` (``asyncio.timeout``, ``wait_for``).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


async def to_the_end(action: Coroutine[object, object, T] | asyncio.Task[T]) -> T:
    """Await all of ``action``. A cancellation that arrives meanwhile is raised when it has ended, in place of its result."""
    task = asyncio.ensure_future(action)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None and not task.cancelled():
        task.exception()  # seen: the cancellation goes before it
        raise cancelled
    return task.result()
