"""Both sides of an NBD handshake without a connection: exports to offer, streams in pieces, and conversations."""

from __future__ import annotations

from blocklayer.codec.nbd import client_handshake as client
from blocklayer.codec.nbd import server_handshake as server
from blocklayer.codec.nbd.options import (
    OPTION_REPLY_HEADER,
    ExportInfo,
    pack_greeting,
    pack_info,
    pack_meta_context,
    pack_option_error,
    pack_option_reply,
    parse_option_reply_header,
)
from blocklayer.codec.nbd.protocol import HandshakeFlags, Option, OptionReply, TransmissionFlags

FLAGS = TransmissionFlags.SEND_FLUSH | TransmissionFlags.SEND_DF | TransmissionFlags.BLOCK_STATUS_PAYLOAD
DISK = server.ExportOffer(
    "disk",
    "the system disk",
    1 << 30,
    FLAGS,
    contexts=("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"),
)
BLOCKY = server.ExportOffer("blocky", "", 1 << 20, FLAGS, minimum=4096, preferred=65536, maximum=1 << 20)


class Exports:
    """An ``Offer`` of the given exports; the first one is the default. It keeps what it was asked for."""

    def __init__(self, *exports):
        self.exports = exports or (DISK, BLOCKY)
        self.asked = []

    def names(self):
        return [(export.name, export.description) for export in self.exports]

    def find(self, name):
        self.asked.append(name)
        return next((export for export in self.exports if name in ("", export.name)), None)


def feed(handshake, stream, pieces=None):
    """Receive a stream in pieces of the given sizes (all at once without): what is sent, the outcome, what is left.

    With ``pieces`` bytes that are not consumed stay before the next ones, as a caller's buffer has it.
    """
    sent, kept = b"", b""
    for piece in cut(stream, pieces):
        kept += piece
        while True:
            step = handshake.receive(memoryview(kept))
            assert 0 <= step.consumed <= len(kept)
            sent += step.send
            kept = kept[step.consumed :]
            if step.outcome is not None:
                return sent, step.outcome, kept
            if not step.consumed:
                break
    return sent, None, kept


def cut(stream, pieces):
    """The stream in pieces: ``pieces`` sizes, then the rest."""
    at = 0
    for size in pieces or ():
        yield stream[at : at + size]
        at += size
    if at < len(stream) or not pieces:
        yield stream[at:]


def replies(sent):
    """The option replies in what a server sent, as (option, type, payload)."""
    found = []
    while sent:
        header = parse_option_reply_header(sent)
        end = OPTION_REPLY_HEADER.size + header.length
        found.append((header.option, header.type, bytes(sent[OPTION_REPLY_HEADER.size : end])))
        sent = sent[end:]
    return found


# -- what a server says ----------------------------------------------------------------------------------------

GREETING = pack_greeting(HandshakeFlags(3))
"""Of a server with everything."""


def ack(option):
    return pack_option_reply(option, OptionReply.ACK)


def no(option, kind=OptionReply.ERR_UNSUP, message=""):
    return pack_option_error(option, kind, message)


def info(*infos, option=Option.GO):
    return b"".join(pack_option_reply(option, OptionReply.INFO, pack_info(one)) for one in infos)


def gone(size=512, flags=1):
    return info(ExportInfo(size, flags)) + ack(Option.GO)


def context(number, name, option=Option.SET_META_CONTEXT):
    return pack_option_reply(option, OptionReply.META_CONTEXT, pack_meta_context(number, name))


class Talk:
    """A conversation of the two sides: ends with the outcome of each, None where one is still waiting.

    TLS is imagined: both sides begin it when they say so.
    """

    def __init__(self, wish, offer, *, tls=server.TlsMode.OFF, mangle=lambda data: data):
        self.server = server.ServerHandshake(offer, tls=tls)
        self.client = client.ClientHandshake(wish)
        self.to_server, self.to_client = b"", self.server.greeting()
        self.mangle = mangle
        self.encrypted = [False, False]
        self.said = b""
        self.server_outcome = self.client_outcome = None
        while self.turn():
            pass

    def turn(self):
        """One step of whoever can take one; False if nobody can."""
        return self.client_turn() or self.server_turn()

    def client_turn(self):
        if self.client_outcome is not None:
            return False
        step = self.client.receive(self.to_client)
        self.to_client = self.to_client[step.consumed :]
        self.to_server += step.send
        self.said += step.send
        if isinstance(step.outcome, client.StartTls):
            self.encrypted[0] = True
            return True
        self.client_outcome = step.outcome
        return bool(step.consumed or step.send or step.outcome)

    def server_turn(self):
        if self.server_outcome is not None:
            return False
        step = self.server.receive(self.to_server)
        self.to_server = self.to_server[step.consumed :]
        self.to_client += self.mangle(step.send)
        if isinstance(step.outcome, server.StartTls):
            self.encrypted[1] = True
            return True
        self.server_outcome = step.outcome
        return bool(step.consumed or step.send or step.outcome)
