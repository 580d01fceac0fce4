"""Event loops by name: ``stock`` is asyncio's own, ``uvloop`` the one on libuv.

``timed`` is the only clock of the benchmarks.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")

STOCK = "stock"
UVLOOP = "uvloop"


def available() -> tuple[str, ...]:
    """The loops that are installed, the slowest first."""
    return (STOCK, UVLOOP) if importlib.util.find_spec("uvloop") else (STOCK,)


def run(loop: str, main: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run ``main`` to its end on a new event loop of that kind."""
    with asyncio.Runner(loop_factory=_factory(loop)) as runner:
        return runner.run(main())


def _factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if loop == STOCK:
        return asyncio.new_event_loop
    if loop == UVLOOP:
        import uvloop  # noqa: PLC0415 - an extra that need not be installed

        return uvloop.new_event_loop
    raise ValueError(f"no event loop is called {loop!r}")


@dataclass(slots=True)
class Stopwatch:
    """Seconds that a block took; zero until it is left."""

    seconds: float = 0.0


@contextmanager
def timed() -> Iterator[Stopwatch]:
    """Measure the block; nothing is measured if it raises."""
    watch = Stopwatch()
    started = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - started
