"""One wake-up call for everybody who waits for "something has changed".

A waiter looks at the state it cares about, finds it wanting, and waits; whoever changes state notifies. Looking and
beginning to wait happen without an await in between, so no change is missed; a waiter that is woken looks again.
"""

from __future__ import annotations

import asyncio

import anyio


class Signal:
    """Not a flag: only those that wait already are woken."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        """Nobody waits yet."""
        self._future: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Wake all who wait."""
        if self._future is not None:
            self._future.set_result(None)
            self._future = None

    async def wait(self) -> None:
        """Wait for the next ``notify``."""
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._future)

    async def wait_at_most(self, timeout_s: float) -> None:
        """Wait for the next ``notify``, or until the time is over."""
        with anyio.move_on_after(timeout_s):
            await self.wait()
