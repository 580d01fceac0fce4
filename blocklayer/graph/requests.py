"""Requests in flight on one node, and who has to wait for whom.

Two overlapping requests conflict if one of them is *serialising*. A request is put on the list first and then waits for
the conflicting requests that do not wait themselves; each time it wakes up it looks again. Nobody ever waits for one
that waits, so there is no circle and no deadlock, also when a request becomes serialising while others wait for it, or
when its notifier reads what they wait for. Whoever waits is woken in the order in which it began to.
Reads and plain writes never conflict: the guest asked for them in any order.
Between looking at the list and adding to it there is no await.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING

from blocklayer.base.modes import WriteFlags

if TYPE_CHECKING:
    from collections.abc import Iterator


class RequestKind(enum.Enum):
    """What a request does."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write_zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    TRUNCATE = "truncate"


class Request:
    """One request in flight: ``kind``, ``offset`` and ``length`` in bytes, ``flags``. Compared by identity."""

    __slots__ = ("_done", "flags", "grows", "kind", "length", "offset", "serialising", "waiting")

    def __init__(
        self,
        kind: RequestKind,
        offset: int,
        length: int,
        flags: WriteFlags = WriteFlags.NONE,
        *,
        serialising: bool = False,
    ) -> None:
        """Describe a request; it is not tracked yet."""
        self.kind = kind
        self.offset = offset
        self.length = length
        self.flags = flags
        self.serialising = serialising
        self.grows = False
        """Whether it may extend the node."""
        self.waiting = False
        """Whether it waits for another one, which may therefore not wait for it."""
        self._done: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        """``<write 4096+512 serialising>``."""
        return f"<{self.kind.value} {self.offset}+{self.length}{' serialising' if self.serialising else ''}>"

    def conflicts(self, other: Request) -> bool:
        """Whether the two must not run at once."""
        return (
            (self.serialising or other.serialising)
            and self.offset < other.offset + other.length
            and other.offset < self.offset + self.length
        )

    async def wait_done(self) -> None:
        """Wait until the request is off the list."""
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._done)

    def finish(self) -> None:
        """Wake whoever waits."""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


WriteRequest = Request
"""What a before-write notifier gets: kind, offset, length, flags of the write that is about to happen."""


class RequestList:
    """The requests in flight on one node, oldest first."""

    __slots__ = ("_idle", "_requests", "serialising")

    def __init__(self) -> None:
        """Start empty."""
        self._requests: dict[Request, None] = {}
        self.serialising = 0
        """How many of them are serialising: 0 means that nobody has to look for conflicts."""
        self._idle: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """How many are in flight."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Oldest first."""
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Track ``request``; if it or any other is serialising, ``await wait_turn(request)`` must follow."""
        self._requests[request] = None
        self.serialising += request.serialising

    async def wait_turn(self, request: Request) -> None:
        """Wait until no conflicting request runs. If cancelled, the caller still has to ``remove``."""
        while (other := self._conflict_of(request)) is not None:
            request.waiting = True
            try:
                await other.wait_done()
            finally:
                request.waiting = False

    def _conflict_of(self, request: Request) -> Request | None:
        for other in self._requests:
            if other is not request and not other.waiting and other.conflicts(request):
                return other
        return None

    def promote(self, request: Request, offset: int, length: int) -> None:
        """Make a tracked request serialising over ``[offset, offset + length)``.

        ``await wait_turn(request)`` must follow.
        """
        self.serialising += not request.serialising
        request.offset, request.length, request.serialising = offset, length, True

    def remove(self, request: Request) -> None:
        """The request is done, however it ended."""
        del self._requests[request]
        if request.serialising:
            self.serialising -= 1
        request.finish()
        if self._idle is not None and not self._requests:
            if not self._idle.done():
                self._idle.set_result(None)
            self._idle = None

    def blocks(self, offset: int, length: int) -> bool:
        """Whether a plain request on the range would have to wait now."""
        return self.serialising > 0 and any(
            other.serialising
            and not other.waiting
            and other.offset < offset + length
            and offset < other.offset + other.length
            for other in self._requests
        )

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight; new requests may arrive meanwhile and are waited for too."""
        while self._requests:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)
