"""One client: its handshake, and then its transmission phase, on one channel.

    open -> Handshake: greeting, options -> Transmission: requests -> over
               | took too long, broke the protocol, server closes       |
               +--------------------------------------------------------+

The connection is a task of the server: when it ends, however it does, the socket is closed and no worker is left.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from blocklayer.aio.channel import Channel
from blocklayer.aio.tls_channel import TlsChannel
from blocklayer.base.units import KIB
from blocklayer.codec.nbd.protocol import TlsMode
from blocklayer.codec.nbd.server_handshake import Close, Ready, ServerHandshake, StartTls
from blocklayer.exports.nbd_server.transmission import Transmission

if TYPE_CHECKING:
    import socket
    import ssl

    from blocklayer.codec.nbd.server_handshake import Offer
    from blocklayer.exports.nbd_server.export import ActiveExport
    from blocklayer.exports.nbd_server.tls import ServerTls

logger = logging.getLogger(__name__)

HANDSHAKE_INPUT: Final = 64 * KIB
"""Bytes taken from the socket at once; the part of an option that is here is the handshake's to keep. Requests behind
the last option go to ``Transmission.feed``, which takes no more than its ``INPUT``."""


class ConnectionOwner(Protocol):
    """What a connection asks of its server."""

    @property
    def offer(self) -> Offer:
        """What clients can choose from."""

    @property
    def handshake_s(self) -> float:
        """How long a handshake may take; 0 for ever."""

    @property
    def tls(self) -> ServerTls | None:
        """How connections are encrypted; None: they are not."""

    def enter(self, name: str, connection: Connection) -> ActiveExport | None:
        """The client uses an export from now on; None if it is gone, or has enough clients."""

    def leave(self, export: ActiveExport, connection: Connection) -> None:
        """It uses it no more."""


class Connection:
    """Runs on ``sock``, which it owns; ``peer`` is for people."""

    def __init__(self, owner: ConnectionOwner, sock: socket.socket, peer: str) -> None:
        """Nothing is sent before ``run``."""
        self.peer = peer
        self.export: ActiveExport | None = None
        self._owner = owner
        self._over = asyncio.Event()
        self._ready = asyncio.Event()
        self._reason = ""
        self._channel: Channel | TlsChannel = Channel(sock, self)
        mode = TlsMode.OFF if owner.tls is None else TlsMode.REQUIRE if owner.tls.required else TlsMode.ALLOW
        self._handshake = ServerHandshake(owner.offer, tls=mode)
        self._input = memoryview(bytearray(HANDSHAKE_INPUT))
        self._end = 0
        self._group: anyio.abc.TaskGroup | None = None
        self._transmission: Transmission | None = None
        self._tls_is_next = False  # the client waits for it, as soon as it has read that it can begin

    def __repr__(self) -> str:
        """``<NBD client 127.0.0.1:50000, export 'disk'>``."""
        return f"<NBD client {self.peer}, {'handshake' if self.export is None else f'export {self.export.name!r}'}>"

    async def run(self) -> None:
        """Serve the client until it leaves, the connection breaks, or ``close`` is called."""
        try:
            async with anyio.create_task_group() as self._group:
                self._channel.send([self._handshake.greeting()])
                self._channel.resume_reading()
                with anyio.move_on_after(self._owner.handshake_s or None) as limit:
                    await self._ready.wait()
                if limit.cancelled_caught:
                    self._end_with(f"the handshake took more than {self._owner.handshake_s:g} s")
                await self._over.wait()
                self._group.cancel_scope.cancel()
        finally:
            self._channel.close()
            if self.export is not None:
                self._owner.leave(self.export, self)
            logger.info("%r: %s", self, self._reason or "the client left")

    def abandon(self) -> None:
        """Close the socket of a connection that was not run."""
        self._channel.close()

    def close(self, reason: str, *, hard: bool) -> None:
        """End the connection: at once, or when the requests under way are answered."""
        if hard or self._transmission is None:
            self._end_with(reason)
        else:
            self._transmission.leave(reason)

    # -- what the channel tells during the handshake -------------------------------------------------------------

    def receive_into(self) -> memoryview:
        """See ``ChannelUser``."""
        return self._input[self._end :]

    def received(self, count: int) -> None:
        """See ``ChannelUser``."""
        self._end += count
        self._take_options()

    def drained(self) -> None:
        """See ``ChannelUser``: the client has read the answers to its options; the next ones can be answered."""
        if self._tls_is_next:
            self._encrypt()
        else:
            self._take_options()

    def lost(self, error: OSError | None) -> None:
        """See ``ChannelUser``."""
        self._end_with("the client closed the connection" if error is None else str(error))

    def _take_options(self) -> None:
        """Answer what is here, as far as the client reads the answers."""
        at = 0
        while not (self._channel.unsent or self._over.is_set()):
            step = self._handshake.receive(self._input[at : self._end])
            at += step.consumed
            if step.send:
                self._channel.send([step.send])
            if self._over.is_set():
                return
            if isinstance(step.outcome, Ready):
                self._begin(step.outcome, bytes(self._input[at : self._end]))
                return
            if isinstance(step.outcome, Close):
                self._end_with(step.outcome.reason)
            elif isinstance(step.outcome, StartTls):
                self._tls_is_next = True
                break
            elif not step.consumed:
                break
        rest = self._end - at
        self._input[:rest] = bytes(self._input[at : self._end])
        self._end = rest
        if self._channel.unsent:
            self._channel.pause_reading()
        elif self._tls_is_next:
            self._encrypt()
        else:
            self._channel.resume_reading()

    # -- encryption ----------------------------------------------------------------------------------------------

    def _encrypt(self) -> None:
        """The client asked for TLS, and has been told that it can begin."""
        tls, self._tls_is_next = self._owner.tls, False
        if tls is None or not isinstance(self._channel, Channel):
            self._end_with("TLS is not available")
            return
        self._channel = TlsChannel(
            self._channel.detach(), self, tls.context, server_side=True, established=self._encrypted
        )

    def _encrypted(self, session: ssl.SSLObject) -> None:
        """The TLS handshake is done; the client may have to be somebody in particular."""
        tls = self._owner.tls
        if tls is None or tls.authorise is None:
            return
        try:
            may_go_on = tls.authorise(session.getpeercert() or {})
        except Exception:  # a decision that failed is a refusal
            logger.exception("%r: its certificate could not be judged", self)
            may_go_on = False
        if not may_go_on:
            self._end_with("the client's certificate is not authorised")

    # -- changes of state ----------------------------------------------------------------------------------------

    def _begin(self, ready: Ready, rest: bytes) -> None:
        export = self._owner.enter(ready.session.export.name, self)
        if export is None or self._group is None:
            self._end_with("the export is gone, or has as many clients as it may have")
            return
        self.export = export
        if not set(ready.session.contexts.values()) <= set(export.contexts):
            self._end_with("the export is another one than that whose contexts the client chose")
            return
        self._ready.set()
        self._transmission = Transmission(ready.session, export, self._channel, self._group, finished=self._end_with)
        self._channel.user = self._transmission
        self._transmission.feed(rest)

    def _end_with(self, reason: str) -> None:
        if not self._over.is_set():
            self._reason = reason
            self._over.set()
            self._ready.set()


def peer_of(sock: socket.socket) -> str:
    """The other side of a socket, for people."""
    try:
        name = sock.getpeername()
    except OSError:
        return "gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else (name or "local")
