"""RangeLock: exclusive holds on byte ranges; overlapping ones wait for each other, first come, first served.

A holder or waiter stands on one list, oldest first, and may go on when nobody before it overlaps. Nobody waits for
somebody younger, so there is no deadlock as long as one task holds one range at a time.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class _Hold:
    """One holder or waiter of ``[start, end)``; ``gone`` is what younger ones wait for."""

    __slots__ = ("end", "gone", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.gone: asyncio.Future[None] | None = None


class RangeLock:
    """The holds on one object."""

    __slots__ = ("_holds",)

    def __init__(self) -> None:
        """Nobody holds anything."""
        self._holds: dict[_Hold, None] = {}

    def __len__(self) -> int:
        """Holders and waiters."""
        return len(self._holds)

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether somebody holds, or waits for, a byte of the range."""
        end = offset + length
        for hold in self._holds:  # noqa: SIM110 - any() would make a generator for each request
            if hold.start < end and offset < hold.end:
                return True
        return False

    def try_hold(self, offset: int, length: int) -> _Hold | None:
        """Take the range at once, or answer None; give what this returns to ``release``."""
        if self._holds and self.overlaps(offset, length):
            return None
        hold = _Hold(offset, offset + length)
        self._holds[hold] = None
        return hold

    async def acquire(self, offset: int, length: int) -> _Hold:
        """Wait for the range; give what this returns to ``release``."""
        hold = _Hold(offset, offset + length)
        self._holds[hold] = None
        try:
            while (before := self._overlapping_before(hold)) is not None:
                await _gone(before)
        except BaseException:
            self.release(hold)
            raise
        return hold

    def release(self, hold: _Hold) -> None:
        """Let go, and wake those that waited for it."""
        del self._holds[hold]
        if hold.gone is not None and not hold.gone.done():
            hold.gone.set_result(None)

    @asynccontextmanager
    async def hold(self, offset: int, length: int) -> AsyncIterator[None]:
        """``async with``: exclusive on the range inside."""
        held = self.try_hold(offset, length) or await self.acquire(offset, length)
        try:
            yield
        finally:
            self.release(held)

    async def wait_clear(self, offset: int, length: int) -> None:
        """Wait until nobody who is there now holds a byte of the range."""
        end = offset + length
        for hold in tuple(self._holds):
            if hold.start < end and offset < hold.end and hold in self._holds:
                await _gone(hold)

    def _overlapping_before(self, hold: _Hold) -> _Hold | None:
        for other in self._holds:
            if other is hold:
                return None
            if other.start < hold.end and hold.start < other.end:
                return other
        return None


async def _gone(hold: _Hold) -> None:
    if hold.gone is None:
        hold.gone = asyncio.get_running_loop().create_future()
    await asyncio.shield(hold.gone)
