"""A connection's handshake: what it waits for, what it does not keep, and how it ends."""

from __future__ import annotations

import asyncio
import socket

import pytest

from blocklayer.base.units import KIB
from blocklayer.codec.nbd import options as opt
from blocklayer.codec.nbd.protocol import Option, OptionReply
from blocklayer.exports.nbd_server import NbdExport, NbdServer, Run, ServerLimits
from blocklayer.exports.nbd_server.connection import HANDSHAKE_INPUT, peer_of
from blocklayer.exports.nbd_server.transmission import INPUT
from tests.helpers.blocking import turns
from tests.helpers.nbd_client import PATIENCE_S, raw_client, until_clients
from tests.helpers.nbd_disk import PaperDisk
from tests.helpers.virtual_time import virtual_loop, virtual_time


class Bitmap:
    """A context of a name."""

    def __init__(self, name):
        self.name = name

    async def runs(self, offset, length):
        yield Run(length, 1)


def test_what_stands_behind_a_handshake_fits_into_the_buffer_of_requests():
    assert HANDSHAKE_INPUT <= INPUT


async def test_the_old_way_to_choose_an_export(raw, disk):
    for flags, zeroes in ((1, 124), (3, 0)):
        client = raw()
        await client.greet(flags)
        await client.send(opt.pack_option(Option.EXPORT_NAME, b"disk"))
        size, _ = opt.parse_export(await client.receive(10 + zeroes))
        assert size == disk.size
        await client.write(0, b"old way")
        assert await client.read(0, 7) == b"old way"


async def test_an_export_that_there_is_not(raw, disk, server):
    client = raw()
    await client.greet()
    answers = await client.option(Option.GO, opt.pack_info_request("other", []))
    assert [answer.type for answer in answers] == [OptionReply.ERR_UNKNOWN]
    await client.send(opt.pack_option(Option.EXPORT_NAME, b"other"))
    assert await client.at_end()
    await until_clients(server, 0)


async def test_a_handshake_in_single_bytes(raw, disk):
    client = raw("structured")
    stream = opt.pack_client_flags(3) + opt.pack_option(Option.STRUCTURED_REPLY)
    for byte in stream + opt.pack_option(Option.GO, opt.pack_info_request("disk", [])):
        await client.send(bytes([byte]))
        await turns(3)
    await client.receive(18)
    assert [len(await client.option_replies()) for _ in range(2)] == [1, 2]
    await client.write(0, b"x")


async def test_an_option_as_long_as_there_can_be_one(raw, disk):
    """Longer than the buffer of the connection: the handshake keeps it."""
    client = raw("structured")
    await client.negotiate()
    names = ["x:" + "y" * 4000 for _ in range(63)] + ["base:allocation"]
    await client.choose("disk", names)
    assert client.contexts == {"base:allocation": 0}
    answers = await client.option(77, bytes(1_000_000))
    assert [answer.type for answer in answers] == [OptionReply.ERR_UNSUP]


async def test_abort_is_acknowledged(raw, disk, server):
    client = raw()
    await client.greet()
    assert [answer.type for answer in await client.option(Option.ABORT)] == [OptionReply.ACK]
    assert await client.at_end()
    await until_clients(server, 0)


@pytest.mark.parametrize("noise", [b"\xff" * 4, b"\0\0\0\3" + b"x" * 16, b"GET / HTTP/1.1\r\n\r\n", bytes(10_000)])
async def test_noise_is_hung_up_on(raw, disk, server, noise):
    client = raw()
    await client.receive(18)
    await client.send(noise)
    await until_clients(server, 0)


@pytest.mark.parametrize("cut", range(0, 60, 7))
async def test_a_client_that_vanishes_in_the_handshake(raw, disk, server, cut):
    client = raw()
    stream = opt.pack_client_flags(3) + opt.pack_option(Option.GO, opt.pack_info_request("disk", []))
    await client.send(stream[:cut])
    client.close()
    await until_clients(server, 0)


async def test_a_client_that_does_not_read_the_answers_to_its_options_has_to_wait(raw, server):
    """Else two thousand small options would make the server keep a thousand times as much."""
    for number in range(300):
        server.add(NbdExport(f"disk{number}", PaperDisk(), description="d" * 4000))
    client = raw(buffer=64 * KIB)
    await client.greet()
    sending = asyncio.ensure_future(client.send(opt.pack_option(Option.LIST) * 500))
    await turns(2000)
    (connection,) = server._connections
    assert 0 < connection._channel.unsent < 2_000_000
    for _ in range(500):
        assert len(await client.option_replies()) == 301
    await sending
    answers = await client.option(Option.GO, opt.pack_info_request("disk7", []))
    assert answers[-1].type == OptionReply.ACK


@virtual_time
async def test_a_handshake_that_takes_too_long():
    async with NbdServer(limits=ServerLimits(handshake_s=7)) as server:
        server.add(NbdExport("disk", PaperDisk()))
        idle, slow, ready = (raw_client(server) for _ in range(3))
        await idle.receive(18)
        await ready.go()
        await slow.greet()
        await slow.option(Option.LIST)
        loop = virtual_loop()
        await asyncio.sleep(6.9)
        assert (server.connections, loop.time() < 7) == (3, True)
        await asyncio.sleep(0.2)
        assert server.connections == 1
        assert await idle.at_end()
        assert await slow.at_end()
        await asyncio.sleep(1000)
        assert await ready.read(0, 1) == b"\0"
        for client in (idle, slow, ready):
            client.close()


@virtual_time
async def test_a_handshake_without_limit():
    async with NbdServer(limits=ServerLimits(handshake_s=0)) as server:
        server.add(NbdExport("disk", PaperDisk()))
        client = raw_client(server)
        await client.receive(18)
        await asyncio.sleep(1e6)
        assert server.connections == 1
        client.close()


async def test_an_export_that_was_replaced_between_two_options(raw, server):
    """The contexts that the client chose are another disk's."""
    server.add(NbdExport("disk", PaperDisk(), contexts=(Bitmap("x:old"),)))
    client = raw("structured")
    await client.negotiate(contexts=["x:old"])
    await server.remove("disk")
    server.add(NbdExport("disk", PaperDisk()))
    await client.send(opt.pack_option(Option.GO, opt.pack_info_request("disk", [])))
    await until_clients(server, 0)


async def test_an_export_that_is_removed_between_two_options(raw, server, disk):
    client = raw("structured")
    await client.negotiate(contexts=["base:allocation"])
    await server.remove("disk")
    answers = await client.option(Option.GO, opt.pack_info_request("disk", []))
    assert [answer.type for answer in answers] == [OptionReply.ERR_UNKNOWN]


async def test_who_the_peer_is():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == "local"
    assert peer_of(ours) == "gone"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            host, port = client.getpeername()
            assert peer_of(client) == f"{host}:{port}"


async def test_its_repr_says_how_far_it_is(raw, server, disk):
    client = raw()
    (connection,) = server._connections
    assert repr(connection) == "<NBD client local, handshake>"
    await client.go()
    assert repr(connection) == "<NBD client local, export 'disk'>"
    async with asyncio.timeout(PATIENCE_S):
        await client.leave()
