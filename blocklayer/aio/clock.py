"""Time as an object, so that tests decide how fast it passes."""

from __future__ import annotations

import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """Monotonic seconds and a way to wait for them."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    async def sleep(self, seconds: float) -> None:
        """Return ``seconds`` later."""


class MonotonicClock:
    """The system's."""

    def now(self) -> float:
        """``time.monotonic``."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """``anyio.sleep``."""
        await anyio.sleep(seconds)


async def sleep_unless(changed: anyio.Event, clock: Clock, seconds: float) -> None:
    """Return ``seconds`` later, or as soon as ``changed`` is set."""
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            await changed.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        await clock.sleep(seconds)
        tasks.cancel_scope.cancel()
