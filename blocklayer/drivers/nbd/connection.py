"""One connection to an NBD server: the handshake, then requests side by side.

Layer ``drivers``: a ``ChannelUser`` around the codec. Requests of one turn of the event loop go out in one call; the
payload of a read is received straight into the caller's memory, that of a write is sent straight from it.

    read_into / write / command / block_status -> header [data] -> out -> (end of the turn) -> channel
    channel -> input -> header of a reply -> its request -> payload -> the request's buffer -> finished when DONE

Invariants
- A request is in ``_pending`` from the turn in which it is made until its last reply; there are at most
  ``in_flight_max``, whoever comes then waits.
- A buffer is the caller's again when its call returns, also if that was cancelled: what a cancelled read still
  receives is dropped, and a cancelled write waits until the channel does not need its data any more.
- Whatever breaks the protocol ends the connection, and so does everything that makes the stream useless. Then ``error``
  is set, every request fails with a copy of it *caused by* it, and nothing is sent or believed any more.

Source: NBD, "Transmission phase".
"""

from __future__ import annotations

import asyncio
import copy
import errno
import socket
from typing import TYPE_CHECKING, Final

from blocklayer.aio.channel import Channel
from blocklayer.aio.shield import to_the_end
from blocklayer.aio.tls_channel import TlsChannel
from blocklayer.base.errors import BlockError, IOFailedError, OptionError, ProtocolError, TimedOutError, from_os_error
from blocklayer.base.units import KIB
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.client_handshake import ClientHandshake, Failed, Ready, RemoteExport, StartTls, Wish
from blocklayer.codec.nbd.protocol import REQUEST_MAX, Command, CommandFlags, ReplyType, TlsMode
from blocklayer.codec.nbd.transmission import (
    Chunk,
    ReplyKind,
    Request,
    check_answer,
    pack_request,
    parse_chunk,
)
from blocklayer.drivers.nbd.dial import Address, connect
from blocklayer.drivers.nbd.pending import Pending

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Buffer

INPUT: Final = 64 * KIB
"""Bytes taken from the socket at once: sixteen reads of 4 KiB."""

LARGE: Final = 32 * KIB
"""While a read of this length is under way, no more than ``WINDOW`` is taken at once, so that hardly anything of its
payload has to be copied out of the input."""

WINDOW: Final = 512

IN_FLIGHT_MAX: Final = 64
"""As many as our own server has workers; QEMU's client stops at 16."""

GRACE_S: Final = 2.0
"""How long a server that does not read is waited for when there is nothing else to lose."""


class Connection:
    """Made by ``open``; then ``export`` says what there is, and ``error`` is None while it lives."""

    export: RemoteExport

    def __init__(
        self, wish: Wish, tls: ssl.SSLContext | None, hostname: str | None, in_flight_max: int, request_timeout_s: float
    ) -> None:
        """Nothing is connected yet."""
        if wish.tls is TlsMode.REQUIRE and tls is None:
            raise OptionError("TLS is required, and there are no certificates for it")
        self.error: BlockError | None = None
        self._tls, self._hostname = tls, hostname
        self._request_timeout_s = request_timeout_s
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | TlsChannel | None = None
        self._handshake: ClientHandshake | None = ClientHandshake(wish)
        self._ready: asyncio.Future[BlockError | None] = self._loop.create_future()
        self._slots = asyncio.Semaphore(in_flight_max)
        self._pending: dict[int, Pending] = {}
        self._cookie = 0
        self._large = 0  # reads of LARGE and more under way
        self._out: list[Buffer] = []  # goes out at the end of the turn
        self._out_with_data: list[Pending] = []
        self._drained: asyncio.Future[None] | None = None
        self._input = memoryview(bytearray(INPUT))
        self._start = self._end = 0
        # A payload that is being received: how much is missing, where it goes (None: nowhere), and what it belongs to
        self._left = 0
        self._sink: memoryview | None = None
        self._payload: bytearray | None = None  # of a small payload, which is looked at when it is here
        self._chunk: Chunk | None = None
        self._owner: Pending | None = None

    def __repr__(self) -> str:
        """How it is."""
        state = "handshake" if self._handshake is not None else "open" if self.error is None else f"over: {self.error}"
        return f"<Connection {state}, {len(self._pending)} in flight>"

    # -- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def open(
        cls,
        address: Address | socket.socket,
        wish: Wish,
        tls: ssl.SSLContext | None = None,
        hostname: str | None = None,
        *,
        open_timeout_s: float = 0,
        in_flight_max: int = IN_FLIGHT_MAX,
        request_timeout_s: float = 0,
    ) -> Connection:
        """Connect and agree on the export; 0 seconds mean no limit. If it is cancelled, nothing is left.

        ``address`` may be a connected socket, which is the connection's own from now on.

        Raises ``TimedOutError``, ``IOFailedError`` kinds, ``ProtocolError``, ``NotFoundError``, ``UnsupportedError``.
        """
        self = cls(wish, tls, hostname, in_flight_max, request_timeout_s)
        try:
            async with asyncio.timeout(open_timeout_s or None):
                return await self._agree(address if isinstance(address, socket.socket) else await connect(address))
        except TimeoutError:
            text = f"no answer from the NBD server within {open_timeout_s:g} seconds"
            raise TimedOutError(text, errno=errno.ETIMEDOUT) from None

    async def _agree(self, sock: socket.socket) -> Connection:
        self._channel = Channel(sock, self)
        self._channel.resume_reading()
        try:
            error = await self._ready
        except BaseException:
            self._channel.close()
            raise
        if error is not None:
            raise error
        return self

    async def close(self) -> None:
        """Take leave and hang up; requests under way fail. Twice is fine. If it is cancelled, it hangs up at once."""
        if self.error is None and self._channel is not None:
            self._out.append(pack_request(Command.DISC, 0, 0, 0, 0, extended=self.export.extended))
            self._flush()
            try:
                if self._channel.unsent:
                    self._drained = self._loop.create_future()
                    await asyncio.wait([self._drained], timeout=GRACE_S)
            finally:
                self._die(IOFailedError("the connection was closed", errno=errno.ESHUTDOWN))

    def _die(self, error: BlockError) -> None:
        """The end, once."""
        if self.error is not None:
            return
        self.error = error
        if self._channel is not None:
            self._channel.close()
        self._out.clear()
        for pending in self._out_with_data:
            pending.release()
        self._out_with_data.clear()
        self._left, self._sink, self._owner = 0, None, None
        if not self._ready.done():
            self._ready.set_result(error)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        for pending in list(self._pending.values()):
            pending.error = error
            self._forget(pending)
            pending.release()

    # -- requests ------------------------------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``. If it is cancelled, nothing is written to ``buffer`` any more."""
        await self._request(Command.READ, offset, len(buffer), buffer=buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Store ``data``. If it is cancelled, it may or may not be stored."""
        await self._request(Command.WRITE, offset, len(data), CommandFlags.FUA if fua else 0, data=data)

    async def command(self, command: Command, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        """FLUSH, TRIM, CACHE or WRITE_ZEROES. If it is cancelled, it may or may not be done."""
        await self._request(command, offset, length, flags)

    async def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[int, payloads.BlockStatus]:
        """What each context says, by its id; only the first extent if ``one``. Cancelling it changes nothing."""
        flags = CommandFlags.REQ_ONE if one else 0
        return (await self._request(Command.BLOCK_STATUS, offset, length, flags)).status

    async def _request(
        self,
        command: Command,
        offset: int,
        length: int,
        flags: int = 0,
        *,
        buffer: memoryview | None = None,
        data: memoryview | None = None,
    ) -> Pending:
        await self._slots.acquire()
        if self.error is not None:
            self._slots.release()
            raise copy.copy(self.error) from self.error
        self._cookie += 1
        pending = Pending(Request(command, flags, self._cookie, offset, length), buffer, self._loop.create_future())
        self._start_request(pending, data)
        try:
            error = await pending.future
        except asyncio.CancelledError:
            self._drop_bytes_of(pending)
            if not pending.sent:
                await to_the_end(self._until_sent(pending))
            raise
        if error is not None:
            if error is self.error:
                raise copy.copy(error) from error
            raise error
        return pending

    def _start_request(self, pending: Pending, data: memoryview | None) -> None:
        request = pending.request
        self._pending[request.cookie] = pending
        if request.command == Command.READ and request.length >= LARGE:
            self._large += 1
        if self._request_timeout_s:
            pending.timer = self._loop.call_later(self._request_timeout_s, self._timed_out)
        if not self._out:
            self._loop.call_soon(self._flush)
        command, flags, cookie, offset, length = request
        self._out.append(pack_request(command, flags, cookie, offset, length, extended=self.export.extended))
        if data is not None:
            pending.sent = False
            self._out.append(data)
            self._out_with_data.append(pending)

    def _flush(self) -> None:
        """Send what this turn has gathered."""
        if not self._out or self._channel is None:
            return
        out, self._out = self._out, []
        with_data, self._out_with_data = self._out_with_data, []

        def release() -> None:
            for pending in with_data:
                pending.release()

        self._channel.send(out, release=release if with_data else None)

    def _drop_bytes_of(self, pending: Pending) -> None:
        """Its caller has gone: from now on its buffer is not ours."""
        pending.buffer = None
        if self._owner is pending and self._payload is None:
            self._sink = None

    async def _until_sent(self, pending: Pending) -> None:
        """Wait for the channel; a server that takes nothing for long loses the connection."""
        self._flush()
        if not pending.sent:
            pending.until_sent = self._loop.create_future()
            await asyncio.wait([pending.until_sent], timeout=GRACE_S)
        if not pending.sent:
            text = "the server did not take the data of a write that was cancelled"
            self._die(TimedOutError(text, errno=errno.ETIMEDOUT))

    def _timed_out(self) -> None:
        text = f"no reply from the NBD server within {self._request_timeout_s:g} seconds"
        self._die(TimedOutError(text, errno=errno.ETIMEDOUT))

    def _forget(self, pending: Pending) -> None:
        """It is not under way any more; the caller learns of it as soon as its data are not needed."""
        del self._pending[pending.request.cookie]
        if pending.request.command == Command.READ and pending.request.length >= LARGE:
            self._large -= 1
        if pending.timer is not None:
            pending.timer.cancel()
        pending.buffer = None
        pending.replied = True
        self._slots.release()
        pending.finish()

    # -- what arrives --------------------------------------------------------------------------------------------

    def receive_into(self) -> memoryview:
        """See ``ChannelUser``: the rest of a payload goes where it belongs, everything else into the input."""
        if self._left:
            return self._input[: self._left] if self._sink is None else self._sink
        if self._start == self._end:
            self._start = self._end = 0
        elif INPUT - self._end < WINDOW:
            rest = bytes(self._input[self._start : self._end])
            self._input[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._input[self._end : self._end + WINDOW] if self._large else self._input[self._end :]

    def received(self, count: int) -> None:
        """See ``ChannelUser``."""
        try:
            if self._left:
                self._take_payload(count)
            else:
                self._end += count
            if self._handshake is not None:
                self._shake_hands()
            else:
                self._take_replies()
        except BlockError as error:
            self._die(error)

    def drained(self) -> None:
        """See ``ChannelUser``."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def lost(self, error: OSError | None) -> None:
        """See ``ChannelUser``."""
        if self._handshake is not None and error is None:
            self._die(self._handshake.at_end())
        elif error is None:
            self._die(IOFailedError("the NBD server closed the connection", errno=errno.ECONNRESET))
        elif error.errno is None or error.errno <= 0 or type(error).__module__ == "ssl":
            self._die(IOFailedError(f"TLS failed: {error}", errno=errno.EPROTO))
        else:
            self._die(from_os_error(error, "the connection to the NBD server"))

    # -- handshake -----------------------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        while self._handshake is not None and self._channel is not None:
            step = self._handshake.receive(self._input[self._start : self._end])
            self._start += step.consumed
            if step.send:
                self._channel.send([step.send])
            match step.outcome:
                case Ready(export):
                    self.export, self._handshake = export, None
                    self._take_replies()
                    if not self._ready.done():
                        self._ready.set_result(None)
                case Failed(error):
                    self._die(error)
                    return
                case StartTls():
                    self._start_tls()
                    return
                case _:
                    if not step.consumed:
                        return

    def _start_tls(self) -> None:
        if not isinstance(self._channel, Channel) or self._tls is None or self._channel.unsent:
            raise ProtocolError("the server begins TLS when it cannot begin")
        context, sock = self._tls, self._channel.detach()
        self._channel = TlsChannel(
            sock,
            self,
            context,
            server_side=False,
            hostname=self._hostname,
            established=lambda _tls: self._shake_hands(),
        )

    # -- replies -------------------------------------------------------------------------------------------------

    def _take_replies(self) -> None:
        """Take what stands in the input, as far as it is whole."""
        while self.error is None and self._start < self._end:
            if self._left:
                count = min(self._left, self._end - self._start)
                if self._sink is not None:
                    self._sink[:count] = self._input[self._start : self._start + count]
                self._start += count
                self._take_payload(count)
            elif not self._take_header():
                return

    def _take_header(self) -> bool:
        """The next reply's header; False if it is not wholly here."""
        export = self.export
        view = self._input[self._start : self._end]
        chunk = parse_chunk(view, 0, structured=export.structured, extended=export.extended, data_max=REQUEST_MAX)
        if chunk is None:
            return False
        pending = self._pending.get(chunk.cookie)
        if pending is None:
            raise ProtocolError(f"a reply has the cookie {chunk.cookie}, which no request has")
        check_answer(chunk, pending.request, structured=export.structured)
        length, size = chunk.length, int(chunk.kind)
        if chunk.type == ReplyType.OFFSET_DATA:
            if len(view) < size + payloads.OFFSET.size:
                return False
            offset = payloads.parse_data_offset(view[size:])
            length, size = length - payloads.OFFSET.size, size + payloads.OFFSET.size
            self._expect_data(pending, offset, length)
        elif chunk.kind is ReplyKind.SIMPLE:
            length = self._simple(chunk, pending)
        else:
            self._payload = bytearray(length)
            self._sink = memoryview(self._payload)
        self._start += size
        self._chunk, self._owner, self._left = chunk, pending, length
        if not length:
            self._payload_is_here()
        return True

    def _simple(self, chunk: Chunk, pending: Pending) -> int:
        """How many bytes follow a simple reply."""
        request = pending.request
        if chunk.error:
            pending.fail(payloads.ErrorPayload(chunk.error, "", None))
        elif request.command == Command.READ:
            self._expect_data(pending, request.offset, request.length)
            return request.length
        return 0

    def _expect_data(self, pending: Pending, offset: int, length: int) -> None:
        """The content of a read follows."""
        pending.cover(offset, length)
        start = offset - pending.request.offset
        self._payload = None
        self._sink = None if pending.buffer is None else pending.buffer[start : start + length]

    def _take_payload(self, count: int) -> None:
        """So many bytes of it have arrived."""
        self._left -= count
        if self._sink is not None:
            self._sink = self._sink[count:]
        if not self._left:
            self._payload_is_here()

    def _payload_is_here(self) -> None:
        chunk, pending, payload = self._chunk, self._owner, self._payload
        self._chunk = self._owner = self._sink = self._payload = None
        if chunk is None or pending is None:
            return
        if payload:
            pending.take(chunk, memoryview(payload), self.export.contexts)
        if chunk.done:
            if pending.error is None:
                pending.check_end()
            self._forget(pending)
