"""Connected sockets to where NBD servers are: a host and a port, or a Unix socket."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

from blocklayer.base.errors import IOFailedError, from_os_error

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket; that of an abstract one begins with NUL."""


async def connect(address: Address) -> socket.socket:
    """A connected socket; each address of a host is tried. Raises the last one's ``IOFailedError`` kind."""
    loop = asyncio.get_running_loop()
    if isinstance(address, str):
        return await _connect_one(socket.AF_UNIX, address, str(address).replace("\0", "@"))
    host, port = address
    name = f"{host}:{port}"
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise IOFailedError(f"the host {host!r} is not known: {error.strerror}", errno=errno.EHOSTUNREACH) from None
    failure: IOFailedError | None = None
    for family, _, _, _, place in found:
        try:
            return await _connect_one(family, place, name)
        except IOFailedError as error:
            failure = error
    raise failure or IOFailedError(f"the host {host!r} has no address", errno=errno.EHOSTUNREACH)


async def _connect_one(family: int, place: Any, name: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await asyncio.get_running_loop().sock_connect(sock, place)
        sock.getpeername()  # with a full queue a Unix socket looks connected and is not
    except OSError as error:
        sock.close()
        raise from_os_error(error, "connect", filename=name) from None
    except BaseException:
        sock.close()
        raise
    return sock
