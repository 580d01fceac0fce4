"""The small payloads of requests and chunks: errors, holes, block status, and the filter of contexts.

Layer ``codec``: pure, for both sides. Builders return bytes to be sent behind a header of ``transmission``; parsers
take exactly the bytes that the header announced and raise ``ProtocolError`` for what breaks a rule.

    OFFSET_DATA          offset 8, then the data, which no function here touches
    OFFSET_HOLE          offset 8, length 4
    ERROR                error 4, bytes of the message 2, message
    ERROR_OFFSET         the same, then offset 8
    BLOCK_STATUS         context id 4, then each extent: length 4, flags 4
    BLOCK_STATUS_EXT     context id 4, number of extents 4 (or 0), then each extent: length 8, flags 8
    filter (a request)   length of the range 8, then context ids of 4 each

Source: NBD, "Structured reply types", "Request types".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from blocklayer.base.errors import ProtocolError
from blocklayer.codec.nbd.protocol import EXTENTS_MAX, NAME_MAX, ReplyType

OFFSET: Final = struct.Struct(">Q")
"""Before the bytes of OFFSET_DATA: where on the disk they lie."""
OFFSET_HOLE: Final = struct.Struct(">QI")
"""offset, length"""
ERROR: Final = struct.Struct(">IH")
"""error, bytes of the message that follows"""
CONTEXT_ID: Final = struct.Struct(">I")
"""Before the descriptors of BLOCK_STATUS."""
EXTENT: Final = struct.Struct(">II")
"""length, status flags"""
CONTEXT_ID_EXT: Final = struct.Struct(">II")
"""Before the descriptors of BLOCK_STATUS_EXT: the context's id, and the number of descriptors or 0."""
EXTENT_EXT: Final = struct.Struct(">QQ")
"""length, status flags"""
FILTER: Final = struct.Struct(">Q")
"""Before the context ids of a filter: the length of the range."""

COMPACT_LENGTH_MAX: Final = (1 << 32) - 1


# -- content of reads ------------------------------------------------------------------------------------------


def pack_data_offset(offset: int) -> bytes:
    """What stands between the header of OFFSET_DATA and the data."""
    return OFFSET.pack(offset)


def parse_data_offset(payload: bytes | memoryview) -> int:
    """Where the data of OFFSET_DATA belong; they begin at byte 8 of the payload."""
    if len(payload) < OFFSET.size:
        raise _too_short("OFFSET_DATA", payload)
    return int(OFFSET.unpack_from(payload)[0])


def pack_hole(offset: int, length: int) -> bytes:
    """The payload of OFFSET_HOLE."""
    return OFFSET_HOLE.pack(offset, length)


def parse_hole(payload: bytes | memoryview) -> tuple[int, int]:
    """``(offset, length)`` of OFFSET_HOLE."""
    if len(payload) != OFFSET_HOLE.size:
        raise _too_short("OFFSET_HOLE", payload)
    offset, length = OFFSET_HOLE.unpack(payload)
    if not length:
        raise ProtocolError("a hole has no length")
    return offset, length


def _too_short(name: str, payload: bytes | memoryview) -> ProtocolError:
    return ProtocolError(f"a payload of {name} cannot have {len(payload)} bytes")


# -- errors ----------------------------------------------------------------------------------------------------


class ErrorPayload(NamedTuple):
    """Why a request failed: a number of the protocol, the server's words, and where on the disk if it says so."""

    error: int
    message: str
    offset: int | None


def pack_error(error: int, message: str = "", *, offset: int | None = None) -> bytes:
    """The payload of ERROR, or with ``offset`` that of ERROR_OFFSET. A long message is cut to what the protocol allows."""
    text = cut_text(message)
    end = b"" if offset is None else OFFSET.pack(offset)
    return ERROR.pack(error, len(text)) + text + end


def parse_error(payload: bytes | memoryview, *, type: int = ReplyType.ERROR) -> ErrorPayload:  # noqa: A002 - the field's word
    """The payload of a chunk of an error type; of types that are not known the error and the message."""
    if len(payload) < ERROR.size:
        raise _too_short("an error", payload)
    error, length = ERROR.unpack_from(payload)
    end = ERROR.size + length
    if not error:
        raise ProtocolError("an error chunk holds error 0")
    if end > len(payload) or length > NAME_MAX:
        raise ProtocolError(f"an error's message of {length} bytes does not fit its payload of {len(payload)}")
    message = printable(bytes(payload[ERROR.size : end]))
    if type == ReplyType.ERROR_OFFSET:
        if end + OFFSET.size != len(payload):
            raise ProtocolError(f"an ERROR_OFFSET with a message of {length} bytes has {len(payload)} bytes")
        return ErrorPayload(error, message, OFFSET.unpack_from(payload, end)[0])
    return ErrorPayload(error, message, None)


def cut_text(message: str) -> bytes:
    """A message as UTF-8, without its end where it is longer than the protocol allows."""
    data = message.encode("utf-8", "replace").replace(b"\0", b"?")
    return data[:NAME_MAX].decode("utf-8", "ignore").encode()


def printable(text: bytes) -> str:
    """Text of the other side made fit for a message of ours: one line, no control characters, whatever the bytes."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text.decode("utf-8", "replace")
    )


# -- block status ----------------------------------------------------------------------------------------------


class BlockStatus(NamedTuple):
    """What one context says from the request's offset on: ``(length, flags)`` for each extent."""

    context_id: int
    extents: list[tuple[int, int]]


def pack_block_status(context_id: int, extents: Iterable[tuple[int, int]]) -> bytes:
    """The payload of BLOCK_STATUS. Each length fits in 32 bits: longer extents are the caller's to shorten."""
    return CONTEXT_ID.pack(context_id) + b"".join([EXTENT.pack(length, flags) for length, flags in extents])


def pack_block_status_ext(context_id: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """The payload of BLOCK_STATUS_EXT, for extended replies only."""
    head = CONTEXT_ID_EXT.pack(context_id, len(extents))
    return head + b"".join([EXTENT_EXT.pack(length, flags) for length, flags in extents])


def parse_block_status(payload: bytes | memoryview) -> BlockStatus:
    """The payload of BLOCK_STATUS."""
    body = _descriptors("BLOCK_STATUS", payload, CONTEXT_ID.size, EXTENT)
    return BlockStatus(CONTEXT_ID.unpack_from(payload)[0], body)


def parse_block_status_ext(payload: bytes | memoryview) -> BlockStatus:
    """The payload of BLOCK_STATUS_EXT."""
    body = _descriptors("BLOCK_STATUS_EXT", payload, CONTEXT_ID_EXT.size, EXTENT_EXT)
    context_id, count = CONTEXT_ID_EXT.unpack_from(payload)
    if count not in (0, len(body)):
        raise ProtocolError(f"BLOCK_STATUS_EXT counts {count} extents and holds {len(body)}")
    return BlockStatus(context_id, body)


def _descriptors(name: str, payload: bytes | memoryview, start: int, layout: struct.Struct) -> list[tuple[int, int]]:
    count, rest = divmod(len(payload) - start, layout.size)
    if count < 1 or rest or count > EXTENTS_MAX:
        raise _too_short(name, payload)
    extents: list[tuple[int, int]] = list(layout.iter_unpack(memoryview(payload)[start:]))
    if not all(length for length, _ in extents):
        raise ProtocolError(f"{name} holds an extent without length")
    return extents


def check_extents(status: BlockStatus, length: int, *, one: bool) -> None:
    """Raise ``ProtocolError`` if a status cannot answer a request of ``length`` bytes, with REQ_ONE if ``one``.

    Only the last extent may reach beyond the range, and with REQ_ONE not even that one.
    """
    lengths = [extent for extent, _ in status.extents]
    if one and (len(lengths) != 1 or lengths[0] > length):
        raise ProtocolError(f"the server sent {len(lengths)} extents of {sum(lengths)} bytes for one of {length}")
    if len(lengths) > 1 and sum(lengths[:-1]) >= length:
        raise ProtocolError(f"the server sent extents that begin behind the {length} bytes asked for")


def pack_filter(length: int, context_ids: Iterable[int]) -> bytes:
    """The payload of an extended BLOCK_STATUS request that asks for some of the contexts only."""
    return FILTER.pack(length) + b"".join([CONTEXT_ID.pack(context_id) for context_id in context_ids])


def parse_filter(payload: bytes | memoryview) -> tuple[int, list[int]]:
    """``(length, context ids)``. A wrong one is the request's EINVAL; the connection goes on."""
    count, rest = divmod(len(payload) - FILTER.size, CONTEXT_ID.size)
    if count < 0 or rest:
        raise _too_short("a filter of contexts", payload)
    ids = [context_id for (context_id,) in CONTEXT_ID.iter_unpack(memoryview(payload)[FILTER.size :])]
    if len(set(ids)) < len(ids):
        raise ProtocolError("a filter names a context twice")
    return int(FILTER.unpack_from(payload)[0]), ids
