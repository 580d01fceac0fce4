"""What a server replied to one option: collected, counted and checked while it comes in.

Layer ``codec``: pure. ``Replies`` is told of each reply's header before its payload is kept (``admit``) and of each
whole reply (``add``, True for the final one). Whatever the specification lets a client refuse is a ``ProtocolError``:

- a reply to another option, of another type than the option has, or longer than a reply can be
- more replies than ``OPTION_REPLIES_MAX`` or ``EXPORTS_MAX``, or more bytes than ``OPTION_REPLIES_BYTES_MAX``
- metadata contexts that were not asked for, or two with one id
- block sizes that are none

Unknown kinds of information and unknown errors are none of these: the former are ignored, the latter are errors.
Source: NBD, "Option reply types".
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from blocklayer.base.errors import (
    AccessDeniedError,
    BlockError,
    IOFailedError,
    NotFoundError,
    OptionError,
    ProtocolError,
    UnsupportedError,
)
from blocklayer.codec.nbd.options import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    ListedExport,
    NameInfo,
    ReplyHeader,
    check_block_sizes,
    parse_info,
    parse_meta_context,
    parse_server,
)
from blocklayer.codec.nbd.payloads import printable
from blocklayer.codec.nbd.protocol import (
    EXPORTS_MAX,
    OPTION_ERROR,
    OPTION_REPLIES_BYTES_MAX,
    OPTION_REPLIES_MAX,
    OPTION_REPLY_MAX,
    Option,
    OptionReply,
)

_TYPE_OF: Final[dict[Option, OptionReply]] = {
    Option.LIST: OptionReply.SERVER,
    Option.INFO: OptionReply.INFO,
    Option.GO: OptionReply.INFO,
    Option.LIST_META_CONTEXT: OptionReply.META_CONTEXT,
    Option.SET_META_CONTEXT: OptionReply.META_CONTEXT,
}
"""The replies that an option has before its final one; others have none."""

_HEADER: Final = 20
"""Bytes of a reply without payload: replies of nothing cost something too."""


class Refusal(NamedTuple):
    """A final reply that is an error; ``type`` may be unknown, ``message`` is the server's or empty."""

    option: Option
    type: int
    message: str


class Replies:
    """All replies to one option."""

    def __init__(self, option: Option, wanted: tuple[str, ...]) -> None:
        """``wanted``: the metadata contexts that SET_META_CONTEXT asked for."""
        self.refusal: Refusal | None = None
        self.exports: list[ListedExport] = []
        self.contexts: dict[int, str] = {}
        self.offered: list[str] = []
        self.export: ExportInfo | None = None
        self.name: str | None = None
        self.description: str | None = None
        self.block_sizes: BlockSizeInfo | None = None
        self._option = option
        self._wanted = wanted
        self._count = 0
        self._bytes = 0

    def admit(self, header: ReplyHeader) -> None:
        """Raise ``ProtocolError`` unless a reply with this header may come now."""
        option, kind, length = header
        if option != self._option:
            raise ProtocolError(f"the server replies to option {option} while {self._option.name} waits")
        if not kind & OPTION_ERROR and kind not in (OptionReply.ACK, _TYPE_OF.get(self._option)):
            raise ProtocolError(f"the server replies to {self._option.name} with type {kind}")
        if length > OPTION_REPLY_MAX or (kind == OptionReply.ACK and length):
            raise ProtocolError(f"a reply of type {kind:#x} to {self._option.name} has {length} bytes")
        self._count += 1
        self._bytes += _HEADER + length
        count_max = EXPORTS_MAX if self._option is Option.LIST else OPTION_REPLIES_MAX
        if self._count > count_max + 1 or self._bytes > OPTION_REPLIES_BYTES_MAX:
            raise ProtocolError(f"{self._count} replies to {self._option.name} of {self._bytes} bytes are too many")

    def add(self, kind: int, payload: bytes) -> bool:
        """Take an admitted reply; True if it was the final one."""
        if kind & OPTION_ERROR:
            self.refusal = Refusal(self._option, kind, printable(payload))
            return True
        if kind == OptionReply.ACK:
            return True
        if kind == OptionReply.SERVER:
            self.exports.append(parse_server(payload))
        elif kind == OptionReply.META_CONTEXT:
            self._add_context(payload)
        else:
            self._add_info(payload)
        return False

    def _add_context(self, payload: bytes) -> None:
        context_id, name = parse_meta_context(payload)
        if self._option is Option.LIST_META_CONTEXT:
            self.offered.append(name)
            return
        if name not in self._wanted or name in self.contexts.values() or context_id in self.contexts:
            raise ProtocolError(
                f"the server chose the metadata context {name!r} with id {context_id}, unasked or twice"
            )
        self.contexts[context_id] = name

    def _add_info(self, payload: bytes) -> None:
        match parse_info(payload):
            case ExportInfo() as export:
                self.export = export
            case NameInfo(name):
                self.name = name
            case DescriptionInfo(description):
                self.description = description
            case BlockSizeInfo() as sizes:
                try:
                    check_block_sizes(*sizes)
                except OptionError as error:
                    raise ProtocolError(f"the server's {error.message}") from None
                self.block_sizes = sizes


_REASONS: Final[dict[int, str]] = {
    OptionReply.ERR_UNSUP: "the server does not know {option}",
    OptionReply.ERR_POLICY: "the server's policy forbids {option}",
    OptionReply.ERR_INVALID: "the server takes {option} for invalid",
    OptionReply.ERR_PLATFORM: "the server's platform cannot do {option}",
    OptionReply.ERR_TLS_REQD: "the server demands TLS",
    OptionReply.ERR_UNKNOWN: "the server has no export {export!r}",
    OptionReply.ERR_SHUTDOWN: "the server is shutting down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "the server demands that its block sizes are kept",
    OptionReply.ERR_TOO_BIG: "{option} is too large for the server",
    OptionReply.ERR_EXT_HEADER_REQD: "the server demands extended headers",
}

_UNSUPPORTED: Final = (
    OptionReply.ERR_UNSUP,
    OptionReply.ERR_PLATFORM,
    OptionReply.ERR_BLOCK_SIZE_REQD,
    OptionReply.ERR_EXT_HEADER_REQD,
)


def refused(refusal: Refusal, export: str) -> BlockError:
    """The exception for an option that a server refused, with the server's words if it sent any."""
    option, kind, message = refusal
    reason = _REASONS.get(kind, f"the server refuses {{option}} with the unknown error {kind:#x}")
    text = reason.format(option=option.name, export=export)
    if message:
        text = f"{text} (it says: {message})"
    if kind == OptionReply.ERR_UNKNOWN:
        return NotFoundError(text)
    if kind in _UNSUPPORTED:
        return UnsupportedError(text)
    if kind in (OptionReply.ERR_POLICY, OptionReply.ERR_TLS_REQD):
        return AccessDeniedError(text, errno=errno.EACCES)
    return IOFailedError(text, errno=errno.ESHUTDOWN if kind == OptionReply.ERR_SHUTDOWN else errno.EINVAL)
