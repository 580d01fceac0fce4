"""``blocklayer.nbd``: what is public of NBD, and that it works without a graph."""

from __future__ import annotations

import asyncio
import socket

from blocklayer import nbd
from blocklayer.codec.nbd.protocol import INIT_MAGIC


def test_every_public_name_is_there() -> None:
    assert [name for name in nbd.__all__ if not hasattr(nbd, name)] == []


async def test_a_server_without_exports_greets_its_clients() -> None:
    ours, theirs = socket.socketpair()
    async with nbd.NbdServer() as server:
        server.adopt(theirs)
        ours.setblocking(False)
        greeting = await asyncio.get_running_loop().sock_recv(ours, 18)
        assert greeting[:8] == INIT_MAGIC.to_bytes(8, "big")
        assert server.connections == 1
    ours.close()
    assert server.connections == 0
