"""A connection that comes back: requests are sent again when it was lost.

Every request of NBD may be repeated: done twice it leaves what it leaves when done once. So a request whose connection
went away is sent again on the next one, for ``delay_s`` seconds from its first failure; then, or without a delay, it
fails. A server that breaks the protocol is not asked again by the same request.

    run -> connection alive -> request -> its result, or the server's own error
             | lost                | lost
             +-> dial <------------+    one at a time; the others wait and share what came out

For ``delay_s`` after the loss dialling is repeated with growing pauses; later each new request tries once.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Final, TypeVar

from blocklayer.base.errors import BlockError, IOFailedError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blocklayer.drivers.nbd.connection import Connection

T = TypeVar("T")

PAUSE_MIN_S: Final = 0.05
PAUSE_MAX_S: Final = 2.0
"""A server that restarts is found soon; one that is away is not flooded."""


class Link:
    """``dial`` makes a connection to the same export as before, or raises."""

    def __init__(self, connection: Connection, dial: Callable[[], Awaitable[Connection]], *, delay_s: float) -> None:
        """``connection`` is the first one."""
        self.connection = connection
        self._dial = dial
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._dialling = asyncio.Lock()
        """Held while a connection is made; guards the three below."""
        self._failure: BlockError | None = None
        self._failures = 0
        self._lost_at: float | None = None

    async def run(self, request: Callable[[Connection], Awaitable[T]]) -> T:
        """Do ``request``, on as many connections as it takes. What holds if it is cancelled is the request's matter."""
        deadline: float | None = None
        while True:
            connection = self.connection
            if connection.error is not None:
                connection = await self._reconnected(deadline)
            try:
                return await request(connection)
            except IOFailedError as error:
                if connection.error is None or error.__cause__ is not connection.error:
                    raise  # the server's answer
                now = self._loop.time()
                deadline = now + self._delay_s if deadline is None else deadline
                if now >= deadline or isinstance(error, ProtocolError):
                    raise

    async def close(self) -> None:
        """Take leave."""
        await self.connection.close()

    async def _reconnected(self, deadline: float | None) -> Connection:
        """A living connection. Raises what the last attempt raised."""
        failures = self._failures
        async with self._dialling:
            if self.connection.error is None:
                return self.connection
            if self._failure is not None and self._failures != failures:
                raise copy.copy(self._failure) from self._failure  # somebody tried while this one waited
            if self._lost_at is None:
                self._lost_at = self._loop.time()
            until = self._lost_at + self._delay_s if deadline is None else deadline
            try:
                self.connection = await self._dial_until(until)
            except BlockError as error:
                self._failure = error
                self._failures += 1
                raise
            self._failure = self._lost_at = None
            return self.connection

    async def _dial_until(self, until: float) -> Connection:
        pause_s = PAUSE_MIN_S
        while True:
            try:
                return await self._dial()
            except IOFailedError:
                left_s = until - self._loop.time()
                if left_s <= 0:
                    raise
                await asyncio.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
