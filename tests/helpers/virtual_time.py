"""An event loop whose clock jumps: when everybody waits for time, time passes at once.

If everybody waits for something else, the test hangs for good; the loop raises ``Deadlock`` instead.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

P = ParamSpec("P")


class Deadlock(AssertionError):
    """Nothing is ready, and no timer is set: nobody will ever wake up."""


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]  # chosen at run time by the library
    """Never waits; says how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Answer what is ready now; else let the time pass."""
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock("every task waits for another one")
            self.passed += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 and counts what was waited for."""

    def __init__(self) -> None:
        """Make the loop."""
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds."""
        return self._jumping.passed


def run_virtual(main: Coroutine[object, object, None]) -> None:
    """Run ``main`` in a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


def virtual_time(test: Callable[P, Coroutine[object, object, None]]) -> Callable[P, None]:
    """Make a coroutine test one that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtual(test(*args, **kwargs))

    return run
