"""The messages of the handshake: greeting, options, and their replies, as bytes and values.

Layer ``codec``: pure, for both sides; which message may come when is decided in ``server_handshake`` and
``client_handshake``. What is packed here parses to the same values. Parsers take exactly one payload and raise
``ProtocolError`` that says what was wrong and at which byte; nothing is left over at the end of a payload unless the
specification has it so. Texts are UTF-8 of at most ``NAME_MAX`` bytes without NUL; names that *we* were given and that
are not like this are an ``OptionError``.

    greeting       S: INIT_MAGIC 8, OPTION_MAGIC 8, handshake flags 2
    client flags   C: 4
    option         C: OPTION_MAGIC 8, option 4, length 4, payload
    option reply   S: OPTION_REPLY_MAGIC 8, option 4, type 4, length 4, payload
    export         S: size 8, flags 2, zeroes 124 unless NO_ZEROES; the only answer to EXPORT_NAME

Source: NBD, "Handshake", "Option types", "Option reply types".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from blocklayer.base.errors import OptionError, ProtocolError
from blocklayer.codec.nbd.payloads import cut_text, printable
from blocklayer.codec.nbd.protocol import (
    INIT_MAGIC,
    MINIMUM_BLOCK_MAX,
    NAME_MAX,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    UNLIMITED,
    HandshakeFlags,
    Info,
    OptionReply,
)

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")
OPTION_REPLY_HEADER: Final = struct.Struct(">QIII")
EXPORT: Final = struct.Struct(">QH")
"""size, transmission flags"""
BLOCK_SIZES: Final = struct.Struct(">III")
"""minimum, preferred, maximum"""
ZEROES: Final = bytes(124)

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

Payload = bytes | bytearray | memoryview


# -- texts and numbers in a payload ----------------------------------------------------------------------------


def encode_text(text: str, what: str) -> bytes:
    """UTF-8. Raises ``OptionError`` if it has more than 4096 bytes, a NUL, or characters that UTF-8 does not have."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{what} {text!r} is not Unicode text") from None
    if len(data) > NAME_MAX:
        raise OptionError(f"{what} has {len(data)} bytes; NBD allows {NAME_MAX}")
    if b"\0" in data:
        raise OptionError(f"{what} {text!r} contains a zero byte")
    return data


def decode_text(data: Payload, what: str) -> str:
    """The text. Raises ``ProtocolError`` if it is too long, not UTF-8, or contains NUL."""
    if len(data) > NAME_MAX:
        raise ProtocolError(f"{what} has {len(data)} bytes; NBD allows {NAME_MAX}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} is not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise ProtocolError(f"{what} contains a zero byte")
    return text


class _Reader:
    """A payload that is read from its start to its end."""

    def __init__(self, payload: Payload, what: str) -> None:
        """``what`` names it in errors."""
        self._rest = memoryview(payload)
        self._what = what
        self._at = 0

    def take(self, length: int, field: str) -> memoryview:
        """The next ``length`` bytes."""
        if length > len(self._rest):
            raise ProtocolError(
                f"{self._what}: {field} at byte {self._at} takes {length} bytes and {len(self._rest)} are left"
            )
        piece, self._rest = self._rest[:length], self._rest[length:]
        self._at += length
        return piece

    def number(self, layout: struct.Struct, field: str) -> int:
        """The next number."""
        return int(layout.unpack(self.take(layout.size, field))[0])

    def text(self, field: str) -> str:
        """The next text with its length of 32 bits."""
        length = self.number(_U32, f"the length of {field}")
        return decode_text(self.take(length, field), f"{self._what}: {field}")

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(len(self._rest), "the rest")

    def end(self) -> None:
        """Nothing may be left."""
        if len(self._rest):
            raise ProtocolError(f"{self._what}: {len(self._rest)} bytes too many at byte {self._at}")


def _text(data: bytes) -> bytes:
    return _U32.pack(len(data)) + data


# -- greeting --------------------------------------------------------------------------------------------------


def pack_greeting(flags: HandshakeFlags) -> bytes:
    """The first bytes of a server."""
    return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, flags)


def pack_client_flags(flags: int) -> bytes:
    """The first bytes of a client."""
    return CLIENT_FLAGS.pack(flags)


# -- options ---------------------------------------------------------------------------------------------------


class OptionHeader(NamedTuple):
    """An option and the bytes of its payload. ``option`` is as on the wire: unknown ones have their number too."""

    option: int
    length: int


def pack_option(option: int, payload: bytes = b"") -> bytes:
    """A whole option."""
    return OPTION_HEADER.pack(OPTION_MAGIC, option, len(payload)) + payload


def parse_option_header(header: Payload) -> OptionHeader:
    """The first 16 bytes of an option."""
    magic, option, length = OPTION_HEADER.unpack_from(header)
    if magic != OPTION_MAGIC:
        raise ProtocolError(f"an option begins with {magic:#018x} in place of IHAVEOPT")
    return OptionHeader(option, length)


class InfoRequest(NamedTuple):
    """Payload of INFO and GO: an export's name and the kinds of information wanted, unknown ones included."""

    name: str
    wanted: tuple[int, ...]


def pack_info_request(name: str, wanted: Sequence[int]) -> bytes:
    """The payload of INFO and GO."""
    return _text(encode_text(name, "the export's name")) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def parse_info_request(payload: Payload) -> InfoRequest:
    """The payload of INFO and GO."""
    reader = _Reader(payload, "INFO or GO")
    name = reader.text("the export's name")
    count = reader.number(_U16, "the number of requests")
    wanted = struct.unpack(f">{count}H", reader.take(2 * count, "the list of requests"))
    reader.end()
    return InfoRequest(name, wanted)


class MetaRequest(NamedTuple):
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT: an export's name, and queries for contexts."""

    name: str
    queries: tuple[str, ...]


def pack_meta_request(name: str, queries: Sequence[str]) -> bytes:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [_text(encode_text(query, "a metadata context's name")) for query in queries]
    return _text(encode_text(name, "the export's name")) + _U32.pack(len(queries)) + b"".join(parts)


def parse_meta_request(payload: Payload) -> MetaRequest:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT. There are as many queries as the payload has room for."""
    reader = _Reader(payload, "LIST_ or SET_META_CONTEXT")
    name = reader.text("the export's name")
    count = reader.number(_U32, "the number of queries")
    if count * _U32.size > len(payload):
        raise ProtocolError(f"LIST_ or SET_META_CONTEXT: {count} queries do not fit its {len(payload)} bytes")
    queries = tuple(reader.text(f"query {index}") for index in range(count))
    reader.end()
    return MetaRequest(name, queries)


# -- replies ---------------------------------------------------------------------------------------------------


class ReplyHeader(NamedTuple):
    """An option reply without its payload; ``type`` is as on the wire."""

    option: int
    type: int
    length: int


def pack_option_reply(option: int, type: int, payload: bytes = b"") -> bytes:  # noqa: A002 - the field's word
    """A whole option reply."""
    return OPTION_REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, type, len(payload)) + payload


def parse_option_reply_header(header: Payload) -> ReplyHeader:
    """The first 20 bytes of an option reply."""
    magic, option, kind, length = OPTION_REPLY_HEADER.unpack_from(header)
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolError(f"an option reply begins with {magic:#018x} in place of {OPTION_REPLY_MAGIC:#018x}")
    return ReplyHeader(option, kind, length)


def pack_option_error(option: int, type: OptionReply, message: str) -> bytes:  # noqa: A002 - the field's word
    """A refusal with words for people."""
    return pack_option_reply(option, type, cut_text(message))


def pack_export(size: int, flags: int, *, zeroes: bool) -> bytes:
    """The answer to EXPORT_NAME; ``zeroes`` unless the client flag NO_ZEROES was set."""
    return EXPORT.pack(size, flags) + (ZEROES if zeroes else b"")


def parse_export(answer: Payload) -> tuple[int, int]:
    """``(size, flags)`` of the answer to EXPORT_NAME. What the zeroes hold does not matter."""
    size, flags = EXPORT.unpack_from(answer)
    return size, flags


class ListedExport(NamedTuple):
    """One export of a server's list."""

    name: str
    description: str


def pack_server(name: str, description: str = "") -> bytes:
    """The payload of SERVER."""
    return _text(encode_text(name, "the export's name")) + encode_text(description, "the export's description")


def parse_server(payload: Payload) -> ListedExport:
    """The payload of SERVER. A description need not be readable: it is only for people."""
    reader = _Reader(payload, "SERVER")
    name = reader.text("the export's name")
    return ListedExport(name, _description(reader.rest()))


def _description(data: memoryview) -> str:
    if len(data) > NAME_MAX:
        raise ProtocolError(f"a description has {len(data)} bytes; NBD allows {NAME_MAX}")
    text = bytes(data)
    try:
        return decode_text(text, "a description")
    except ProtocolError:
        return printable(text)


class ContextReply(NamedTuple):
    """A metadata context and the number that block status uses for it; 0 in replies to LIST_META_CONTEXT."""

    context_id: int
    name: str


def pack_meta_context(context_id: int, name: str) -> bytes:
    """The payload of META_CONTEXT."""
    return _U32.pack(context_id) + encode_text(name, "a metadata context's name")


def parse_meta_context(payload: Payload) -> ContextReply:
    """The payload of META_CONTEXT."""
    reader = _Reader(payload, "META_CONTEXT")
    context_id = reader.number(_U32, "the id")
    return ContextReply(context_id, decode_text(reader.rest(), "META_CONTEXT: the name"))


# -- information about an export -------------------------------------------------------------------------------


class ExportInfo(NamedTuple):
    """Of the kind EXPORT."""

    size: int
    flags: int


class NameInfo(NamedTuple):
    """Of the kind NAME: the name under which the server lists the export."""

    name: str


class DescriptionInfo(NamedTuple):
    """Of the kind DESCRIPTION."""

    description: str


class BlockSizeInfo(NamedTuple):
    """Of the kind BLOCK_SIZE, bytes: the unit of offsets and lengths, the unit that works well, the longest request."""

    minimum: int
    preferred: int
    maximum: int


AnyInfo = ExportInfo | NameInfo | DescriptionInfo | BlockSizeInfo


def pack_info(info: AnyInfo) -> bytes:
    """The payload of an INFO reply."""
    match info:
        case ExportInfo():
            return _U16.pack(Info.EXPORT) + EXPORT.pack(*info)
        case NameInfo(name):
            return _U16.pack(Info.NAME) + encode_text(name, "the export's name")
        case DescriptionInfo(description):
            return _U16.pack(Info.DESCRIPTION) + encode_text(description, "the export's description")
        case BlockSizeInfo():
            return _U16.pack(Info.BLOCK_SIZE) + BLOCK_SIZES.pack(*info)


def parse_info(payload: Payload) -> AnyInfo | None:
    """The payload of an INFO reply; None for kinds that are not known, which clients ignore."""
    reader = _Reader(payload, "an INFO reply")
    kind = reader.number(_U16, "the kind")
    info: AnyInfo
    match kind:
        case Info.EXPORT:
            info = ExportInfo(*EXPORT.unpack(reader.take(EXPORT.size, "size and flags")))
        case Info.NAME:
            info = NameInfo(decode_text(reader.rest(), "an INFO reply: the export's name"))
        case Info.DESCRIPTION:
            info = DescriptionInfo(_description(reader.rest()))
        case Info.BLOCK_SIZE:
            info = BlockSizeInfo(*BLOCK_SIZES.unpack(reader.take(BLOCK_SIZES.size, "block sizes")))
        case _:
            return None
    reader.end()
    return info


def check_block_sizes(minimum: int, preferred: int, maximum: int) -> None:
    """Raise ``OptionError`` if these are no block sizes of the protocol. Source: NBD, "Block size constraints"."""
    if minimum < 1 or minimum & (minimum - 1) or minimum > MINIMUM_BLOCK_MAX:
        raise OptionError(f"minimum block size {minimum} is not a power of two up to {MINIMUM_BLOCK_MAX}")
    if preferred < max(minimum, 512) or preferred & (preferred - 1) or preferred > UNLIMITED:
        raise OptionError(f"preferred block size {preferred} is not a power of two from {max(minimum, 512)}")
    if maximum != UNLIMITED and (maximum % minimum or not minimum <= maximum < UNLIMITED):
        raise OptionError(f"maximum block size {maximum} is not a multiple of the minimum {minimum}")
