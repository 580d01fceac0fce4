"""Clients of our own server over socket pairs; at the end nothing may be left."""

from __future__ import annotations

import socket

import pytest

from blocklayer.codec.nbd.client_handshake import Wish
from blocklayer.drivers.nbd.connection import Connection
from blocklayer.exports.nbd_server import NbdExport, NbdServer, ServerLimits
from tests.helpers.nbd_client import SHAPES, Leftovers, until_clients
from tests.helpers.nbd_disk import PaperDisk

CONTEXT = "base:allocation"


@pytest.fixture
async def server():
    before = Leftovers()
    async with NbdServer(limits=ServerLimits(close_s=5)) as server:
        yield server
        await until_clients(server, 0)
    before.assert_none()


@pytest.fixture
def disk(server):
    """Exported as "disk", writable."""
    disk = PaperDisk(4 << 20)
    server.add(NbdExport("disk", disk, writable=True))
    return disk


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def wish_of(shape, export="disk", **more):
    """``simple`` has no contexts: they bring chunks with them."""
    contexts = () if shape == "simple" else (CONTEXT,)
    return Wish(export, structured=shape != "simple", extended=shape == "extended", contexts=contexts, **more)


@pytest.fixture
async def connect(server, disk):
    """Makes connections."""
    made = []

    async def make(shape="extended", **options):
        ours, theirs = socket.socketpair()
        server.adopt(theirs)
        made.append(await Connection.open(ours, wish_of(shape), **options))
        return made[-1]

    yield make
    for connection in made:
        await connection.close()
