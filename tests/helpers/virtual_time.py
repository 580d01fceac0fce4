"""An event loop whose clock jumps: when everybody waits for time, time passes at once.

If everybody waits for something else, the test hangs for good; the loop raises ``Deadlock`` instead.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from unittest import mock

from blocklayer.aio import breath

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


FOREVER_S = 1e9
"""Thirty years: only ``sleep_forever`` waits that long."""


class Deadlock(AssertionError):
    """Nothing is ready, and no timer is set: nobody will ever wake up."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits; says how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self._idle_since = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Answer what is ready now; else let the time pass."""
        ready = super().select(0)
        if ready or not timeout:
            self._idle_since = self.passed
        if not ready:
            if timeout is None or self.passed - self._idle_since > FOREVER_S:
                raise Deadlock("every task waits for another one")
            self.passed += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 and counts what was waited for."""

    def __init__(self) -> None:
        """Make the loop."""
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self.ticks = 0
        """How often the loop has gone round."""
        self.act_at = -1
        """The tick at which ``action`` is called."""
        self.action: Callable[[], object] = lambda: None

    def _run_once(self) -> None:
        self.ticks += 1
        if self.ticks == self.act_at:
            self.action()
        super()._run_once()  # type: ignore[misc]  # the stock loop's own, which its stubs leave out

    def run_in_executor(
        self,
        executor: object,
        func: Callable[..., R],
        *args: object,  # noqa: ARG002 - no thread, no executor
    ) -> asyncio.Future[R]:
        """Run it in the loop, one turn later: threads have a time of their own."""
        future: asyncio.Future[R] = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - whatever it is, it goes to who waits
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_soon(run)
        return future

    def time(self) -> float:
        """Virtual seconds."""
        return self._jumping.passed


def virtual_loop() -> VirtualLoop:
    """The loop that runs."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def run_virtual(main: Coroutine[object, object, T]) -> T:
    """Run ``main`` in a loop of its own; work takes no time, so nobody has to give way because it took long."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner, mock.patch.object(breath, "perf_counter", lambda: 0.0):
        return runner.run(main)


def virtual_time(test: Callable[P, Coroutine[object, object, None]]) -> Callable[P, None]:
    """Make a coroutine test one that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtual(test(*args, **kwargs))

    return run
