"""NbdServer: exports come and go, clients wait their turn, and nothing is left when it is closed."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat

import pytest

import blocklayer
from blocklayer.base.errors import (
    DuplicateError,
    InUseError,
    IOFailedError,
    NotFoundError,
    OptionError,
    StateError,
)
from blocklayer.codec.nbd import options as opt
from blocklayer.codec.nbd.protocol import Command, Option
from blocklayer.exports.nbd_server import NbdExport, NbdServer, ServerLimits
from tests.exports.nbd_server.test_transmission import Gate
from tests.helpers.blocking import turns
from tests.helpers.nbd_client import Leftovers, RawClient, Reply, connected, raw_client, until_clients
from tests.helpers.nbd_disk import PaperDisk
from tests.helpers.virtual_time import virtual_time


async def connect_to(address, family=socket.AF_UNIX):
    sock = socket.socket(family)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address)
    return RawClient(sock)


# -- exports -----------------------------------------------------------------------------------------------------


async def test_exports_are_listed_with_their_descriptions(server, raw):
    for name, description in [("", "the default"), ("two", "äöü"), ("three", "")]:
        server.add(NbdExport(name, PaperDisk(), description=description))
    client = raw()
    await client.greet()
    answers = await client.option(Option.LIST)
    listed = [opt.parse_server(answer.payload) for answer in answers[:-1]]
    assert listed == [("", "the default"), ("two", "äöü"), ("three", "")]


async def test_a_name_is_given_once(server, disk):
    with pytest.raises(DuplicateError, match="disk"):
        server.add(NbdExport("disk", PaperDisk()))


async def test_exports_come_while_clients_are_connected(server, disk, connect):
    first = await connect()
    server.add(NbdExport("more", more := PaperDisk(5000)))
    more.bytes[:4] = b"more"
    second = await connect(name="more")
    assert (second.size, await second.read(0, 4), await first.read(0, 1)) == (5000, b"more", b"\0")


async def test_removing_an_export_that_is_used_is_refused_unless_hard(server, disk, connect, raw):
    user, other = await connect(), raw()
    disk.script = gate = Gate("write")
    await user.ask(Command.WRITE, 0, payload=b"x")
    await gate.reached(1)
    with pytest.raises(InUseError, match="1 clients"):
        await server.remove("disk")
    await server.remove("disk", hard=True)
    assert gate.waiting == 0
    assert await user.at_end()
    await other.greet()
    assert len(await other.option(Option.LIST)) == 1
    with pytest.raises(NotFoundError):
        await server.remove("disk")
    server.add(NbdExport("disk", PaperDisk()))


async def test_removing_an_unused_export(server, disk, connect):
    await (await connect()).leave()
    await until_clients(server, 0)
    await server.remove("disk")
    assert server.statistics == {}


# -- listening ---------------------------------------------------------------------------------------------------


async def test_a_unix_socket_with_its_mode_is_removed_at_the_end(tmp_path):
    path = tmp_path / "disk.sock"
    async with NbdServer() as server:
        server.add(NbdExport("disk", PaperDisk()))
        await server.listen_unix(path, mode=0o600)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        client = await (await connect_to(str(path))).go()
        assert await client.read(0, 1) == b"\0"
        client.close()
    assert not path.exists()


async def test_a_socket_that_nobody_listens_on_is_replaced(server, tmp_path):
    path = str(tmp_path / "disk.sock")
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(path)
    await server.listen_unix(path)
    (await connect_to(path)).close()


async def test_a_socket_that_somebody_listens_on_is_not(server, tmp_path):
    path = str(tmp_path / "disk.sock")
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(path)
        old.listen()
        with pytest.raises(InUseError):
            await server.listen_unix(path)
    assert os.path.exists(path)


@pytest.mark.parametrize("where", ["file", "missing/disk.sock", "x" * 200])
async def test_a_path_that_cannot_be_a_socket(server, tmp_path, where):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(IOFailedError):
        await server.listen_unix(tmp_path / where)
    assert (tmp_path / "file").read_text() == "precious"


async def test_one_port_on_all_addresses_of_localhost(server, disk):
    port = await server.listen_tcp("localhost", 0)
    families = [(socket.AF_INET, "127.0.0.1")]
    if any(listener.family == socket.AF_INET6 for listener in server._listeners):
        families.append((socket.AF_INET6, "::1"))
    for family, host in families:
        client = await (await connect_to((host, port), family)).go()
        assert await client.read(0, 1) == b"\0"
        client.close()


async def test_a_port_that_is_taken_and_one_that_is_none(server):
    port = await server.listen_tcp("127.0.0.1", 0)
    with pytest.raises(IOFailedError) as caught:
        await server.listen_tcp("127.0.0.1", port)
    assert caught.value.errno == errno.EADDRINUSE
    for wrong in (-1, 65536):
        with pytest.raises(OptionError, match="65535"):
            await server.listen_tcp("127.0.0.1", wrong)
    with pytest.raises(OptionError, match="no address"):
        await server.listen_tcp("no.such.host.invalid", 0)


async def test_a_socket_that_is_bound_already(server, disk):
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server.listen_socket(listener)
    client = await (await connect_to(address, socket.AF_INET)).go()
    client.close()
    await until_clients(server, 0)
    await server.close()
    assert listener.fileno() == -1


async def test_a_server_that_is_not_open(tmp_path):
    server = NbdServer()
    with pytest.raises(StateError):
        await server.listen_unix(tmp_path / "disk.sock")
    with pytest.raises(StateError):
        await server.listen_tcp("127.0.0.1", 0)
    listener = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(StateError):
        server.listen_socket(listener)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(StateError):
        server.adopt(ours)
    assert list(tmp_path.iterdir()) == []
    await server.close()


# -- how many ----------------------------------------------------------------------------------------------------


async def test_the_next_client_waits_until_one_leaves(tmp_path):
    path = str(tmp_path / "disk.sock")
    async with NbdServer(limits=ServerLimits(connections_max=2)) as server:
        server.add(NbdExport("disk", PaperDisk()))
        await server.listen_unix(path)
        clients = [await connect_to(path) for _ in range(4)]
        for client in clients[:2]:
            await client.go()
        waiting = asyncio.ensure_future(clients[2].go())
        await turns(200)
        assert (server.connections, waiting.done()) == (2, False)
        clients[0].close()
        await waiting
        await clients[1].leave()
        await clients[3].go()
        assert server.connections == 2
        for client in clients:
            client.close()


async def test_without_a_limit_many_come_at_once(tmp_path):
    path = str(tmp_path / "disk.sock")
    async with NbdServer(limits=ServerLimits(connections_max=0)) as server:
        server.add(NbdExport("disk", PaperDisk()))
        await server.listen_unix(path)
        clients = [await connect_to(path) for _ in range(60)]
        await asyncio.gather(*(client.go() for client in clients))
        assert server.statistics["disk"].connections == server.connections == 60
        for client in clients:
            client.close()
        await until_clients(server, 0)
        assert server.statistics["disk"].connections == 0


async def test_a_server_that_cannot_accept_tries_again(tmp_path, monkeypatch):
    path = str(tmp_path / "disk.sock")
    async with NbdServer() as server:
        server.add(NbdExport("disk", PaperDisk()))
        await server.listen_unix(path)
        (listener,) = server._listeners
        left = [OSError(errno.EMFILE, "too many open files")]

        class Failing:
            def accept(self):
                if left:
                    raise left.pop()
                return listener.accept()

        later = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda delay, call: later.append((delay, call)))
        server._accept(Failing())
        assert [delay for delay, _ in later] == [1.0]
        monkeypatch.undo()
        client = await connect_to(path)
        await turns()
        assert server.connections == 0
        later[0][1]()
        await client.go()
        client.close()


@pytest.mark.parametrize("limits", [{"connections_max": -1}, {"handshake_s": -0.1}, {"close_s": -1}])
def test_limits_are_not_negative(limits):
    with pytest.raises(OptionError):
        ServerLimits(**limits)


# -- the end -----------------------------------------------------------------------------------------------------


async def test_a_graceful_close_answers_what_is_under_way(server, disk, connect):
    user, idle = await connect(), await connect("structured")
    disk.script = gate = Gate("write")
    cookie = await user.ask(Command.WRITE, 0, payload=b"last words")
    await gate.reached(1)
    closing = asyncio.ensure_future(server.close())
    assert await idle.at_end()
    await user.send(user.pack(Command.WRITE, 20, payload=b"too late"))
    await turns(100)
    assert not closing.done()
    gate.opened.set()
    assert await user.reply(cookie) == Reply()
    assert await user.at_end()
    await closing
    assert disk.bytes[:30] == b"last words" + bytes(20)


async def test_a_hard_close_does_not_wait(server, disk, connect):
    user = await connect()
    disk.script = gate = Gate("write")
    await user.ask(Command.WRITE, 0, payload=b"x")
    await gate.reached(1)
    await server.close(hard=True)
    assert (gate.waiting, server.connections) == (0, 0)
    assert await user.at_end()


async def test_a_hard_close_overtakes_a_graceful_one(server, disk, connect):
    user = await connect()
    disk.script = gate = Gate("write")
    await user.ask(Command.WRITE, 0, payload=b"x")
    await gate.reached(1)
    closing = [asyncio.ensure_future(server.close()) for _ in range(2)]
    await turns()
    await server.close(hard=True)
    await asyncio.gather(*closing)
    await server.close()
    assert gate.waiting == 0


@virtual_time
async def test_a_graceful_close_waits_no_longer_than_it_may():
    for limit, waits in ((5, True), (0, False)):
        server = NbdServer(limits=ServerLimits(close_s=limit))
        async with server:
            disk = PaperDisk()
            server.add(NbdExport("disk", disk, writable=True))
            disk.script = gate = Gate("write")
            async with connected(server) as user:
                await user.ask(Command.WRITE, 0, payload=b"x")
                await gate.reached(1)
                closing = asyncio.ensure_future(server.close())
                await asyncio.sleep(4.9)
                assert not closing.done()
                await asyncio.sleep(1000)
                assert closing.done() == waits, "0 is without limit"
                gate.opened.set()
                await closing


async def test_a_close_that_is_cancelled_closes_all_the_same(server, disk, connect):
    user = await connect()
    disk.script = gate = Gate("write")
    await user.ask(Command.WRITE, 0, payload=b"x")
    await gate.reached(1)
    closing = asyncio.ensure_future(server.close())
    await turns()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (server.connections, gate.waiting, server.statistics) == (0, 0, {})


async def test_a_client_whose_task_has_not_begun_is_closed_too():
    before = Leftovers()
    for hard in (True, False):
        async with NbdServer() as server:
            server.add(NbdExport("disk", PaperDisk()))
            client = raw_client(server)
            await server.close(hard=hard)
            assert server.connections == 0
            client.close()
    before.assert_none()


async def test_a_server_may_be_opened_again(tmp_path):
    server = NbdServer()
    for _ in range(2):
        async with server:
            server.add(NbdExport("disk", PaperDisk()))
            await server.listen_unix(tmp_path / "disk.sock")
            client = await (await connect_to(str(tmp_path / "disk.sock"))).go()
            await client.leave()


# -- nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def node(server):
    async with blocklayer.Graph() as graph:
        yield await graph.open({"driver": "memory", "size": 1 << 20})
        await server.close(hard=True)


async def test_a_drained_section_holds_requests_back_and_lets_them_go_on(server, node, connect):
    server.add(NbdExport("disk", node, writable=True))
    client = await connect()
    await client.write(0, b"before")
    async with node.drained():
        cookies = [await client.ask(Command.WRITE, 0, payload=b"behind"), await client.ask(Command.READ, 100, 5)]
        await turns(200)
        assert node.path.try_read_into(0, memoryview(data := bytearray(6)))
        assert data == b"before"
    assert [(await client.reply(cookie)).error for cookie in cookies] == [0, 0]
    assert await client.read(0, 6) == b"behind"


async def test_a_flush_on_one_connection_is_for_the_writes_of_all(server, connect, disk):
    one, two = await connect(), await connect("extended")
    await one.write(0, b"durable")
    assert await two.request(Command.FLUSH) == Reply()
    assert [step[0] for step in disk.log] == ["write", "flush"]
    assert await two.read(0, 7) == b"durable"


async def test_a_node_that_is_removed_is_free_again(server, node):
    server.add(NbdExport("disk", node))
    users = len(node.parents)
    await server.remove("disk")
    assert len(node.parents) == users - 1


async def test_a_node_that_only_its_export_holds_is_closed_with_it(server, tmp_path):
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    async with blocklayer.Graph() as graph:
        node = await graph.open(tmp_path / "disk.raw", format="raw")
        server.add(NbdExport("disk", node, writable=True))
        await node.close()
        assert not node.closed, "the export holds it"
        await server.remove("disk")
        assert node.closed
