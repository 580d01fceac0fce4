"""The server's side of the handshake: bytes of a client in, bytes for it and decisions out.

Layer ``codec``: pure, no I/O. The caller sends ``greeting()`` and hands what it receives to ``receive``:

    step = handshake.receive(view)     # any piece of the stream, as small or large as it comes
    send step.send, drop step.consumed bytes
    outcome None      nothing more can be done without more bytes if consumed is 0, else call again with the rest
    outcome StartTls  after sending, begin TLS; what is received through it goes to the same object
    outcome Ready     the transmission phase begins, with the bytes that were not consumed
    outcome Close     after sending, hang up

Invariants
- The answer depends on the stream, not on the pieces in which it came.
- Memory: one option's payload of at most ``OPTION_MAX`` bytes. Work: ``OPTIONS_MAX`` options, ``SKIPPED_MAX`` bytes of
  options that are not wanted, and a turn ends when it has ``SEND_STOP`` bytes to send.
- Before TLS nothing that was negotiated counts afterwards, and bytes behind STARTTLS end the connection: they could
  have been put there by a third party. With ``TlsMode.REQUIRE`` no export's name or existence is told before TLS.
- ``Offer.find`` is asked for names that a client sent; nothing is opened before ``Ready``.

Source: NBD, "Handshake", "TLS support", "Option types".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from blocklayer.base.errors import OptionError, ProtocolError
from blocklayer.codec.nbd.options import (
    CLIENT_FLAGS,
    OPTION_HEADER,
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    NameInfo,
    OptionHeader,
    decode_text,
    encode_text,
    pack_export,
    pack_greeting,
    pack_info,
    pack_meta_context,
    pack_option_error,
    pack_option_reply,
    pack_server,
    parse_info_request,
    parse_meta_request,
    parse_option_header,
)
from blocklayer.codec.nbd.protocol import (
    CONTEXTS_MAX,
    MINIMUM_BLOCK_MAX,
    NAME_MAX,
    OPTION_MAX,
    OPTIONS_MAX,
    REQUEST_MAX,
    SKIPPED_MAX,
    UNLIMITED,
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

SEND_STOP: Final = 64 * 1024
"""A turn takes no further option once it has so much to send: the caller can see whether the client reads it."""

_FLAGS = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES


# -- what a server offers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportOffer:
    """An export as clients are told of it; sizes in bytes. ``flags`` are those that the disk could have at best.

    Raises ``OptionError`` for texts and block sizes that the protocol does not allow.
    """

    name: str
    description: str
    size: int
    flags: TransmissionFlags
    minimum: int = 1
    preferred: int = 4096
    maximum: int = REQUEST_MAX
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check it all: a client would hang up over any of these."""
        encode_text(self.name, "the export's name")
        encode_text(self.description, "the export's description")
        for context in self.contexts:
            encode_text(context, "a metadata context's name")
            if not context.partition(":")[0] or ":" not in context:
                raise OptionError(f"metadata context {context!r} has no namespace")
        check_block_sizes(self.minimum, self.preferred, self.maximum)

    def effective(self, *, structured: bool, extended: bool, contexts: bool) -> TransmissionFlags:
        """The flags to send on one connection."""
        flags = self.flags | TransmissionFlags.HAS_FLAGS
        return effective_flags(flags, structured=structured, extended=extended, contexts=contexts)


def check_block_sizes(minimum: int, preferred: int, maximum: int) -> None:
    """Raise ``OptionError`` if these are no block sizes of the protocol. Source: NBD, "Block size constraints"."""
    if minimum < 1 or minimum & (minimum - 1) or minimum > MINIMUM_BLOCK_MAX:
        raise OptionError(f"minimum block size {minimum} is not a power of two up to {MINIMUM_BLOCK_MAX}")
    if preferred < max(minimum, 512) or preferred & (preferred - 1) or preferred > UNLIMITED:
        raise OptionError(f"preferred block size {preferred} is not a power of two from {max(minimum, 512)}")
    if maximum != UNLIMITED and (maximum % minimum or not minimum <= maximum < UNLIMITED):
        raise OptionError(f"maximum block size {maximum} is not a multiple of the minimum {minimum}")


class Offer(Protocol):
    """The exports of a server, as the handshake asks for them."""

    def names(self) -> Iterable[tuple[str, str]]:
        """Name and description of each export that clients may see."""

    def find(self, name: str) -> ExportOffer | None:
        """The export that a client means by ``name``, which is empty for the default one; None if there is none."""


# -- outcomes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """What was agreed on. ``contexts``: names by the ids that block status uses; ``flags``: as the client saw them.

    ``structured`` is set with ``extended`` too: replies come in chunks either way.
    """

    export: ExportOffer
    flags: TransmissionFlags
    structured: bool = False
    extended: bool = False
    no_zeroes: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    tls: bool = False


@dataclass(frozen=True, slots=True)
class StartTls:
    """The client waits for TLS to begin."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Requests follow."""

    session: Session


@dataclass(frozen=True, slots=True)
class Close:
    """Hang up; ``reason`` is for the log."""

    reason: str


Outcome = StartTls | Ready | Close


class Step(NamedTuple):
    """What to do about the bytes received: drop ``consumed`` of them, send ``send``, then ``outcome`` if there is one."""

    consumed: int
    send: bytes
    outcome: Outcome | None


# -- options: from what was agreed and a payload to an answer --------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    """What was agreed so far. All of it but the client flags is lost when TLS begins."""

    client: HandshakeFlags = HandshakeFlags(0)
    tls: bool = False
    structured: bool = False
    extended: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    contexts_of: str | None = None
    """The export for which the contexts were chosen: with another one they do not count."""


class _Answer(NamedTuple):
    send: bytes
    state: _State
    outcome: Outcome | None = None


_Handler = Callable[[_State, Offer, bytes], _Answer]


def _ack(option: Option) -> bytes:
    return pack_option_reply(option, OptionReply.ACK)


def _refused(state: _State, option: Option, kind: OptionReply, message: str) -> _Answer:
    return _Answer(pack_option_error(option, kind, message), state)


def _session(state: _State, export: ExportOffer) -> Session:
    contexts = dict(state.contexts) if state.contexts_of == export.name else {}
    shape = {"structured": state.structured, "extended": state.extended}
    flags = export.effective(**shape, contexts=bool(contexts))
    no_zeroes = HandshakeFlags.NO_ZEROES in state.client
    return Session(export, flags, **shape, no_zeroes=no_zeroes, contexts=contexts, tls=state.tls)


def _export_name(state: _State, offer: Offer, payload: bytes) -> _Answer:
    """Cannot be refused but by hanging up."""
    name = decode_text(payload, "EXPORT_NAME: the name")
    export = offer.find(name)
    if export is None:
        return _Answer(b"", state, Close(f"there is no export {name!r}"))
    if export.minimum > 1:
        return _Answer(b"", state, Close("the client did not ask for the export's block sizes"))
    session = _session(state, export)
    return _Answer(pack_export(export.size, session.flags, zeroes=not session.no_zeroes), state, Ready(session))


def _list(state: _State, offer: Offer, _payload: bytes) -> _Answer:
    replies = [
        pack_option_reply(Option.LIST, OptionReply.SERVER, pack_server(name, description))
        for name, description in offer.names()
    ]
    return _Answer(b"".join([*replies, _ack(Option.LIST)]), state)


def _starttls(state: _State, _offer: Offer, _payload: bytes) -> _Answer:
    if state.tls:
        return _refused(state, Option.STARTTLS, OptionReply.ERR_INVALID, "TLS is active already")
    return _Answer(_ack(Option.STARTTLS), _State(client=state.client, tls=True), StartTls())


def _info(state: _State, offer: Offer, payload: bytes) -> _Answer:
    return _describe(Option.INFO, state, offer, payload)


def _go(state: _State, offer: Offer, payload: bytes) -> _Answer:
    return _describe(Option.GO, state, offer, payload)


def _describe(option: Option, state: _State, offer: Offer, payload: bytes) -> _Answer:
    """INFO and GO, which differ in what happens afterwards. Block sizes that a client must keep are told in any case."""
    name, wanted = parse_info_request(payload)
    export = offer.find(name)
    if export is None:
        return _refused(state, option, OptionReply.ERR_UNKNOWN, "there is no such export")
    session = _session(state, export)
    infos = {
        Info.EXPORT: ExportInfo(export.size, session.flags),
        Info.NAME: NameInfo(export.name),
        Info.DESCRIPTION: DescriptionInfo(export.description),
        Info.BLOCK_SIZE: BlockSizeInfo(export.minimum, export.preferred, export.maximum),
    }
    unasked = {Info.EXPORT, Info.BLOCK_SIZE} if export.minimum > 1 else {Info.EXPORT}
    kinds = [kind for kind in Info if kind in unasked or kind in wanted]
    send = b"".join(pack_option_reply(option, OptionReply.INFO, pack_info(infos[kind])) for kind in kinds)
    if option is Option.INFO:
        return _Answer(send + _ack(option), state)
    if export.minimum > 1 and Info.BLOCK_SIZE not in wanted:
        message = "ask for the block sizes, and keep them"
        return _Answer(send + pack_option_error(option, OptionReply.ERR_BLOCK_SIZE_REQD, message), state)
    return _Answer(send + _ack(option), state, Ready(session))


def _structured_reply(state: _State, _offer: Offer, _payload: bytes) -> _Answer:
    if state.extended:
        message = "extended headers are agreed on already"
        return _refused(state, Option.STRUCTURED_REPLY, OptionReply.ERR_EXT_HEADER_REQD, message)
    return _Answer(_ack(Option.STRUCTURED_REPLY), replace(state, structured=True))


def _extended_headers(state: _State, _offer: Offer, _payload: bytes) -> _Answer:
    return _Answer(_ack(Option.EXTENDED_HEADERS), replace(state, structured=True, extended=True))


def _list_meta_context(state: _State, offer: Offer, payload: bytes) -> _Answer:
    name, queries = parse_meta_request(payload)
    export = offer.find(name)
    if export is None:
        return _refused(state, Option.LIST_META_CONTEXT, OptionReply.ERR_UNKNOWN, "there is no such export")
    found = [(0, context) for context in export.contexts if not queries or _matches(context, frozenset(queries))]
    return _Answer(_contexts(Option.LIST_META_CONTEXT, found), state)


def _matches(context: str, queries: frozenset[str]) -> bool:
    """A query is a context's name, or its beginning up to a colon; queries for what is not known match nothing."""
    colons = [index + 1 for index, char in enumerate(context) if char == ":"]
    return context in queries or any(context[:index] in queries for index in colons)


def _set_meta_context(state: _State, offer: Offer, payload: bytes) -> _Answer:
    """Replaces what was chosen before, even where it fails. Ids are the contexts' places among the export's."""
    state = replace(state, contexts=(), contexts_of=None)
    option = Option.SET_META_CONTEXT
    if not state.structured:
        return _refused(state, option, OptionReply.ERR_INVALID, "ask for structured replies first")
    name, queries = parse_meta_request(payload)
    export = offer.find(name)
    if export is None:
        return _refused(state, option, OptionReply.ERR_UNKNOWN, "there is no such export")
    wanted = frozenset(queries)
    found = [(index, context) for index, context in enumerate(export.contexts) if context in wanted]
    if len(found) > CONTEXTS_MAX:
        return _refused(state, option, OptionReply.ERR_TOO_BIG, f"no more than {CONTEXTS_MAX} metadata contexts")
    return _Answer(_contexts(option, found), replace(state, contexts=tuple(found), contexts_of=export.name))


def _contexts(option: Option, found: Iterable[tuple[int, str]]) -> bytes:
    replies = [pack_option_reply(option, OptionReply.META_CONTEXT, pack_meta_context(*context)) for context in found]
    return b"".join([*replies, _ack(option)])


class _Rule(NamedTuple):
    """How an option is answered, and the longest payload that it may have."""

    handler: _Handler
    length_max: int = 0


# ABORT has no handler: whatever follows it, the connection ends.
_RULES: Final[dict[int, _Rule]] = {
    Option.EXPORT_NAME: _Rule(_export_name, NAME_MAX),
    Option.LIST: _Rule(_list),
    Option.STARTTLS: _Rule(_starttls),
    Option.INFO: _Rule(_info, OPTION_MAX),
    Option.GO: _Rule(_go, OPTION_MAX),
    Option.STRUCTURED_REPLY: _Rule(_structured_reply),
    Option.LIST_META_CONTEXT: _Rule(_list_meta_context, OPTION_MAX),
    Option.SET_META_CONTEXT: _Rule(_set_meta_context, OPTION_MAX),
    Option.EXTENDED_HEADERS: _Rule(_extended_headers),
}


def _hang_up(header: OptionHeader, state: _State, tls: TlsMode) -> str | None:
    """Why an option ends the connection, told from its header."""
    if header.option == Option.EXPORT_NAME:
        if tls is TlsMode.REQUIRE and not state.tls:
            return "the client wants an export without TLS"
        if state.extended:
            return "EXPORT_NAME cannot be used with extended headers"
        if header.length > NAME_MAX:
            return f"the export's name has {header.length} bytes"
    elif HandshakeFlags.FIXED_NEWSTYLE not in state.client:
        return f"option {header.option} needs the fixed newstyle handshake, which the client did not choose"
    return None


def _refusal(header: OptionHeader, state: _State, tls: TlsMode) -> bytes | None:
    """The error reply to an option, told from its header; None if its payload is to be read."""
    option, length = header
    rule = _RULES.get(option)
    reason: tuple[OptionReply, str] | None = None
    if tls is TlsMode.REQUIRE and not state.tls and option != Option.STARTTLS:
        reason = OptionReply.ERR_TLS_REQD, "begin TLS first"
    elif rule is None:
        reason = OptionReply.ERR_UNSUP, "this option is not known here"
    elif length > rule.length_max:
        kind = OptionReply.ERR_TOO_BIG if rule.length_max else OptionReply.ERR_INVALID
        reason = kind, f"this option has at most {rule.length_max} bytes"
    elif option == Option.STARTTLS and tls is TlsMode.OFF:
        reason = OptionReply.ERR_POLICY, "this server does without TLS"
    return None if reason is None else pack_option_error(option, *reason)


# -- the machine -----------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    consumed: int
    send: bytes = b""
    outcome: Outcome | None = None


class ServerHandshake:
    """One connection's handshake.

    Phases: ``flags -> header -> payload | skip -> header ...``, until an outcome that ends it.
    """

    def __init__(self, offer: Offer, *, tls: TlsMode = TlsMode.OFF) -> None:
        """What is on offer, and whether with TLS."""
        self._offer = offer
        self._tls = tls
        self._state = _State()
        self._phase: Callable[[memoryview], _Turn | None] = self._flags
        self._option = 0
        self._left = 0
        self._payload = bytearray()
        self._refusal = b""
        self._options = 0
        self._skipped = 0

    def __repr__(self) -> str:
        """Where it stands."""
        return f"<ServerHandshake {self._phase.__name__.strip('_')}, {self._options} options>"

    def greeting(self) -> bytes:
        """What to send first, without waiting for the client."""
        return pack_greeting(_FLAGS)

    def receive(self, buffer: Buffer) -> Step:
        """Take from the start of ``buffer`` what can be understood. Raises nothing: what is wrong ends in ``Close``."""
        view = memoryview(buffer)
        at, send = 0, bytearray()
        while len(send) < SEND_STOP:
            turn = self._phase(view[at:])
            if turn is None:
                break
            at += turn.consumed
            if isinstance(turn.outcome, StartTls) and at < len(view):
                turn = _Turn(0, b"", Close("the client sent bytes behind STARTTLS, without encryption"))
            send += turn.send
            if turn.outcome is not None:
                self._phase = self._header if isinstance(turn.outcome, StartTls) else self._over
                return Step(at, bytes(send), turn.outcome)
        return Step(at, bytes(send), None)

    def _flags(self, view: memoryview) -> _Turn | None:
        if len(view) < CLIENT_FLAGS.size:
            return None
        (flags,) = CLIENT_FLAGS.unpack_from(view)
        if flags & ~_FLAGS:
            return _Turn(CLIENT_FLAGS.size, b"", Close(f"the client set flags {flags:#x}, of which some are unknown"))
        self._state = _State(client=HandshakeFlags(flags))
        self._phase = self._header
        return _Turn(CLIENT_FLAGS.size)

    def _header(self, view: memoryview) -> _Turn | None:
        if len(view) < OPTION_HEADER.size:
            return None
        self._options += 1
        try:
            header = parse_option_header(view)
        except ProtocolError as error:
            return _Turn(OPTION_HEADER.size, b"", Close(str(error)))
        send, reason = b"", _hang_up(header, self._state, self._tls)
        if reason is None and header.option == Option.ABORT:
            send, reason = _ack(Option.ABORT), "the client wants no export"
        elif reason is None and self._options > OPTIONS_MAX:
            reason = f"the client sent more than {OPTIONS_MAX} options"
        elif reason is None:
            reason = self._begin(header)
        return _Turn(OPTION_HEADER.size, send, None if reason is None else Close(reason))

    def _begin(self, header: OptionHeader) -> str | None:
        """Prepare for an option's payload; the reason if the connection ends instead."""
        self._option, self._left = header
        refusal = _refusal(header, self._state, self._tls)
        self._phase = self._collect
        if refusal is None:
            return None
        self._refusal, self._phase = refusal, self._skip
        self._skipped += header.length
        if self._skipped > SKIPPED_MAX:
            return f"the client sent {self._skipped} bytes of options that are not wanted"
        if self._option == Option.SET_META_CONTEXT:
            self._state = replace(self._state, contexts=(), contexts_of=None)
        return None

    def _skip(self, view: memoryview) -> _Turn | None:
        taken = min(self._left, len(view))
        self._left -= taken
        if self._left:
            return _Turn(taken) if taken else None
        self._phase = self._header
        return _Turn(taken, self._refusal)

    def _collect(self, view: memoryview) -> _Turn | None:
        piece = view[: self._left]
        self._payload += piece
        self._left -= len(piece)
        if self._left:
            return _Turn(len(piece)) if piece else None
        payload, self._payload = bytes(self._payload), bytearray()
        self._phase = self._header
        return _Turn(len(piece), *self._answer(payload))

    def _answer(self, payload: bytes) -> tuple[bytes, Outcome | None]:
        try:
            send, self._state, outcome = _RULES[self._option].handler(self._state, self._offer, payload)
        except ProtocolError as error:
            if self._option == Option.EXPORT_NAME:
                return b"", Close(str(error))
            if self._option == Option.SET_META_CONTEXT:
                self._state = replace(self._state, contexts=(), contexts_of=None)
            return pack_option_error(self._option, OptionReply.ERR_INVALID, str(error)), None
        return send, outcome

    def _over(self, _view: memoryview) -> _Turn | None:
        return _Turn(0, b"", Close("the handshake is over"))
