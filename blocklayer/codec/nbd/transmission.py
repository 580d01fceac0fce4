"""Requests and replies: how the two sides speak once the handshake is over.

Layer ``codec``: pure. Only headers and small payloads pass through here; the bytes of reads and writes never do: a
header says how many of them lie behind it, and the caller moves them.

    simple       C: request 28 [data]     S: simple reply 16 [data]
    structured   C: request 28 [data]     S: chunk 20 + payload, ..., chunk with DONE; or a simple reply without data
    extended     C: request 32 [payload]  S: chunk 32 + payload, ..., chunk with DONE

What a client must check in two steps: ``parse_chunk`` looks at a header alone (does it exist in what was negotiated,
can it have this type and this length), ``check_answer`` holds it against the request that it answers. Whatever breaks
a rule raises ``ProtocolError``, after which the connection is of no use. What stands in the payloads is ``payloads``'s.
Source: NBD, "Transmission", "Structured reply types", "Request types".
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import ProtocolError
from blocklayer.codec.nbd.payloads import (
    CONTEXT_ID,
    CONTEXT_ID_EXT,
    ERROR,
    EXTENT,
    EXTENT_EXT,
    OFFSET,
    OFFSET_HOLE,
)
from blocklayer.codec.nbd.protocol import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    EXTENTS_MAX,
    NAME_MAX,
    REPLY_ERROR,
    REQUEST_MAGIC,
    REQUEST_MAX,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlags,
    ReplyFlags,
    ReplyType,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

REQUEST: Final = struct.Struct(">IHHQQI")
"""magic, flags, command, cookie, offset, length"""
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
"""The same with a length of 64 bits."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""magic, error, cookie"""
STRUCTURED_REPLY: Final = struct.Struct(">IHHQI")
"""magic, flags, type, cookie, length"""
EXTENDED_REPLY: Final = struct.Struct(">IHHQQQ")
"""magic, flags, type, cookie, offset of the request, length"""

_PAYLOAD_LEN = int(CommandFlags.PAYLOAD_LEN)
_DONE = int(ReplyFlags.DONE)
_WRITE = int(Command.WRITE)


# -- requests --------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A request's header. ``command`` and ``flags`` are as on the wire: any number of 16 bits."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


def parse_request(buffer: Buffer, at: int, *, extended: bool) -> Request:
    """The header at byte ``at``. Raises ``ProtocolError`` for another magic, or if it is not wholly there."""
    layout, wanted = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
    try:
        magic, flags, command, cookie, offset, length = layout.unpack_from(buffer, at)
    except struct.error:
        raise ProtocolError(f"a request's header has {layout.size} bytes; fewer are there") from None
    if magic != wanted:
        raise ProtocolError(f"a request begins with {magic:#010x} in place of {wanted:#010x}")
    return Request(command, flags, cookie, offset, length)


def pack_request(command: int, flags: int, cookie: int, offset: int, length: int, *, extended: bool) -> bytes:
    """A request's header; the fields are those of ``Request``. Extended writes get PAYLOAD_LEN, which they must have."""
    if not extended:
        return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
    if command == _WRITE:
        flags |= _PAYLOAD_LEN
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)


def payload_length(request: Request, *, extended: bool) -> int:
    """How many bytes follow a request's header, whether or not they make sense."""
    follows = request.flags & _PAYLOAD_LEN if extended else request.command == _WRITE
    return request.length if follows else 0


# -- replies: the server's side --------------------------------------------------------------------------------


def pack_simple_reply(cookie: int, error: int = 0) -> bytes:
    """The header of a simple reply. The bytes of a successful read follow it."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def pack_chunk(cookie: int, type: int, length: int, *, done: bool, extended: bool, offset: int = 0) -> bytes:  # noqa: A002 - the field's word
    """The header of a chunk with a payload of ``length`` bytes. ``offset`` is that of the request, if extended."""
    flags = _DONE if done else 0
    if extended:
        return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, type, cookie, offset, length)
    return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, type, cookie, length)


# -- replies: the client's side --------------------------------------------------------------------------------


class ReplyKind(enum.IntEnum):
    """Of a reply's header; the value is its size in bytes."""

    SIMPLE = 16
    STRUCTURED = 20
    EXTENDED = 32


_SIMPLE, _STRUCTURED, _EXTENDED = ReplyKind


class Chunk(NamedTuple):
    """A reply's header. ``length`` bytes of payload follow it; a simple reply does not say how many: 0 stands here.

    ``error`` is that of a simple reply, ``offset`` (that of the request) only in extended replies.
    """

    kind: ReplyKind
    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    error: int

    @property
    def done(self) -> bool:
        """No further chunk answers the request."""
        return self.kind is _SIMPLE or bool(self.flags & _DONE)

    @property
    def is_error(self) -> bool:
        """The request failed."""
        return bool(self.error or self.type & REPLY_ERROR)


def parse_chunk(
    buffer: Buffer, at: int, *, structured: bool, extended: bool, data_max: int = REQUEST_MAX
) -> Chunk | None:
    """The reply's header at byte ``at``, checked by itself; None if it is not wholly there yet.

    ``data_max``: the bytes of the longest read in flight. Raises ``ProtocolError`` for a header that the negotiated
    shape does not have, and for a type or a length that cannot be.
    """
    view = memoryview(buffer)[at:]
    if len(view) < _SIMPLE:
        return None
    chunk = _parse_extended(view) if extended else _parse_compact(view, structured=structured)
    if chunk is not None and chunk.kind is not _SIMPLE:
        _check_header(chunk, data_max)
    return chunk


def _parse_extended(view: memoryview) -> Chunk | None:
    if int.from_bytes(view[:4], "big") != EXTENDED_REPLY_MAGIC:
        raise _wrong_magic(view)
    if len(view) < _EXTENDED:
        return None
    _, flags, type_, cookie, offset, length = EXTENDED_REPLY.unpack_from(view)
    return Chunk(_EXTENDED, flags, type_, cookie, offset, length, 0)


def _parse_compact(view: memoryview, *, structured: bool) -> Chunk | None:
    magic, error, cookie = SIMPLE_REPLY.unpack_from(view)
    if magic == SIMPLE_REPLY_MAGIC:
        return Chunk(_SIMPLE, 0, ReplyType.NONE, cookie, 0, 0, error)
    if magic != STRUCTURED_REPLY_MAGIC or not structured:
        raise _wrong_magic(view)
    if len(view) < _STRUCTURED:
        return None
    _, flags, type_, cookie, length = STRUCTURED_REPLY.unpack_from(view)
    return Chunk(_STRUCTURED, flags, type_, cookie, 0, length, 0)


def _wrong_magic(view: memoryview) -> ProtocolError:
    return ProtocolError(f"a reply begins with {view[:4].hex()}, which was not negotiated")


# type: shortest payload, longest payload without the part that grows, bytes of a step of it, steps at most
_LENGTHS: Final[dict[int, tuple[int, int, int, int]]] = {
    ReplyType.NONE: (0, 0, 1, 0),
    ReplyType.OFFSET_HOLE: (OFFSET_HOLE.size, OFFSET_HOLE.size, 1, 0),
    ReplyType.BLOCK_STATUS: (CONTEXT_ID.size + EXTENT.size, CONTEXT_ID.size, EXTENT.size, EXTENTS_MAX),
    ReplyType.BLOCK_STATUS_EXT: (
        CONTEXT_ID_EXT.size + EXTENT_EXT.size, CONTEXT_ID_EXT.size, EXTENT_EXT.size, EXTENTS_MAX,
    ),
    ReplyType.ERROR: (ERROR.size, ERROR.size, 1, NAME_MAX),
    ReplyType.ERROR_OFFSET: (ERROR.size + OFFSET.size, ERROR.size + OFFSET.size, 1, NAME_MAX),
}  # fmt: skip

_UNKNOWN_ERROR: Final = (ERROR.size, ERROR.size, 1, 2 * NAME_MAX)
"""An error that we do not know: a message, and room for as many bytes that it may have besides."""


def _check_header(chunk: Chunk, data_max: int) -> None:
    kind, length = chunk.type, chunk.length
    if kind == ReplyType.OFFSET_DATA:
        shortest, fixed, step, steps = OFFSET.size + 1, OFFSET.size, 1, data_max
    elif kind in _LENGTHS:
        shortest, fixed, step, steps = _LENGTHS[kind]
    elif kind & REPLY_ERROR:
        shortest, fixed, step, steps = _UNKNOWN_ERROR
    else:
        raise ProtocolError(f"a chunk has the unknown type {kind}")
    if not shortest <= length <= fixed + step * steps or (length - fixed) % step:
        raise ProtocolError(f"a chunk of type {kind} has a payload of {length} bytes, which cannot be")
    if kind == ReplyType.NONE and not chunk.flags & _DONE:
        raise ProtocolError("a chunk of type NONE is not the last one of its reply")
    if kind == ReplyType.BLOCK_STATUS_EXT and chunk.kind is not _EXTENDED:
        raise ProtocolError("a chunk of type BLOCK_STATUS_EXT came without extended headers")


_ANSWERS: Final[dict[int, Command]] = {
    ReplyType.OFFSET_DATA: Command.READ,
    ReplyType.OFFSET_HOLE: Command.READ,
    ReplyType.BLOCK_STATUS: Command.BLOCK_STATUS,
    ReplyType.BLOCK_STATUS_EXT: Command.BLOCK_STATUS,
}


def check_answer(chunk: Chunk, request: Request, *, structured: bool) -> None:
    """Raise ``ProtocolError`` if a chunk cannot answer this request. The lengths of content are checked with it."""
    if chunk.kind is _SIMPLE:
        with_payload = request.command in (Command.READ, Command.BLOCK_STATUS)
        if structured and (request.command == Command.READ or (with_payload and not chunk.error)):
            raise ProtocolError(f"a simple reply answers command {request.command} although chunks were negotiated")
        return
    if chunk.kind is _EXTENDED and chunk.offset != request.offset:
        raise ProtocolError(f"a reply names offset {chunk.offset:#x}, its request {request.offset:#x}")
    command = _ANSWERS.get(chunk.type)
    if command is not None and command != request.command:
        raise ProtocolError(f"a chunk of type {chunk.type} answers command {request.command}")


def check_content(offset: int, length: int, request: Request) -> None:
    """Raise ``ProtocolError`` if the bytes of OFFSET_DATA or a hole lie outside the read that they answer."""
    if not length or offset < request.offset or offset + length > request.offset + request.length:
        raise ProtocolError(f"the server sent {offset:#x}+{length} for a read of {request.offset:#x}+{request.length}")
