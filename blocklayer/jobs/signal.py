"""One wake-up call for everybody who waits for "something has changed".

A waiter looks at the state it cares about, finds it wanting, and waits; whoever changes state notifies. Looking and
beginning to wait happen without an await in between, so no change is missed; a waiter that is woken looks again.
"""

from __future__ import annotations

import asyncio

import anyio


class Signal:
    """Not a flag: only those that wait already are woken."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        """Nobody waits yet."""
        self._waiters: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        """Wake all who wait."""
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for the next ``notify``."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    async def wait_at_most(self, timeout_s: float) -> None:
        """Wait for the next ``notify``, or until the time is over."""
        with anyio.move_on_after(timeout_s):
            await self.wait()
