"""What a server answers to each option of the handshake.

Layer ``codec``: pure. A handler takes what was agreed so far, the exports, and an option's payload; it returns what to
send, what is agreed now, and, with the last option, the outcome. ``RULES`` lists the handlers. Malformed payloads raise
``ProtocolError``, which ``server_handshake`` turns into ERR_INVALID. What can be said from an option's header alone
(``hang_up``, ``refusal``) is said before its payload is read.

    option              longest payload   agreed on afterwards
    EXPORT_NAME         a name            transmission begins, or the connection ends: it has no error reply
    LIST                0
    STARTTLS            0                 TLS, and nothing else
    INFO, GO            OPTION_MAX        GO: transmission begins
    STRUCTURED_REPLY    0                 structured
    LIST_META_CONTEXT   OPTION_MAX
    SET_META_CONTEXT    OPTION_MAX        contexts, for one export; the ones before are lost in any case
    EXTENDED_HEADERS    0                 extended, which implies structured

Source: NBD, "Option types", "TLS support", "Metadata querying".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol

from blocklayer.base.errors import OptionError
from blocklayer.codec.nbd.options import (
    AnyInfo,
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    NameInfo,
    OptionHeader,
    check_block_sizes,
    decode_text,
    encode_text,
    pack_export,
    pack_info,
    pack_meta_context,
    pack_option_error,
    pack_option_reply,
    pack_server,
    parse_info_request,
    parse_meta_request,
)
from blocklayer.codec.nbd.protocol import (
    CONTEXTS_MAX,
    NAME_MAX,
    OPTION_MAX,
    REQUEST_MAX,
    HandshakeFlags,
    Info,
    Option,
    OptionReply,
    TlsMode,
    TransmissionFlags,
    effective_flags,
)

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


# -- from what was agreed and a payload to an answer -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agreed:
    """What was agreed so far. All of it but the client flags is lost when TLS begins."""

    client: HandshakeFlags
    tls: bool = False
    structured: bool = False
    extended: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    contexts_of: str | None = None
    """The export for which the contexts were chosen: with another one they do not count."""


class Answer(NamedTuple):
    """What to send, what is agreed on now, and whether the options end here."""

    send: bytes
    state: Agreed
    outcome: Outcome | None = None


Handler = Callable[[Agreed, Offer, bytes], Answer]


def _ack(option: Option) -> bytes:
    return pack_option_reply(option, OptionReply.ACK)


def _refused(state: Agreed, option: Option, kind: OptionReply, message: str) -> Answer:
    return Answer(pack_option_error(option, kind, message), state)


def _session(state: Agreed, export: ExportOffer) -> Session:
    contexts = dict(state.contexts) if state.contexts_of == export.name else {}
    shape = {"structured": state.structured, "extended": state.extended}
    flags = export.effective(**shape, contexts=bool(contexts))
    no_zeroes = HandshakeFlags.NO_ZEROES in state.client
    return Session(export, flags, **shape, no_zeroes=no_zeroes, contexts=contexts, tls=state.tls)


def _export_name(state: Agreed, offer: Offer, payload: bytes) -> Answer:
    """Cannot be refused but by hanging up."""
    name = decode_text(payload, "EXPORT_NAME: the name")
    export = offer.find(name)
    if export is None:
        return Answer(b"", state, Close(f"there is no export {name!r}"))
    if export.minimum > 1:
        return Answer(b"", state, Close("the client did not ask for the export's block sizes"))
    session = _session(state, export)
    return Answer(pack_export(export.size, session.flags, zeroes=not session.no_zeroes), state, Ready(session))


def _list(state: Agreed, offer: Offer, _payload: bytes) -> Answer:
    replies = [
        pack_option_reply(Option.LIST, OptionReply.SERVER, pack_server(name, description))
        for name, description in offer.names()
    ]
    return Answer(b"".join([*replies, _ack(Option.LIST)]), state)


def _starttls(state: Agreed, _offer: Offer, _payload: bytes) -> Answer:
    if state.tls:
        return _refused(state, Option.STARTTLS, OptionReply.ERR_INVALID, "TLS is active already")
    return Answer(_ack(Option.STARTTLS), Agreed(client=state.client, tls=True), StartTls())


def _info(state: Agreed, offer: Offer, payload: bytes) -> Answer:
    return _describe(Option.INFO, state, offer, payload)


def _go(state: Agreed, offer: Offer, payload: bytes) -> Answer:
    return _describe(Option.GO, state, offer, payload)


def _describe(option: Option, state: Agreed, offer: Offer, payload: bytes) -> Answer:
    """INFO and GO, which differ in what happens afterwards. Block sizes that a client must keep are told in any case."""
    name, wanted = parse_info_request(payload)
    export = offer.find(name)
    if export is None:
        return _refused(state, option, OptionReply.ERR_UNKNOWN, "there is no such export")
    session = _session(state, export)
    infos: dict[Info, AnyInfo] = {
        Info.EXPORT: ExportInfo(export.size, session.flags),
        Info.NAME: NameInfo(export.name),
        Info.DESCRIPTION: DescriptionInfo(export.description),
        Info.BLOCK_SIZE: BlockSizeInfo(export.minimum, export.preferred, export.maximum),
    }
    unasked = {Info.EXPORT, Info.BLOCK_SIZE} if export.minimum > 1 else {Info.EXPORT}
    kinds = [kind for kind in Info if kind in unasked or kind in wanted]
    send = b"".join(pack_option_reply(option, OptionReply.INFO, pack_info(infos[kind])) for kind in kinds)
    if option is Option.INFO:
        return Answer(send + _ack(option), state)
    if export.minimum > 1 and Info.BLOCK_SIZE not in wanted:
        message = "ask for the block sizes, and keep them"
        return Answer(send + pack_option_error(option, OptionReply.ERR_BLOCK_SIZE_REQD, message), state)
    return Answer(send + _ack(option), state, Ready(session))


def _structured_reply(state: Agreed, _offer: Offer, _payload: bytes) -> Answer:
    if state.extended:
        message = "extended headers are agreed on already"
        return _refused(state, Option.STRUCTURED_REPLY, OptionReply.ERR_EXT_HEADER_REQD, message)
    return Answer(_ack(Option.STRUCTURED_REPLY), replace(state, structured=True))


def _extended_headers(state: Agreed, _offer: Offer, _payload: bytes) -> Answer:
    return Answer(_ack(Option.EXTENDED_HEADERS), replace(state, structured=True, extended=True))


def _list_meta_context(state: Agreed, offer: Offer, payload: bytes) -> Answer:
    name, queries = parse_meta_request(payload)
    export = offer.find(name)
    if export is None:
        return _refused(state, Option.LIST_META_CONTEXT, OptionReply.ERR_UNKNOWN, "there is no such export")
    found = [(0, context) for context in export.contexts if not queries or _matches(context, frozenset(queries))]
    return Answer(_contexts(Option.LIST_META_CONTEXT, found), state)


def _matches(context: str, queries: frozenset[str]) -> bool:
    """A query is a context's name, or its beginning up to a colon; queries for what is not known match nothing."""
    colons = [index + 1 for index, char in enumerate(context) if char == ":"]
    return context in queries or any(context[:index] in queries for index in colons)


def _set_meta_context(state: Agreed, offer: Offer, payload: bytes) -> Answer:
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
    return Answer(_contexts(option, found), replace(state, contexts=tuple(found), contexts_of=export.name))


def _contexts(option: Option, found: Iterable[tuple[int, str]]) -> bytes:
    replies = [pack_option_reply(option, OptionReply.META_CONTEXT, pack_meta_context(*context)) for context in found]
    return b"".join([*replies, _ack(option)])


class Rule(NamedTuple):
    """How an option is answered, and the longest payload that it may have."""

    handler: Handler
    length_max: int = 0


# ABORT has no handler: whatever follows it, the connection ends.
RULES: Final[dict[int, Rule]] = {
    Option.EXPORT_NAME: Rule(_export_name, NAME_MAX),
    Option.LIST: Rule(_list),
    Option.STARTTLS: Rule(_starttls),
    Option.INFO: Rule(_info, OPTION_MAX),
    Option.GO: Rule(_go, OPTION_MAX),
    Option.STRUCTURED_REPLY: Rule(_structured_reply),
    Option.LIST_META_CONTEXT: Rule(_list_meta_context, OPTION_MAX),
    Option.SET_META_CONTEXT: Rule(_set_meta_context, OPTION_MAX),
    Option.EXTENDED_HEADERS: Rule(_extended_headers),
}


def hang_up(header: OptionHeader, state: Agreed, tls: TlsMode) -> str | None:
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


def refusal(header: OptionHeader, state: Agreed, tls: TlsMode) -> bytes | None:
    """The error reply to an option, told from its header; None if its payload is to be read."""
    option, length = header
    rule = RULES.get(option)
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
