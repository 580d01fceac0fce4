"""A function that blocks its thread until the test lets it go: no sleeps, and the test knows when it got there."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 30.0
"""A test that hangs fails after this time instead."""


class Blocking:
    """Call it in a worker thread: it stands still there, then does what ``inner`` does."""

    def __init__(self, inner: Callable[..., object] = lambda *_args: None) -> None:
        """Made in the event loop, which learns by ``reached`` that a thread stands still."""
        self._loop = asyncio.get_running_loop()
        self._inner = inner
        self._opened = threading.Event()
        self.reached = asyncio.Event()
        self.calls = 0
        """How often it was entered."""
        self.done = 0
        """How often it was left."""
        self.__name__ = "blocking"

    def __call__(self, *args: Any) -> object:
        """Stand still until ``let_go``."""
        self.calls += 1
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self._opened.wait(PATIENCE_S), "nobody let it go"
        try:
            return self._inner(*args)
        finally:
            self.done += 1

    def let_go(self) -> None:
        """All calls, also later ones, go on."""
        self._opened.set()


async def turns(count: int = 20) -> None:
    """Let everything happen that waits for nothing but the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)
