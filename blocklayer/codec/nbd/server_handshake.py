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

What is answered to which option stands in ``server_options``.
Source: NBD, "Handshake", "TLS support", "Option types".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import ProtocolError
from blocklayer.codec.nbd.options import (
    CLIENT_FLAGS,
    OPTION_HEADER,
    OptionHeader,
    pack_greeting,
    pack_option_error,
    pack_option_reply,
    parse_option_header,
)
from blocklayer.codec.nbd.protocol import OPTIONS_MAX, SKIPPED_MAX, HandshakeFlags, Option, OptionReply, TlsMode
from blocklayer.codec.nbd.server_options import (
    RULES,
    Agreed,
    Close,
    ExportOffer,
    Offer,
    Outcome,
    Ready,
    Session,
    StartTls,
    hang_up,
    refusal,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ServerHandshake", "Step", "StartTls", "Ready", "Close", "Session", "Offer", "ExportOffer"]

SEND_STOP: Final = 64 * 1024
"""A turn takes no further option once it has so much to send: the caller can see whether the client reads it."""

_FLAGS = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES


class Step(NamedTuple):
    """What to do about the bytes received: drop ``consumed`` of them, send ``send``, then ``outcome`` if there is one."""

    consumed: int
    send: bytes
    outcome: Outcome | None


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
        self._agreed = Agreed(HandshakeFlags(0))
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
        if flags & ~int(_FLAGS):
            return _Turn(CLIENT_FLAGS.size, b"", Close(f"the client set flags {flags:#x}, of which some are unknown"))
        self._agreed = Agreed(HandshakeFlags(flags))
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
        send, reason = b"", hang_up(header, self._agreed, self._tls)
        if reason is None and header.option == Option.ABORT:
            send, reason = pack_option_reply(Option.ABORT, OptionReply.ACK), "the client wants no export"
        elif reason is None and self._options > OPTIONS_MAX:
            reason = f"the client sent more than {OPTIONS_MAX} options"
        elif reason is None:
            reason = self._begin(header)
        return _Turn(OPTION_HEADER.size, send, None if reason is None else Close(reason))

    def _begin(self, header: OptionHeader) -> str | None:
        """Prepare for an option's payload; the reason if the connection ends instead."""
        self._option, self._left = header
        error = refusal(header, self._agreed, self._tls)
        self._phase = self._collect
        if error is None:
            return None
        self._refusal, self._phase = error, self._skip
        self._skipped += header.length
        if self._skipped > SKIPPED_MAX:
            return f"the client sent {self._skipped} bytes of options that are not wanted"
        if self._option == Option.SET_META_CONTEXT:
            self._agreed = replace(self._agreed, contexts=(), contexts_of=None)
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
            send, self._agreed, outcome = RULES[self._option].handler(self._agreed, self._offer, payload)
        except ProtocolError as error:
            if self._option == Option.EXPORT_NAME:
                return b"", Close(str(error))
            if self._option == Option.SET_META_CONTEXT:
                self._agreed = replace(self._agreed, contexts=(), contexts_of=None)
            return pack_option_error(self._option, OptionReply.ERR_INVALID, str(error)), None
        return send, outcome

    def _over(self, _view: memoryview) -> _Turn | None:
        return _Turn(0, b"", Close("the handshake is over"))
