"""A guest of ours: tasks that write 4 KiB at random places, as many as there are requests in flight."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from benchmarks.images import SEED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import blocklayer

REQUEST = 4096
PLACES = 1 << 16
"""Offsets drawn before the clock starts; they are gone through again and again, each task from another place."""


class Guest:
    """``completed`` writes so far."""

    def __init__(self, node: blocklayer.Node, depth: int) -> None:
        """Write to all of ``node`` with ``depth`` in flight."""
        generator = random.Random(SEED)
        self.completed = 0
        self._node = node
        self._depth = depth
        self._data = memoryview(generator.randbytes(REQUEST))
        self._places = [place * REQUEST for place in generator.choices(range(node.size // REQUEST), k=PLACES)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write for as long as the block lasts."""
        async with anyio.create_task_group() as group:
            for number in range(self._depth):
                group.start_soon(self._write_on, number * PLACES // self._depth)
            yield
            group.cancel_scope.cancel()

    async def _write_on(self, first: int) -> None:
        number = first
        while True:
            await self._node.write(self._places[number % PLACES], self._data)
            self.completed += 1
            number += 1
