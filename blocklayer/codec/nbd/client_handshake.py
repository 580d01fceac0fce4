"""The client's side of the handshake: bytes of a server in, bytes for it and decisions out.

Layer ``codec``: pure, no I/O. The caller hands what it receives to ``receive``, from the start on:

    step = handshake.receive(view)     # any piece of the stream, as small or large as it comes
    send step.send, drop step.consumed bytes
    outcome None      more bytes are needed if consumed is 0, else call again with the rest
    outcome StartTls  begin TLS, then call again *with nothing*: what to send comes back
    outcome Ready     mode GO: requests may be sent; mode INFO: after sending, hang up
    outcome Listed    after sending, hang up
    outcome Failed    after sending, hang up

Options go out one at a time, in the order of ``_plan``; an option that the server does not have is done without:

    STARTTLS -> EXTENDED_HEADERS -> STRUCTURED_REPLY -> SET_META_CONTEXT -> GO -> (EXPORT_NAME, if there is no GO)

Invariants
- With ``TlsMode.REQUIRE`` nothing but STARTTLS is sent before TLS; a server that refuses ends the handshake, and so do
  bytes behind its consent, which could have been put there by a third party.
- Of a server that breaks the protocol nothing is believed: ``Failed`` with ``ProtocolError``. It can make this side
  keep ``OPTION_REPLIES_BYTES_MAX`` bytes and ``EXPORTS_MAX`` exports, no more.
- The result depends on the stream, not on the pieces in which it came.

Source: NBD, "Handshake", "Client-side requirements", "Option types".
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import (
    BlockError,
    IOFailedError,
    NotFoundError,
    OptionError,
    ProtocolError,
    UnsupportedError,
)
from blocklayer.base.units import SIZE_MAX
from blocklayer.codec.nbd.client_replies import Refusal, Replies, refused
from blocklayer.codec.nbd.options import (
    EXPORT,
    GREETING,
    OPTION_REPLY_HEADER,
    ZEROES,
    ListedExport,
    encode_text,
    pack_client_flags,
    pack_info_request,
    pack_meta_request,
    pack_option,
    parse_export,
    parse_option_reply_header,
)
from blocklayer.codec.nbd.protocol import (
    CONTEXTS_MAX,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    REQUEST_MAX,
    HandshakeFlags,
    Info,
    Option,
    OptionReply,
    TlsMode,
    TransmissionFlags,
    effective_flags,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ClientHandshake", "Step", "StartTls", "Ready", "Listed", "Failed", "Wish", "Mode", "RemoteExport"]


class Mode(enum.Enum):
    """What a handshake is for: using an export, being told of one, or of all."""

    GO = "go"
    INFO = "info"
    LIST = "list"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants. ``full_info``: name, description and, in mode INFO, all metadata contexts of the export.

    ``structured``, ``extended`` and ``contexts`` are had only if the server has them; contexts bring structured replies
    with them. Raises ``OptionError`` for texts that the protocol does not allow, and for TLS that is only allowed: a
    client that takes what it gets can be talked out of it.
    """

    export: str = ""
    mode: Mode = Mode.GO
    tls: TlsMode = TlsMode.OFF
    structured: bool = True
    extended: bool = True
    contexts: tuple[str, ...] = ()
    full_info: bool = False

    def __post_init__(self) -> None:
        """Check what is going to be sent."""
        encode_text(self.export, "the export's name")
        for context in self.contexts:
            encode_text(context, "a metadata context's name")
        if len(self.contexts) > CONTEXTS_MAX or len(set(self.contexts)) < len(self.contexts):
            raise OptionError(f"metadata contexts are at most {CONTEXTS_MAX} different ones")
        if self.tls is TlsMode.ALLOW:
            raise OptionError("a client either requires TLS or does without")


@dataclass(frozen=True, slots=True)
class RemoteExport:
    """An export as its server describes it, and what was agreed on; sizes in bytes.

    ``flags``             those that mean something on this connection
    ``contexts``          the ones chosen, by the ids that block status uses
    ``contexts_offered``  all that there are; mode INFO with ``full_info`` only
    ``sizes_advertised``  whether the block sizes are the server's word, to be kept, or customary ones
    """

    name: str
    size: int
    flags: TransmissionFlags
    description: str = ""
    structured: bool = False
    extended: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    contexts_offered: tuple[str, ...] = ()
    minimum: int = 1
    preferred: int = 4096
    maximum: int = REQUEST_MAX
    sizes_advertised: bool = False
    tls: bool = False


# -- outcomes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartTls:
    """The server waits for TLS to begin."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The export is there."""

    export: RemoteExport


@dataclass(frozen=True, slots=True)
class Listed:
    """All exports that the server shows."""

    exports: tuple[ListedExport, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """It does not work out; ``error`` is for the caller to raise."""

    error: BlockError


Outcome = StartTls | Ready | Listed | Failed


class Step(NamedTuple):
    """What to do about the bytes received: drop ``consumed`` of them, send ``send``, then ``outcome`` if there is one."""

    consumed: int
    send: bytes
    outcome: Outcome | None


# -- decisions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What was agreed so far. With TLS it begins anew."""

    tls: bool = False
    structured: bool = False
    extended: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    contexts_offered: tuple[str, ...] = ()
    asked: frozenset[Option] = frozenset()


def _plan(wish: Wish, agreed: _Agreed) -> Option:
    """The next option to send."""
    chunks = agreed.structured or agreed.extended
    steps = (
        (Option.STARTTLS, wish.tls is TlsMode.REQUIRE and not agreed.tls),
        (Option.LIST, wish.mode is Mode.LIST),
        (Option.EXTENDED_HEADERS, wish.extended),
        (Option.STRUCTURED_REPLY, not chunks and (wish.structured or wish.extended or bool(wish.contexts))),
        (Option.SET_META_CONTEXT, chunks and bool(wish.contexts)),
        (Option.LIST_META_CONTEXT, chunks and wish.mode is Mode.INFO and wish.full_info),
        (Option.INFO, wish.mode is Mode.INFO),
        (Option.GO, True),
        (Option.EXPORT_NAME, True),
    )
    return next(option for option, wanted in steps if wanted and option not in agreed.asked)


def _pack(option: Option, wish: Wish) -> bytes:
    """An option as it is sent. Block sizes are always asked for: a server may insist."""
    match option:
        case Option.INFO | Option.GO:
            further = (Info.NAME, Info.DESCRIPTION) if wish.full_info else ()
            return pack_option(option, pack_info_request(wish.export, (Info.BLOCK_SIZE, *further)))
        case Option.SET_META_CONTEXT:
            return pack_option(option, pack_meta_request(wish.export, wish.contexts))
        case Option.LIST_META_CONTEXT:
            return pack_option(option, pack_meta_request(wish.export, ()))
        case Option.EXPORT_NAME:
            return pack_option(option, encode_text(wish.export, "the export's name"))
        case _:
            return pack_option(option)


_DISPENSABLE: Final = frozenset(
    {Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT}
)
"""Whatever the server has against these, there is a way without them."""


def _check_refusal(refusal: Refusal, wish: Wish, agreed: _Agreed) -> None:
    """Raise the error that an option's refusal is, unless the handshake can go on."""
    option, kind, _ = refusal
    if kind == OptionReply.ERR_TLS_REQD and agreed.tls:
        raise ProtocolError(f"the server demands TLS for {option.name} although TLS is active")
    if option is Option.STARTTLS:
        error = refused(refusal, wish.export)
        raise UnsupportedError(f"TLS is required: {error.message}")
    if option in _DISPENSABLE and kind not in (OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN):
        return
    if option is Option.GO and kind == OptionReply.ERR_UNSUP:
        if agreed.extended:
            raise ProtocolError("the server agreed on extended headers and does not know GO")
        return
    raise refused(refusal, wish.export)


def _export(wish: Wish, agreed: _Agreed, replies: Replies) -> RemoteExport:
    """What INFO or GO told. Raises ``ProtocolError`` if something is missing or cannot be."""
    info = replies.export
    if info is None:
        raise ProtocolError("the server did not tell the export's size")
    export = _plain_export(wish, agreed, info.size, info.flags)
    if replies.name is not None:
        export = replace(export, name=replies.name)
    if replies.block_sizes is not None:
        minimum, preferred, maximum = replies.block_sizes
        export = replace(export, minimum=minimum, preferred=preferred, maximum=maximum, sizes_advertised=True)
    return replace(export, description=replies.description or "")


def _plain_export(wish: Wish, agreed: _Agreed, size: int, flags: int) -> RemoteExport:
    if size > SIZE_MAX:
        raise ProtocolError(f"the export has {size} bytes, more than {SIZE_MAX}")
    known = effective_flags(
        TransmissionFlags(flags),
        structured=agreed.structured or agreed.extended,
        extended=agreed.extended,
        contexts=bool(agreed.contexts),
    )
    return RemoteExport(
        name=wish.export,
        size=size,
        flags=known,
        structured=agreed.structured or agreed.extended,
        extended=agreed.extended,
        contexts=dict(agreed.contexts),
        contexts_offered=agreed.contexts_offered,
        tls=agreed.tls,
    )


def _greeted(magic: int, second: int, wish: Wish, flags: int) -> None:
    """Raise if a server's first words are not those of one that can be used."""
    if magic != INIT_MAGIC:
        raise ProtocolError(f"this is no NBD server: it begins with {magic:#018x}")
    if second == OLDSTYLE_MAGIC:
        raise UnsupportedError("the server speaks the oldstyle protocol, which is not supported")
    if second != OPTION_MAGIC:
        raise ProtocolError(f"the greeting goes on with {second:#018x} in place of IHAVEOPT")
    if flags & HandshakeFlags.FIXED_NEWSTYLE:
        return
    if wish.tls is TlsMode.REQUIRE:
        raise UnsupportedError("TLS is required: the server's handshake is too old for it")
    if wish.mode is not Mode.GO:
        raise UnsupportedError("the server's handshake is too old to tell of its exports")


# -- the machine -----------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    consumed: int
    send: bytes = b""
    outcome: Outcome | None = None


class ClientHandshake:
    """One connection's handshake.

    Phases: ``greeting -> header -> payload -> header ...`` with ``encrypted`` after StartTls and ``answer`` after
    EXPORT_NAME, until an outcome that ends it.
    """

    def __init__(self, wish: Wish) -> None:
        """What is wanted."""
        self._wish = wish
        self._agreed = _Agreed()
        self._flags = HandshakeFlags(0)
        self._phase: Callable[[memoryview], _Turn | None] = self._greeting
        self._option: Option | None = None
        """Sent and not finally answered."""
        self._replies = Replies(Option.ABORT, ())
        self._type = 0
        self._left = 0
        self._payload = bytearray()

    def __repr__(self) -> str:
        """Where it stands."""
        return f"<ClientHandshake {self._phase.__name__.strip('_')}, {self._option!r}>"

    def receive(self, buffer: Buffer) -> Step:
        """Take from the start of ``buffer`` what can be understood. Raises nothing: what is wrong ends in ``Failed``."""
        view = memoryview(buffer)
        at, send = 0, bytearray()
        while True:
            try:
                turn = self._phase(view[at:])
                if turn is not None and isinstance(turn.outcome, StartTls) and at + turn.consumed < len(view):
                    raise ProtocolError("the server sent bytes behind its consent to TLS, without encryption")
            except BlockError as error:
                turn = _Turn(0, self._farewell(error), Failed(error))
            if turn is None:
                return Step(at, bytes(send), None)
            at += turn.consumed
            send += turn.send
            if turn.outcome is not None:
                self._phase = self._encrypted if isinstance(turn.outcome, StartTls) else self._over
                return Step(at, bytes(send), turn.outcome)

    def at_end(self) -> BlockError:
        """The error if the server hangs up now."""
        if self._option is Option.EXPORT_NAME:
            return NotFoundError(f"the server hung up, as it does if it has no export {self._wish.export!r}")
        awaited = "the greeting" if self._option is None else f"the reply to {self._option.name}"
        return IOFailedError(f"the server hung up before {awaited}", errno=errno.ECONNRESET)

    def _farewell(self, error: BlockError) -> bytes:
        """Servers are left politely if they keep the protocol and have one that knows a farewell."""
        if isinstance(error, ProtocolError) or self._option in (None, Option.EXPORT_NAME):
            return b""
        return pack_option(Option.ABORT)

    def _ask(self) -> bytes:
        """Go on to the next option."""
        newstyle = bool(self._flags & HandshakeFlags.FIXED_NEWSTYLE)
        option = _plan(self._wish, self._agreed) if newstyle else Option.EXPORT_NAME
        self._agreed = replace(self._agreed, asked=self._agreed.asked | {option})
        self._option = option
        self._replies = Replies(option, self._wish.contexts)
        self._phase = self._answer if option is Option.EXPORT_NAME else self._header
        return _pack(option, self._wish)

    def _greeting(self, view: memoryview) -> _Turn | None:
        if len(view) < GREETING.size:
            return None
        magic, second, flags = GREETING.unpack_from(view)
        _greeted(magic, second, self._wish, flags)
        known = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES
        self._flags = HandshakeFlags(flags) & known
        return _Turn(GREETING.size, pack_client_flags(self._flags) + self._ask())

    def _encrypted(self, _view: memoryview) -> _Turn | None:
        self._agreed = _Agreed(tls=True)
        return _Turn(0, self._ask())

    def _header(self, view: memoryview) -> _Turn | None:
        if len(view) < OPTION_REPLY_HEADER.size:
            return None
        header = parse_option_reply_header(view)
        self._replies.admit(header)
        self._type, self._left = header.type, header.length
        self._phase = self._collect
        return _Turn(OPTION_REPLY_HEADER.size)

    def _collect(self, view: memoryview) -> _Turn | None:
        piece = view[: self._left]
        self._payload += piece
        self._left -= len(piece)
        if self._left:
            return _Turn(len(piece)) if piece else None
        payload, self._payload = bytes(self._payload), bytearray()
        self._phase = self._header
        if not self._replies.add(self._type, payload):
            return _Turn(len(piece))
        send, outcome = self._conclude()
        return _Turn(len(piece), send, outcome)

    def _conclude(self) -> tuple[bytes, Outcome | None]:
        """An option is finally answered."""
        replies = self._replies
        if replies.refusal is not None:
            _check_refusal(replies.refusal, self._wish, self._agreed)
            return self._ask(), None
        match self._option:
            case Option.STARTTLS:
                return b"", StartTls()
            case Option.LIST:
                return pack_option(Option.ABORT), Listed(tuple(replies.exports))
            case Option.INFO:
                return pack_option(Option.ABORT), Ready(_export(self._wish, self._agreed, replies))
            case Option.GO:
                return b"", Ready(_export(self._wish, self._agreed, replies))
            case Option.EXTENDED_HEADERS:
                self._agreed = replace(self._agreed, extended=True)
            case Option.STRUCTURED_REPLY:
                self._agreed = replace(self._agreed, structured=True)
            case Option.SET_META_CONTEXT:
                self._agreed = replace(self._agreed, contexts=tuple(replies.contexts.items()))
            case _:
                self._agreed = replace(self._agreed, contexts_offered=tuple(replies.offered))
        return self._ask(), None

    def _answer(self, view: memoryview) -> _Turn | None:
        """EXPORT_NAME: no header, no errors, and zeroes that nobody needs."""
        zeroes = 0 if self._flags & HandshakeFlags.NO_ZEROES else len(ZEROES)
        if len(view) < EXPORT.size + zeroes:
            return None
        size, flags = parse_export(view)
        return _Turn(EXPORT.size + zeroes, b"", Ready(_plain_export(self._wish, self._agreed, size, flags)))

    def _over(self, _view: memoryview) -> _Turn | None:
        return _Turn(0, b"", Failed(ProtocolError("the handshake is over")))
