"""The I/O engine as an interface: what blocks is done elsewhere, and the event loop is told when it is done.

An engine belongs to one running event loop, and a graph owns one engine. Requests are positional and independent; they
run in any order. Contract of every call:

- a read fills the whole buffer; what lies behind the end of the file becomes zeroes. A write stores all of it;
- ``OSError`` arrives as the matching class of ``base.errors``, mapped here and nowhere else;
- a caller that is cancelled gets its ``CancelledError`` only when nobody uses its buffers any more.

``ThreadEngine`` is the implementation; one on io_uring fits behind the same calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class Engine(ABC):
    """Blocking I/O for one event loop. ``fd`` is an open file descriptor, offsets and lengths are bytes."""

    @abstractmethod
    async def read(self, fd: int, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""

    @abstractmethod
    async def write(self, fd: int, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        """Store ``buffers`` one behind the other from ``offset``; ``durable`` makes them so before the call returns."""

    def start_write(self, fd: int, data: memoryview, offset: int, done: Callable[[OSError | None], None]) -> bool:
        """Begin to store ``data`` and call ``done`` in the event loop when that has ended; False: use ``write``.

        No future and no task is made. Nobody can cancel it; ``data`` belongs to the engine until ``done`` is called.
        """
        return False

    @abstractmethod
    async def sync(self, fd: int) -> None:
        """Make all completed writes to ``fd`` durable, and what is needed to read them back (fdatasync)."""

    @abstractmethod
    async def allocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """``fallocate(2)``."""

    @abstractmethod
    async def call(self, function: Callable[..., T], *args: object, weight: int = 0) -> T:
        """Run any blocking or heavy function; ``weight`` is about how many bytes it works on.

        Errors pass as they are raised, except ``OSError``, which is mapped.
        """

    @abstractmethod
    async def close(self) -> None:
        """Wait for what is in flight and stop. Calls after it raise ``StateError``."""
