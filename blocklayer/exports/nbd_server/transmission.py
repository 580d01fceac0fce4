"""The transmission phase of one connection: requests come in, replies go out.

All requests that stand in the buffer are taken in one go. A read that the caches can answer at once is answered on the
spot, behind the replies before it in one piece of memory (the *tray*), which goes out in one call. Everything else goes
to a worker task, which replies when it is done; replies may overtake each other, as the protocol allows.

    received -> parse -> READ that disk.try_read_into can -> tray -> send
                      -> other requests -> worker -> disk -> send
                      -> payload of WRITE that is not all here -> received straight into the request's own memory

Bounds
- a turn of the event loop: ``TURN_S``, or a full tray; then others get theirs, and this goes on in the next one
- in flight: as many requests as there are workers, and ``IN_FLIGHT_MAX`` bytes; then no more is read from the socket
- unsent: a client that does not read its replies gets no more of them than ``UNSENT_MAX`` before its requests wait

Source: NBD, "Transmission phase", "Structured reply chunk types", "Extended headers".
"""

from __future__ import annotations

import asyncio
import logging
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.aio.workers import Workers
from blocklayer.base.errors import BlockError
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd.errors_map import to_wire
from blocklayer.codec.nbd.protocol import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    REQUEST_MAX,
    Command,
    CommandFlags,
    NbdErrno,
)
from blocklayer.codec.nbd.transmission import EXTENDED_REQUEST, REQUEST, Request, payload_length
from blocklayer.exports.nbd_server.commands import Commands, ReadReply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import anyio.abc
    from typing_extensions import Buffer

    from blocklayer.aio.channel import Channel
    from blocklayer.aio.tls_channel import TlsChannel
    from blocklayer.codec.nbd.server_handshake import Session
    from blocklayer.exports.nbd_server.export import ActiveExport

logger = logging.getLogger(__name__)

INPUT: Final = 256 * KIB
"""Bytes taken from the socket at once: sixty writes of 4 KiB, or a whole request of nbdcopy."""

TRAY: Final = MIB
"""Replies that one turn answers on the spot: 250 reads of 4 KiB."""

SPOT_MAX: Final = 128 * KIB
"""Longest read that is answered on the spot; a longer one takes the loop's time from other clients."""

TURN_S: Final = 0.002
"""A turn of one client: two of them at once are still less than what a guest notices."""

WORKERS: Final = 64
"""Requests of one client that may be under way; nbdcopy keeps 64 in flight, QEMU answers 16 at a time."""

IN_FLIGHT_MAX: Final = 64 * MIB
"""Bytes of one client that may be under way: two requests of the largest size."""

UNSENT_MAX: Final = 8 * MIB
"""A slow reader is served this far ahead."""

FILTER_MAX: Final = 64 * KIB
"""Longest payload of BLOCK_STATUS: more contexts than any export has."""

_READ, _DISC = int(Command.READ), int(Command.DISC)
_WRITE = int(Command.WRITE)
_DF, _PAYLOAD_LEN = int(CommandFlags.DF), int(CommandFlags.PAYLOAD_LEN)


class Task(NamedTuple):
    """A request for a worker; ``payload`` came with it. ``weight`` is what it counts against ``IN_FLIGHT_MAX``."""

    request: Request
    payload: bytearray | None
    weight: int
    started: float


class Transmission:
    """One client that uses one export. ``finished(reason)`` is called once; "" if the client took its leave."""

    def __init__(
        self,
        session: Session,
        export: ActiveExport,
        channel: Channel | TlsChannel,
        group: anyio.abc.TaskGroup,
        *,
        finished: Callable[[str], None],
    ) -> None:
        """``group`` runs the workers and ends with the connection."""
        self._reason = ""
        self._over = False
        self._session = session
        self._export = export
        self._disk = export.disk
        self._channel = channel
        self._finished = finished
        self._loop = asyncio.get_running_loop()
        self._commands = Commands(session, export)
        self._workers: Workers[Task] = Workers(group, self._work, size=WORKERS, name="NBD request")
        self._input = memoryview(bytearray(INPUT))
        self._start = self._end = 0
        self._tray = memoryview(bytearray(TRAY))
        self._request = EXTENDED_REQUEST if session.extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if session.extended else REQUEST_MAGIC
        self._reply = ReadReply(session)
        self._replies: list[Buffer] = []
        self._in_flight = 0  # bytes
        self._payload: memoryview | None = None  # where the rest of a WRITE's payload goes
        self._writing: Task | None = None  # the WRITE that it belongs to
        self._skip = 0  # bytes of a payload that nobody wants
        self._disk_start_write = getattr(export.disk, "start_write", None)
        self._started_writes = 0  # under way without a worker
        self._leaving = False
        self._going_on = False  # the next turn is scheduled

    # -- what arrives --------------------------------------------------------------------------------------------

    def receive_into(self) -> memoryview:
        """See ``ChannelUser``: the rest of a payload goes straight to its request."""
        if self._payload is not None:
            return self._payload
        if self._start == self._end:
            self._start = self._end = 0
        elif INPUT - self._end < self._request.size:
            rest = self._end - self._start
            self._input[:rest] = bytes(self._input[self._start : self._end])
            self._start, self._end = 0, rest
        return self._input[self._end :]

    def received(self, count: int) -> None:
        """See ``ChannelUser``."""
        if self._payload is None:
            self._end += count
        else:
            self._payload = self._payload[count:]
            if self._payload:
                return
            self._payload_is_here()
        self.take_turn()

    def feed(self, data: Buffer) -> None:
        """Bytes that arrived behind the handshake; at most ``INPUT``."""
        view = memoryview(data)
        self._input[: len(view)] = view
        self._start, self._end = 0, len(view)
        self.take_turn()

    def drained(self) -> None:
        """See ``ChannelUser``."""
        if self._leaving:
            self._leave_when_idle()
        else:
            self.take_turn()

    def lost(self, error: OSError | None) -> None:
        """See ``ChannelUser``."""
        self._leaving = True
        if not self._over:
            self._over = True
            self._finished("the client closed the connection" if error is None else str(error))

    def take_turn(self) -> None:
        """Take requests out of the buffer until it is empty, the turn is over, or too much is under way."""
        tray, at, deadline = self._tray, 0, perf_counter() + TURN_S
        unpack, size = self._request.unpack_from, self._request.size
        reply, disk, statistics = self._reply, self._disk, self._export.statistics
        while self._payload is None and not self._leaving:
            if self._skip:
                self._skip_payload()
            if self._end - self._start < size or self._has_enough():
                break
            magic, flags, kind, cookie, offset, length = unpack(self._input, self._start)
            if magic != self._magic:
                self._leave(f"a request begins with {magic:#010x}")
                break
            self._start += size
            if kind == _READ and 0 < length <= SPOT_MAX and not flags & ~_DF and offset + length <= disk.size:
                behind = at + reply.size + length
                if behind > TRAY:
                    self._channel.send((tray[:at],), volatile=True)
                    at, behind = 0, reply.size + length
                try:
                    is_here = disk.try_read_into(offset, tray[at + reply.size : behind])
                except Exception:  # noqa: BLE001 - a worker meets it again, and says so
                    is_here = False
                if is_here:
                    reply.pack_into(tray, at, cookie, offset, length)
                    at = behind
                    statistics.requests += 1
                    statistics.latency[0] += 1
                    statistics.bytes_read += length
                    if perf_counter() > deadline:
                        self._go_on()
                        break
                    continue
            self._take(Request(kind, flags, cookie, offset, length))
        if at:
            self._channel.send((tray[:at],), volatile=True)
        self._mind_the_flow()

    def _take(self, request: Request) -> None:
        """A request for a worker; a WRITE's payload stands behind it."""
        started = perf_counter()
        length = payload_length(request, extended=self._session.extended)
        if not length:
            weight = min(request.length, REQUEST_MAX) if request.command == _READ else 0
            self._give(Task(request, None, weight, started))
            return
        if length > (REQUEST_MAX if request.command == Command.WRITE else FILTER_MAX):
            self._skip = length
            self._give(Task(request, None, 0, started))
            return
        here = min(length, self._end - self._start)
        payload = bytearray(length)
        payload[:here] = self._input[self._start : self._start + here]
        self._start += here
        task = Task(request, payload, length, started)
        if here == length:
            self._give(task)
        else:
            self._writing, self._payload = task, memoryview(payload)[here:]

    def _payload_is_here(self) -> None:
        task, self._writing, self._payload = self._writing, None, None
        if task is not None:
            self._give(task)

    def _skip_payload(self) -> None:
        piece = min(self._skip, self._end - self._start)
        self._start += piece
        self._skip -= piece

    def _give(self, task: Task) -> None:
        if task.request.command == _DISC:
            self._leave("")
            return
        self._in_flight += task.weight
        if task.request.command != _WRITE or not self._start_write(task):
            self._workers.give(task)

    def _start_write(self, task: Task) -> bool:
        """Let a plain write begin without a worker, if the disk can; else answer False."""
        request, payload = task.request, task.payload
        allowed = _PAYLOAD_LEN if self._session.extended else 0
        if self._disk_start_write is None or request.flags & ~allowed or not payload or not self._export.writable:
            return False

        def done(error: BlockError | None) -> None:
            self._started_writes -= 1
            self._in_flight -= task.weight
            statistics = self._export.statistics
            statistics.record(perf_counter() - task.started)
            if error is None:
                statistics.bytes_written += request.length
                self.send(self._commands.done(request))
            else:
                self._fail(request, to_wire(error, writing=True), str(error))

        try:
            if not self._disk_start_write(request.offset, memoryview(payload), done):
                return False
        except Exception:  # noqa: BLE001 - a worker meets it again, and says so
            return False
        self._started_writes += 1
        return True

    # -- how much is under way -----------------------------------------------------------------------------------

    def _has_enough(self) -> bool:
        busy = self._workers.busy + self._started_writes
        return busy >= WORKERS or self._in_flight >= IN_FLIGHT_MAX or self._channel.unsent >= UNSENT_MAX

    def _mind_the_flow(self) -> None:
        """Read on, or let the client wait."""
        if self._leaving or self._going_on or self._has_enough():
            self._channel.pause_reading()
        else:
            self._channel.resume_reading()

    def _go_on(self) -> None:
        if not self._going_on:
            self._going_on = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._going_on = False
        if not self._channel.closed:
            self.take_turn()

    # -- what workers do -----------------------------------------------------------------------------------------

    async def _work(self, task: Task) -> None:
        request = task.request
        try:
            self.send(await self._commands.perform(request, task.payload))
        except (BlockError, MemoryError) as error:
            self._fail(request, to_wire(error), str(error) or "out of memory")
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            self._fail(request, NbdErrno.EIO, "the request was cancelled")  # what it waited for, not the connection
        except Exception as error:  # a bug in a driver is this request's failure, not the server's
            logger.exception("NBD export %r: %s failed", self._export.name, request)
            self._fail(request, NbdErrno.EIO, f"internal error: {error!r}")
        finally:
            self._in_flight -= task.weight
            self._export.statistics.record(perf_counter() - task.started)
        if self._leaving:
            self._leave_when_idle()

    def _fail(self, request: Request, error: NbdErrno, message: str) -> None:
        self._export.statistics.errors += 1
        self.send(self._commands.failure(request, error, message))

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send a reply, together with all others of this tick."""
        if not self._replies:
            self._loop.call_soon(self._send_replies)
        self._replies += buffers

    def _send_replies(self) -> None:
        replies, self._replies = self._replies, []
        self._channel.send(replies)
        if not self._channel.closed:
            self.take_turn()
        if self._leaving:
            self._leave_when_idle()

    # -- the end -------------------------------------------------------------------------------------------------

    def leave(self, reason: str) -> None:
        """Take no more requests; the end is when those under way are answered."""
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        if not self._leaving:
            self._leaving = True
            self._reason = reason
            self._channel.pause_reading()
            self._loop.call_soon(self._leave_when_idle)

    def _leave_when_idle(self) -> None:
        if not (self._workers.busy or self._started_writes or self._replies or self._channel.unsent or self._over):
            self._over = True
            self._finished(self._reason)


def _is_cancelled() -> bool:
    """Whether somebody ends the task that runs."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
