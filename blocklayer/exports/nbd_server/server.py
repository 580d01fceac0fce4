"""NbdServer: exports by name, listeners, and the clients' connections.

    async with NbdServer() as server:
        server.add(NbdExport("disk", node, writable=True))
        await server.listen_unix("/run/disk.sock")

Any number of listeners serve the same exports. Exports come and go while clients are connected: ``remove`` refuses while
one is used, or with ``hard`` throws its clients out. Leaving the block takes no more clients, answers the requests that
are under way, and ends.

Invariants
- Every connection is a task of the server's group; when the server is closed none is left, and no socket.
- While ``connections_max`` clients are connected nobody is accepted; they wait in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

from blocklayer.aio.shield import to_the_end
from blocklayer.base.errors import (
    BlockError,
    DuplicateError,
    InUseError,
    NotFoundError,
    OptionError,
    StateError,
    from_os_error,
)
from blocklayer.codec.nbd.protocol import DEFAULT_PORT
from blocklayer.exports.nbd_server.connection import Connection, peer_of
from blocklayer.exports.nbd_server.export import ActiveExport

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Self

    from blocklayer.codec.nbd.server_handshake import ExportOffer
    from blocklayer.exports.nbd_server.export import ExportStatistics, NbdExport
    from blocklayer.exports.nbd_server.tls import ServerTls

logger = logging.getLogger(__name__)

BACKLOG: Final = 128
"""Clients that wait to be accepted: a burst of connections from one nbdcopy is 4 to 16."""

PORT_MAX: Final = 65535

ACCEPT_AT_ONCE: Final = 16
"""Clients accepted in one turn of the event loop."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What clients may take; 0 means no limit. The first two are QEMU's.

    ``connections_max``  clients at once; others wait until one leaves
    ``handshake_s``      seconds in which a client has to say what it wants
    ``close_s``          seconds in which requests under way are answered when the server closes

    Raises ``OptionError`` for negative numbers.
    """

    connections_max: int = 100
    handshake_s: float = 10.0
    close_s: float = 10.0

    def __post_init__(self) -> None:
        """Check."""
        if min(self.connections_max, self.handshake_s, self.close_s) < 0:
            raise OptionError("limits must not be negative")


class NbdServer:
    """Use it as ``async with NbdServer() as server``. See the module's text."""

    def __init__(self, *, limits: ServerLimits | None = None, tls: ServerTls | None = None) -> None:
        """Remember; nothing listens yet. Without ``tls`` nothing is encrypted."""
        self.tls = tls
        self.limits = limits or ServerLimits()
        self._exports: dict[str, ActiveExport] = {}
        self._listeners: dict[socket.socket, str | None] = {}  # with the path that has to be removed
        self._connections: dict[Connection, None] = {}
        self._accepting = False
        self._group: anyio.abc.TaskGroup | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start the task group, in a task of its own, so that the server may be left in another task."""
        ready = asyncio.Event()
        self._supervisor = asyncio.create_task(self._supervise(ready), name="NBD server")
        await ready.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close gracefully."""
        await self.close()

    async def _supervise(self, ready: asyncio.Event) -> None:
        async with anyio.create_task_group() as self._group:
            ready.set()
            await anyio.sleep_forever()

    async def close(self, *, hard: bool = False) -> None:
        """Stop listening and end all connections; ``hard`` waits for no request. Twice is fine.

        If it is cancelled, requests under way are not waited for, and all else is done. Raises what the flush of a node
        raises that nobody but its export held.
        """
        self._stop_accepting()
        for listener, path in self._listeners.items():
            listener.close()
            if path is not None:
                _unlink(path)
        self._listeners.clear()
        try:
            if not hard:
                with anyio.move_on_after(self.limits.close_s or None):
                    await self._end_connections(list(self._connections), hard=False)
        finally:
            await to_the_end(self._end())

    async def _end(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = self._group = None
        for connection in self._connections:  # those whose task was cancelled before it began
            connection.abandon()
        self._connections.clear()
        errors: list[BlockError] = []
        while self._exports:
            _, export = self._exports.popitem()
            try:
                await export.release()
            except BlockError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _end_connections(self, connections: Iterable[Connection], *, hard: bool) -> None:
        ending = set(connections)
        for connection in ending:
            connection.close("the server closes", hard=hard)
        while ending & set(self._connections):
            self._changed.clear()
            await self._changed.wait()

    # -- exports -------------------------------------------------------------------------------------------------

    def add(self, export: NbdExport) -> None:
        """Offer ``export`` from now on.

        Raises ``DuplicateError``, ``PermissionConflictError``, ``ReadOnlyError``.
        """
        if export.name in self._exports:
            raise DuplicateError(f"an export called {export.name!r} exists already")
        self._exports[export.name] = ActiveExport(export)

    async def remove(self, name: str, *, hard: bool = False) -> None:
        """Offer it no more. Raises ``NotFoundError``, and ``InUseError`` while it has clients, unless ``hard``.

        If it is cancelled, the export is gone all the same; its clients leave as soon as they can.
        """
        export = self._exports.get(name)
        if export is None:
            raise NotFoundError(f"no export is called {name!r}")
        users = [connection for connection in self._connections if connection.export is export]
        if users and not hard:
            raise InUseError(f"export {name!r} has {len(users)} clients; hard=True disconnects them")
        del self._exports[name]
        try:
            await self._end_connections(users, hard=True)
        finally:
            await to_the_end(export.release())

    @property
    def statistics(self) -> Mapping[str, ExportStatistics]:
        """Live counters by export."""
        return {name: export.statistics for name, export in self._exports.items()}

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    # -- listening -----------------------------------------------------------------------------------------------

    async def listen_unix(self, path: str | os.PathLike[str], *, mode: int | None = None) -> None:
        """Listen on a Unix socket; it is removed at the end. A socket that nobody listens on any more is replaced.

        ``mode``: permission bits of the socket. Raises ``InUseError`` if somebody listens there, and ``IOFailedError`` kinds.
        """
        self._check_open()
        name = os.fspath(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _bind_unix(listener, name)
            if mode is not None:
                os.chmod(name, mode)
        except InUseError:
            listener.close()
            raise
        except OSError as error:
            listener.close()
            raise from_os_error(error, "listen", filename=name) from None
        self._listen(listener, name)

    async def listen_tcp(self, host: str | None = "localhost", port: int = DEFAULT_PORT) -> int:
        """Listen on all addresses of ``host`` (None: of this machine); answers the port, which the system chooses if it is 0.

        Raises ``IOFailedError`` kinds, and ``OptionError`` for a name that is none.
        """
        self._check_open()
        if not 0 <= port <= PORT_MAX:
            raise OptionError(f"a port is a number from 0 to {PORT_MAX}, not {port}")
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise OptionError(f"no address for {host!r}: {error.strerror}") from None
        try:
            listeners = _bound_tcp([(family, address) for family, _, _, _, address in dict.fromkeys(found)], port)
        except OSError as error:
            raise from_os_error(error, "listen", filename=f"{host}:{port}") from None
        for listener in listeners:
            self._listen(listener, None)
        bound: int = listeners[0].getsockname()[1]
        return bound

    def listen_socket(self, listener: socket.socket) -> None:
        """Listen on a socket that is bound already (systemd socket activation); the server closes it."""
        self._listen(listener, None)

    def adopt(self, sock: socket.socket) -> None:
        """Serve the client at the other side of a connected socket; the server closes it."""
        self._check_open()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(self, sock, peer_of(sock))
        self._connections[connection] = None
        assert self._group is not None
        self._group.start_soon(self._serve, connection, name=f"NBD client {connection.peer}")

    def _check_open(self) -> None:
        if self._group is None:
            raise StateError("the server is not open: use it as `async with NbdServer() as server`")

    def _listen(self, listener: socket.socket, path: str | None) -> None:
        try:
            self._check_open()
        except StateError:
            listener.close()
            raise
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._stop_accepting()
        self._listeners[listener] = path
        self._accept_if_there_is_room()

    def _accept_if_there_is_room(self) -> None:
        limit = self.limits.connections_max
        if self._accepting or (limit and len(self._connections) >= limit):
            return
        self._accepting = True
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self._listeners:
                asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        limit = self.limits.connections_max
        for _ in range(ACCEPT_AT_ONCE):
            if limit and len(self._connections) >= limit:
                self._stop_accepting()
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.warning("NBD server: no client can be accepted: %s", error)
                self._stop_accepting()
                asyncio.get_running_loop().call_later(1.0, self._accept_if_there_is_room)
                return
            self.adopt(sock)

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception:  # a bug here is one client's bad luck
            logger.exception("%r: internal error", connection)
        finally:
            del self._connections[connection]
            self._changed.set()
            self._accept_if_there_is_room()

    # -- what connections ask ------------------------------------------------------------------------------------

    @property
    def offer(self) -> NbdServer:
        """See ``ConnectionOwner``."""
        return self

    @property
    def handshake_s(self) -> float:
        """See ``ConnectionOwner``."""
        return self.limits.handshake_s

    def names(self) -> list[tuple[str, str]]:
        """See ``Offer``: names and descriptions."""
        return [(export.name, export.description) for export in self._exports.values()]

    def find(self, name: str) -> ExportOffer | None:
        """See ``Offer``."""
        export = self._exports.get(name)
        return None if export is None else export.offer()

    def enter(self, name: str, connection: Connection) -> ActiveExport | None:
        """See ``ConnectionOwner``."""
        export = self._exports.get(name)
        if export is not None:
            export.statistics.connections += 1
            logger.info("%s uses export %r", connection.peer, name)
        return export

    def leave(self, export: ActiveExport, connection: Connection) -> None:
        """See ``ConnectionOwner``."""
        export.statistics.connections -= 1


def _bind_unix(listener: socket.socket, path: str) -> None:
    try:
        listener.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise InUseError("somebody listens there", filename=path) from None
        os.unlink(path)
        listener.bind(path)


def _bound_tcp(addresses: list[tuple[int, tuple[Any, ...]]], port: int) -> list[socket.socket]:
    """One socket for each address, all with the same port; a family that this machine does without is passed over."""
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses:
            try:
                listeners.append(_bound(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                missing = error
                continue
            port = listeners[-1].getsockname()[1]
        if missing is not None and not listeners:
            raise missing
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        logger.warning("NBD server: cannot remove %s: %s", path, error)
