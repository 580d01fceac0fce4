"""TlsChannel: what ``Channel`` is, over TLS.

The TLS library works on memory alone (``ssl.MemoryBIO``); the bytes of the wire go through a ``Channel`` like any other.
So whoever uses a channel need not know which of the two it has.

    wire -> Channel -> incoming memory -> TLS -> user        user -> TLS -> outgoing memory -> Channel -> wire

``established`` is called once, when the handshake is done; before that nothing is received, and what is sent waits.
A handshake that fails is ``lost`` with the ``ssl.SSLError``, which is an ``OSError``.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

from blocklayer.aio.channel import Channel
from blocklayer.base.units import KIB

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from blocklayer.aio.channel import ChannelUser

INPUT: Final = 64 * KIB
"""Four records of the largest size."""


class TlsChannel:
    """Owns ``sock``, on which the peer begins, or expects, a TLS handshake."""

    def __init__(
        self,
        sock: socket.socket,
        user: ChannelUser,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None = None,
        established: Callable[[ssl.SSLObject], None],
    ) -> None:
        """Begin the handshake. ``hostname`` is checked by clients against the certificate, if ``context`` says so."""
        self.user = user
        self.closed = False
        self._established: Callable[[ssl.SSLObject], None] | None = established
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname)
        self._early: list[bytes] = []  # sent before the handshake was done
        self._paused = False
        self._input = memoryview(bytearray(INPUT))
        self._channel = Channel(sock, self)
        self._channel.resume_reading()
        self._go_on()

    @property
    def unsent(self) -> int:
        """Bytes that wait for the socket."""
        return self._channel.unsent

    # -- as a channel --------------------------------------------------------------------------------------------

    def resume_reading(self) -> None:
        """See ``Channel``."""
        if self._paused and not self.closed:
            self._paused = False
            self._channel.resume_reading()
            self._go_on()

    def pause_reading(self) -> None:
        """See ``Channel``."""
        self._paused = True
        self._channel.pause_reading()

    def send(
        self, buffers: Sequence[Buffer], *, volatile: bool = False, release: Callable[[], None] | None = None
    ) -> None:
        """See ``Channel``. What is sent is encrypted at once, so that no buffer is needed any more."""
        del volatile
        if self._established is not None:
            self._early += [bytes(buffer) for buffer in buffers]
        elif not self.closed:
            for buffer in buffers:
                self._tls.write(buffer)
            self._send_outgoing()
        if release is not None:
            release()

    def close(self) -> None:
        """See ``Channel``."""
        self.closed = True
        self._channel.close()

    # -- as the user of the channel below ------------------------------------------------------------------------

    def receive_into(self) -> memoryview:
        """See ``ChannelUser``."""
        return self._input

    def received(self, count: int) -> None:
        """See ``ChannelUser``."""
        self._incoming.write(self._input[:count])
        self._go_on()

    def drained(self) -> None:
        """See ``ChannelUser``."""
        self.user.drained()

    def lost(self, error: OSError | None) -> None:
        """See ``ChannelUser``."""
        if not self.closed:
            self.closed = True
            self.user.lost(error)

    # -- the work ------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Go on with the handshake, or hand over what has been decrypted."""
        try:
            if self._established is not None:
                self._shake_hands()
            while not (self._paused or self.closed):
                target = self.user.receive_into()
                count = self._read(target)
                if not count:
                    self._fail(None)
                    return
                self.user.received(count)
        except ssl.SSLWantReadError:
            self._send_outgoing()
        except ssl.SSLZeroReturnError:
            self._fail(None)
        except ssl.SSLError as error:
            self._send_outgoing()  # the alert that says why
            self._fail(error)

    def _read(self, target: memoryview) -> int:
        """Decrypted bytes into ``target``; with a buffer the TLS library answers their number."""
        count: int = self._tls.read(len(target), target)  # type: ignore[assignment]  # typeshed knows the other form
        return count

    def _shake_hands(self) -> None:
        self._tls.do_handshake()
        established, self._established = self._established, None
        if established is not None:
            established(self._tls)
        early, self._early = self._early, []
        self.send(early)

    def _send_outgoing(self) -> None:
        data = self._outgoing.read()
        if data:
            self._channel.send([data])

    def _fail(self, error: OSError | None) -> None:
        if not self.closed:
            self.close()
            self.user.lost(error)
