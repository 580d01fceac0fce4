"""A server with a scripted disk, and clients of it; at the end nothing may be left, and nothing in the log."""

from __future__ import annotations

import logging

import pytest

from blocklayer.exports.nbd_server import NbdExport, NbdServer, ServerLimits
from tests.helpers.nbd_client import Leftovers, raw_client, until_clients
from tests.helpers.nbd_disk import PaperDisk


@pytest.fixture
def expected_errors():
    """Texts that the log may have; a test adds them."""
    return []


@pytest.fixture
async def server(caplog, expected_errors):
    caplog.set_level(logging.INFO)
    before = Leftovers()
    async with NbdServer(limits=ServerLimits(close_s=5)) as server:
        yield server
        await until_clients(server, 0)
    before.assert_none()
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [error for error in errors if not any(text in error for text in expected_errors)] == []


@pytest.fixture
def disk(server):
    """Exported as "disk", writable."""
    disk = PaperDisk()
    server.add(NbdExport("disk", disk, writable=True, allocation_depth=True))
    return disk


@pytest.fixture
async def raw(server):
    """Makes clients that have said nothing."""
    clients = []

    def make(shape="simple", **options):
        clients.append(raw_client(server, shape, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
async def connect(raw):
    """Makes clients in their transmission phase."""

    async def make(shape="simple", name="disk", *, contexts=(), **options):
        return await raw(shape, **options).go(name, contexts=contexts)

    return make
