"""NbdDriver: what the server can do decides what the driver does; connections come back."""

from __future__ import annotations

import asyncio

import pytest

import blocklayer
from blocklayer.base.errors import AccessDeniedError, IOFailedError, UnsupportedError
from blocklayer.base.extents import ExtentKind
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import GIB, KIB, MIB
from blocklayer.codec.nbd.client_handshake import RemoteExport
from blocklayer.codec.nbd.protocol import TransmissionFlags
from blocklayer.drivers.nbd.driver import NbdDriver, check_same, limits_of
from blocklayer.exports.nbd_server import NbdExport, NbdServer, ServerLimits
from blocklayer.exports.nbd_server.tls import ServerTls
from tests.exports.nbd_server.test_transmission import Gate
from tests.helpers.nbd_client import until_clients
from tests.helpers.nbd_disk import PaperDisk
from tests.helpers.peers import needs
from tests.helpers.pki import make_pki


@pytest.fixture
async def graph():
    async with blocklayer.Graph() as graph:
        yield graph


@pytest.fixture
async def place(server, disk, tmp_path):
    """Options of a node on the server."""
    await server.listen_unix(tmp_path / "socket")
    return {"driver": "nbd", "path": str(tmp_path / "socket"), "export": "disk"}


async def test_a_node_reads_and_writes(graph, place, disk):
    node = await graph.open(place)
    await node.write(1, b"hello", flags=WriteFlags.FUA)
    assert (node.size, await node.read(0, 7), bytes(disk.bytes[:7])) == (4 * MIB, b"\0hello\0", b"\0hello\0")
    await node.write_zeroes(2, 2)
    await node.discard(4096, 4096)
    await node.flush()
    assert disk.bytes[:7] == b"\0h\0\0lo\0"
    assert [(kind, WriteFlags.FUA in flags) for kind, _, _, flags in disk.log if kind != "read"] == [
        ("write", True), ("write_zeroes", False), ("discard", False), ("flush", False),
    ]  # fmt: skip
    assert (await node.driver.info())["replies"] == "extended"
    await node.close()


async def test_flags_of_zeroes_arrive(graph, place, disk):
    node = await graph.open(place)
    for flags in (WriteFlags.NONE, WriteFlags.MAY_UNMAP, WriteFlags.NO_FALLBACK, WriteFlags.FUA):
        await node.driver.write_zeroes(0, 4096, flags)
    unmap = [WriteFlags.MAY_UNMAP in flags for kind, _, _, flags in disk.log if kind == "write_zeroes"]
    fast = [WriteFlags.NO_FALLBACK in flags for kind, _, _, flags in disk.log if kind == "write_zeroes"]
    assert (unmap, fast) == ([False, True, False, False], [False, False, True, False])
    await node.close()


async def test_extents_are_the_servers(graph, place, disk):
    disk.bytes[4096:12288] = b"x" * 8192
    node = await graph.open(place)
    found = [(extent.offset, extent.length, extent.kind) async for extent in node.extents(100, 20_000)]
    assert found == [
        (100, 3996, ExtentKind.ZERO),
        (4096, 8192, ExtentKind.DATA),
        (12288, 7812, ExtentKind.ZERO),
    ]
    await node.close()


async def test_a_read_only_export(graph, server, place):
    server.add(NbdExport("fixed", PaperDisk()))
    place["export"] = "fixed"
    with pytest.raises(AccessDeniedError, match="read-only"):
        await graph.open(place)
    node = await graph.open(place, auto_read_only=True)
    assert node.read_only
    await node.close()
    await (await graph.open(place, read_only=True)).close()


async def test_a_uri_is_enough(graph, place, disk):
    disk.bytes[:4] = b"data"
    uri = f"nbd+unix:///disk?socket={place['path']}"
    node = await graph.open(uri)
    assert (node.driver.name, await node.read(0, 4)) == ("nbd", b"data")
    await node.close()
    node = await graph.open(uri, format="raw")
    assert (node.driver.name, await node.read(0, 4)) == ("raw", b"data")
    await node.close()


async def test_several_connections_if_the_server_allows_it(graph, server, place, disk):
    node = await graph.open(place, connections=4)
    assert server.connections == 4
    await asyncio.gather(*(node.write(at * 4096, bytes([at])) for at in range(100)))
    await node.flush()
    assert disk.bytes[: 4096 * 100 : 4096] == bytes(range(100))
    await node.close()


async def restart(server, place, disk):
    await server.close(hard=True)
    again = await NbdServer(limits=ServerLimits(close_s=5)).__aenter__()
    again.add(NbdExport("disk", disk, writable=True))
    await again.listen_unix(place["path"])
    return again


async def test_requests_outlive_their_connection(graph, server, place, disk):
    disk.script = gate = Gate("read", "write")
    node = await graph.open(place, reconnect_delay=20)
    writes = [asyncio.ensure_future(node.write(at * 4096, bytes([at]) * 4096)) for at in range(1, 6)]
    reading = asyncio.ensure_future(node.read(MIB, 10))
    await gate.reached(6)
    again = await restart(server, place, disk)
    await gate.reached(6)
    gate.opened.set()
    await asyncio.gather(*writes)
    assert await reading == bytes(10)
    assert disk.bytes[4096 : 6 * 4096 : 4096] == bytes(range(1, 6))
    await node.close()
    await again.close()


async def test_without_a_delay_requests_fail_and_the_next_one_connects(graph, server, place, disk):
    disk.script = gate = Gate("read")
    node = await graph.open(place)
    reading = asyncio.ensure_future(node.read(0, 1))
    await gate.reached(1)
    again = await restart(server, place, disk)
    with pytest.raises(IOFailedError):
        await reading
    gate.opened.set()
    assert await node.read(0, 1) == b"\0"
    await again.close()
    with pytest.raises(IOFailedError):
        await node.read(0, 1)
    with pytest.raises(IOFailedError):
        await node.close()  # it cannot flush


async def test_an_export_that_comes_back_as_another_is_not_used(graph, server, place, disk):
    node = await graph.open(place)
    again = await restart(server, place, PaperDisk(8192))
    with pytest.raises(IOFailedError):
        await node.write(0, b"x")
    with pytest.raises(IOFailedError, match="8192 bytes"):
        await node.write(0, b"x")
    with pytest.raises(IOFailedError, match="8192 bytes"):
        await node.close()
    await until_clients(again, 0)
    await again.close()


@needs("openssl")
async def test_tls(graph, disk, tmp_path):
    folder = str(make_pki(tmp_path / "pki"))
    disk.bytes[:4] = b"safe"
    async with NbdServer(tls=ServerTls.from_directory(folder, verify_peer=True)) as server:
        server.add(NbdExport("disk", disk, writable=True))
        await server.listen_unix(tmp_path / "tls")
        place = {"driver": "nbd", "path": str(tmp_path / "tls"), "export": "disk"}
        node = await graph.open(place, tls=folder, tls_hostname="localhost")
        data = b"secret" * 100_000
        await node.write(10, data)
        assert (await node.read(10, len(data)), await node.read(0, 4)) == (data, b"safe")
        await node.close()
        with pytest.raises(IOFailedError, match="TLS failed"):
            await graph.open(place, tls=folder, tls_hostname="elsewhere")
        with pytest.raises(IOFailedError, match="TLS failed"):
            await graph.open(place, tls=f"{folder}/stranger", tls_hostname="localhost")
        with pytest.raises(blocklayer.BlockError, match="TLS"):
            await graph.open(place)


# -- decisions ---------------------------------------------------------------------------------------------------

PLAIN = TransmissionFlags.HAS_FLAGS


class Deaf:
    """A connection to an export that can do little; nothing may be asked of it."""

    error = None

    def __init__(self, flags=PLAIN):
        self.export = RemoteExport("", MIB + 100, flags, minimum=512, sizes_advertised=True)


async def test_a_server_that_can_do_nothing_is_not_asked_to():
    driver = NbdDriver(None, blocklayer.drivers.nbd.options.NbdOptions(host="h"), Deaf())
    assert (driver.size, driver.handles_fua) == (MIB, False)
    await driver.discard(0, 512)
    await driver.flush()
    assert (await driver.block_status(0, 512)).kind is ExtentKind.DATA
    with pytest.raises(UnsupportedError):
        await driver.write_zeroes(0, 512, WriteFlags.NO_FALLBACK)
    driver = NbdDriver(
        None, blocklayer.drivers.nbd.options.NbdOptions(host="h"), Deaf(PLAIN | TransmissionFlags.SEND_WRITE_ZEROES)
    )
    with pytest.raises(UnsupportedError, match="fast"):
        await driver.write_zeroes(0, 512, WriteFlags.NO_FALLBACK)


@pytest.mark.parametrize(
    ("sizes", "limits"),
    [
        ({}, (1, 32 * MIB, 32 * MIB)),
        ({"minimum": 4096, "maximum": 64 * KIB}, (4096, 64 * KIB, 64 * KIB)),
        ({"maximum": 0xFFFFFFFF, "minimum": 512}, (512, 32 * MIB, GIB)),
        ({"maximum": 64 * KIB, "extended": True}, (1, 64 * KIB, GIB)),
    ],
)
def test_block_sizes_are_limits(sizes, limits):
    alignment, transfer, zeroes = limits
    export = RemoteExport("", MIB, PLAIN, **sizes)
    assert limits_of(export) == BlockLimits(alignment, transfer_max=transfer, zeroes_max=zeroes)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 1},
        {"flags": PLAIN},
        {"flags": PLAIN | TransmissionFlags.SEND_FUA | TransmissionFlags.READ_ONLY},
        {"minimum": 512},
        {"maximum": 4096},
        {"contexts": {1: "base:allocation"}},
    ],
)
def test_an_export_must_be_what_it_was(change):
    kind = {"size": MIB, "flags": PLAIN | TransmissionFlags.SEND_FUA}
    check_same(RemoteExport("", **kind), RemoteExport("", **kind))
    with pytest.raises(IOFailedError):
        check_same(RemoteExport("", **kind), RemoteExport("", **kind | change))
