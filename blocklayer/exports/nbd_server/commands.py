"""The commands of the transmission phase: what a request does to the disk, and the reply as buffers.

``perform`` checks a request against the export in the order in which QEMU does, carries it out, and answers with the
buffers of its reply; what goes wrong is raised as a ``BlockError`` and becomes a reply by ``failure``. Nothing here knows
of sockets, nor in which order requests arrived.

Source: NBD, "Request types", "Structured reply chunk types".
"""

from __future__ import annotations

from errno import ENOSPC
from struct import Struct
from typing import TYPE_CHECKING, Final

from blocklayer.aio.breath import Breather
from blocklayer.base.errors import (
    IOFailedError,
    NoSpaceError,
    OptionError,
    OutOfRangeError,
    ProtocolError,
    ReadOnlyError,
)
from blocklayer.base.modes import WriteFlags
from blocklayer.base.ranges import split
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd import transmission as wire
from blocklayer.codec.nbd.protocol import (
    COMMAND_FLAGS,
    EXTENDED_REPLY_MAGIC,
    EXTENTS_SENT_MAX,
    REQUEST_MAX,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlags,
    NbdErrno,
    ReplyFlags,
    ReplyType,
)
from blocklayer.exports.nbd_server.contexts import joined_runs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    from blocklayer.codec.nbd.server_handshake import Session
    from blocklayer.codec.nbd.transmission import Request
    from blocklayer.exports.nbd_server.export import ActiveExport

SPARSE_MIN: Final = 64 * KIB
"""Shorter reads are not looked through for holes: to ask costs more than to send them."""

CACHE_PIECE: Final = MIB

_DONE, _OFFSET_DATA = int(ReplyFlags.DONE), int(ReplyType.OFFSET_DATA)

# As plain numbers: members of flag types take microseconds to combine.
_READ, _WRITE, _FLUSH, _BLOCK_STATUS = map(int, (Command.READ, Command.WRITE, Command.FLUSH, Command.BLOCK_STATUS))
_FUA, _DF, _PAYLOAD_LEN = int(CommandFlags.FUA), int(CommandFlags.DF), int(CommandFlags.PAYLOAD_LEN)
_UNKNOWN_FLAGS: Final = {int(command): 0xFFFF & ~int(flags) for command, flags in COMMAND_FLAGS.items()}
_CHANGES: Final = frozenset(map(int, (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)))


class ReadReply:
    """How the head of an undivided READ reply looks in a session: ``size`` bytes in front of the data."""

    __slots__ = ("_extended", "_structured", "size")

    _SIMPLE = Struct(">IIQ")
    _STRUCTURED = Struct(">IHHQIQ")
    _EXTENDED = Struct(">IHHQQQQ")

    def __init__(self, session: Session) -> None:
        """Simple, structured, or extended."""
        self._extended = session.extended
        self._structured = session.structured and not session.extended
        layout = self._EXTENDED if self._extended else self._STRUCTURED if self._structured else self._SIMPLE
        self.size = layout.size

    def pack_into(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        """Write the head of a reply with ``length`` bytes from ``offset``."""
        if self._structured:
            self._STRUCTURED.pack_into(
                buffer, at, STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, 8 + length, offset
            )
        elif self._extended:
            self._EXTENDED.pack_into(
                buffer, at, EXTENDED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, 8 + length, offset
            )
        else:
            self._SIMPLE.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)


class Commands:
    """Carries out the requests of one session."""

    def __init__(self, session: Session, export: ActiveExport) -> None:
        """Look up the contexts that the client chose."""
        self._session = session
        self._export = export
        self._disk = export.disk
        self._extended = session.extended
        self._chunked = session.structured or session.extended
        self._contexts = {number: export.contexts[name] for number, name in session.contexts.items()}
        self._table: dict[int, Callable[[Request, bytearray | None], Awaitable[list[Buffer]]]] = {
            Command.READ: self._read,
            Command.WRITE: self._write,
            Command.FLUSH: self._flush,
            Command.TRIM: self._trim,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._write_zeroes,
            Command.BLOCK_STATUS: self._block_status,
        }

    async def perform(self, request: Request, payload: bytearray | None) -> list[Buffer]:
        """Do what ``request`` asks for and answer with the buffers of the reply. Raises ``BlockError`` kinds."""
        self._check(request, payload)
        return await self._table[request.command](request, payload)

    def failure(self, request: Request, error: NbdErrno, message: str) -> list[Buffer]:
        """The reply to a request that failed."""
        if not self._chunked:
            return [wire.pack_simple_reply(request.cookie, error)]
        return self._chunk(request, ReplyType.ERROR, payloads.pack_error(error, message))

    def _check(self, request: Request, payload: bytearray | None) -> None:
        command, flags, _, offset, length = request
        if command not in self._table:
            raise OptionError(f"unknown command {command}")
        if flags & (_UNKNOWN_FLAGS[command] if self._extended else _UNKNOWN_FLAGS[command] | _PAYLOAD_LEN):
            raise OptionError(f"unknown flags {flags:#x} for {Command(command).name}")
        if command in _CHANGES and not self._export.writable:
            raise ReadOnlyError(f"export {self._export.name!r} is read-only", offset=offset, length=length)
        if (command == _READ and length > REQUEST_MAX) or (command == _WRITE and payload is None and length):
            fault = f"at most {REQUEST_MAX} bytes" if length > REQUEST_MAX else "a payload"
            raise OptionError(f"a request of {length} bytes must have {fault}")
        if offset + length > self._disk.size and command not in (_FLUSH, _BLOCK_STATUS):
            message = f"request outside the export's {self._disk.size} bytes"
            if command in _CHANGES and command != Command.TRIM:
                raise NoSpaceError(message, errno=ENOSPC, offset=offset, length=length)
            raise OutOfRangeError(message, offset=offset, length=length)

    # -- commands ------------------------------------------------------------------------------------------------

    async def _read(self, request: Request, _payload: bytearray | None) -> list[Buffer]:
        offset, length = request.offset, request.length
        if not length:
            return self.done(request)
        self._export.statistics.bytes_read += length
        if self._chunked and length >= SPARSE_MIN and not request.flags & _DF:
            return await self._read_sparsely(request)
        data = memoryview(bytearray(length))
        await self._disk.read_into(offset, data)
        if not self._chunked:
            return [wire.pack_simple_reply(request.cookie, 0), data]
        return [*self._data_chunk(request, offset, length, last=True), data]

    async def _read_sparsely(self, request: Request) -> list[Buffer]:
        """Data as they are, holes as their length."""
        end = request.offset + request.length
        reply: list[Buffer] = []
        at = request.offset
        breather = Breather()
        async for extent in self._disk.extents(request.offset, request.length):
            await breather.breathe()
            at = extent.end
            last = at == end
            if extent.is_zero or not extent.is_allocated:
                hole = payloads.pack_hole(extent.offset, extent.length)
                reply += self._chunk(request, ReplyType.OFFSET_HOLE, hole, last=last)
                continue
            data = memoryview(bytearray(extent.length))
            await self._disk.read_into(extent.offset, data)
            reply += [*self._data_chunk(request, extent.offset, extent.length, last=last), data]
        if at != end:
            raise OutOfRangeError("the disk has become shorter", offset=request.offset, length=request.length)
        return reply

    async def _write(self, request: Request, payload: bytearray | None) -> list[Buffer]:
        data = memoryview(payload or b"")
        await self._disk.write(request.offset, data, _fua(request))
        self._export.statistics.bytes_written += len(data)
        return self.done(request)

    async def _flush(self, request: Request, _payload: bytearray | None) -> list[Buffer]:
        await self._disk.flush()
        return self.done(request)

    async def _trim(self, request: Request, _payload: bytearray | None) -> list[Buffer]:
        await self._disk.discard(request.offset, request.length)
        if request.flags & _FUA:
            await self._disk.flush()
        return self.done(request)

    async def _cache(self, request: Request, _payload: bytearray | None) -> list[Buffer]:
        scratch = memoryview(bytearray(min(request.length, CACHE_PIECE)))
        breather = Breather()
        for piece in split(request.offset, request.length, length_max=CACHE_PIECE):
            await breather.breathe()
            await self._disk.read_into(piece.offset, scratch[: piece.length])
        return self.done(request)

    async def _write_zeroes(self, request: Request, _payload: bytearray | None) -> list[Buffer]:
        flags = _fua(request)
        if not request.flags & CommandFlags.NO_HOLE:
            flags |= WriteFlags.MAY_UNMAP
        if request.flags & CommandFlags.FAST_ZERO:
            flags |= WriteFlags.NO_FALLBACK
        await self._disk.write_zeroes(request.offset, request.length, flags)
        self._export.statistics.bytes_written += request.length
        return self.done(request)

    async def _block_status(self, request: Request, payload: bytearray | None) -> list[Buffer]:
        length, numbers = request.length, list(self._contexts)
        if request.flags & CommandFlags.PAYLOAD_LEN:
            length, numbers = self._filter(payload)
        if not numbers:
            raise OptionError("no metadata context was negotiated")
        if not length or request.offset + length > self._disk.size:
            message = f"status of a range outside the export's {self._disk.size} bytes"
            raise OutOfRangeError(message, offset=request.offset, length=length)
        count_max = 1 if request.flags & CommandFlags.REQ_ONE else EXTENTS_SENT_MAX
        reply: list[Buffer] = []
        for number in numbers:
            runs = await joined_runs(self._contexts[number], request.offset, length, count_max=count_max)
            if not runs:
                raise IOFailedError(f"context {self._contexts[number].name!r} has no answer")
            last = number == numbers[-1]
            if self._session.extended:
                data = payloads.pack_block_status_ext(number, runs)
                reply += self._chunk(request, ReplyType.BLOCK_STATUS_EXT, data, last=last)
            else:
                data = payloads.pack_block_status(number, runs)
                reply += self._chunk(request, ReplyType.BLOCK_STATUS, data, last=last)
        return reply

    def _filter(self, payload: bytearray | None) -> tuple[int, list[int]]:
        """The length and the contexts of a BLOCK_STATUS request that brings them as its payload."""
        if payload is None or not self._session.extended:
            raise OptionError("a payload that BLOCK_STATUS cannot have")
        try:
            length, numbers = payloads.parse_filter(memoryview(payload))
        except ProtocolError as error:  # the request is wrong, but its end is known: the connection goes on
            raise OptionError(str(error)) from None
        if not numbers or not set(numbers) <= set(self._contexts):
            raise OptionError("BLOCK_STATUS for contexts that were not negotiated")
        return length, list(numbers)

    # -- replies -------------------------------------------------------------------------------------------------

    def done(self, request: Request) -> list[Buffer]:
        """The reply to a request that succeeded and has nothing to tell."""
        if not self._extended and not (self._chunked and request.command == _READ):
            return [wire.pack_simple_reply(request.cookie, 0)]
        return self._chunk(request, ReplyType.NONE, b"")

    def _chunk(self, request: Request, kind: ReplyType, data: bytes, *, last: bool = True) -> list[Buffer]:
        extended = self._session.extended
        head = wire.pack_chunk(
            request.cookie, kind, len(data), done=last, extended=extended, offset=request.offset if extended else 0
        )
        return [head + data]

    def _data_chunk(self, request: Request, offset: int, length: int, *, last: bool) -> list[Buffer]:
        extended = self._session.extended
        head = wire.pack_chunk(
            request.cookie, ReplyType.OFFSET_DATA, 8 + length,
            done=last, extended=extended, offset=request.offset if extended else 0,
        )  # fmt: skip
        return [head + payloads.pack_data_offset(offset)]


def _fua(request: Request) -> WriteFlags:
    return WriteFlags.FUA if request.flags & _FUA else WriteFlags.NONE
