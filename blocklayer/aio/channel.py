"""Channel: a connected stream socket in the event loop, without a copy and without a task.

Bytes arrive in memory that the user names (``receive_into``), so that a large payload goes where it is wanted; what is
sent goes to the kernel at once, many buffers in one call, and only what the kernel does not take is kept.

    readable -> receive_into() names memory -> recv_into -> received(count)
    send(buffers) -> sendmsg -> the rest waits for the socket; ``unsent`` says how much that is
    drained()        the rest has gone
    lost(error)      the end, once: None if the peer has closed its side, ``OSError`` if the connection broke

Invariants
- Buffers go out in the order in which they were given; nothing is sent after ``lost`` or ``close``.
- A ``volatile`` buffer may be used again as soon as ``send`` returns; any other is the channel's until ``unsent`` is 0.
- ``release`` is called once for each ``send`` that has one, as soon as its buffers are not needed any more.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from blocklayer.base.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

VECTORS_MAX: Final = 1024
"""IOV_MAX of Linux: more buffers than that do not fit into one call."""


class ChannelUser(Protocol):
    """Who is told what happens. All calls come from the event loop."""

    def receive_into(self) -> memoryview:
        """Memory for the next bytes; at least one."""

    def received(self, count: int) -> None:
        """So many bytes are in the memory that ``receive_into`` named last."""

    def drained(self) -> None:
        """All that was sent is with the kernel; called only if some of it had to wait."""

    def lost(self, error: OSError | None) -> None:
        """Nothing more arrives, and nothing can be sent."""


class _Waiting(NamedTuple):
    """What the kernel has not taken; the last piece of a ``send`` has its ``release``."""

    data: memoryview
    release: Callable[[], None] | None


class Channel:
    """Owns ``sock`` from now on. Reads nothing before ``resume_reading``."""

    def __init__(self, sock: socket.socket, user: ChannelUser) -> None:
        """Bind to the running event loop."""
        sock.setblocking(False)
        self.closed = False
        self.unsent = 0
        """Bytes that wait for the socket."""
        self._loop = asyncio.get_running_loop()
        # uvloop calls a reader once when the connection was reset and never again, though there may be bytes before it
        self._calls_once = not isinstance(self._loop, asyncio.BaseEventLoop)
        self._socket = sock
        self._fd = sock.fileno()
        self.user = user
        """Who is told; may change at any time."""
        self._waiting: deque[_Waiting] = deque()
        self._reading = False

    # -- reading -----------------------------------------------------------------------------------------------

    def resume_reading(self) -> None:
        """Take bytes from the socket as they arrive. Twice is fine."""
        if not self._reading and not self.closed:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def pause_reading(self) -> None:
        """Leave bytes in the socket, so that the peer has to wait. Twice is fine."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self.user.receive_into())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if count:
            self.user.received(count)
            if self._calls_once and not self.closed:
                self._lose_if_reset()
        else:
            self._lose(None)

    def _lose_if_reset(self) -> None:
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._lose(OSError(number, os.strerror(number)))

    # -- sending -----------------------------------------------------------------------------------------------

    def send(
        self, buffers: Sequence[Buffer], *, volatile: bool = False, release: Callable[[], None] | None = None
    ) -> None:
        """Send ``buffers`` one behind the other."""
        if self.closed:
            if release is not None:
                release()
            return
        sent = 0
        if not self._waiting:
            try:
                sent = self._socket.sendmsg(buffers[:VECTORS_MAX])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                if release is not None:
                    release()
                self._lose(error)
                return
        rest = _behind(buffers, sent)
        if rest:
            self._keep(rest, volatile=volatile, release=release)
        elif release is not None:
            release()

    def _keep(self, rest: list[memoryview], *, volatile: bool, release: Callable[[], None] | None) -> None:
        if not self._waiting:
            self._loop.add_writer(self._fd, self._writable)
        for number, piece in enumerate(rest, start=1):
            data = memoryview(bytes(piece)) if volatile else piece
            self._waiting.append(_Waiting(data, release if number == len(rest) else None))
            self.unsent += len(piece)

    def _writable(self) -> None:
        waiting = self._waiting
        try:
            sent = self._socket.sendmsg([each.data for each in _first(waiting, VECTORS_MAX)])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        self.unsent -= sent
        released = []
        while waiting and sent >= len(waiting[0].data):
            each = waiting.popleft()
            sent -= len(each.data)
            if each.release is not None:
                released.append(each.release)
        if sent:
            waiting[0] = waiting[0]._replace(data=waiting[0].data[sent:])
        if not waiting:
            self._loop.remove_writer(self._fd)
        for release in released:  # only now: it may send, or close
            release()
        if not (self._waiting or self.closed):
            self.user.drained()

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the socket at once; what was not sent is lost. The user is not told. Twice is fine."""
        if self.closed:
            return
        self.closed = True
        self.pause_reading()
        if self._waiting:
            self._loop.remove_writer(self._fd)
        self._socket.close()
        waiting, self._waiting, self.unsent = self._waiting, deque(), 0
        for each in waiting:
            if each.release is not None:
                each.release()

    def detach(self) -> socket.socket:
        """Give the socket back, open, to whoever takes it over; only if nothing is unsent."""
        if self._waiting:
            raise StateError("a channel with unsent bytes cannot give its socket away")
        self.pause_reading()
        self.closed = True
        return self._socket

    def _lose(self, error: OSError | None) -> None:
        if not self.closed:
            self.close()
            self.user.lost(error)


def _behind(buffers: Sequence[Buffer], skip: int) -> list[memoryview]:
    """What of ``buffers`` stands behind their first ``skip`` bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        view = memoryview(buffer)
        if skip < len(view):
            rest.append(view[skip:] if skip else view)
        skip = max(0, skip - len(view))
    return rest


def _first(waiting: deque[_Waiting], count: int) -> list[_Waiting]:
    return list(waiting) if len(waiting) <= count else [waiting[number] for number in range(count)]
