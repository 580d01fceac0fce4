"""Connection: requests side by side, buffers that are the caller's again, and servers that are not believed."""

from __future__ import annotations

import asyncio
import random
import socket
import struct

import pytest

from blocklayer.base.errors import (
    IOFailedError,
    NoSpaceError,
    NotFoundError,
    OptionError,
    ProtocolError,
    TimedOutError,
)
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd import options as opt
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.client_handshake import Wish
from blocklayer.codec.nbd.protocol import (
    Command,
    CommandFlags,
    HandshakeFlags,
    NbdErrno,
    Option,
    OptionReply,
    ReplyType,
    TlsMode,
    TransmissionFlags,
)
from blocklayer.codec.nbd.transmission import pack_chunk, pack_simple_reply, parse_request
from blocklayer.drivers.nbd import connection as module
from blocklayer.drivers.nbd.connection import Connection
from tests.drivers.nbd.conftest import wish_of
from tests.exports.nbd_server.test_transmission import Gate
from tests.helpers.blocking import turns
from tests.helpers.nbd_client import PATIENCE_S


async def read(connection, offset, length):
    buffer = bytearray(b"?" * length)
    await connection.read_into(offset, memoryview(buffer))
    return bytes(buffer)


# -- with our own server -----------------------------------------------------------------------------------------


async def test_what_is_written_is_read_in_every_shape(connect, disk, shape):
    connection = await connect(shape)
    assert (connection.export.size, connection.export.structured) == (4 * MIB, shape != "simple")
    for length in (1, 511, 40 * KIB, 3 * MIB):
        data = random.Random(length).randbytes(length)
        await connection.write(7, memoryview(data))
        assert await read(connection, 7, length) == data == disk.bytes[7 : 7 + length]


async def test_holes_and_data_in_one_read(connect, disk, shape):
    disk.bytes[:] = random.Random(1).randbytes(disk.size)
    for unit in range(3, 900, 5):
        disk.bytes[unit * 4096 : (unit + 1 + unit % 3) * 4096] = bytes((1 + unit % 3) * 4096)
    connection = await connect(shape)
    assert await read(connection, 1, disk.size - 2) == disk.bytes[1:-1]


async def test_a_random_program(connect, disk, shape):
    chance, model = random.Random(shape), bytearray(disk.size)
    connection = await connect(shape, in_flight_max=20)

    async def one(slot):
        offset = slot * 64 * KIB + chance.randrange(KIB)
        for _ in range(10):
            length = chance.choice([1, 100, 4096, 40 * KIB])
            data = chance.randbytes(length)
            await connection.write(offset, memoryview(data), fua=chance.random() < 0.2)
            model[offset : offset + length] = data
            assert await read(connection, offset, 40 * KIB) == model[offset : offset + 40 * KIB]

    await asyncio.gather(*(one(slot) for slot in range(64)))
    assert disk.bytes == model


async def test_zeroes_trims_flushes_and_their_flags(connect, disk, shape):
    connection = await connect(shape)
    await connection.write(0, memoryview(b"x" * 9000))
    await connection.command(Command.WRITE_ZEROES, 10, 100, CommandFlags.NO_HOLE)
    await connection.command(Command.TRIM, 4096, 4096)
    await connection.command(Command.FLUSH)
    assert disk.bytes[:9000] == b"x" * 10 + bytes(100) + b"x" * 3986 + bytes(4096) + b"x" * 808
    assert [kind for kind, *_ in disk.log] == ["write", "write_zeroes", "discard", "flush"]


@pytest.mark.parametrize("shape", ["structured", "extended"])
async def test_block_status(connect, disk, shape):
    disk.bytes[4096] = 1
    connection = await connect(shape)
    ((number, name),) = connection.export.contexts.items()
    status = (await connection.block_status(0, 12288))[number]
    assert (name, status.extents[:2]) == ("base:allocation", [(4096, 3), (4096, 0)])
    assert (await connection.block_status(100, 200, one=True))[number].extents == [(200, 3)]


async def test_an_error_is_that_of_one_request(connect, disk, shape):
    async def fail(kind, offset, length):
        if kind == "write":
            raise NoSpaceError("full", errno=28)

    connection, disk.script = await connect(shape), fail
    with pytest.raises(NoSpaceError, match="write failed") as caught:
        await connection.write(512, memoryview(b"x"))
    assert (caught.value.offset, caught.value.length, connection.error) == (512, 1, None)
    assert await read(connection, 0, 1) == b"\0"


async def test_a_cancelled_read_leaves_its_buffer_alone(connect, disk, shape):
    disk.bytes[:] = b"d" * disk.size
    disk.script = gate = Gate("read")
    connection = await connect(shape)
    buffer = bytearray(b"?" * MIB)
    task = asyncio.ensure_future(connection.read_into(0, memoryview(buffer)))
    await gate.reached(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    assert await read(connection, 5, 10) == b"d" * 10
    assert buffer == b"?" * MIB
    buffer.clear()  # nobody has a view of it


async def test_no_more_than_so_many_are_in_flight(connect, disk):
    disk.script = gate = Gate("read")
    connection = await connect(in_flight_max=3)
    tasks = [asyncio.ensure_future(read(connection, at, 1)) for at in range(10)]
    await gate.reached(3)
    await turns()
    gate.opened.set()
    await asyncio.gather(*tasks)
    assert gate.waiting_max == 3


async def test_a_lost_connection_fails_what_is_under_way_and_what_waits(connect, disk, server):
    disk.script = gate = Gate("read", "write")
    connection = await connect(in_flight_max=2)
    tasks = [asyncio.ensure_future(read(connection, at, 1)) for at in range(4)]
    await gate.reached(2)
    await server.close(hard=True)
    failed = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, IOFailedError) and error.__cause__ is connection.error for error in failed)
    assert len({id(error) for error in failed}) == 4
    assert "over" in repr(connection)


async def test_an_export_that_is_not_there(server, disk):
    ours, theirs = socket.socketpair()
    server.adopt(theirs)
    with pytest.raises(NotFoundError):
        await Connection.open(ours, Wish("nothing"))


async def test_tls_needs_certificates():
    with pytest.raises(OptionError, match="certificates"):
        await Connection.open("nowhere", Wish(tls=TlsMode.REQUIRE))


# -- with a server that says what it is told ----------------------------------------------------------------------


class Puppet:
    """The server's side of a socket pair, after a handshake."""

    def __init__(self, sock, shape):
        self.sock, self.shape, self.extended = sock, shape, shape == "extended"

    async def send(self, data):
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, length):
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            while len(data) < length:
                piece = await asyncio.get_running_loop().sock_recv(self.sock, length - len(data))
                if not piece:
                    raise EOFError
                data += piece
        return data

    async def shake_hands(self, size=MIB):
        await self.send(opt.pack_greeting(HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES))
        await self.receive(4)
        while True:
            _, option, length = struct.unpack(">QII", await self.receive(16))
            payload = await self.receive(length)
            reply = b""
            if option == Option.SET_META_CONTEXT:
                reply = struct.pack(">QIII", 0x3E889045565A9, option, OptionReply.META_CONTEXT, 19)
                reply += (7).to_bytes(4, "big") + b"base:allocation"
            elif option == Option.GO:
                reply = struct.pack(">QIII", 0x3E889045565A9, option, OptionReply.INFO, 12)
                reply += struct.pack(">HQH", 0, size, TransmissionFlags.HAS_FLAGS)
            await self.send(reply + struct.pack(">QIII", 0x3E889045565A9, option, OptionReply.ACK, 0))
            del payload
            if option == Option.GO:
                return

    async def request(self):
        return parse_request(await self.receive(32 if self.extended else 28), 0, extended=self.extended)

    def chunk(self, request, type, payload=b"", *, done=False):
        head = pack_chunk(request.cookie, type, len(payload), done=done, extended=self.extended, offset=request.offset)
        return head + payload


@pytest.fixture
async def puppet_of():
    """Makes pairs of a connection and its puppet."""
    made = []

    async def make(shape="structured", **options):
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        puppet = Puppet(theirs, shape)
        opening = asyncio.ensure_future(Connection.open(ours, wish_of(shape), **options))
        await puppet.shake_hands()
        made.append((await opening, puppet))
        return made[-1]

    yield make
    for connection, puppet in made:
        puppet.sock.close()
        await connection.close()


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("shape", ["structured", "extended"])
async def test_a_reply_in_pieces(puppet_of, shape, step):
    connection, puppet = await puppet_of(shape)
    task = asyncio.ensure_future(read(connection, 100, 30))
    request = await puppet.request()
    stream = (
        puppet.chunk(request, ReplyType.OFFSET_DATA, payloads.pack_data_offset(120) + b"c" * 10)
        + puppet.chunk(request, ReplyType.OFFSET_HOLE, payloads.pack_hole(110, 10))
        + puppet.chunk(request, ReplyType.OFFSET_DATA, payloads.pack_data_offset(100) + b"a" * 10)
        + puppet.chunk(request, ReplyType.NONE, done=True)
    )
    for at in range(0, len(stream), step):
        assert not task.done()
        await puppet.send(stream[at : at + step])
        await turns(3)
    assert await task == b"a" * 10 + bytes(10) + b"c" * 10


async def test_an_error_says_where_and_why(puppet_of):
    connection, puppet = await puppet_of()
    task = asyncio.ensure_future(read(connection, 100, 30))
    request = await puppet.request()
    await puppet.send(
        puppet.chunk(request, ReplyType.OFFSET_DATA, payloads.pack_data_offset(100) + b"a")
        + puppet.chunk(request, ReplyType.ERROR_OFFSET, payloads.pack_error(NbdErrno.EIO, "broken", offset=101))
        + puppet.chunk(request, ReplyType.NONE, done=True)
    )
    with pytest.raises(IOFailedError, match="the server says: broken") as caught:
        await task
    assert (caught.value.offset, connection.error) == (101, None)


def _pack(offset, data):
    return payloads.pack_data_offset(offset) + data


LIES = {
    "garbage": lambda p, r: b"\0" * 32,
    "cookie": lambda p, r: p.chunk(r._replace(cookie=99), ReplyType.NONE, done=True),
    "nothing": lambda p, r: p.chunk(r, ReplyType.NONE, done=True),
    "half": lambda p, r: p.chunk(r, ReplyType.OFFSET_DATA, _pack(100, b"x" * 29), done=True),
    "beyond": lambda p, r: p.chunk(r, ReplyType.OFFSET_DATA, _pack(101, b"x" * 30), done=True),
    "before": lambda p, r: p.chunk(r, ReplyType.OFFSET_HOLE, payloads.pack_hole(99, 31), done=True),
    "twice": lambda p, r: 2 * p.chunk(r, ReplyType.OFFSET_DATA, _pack(100, b"x" * 30)),
    "status": lambda p, r: p.chunk(r, ReplyType.BLOCK_STATUS, payloads.pack_block_status(7, [(30, 0)]), done=True),
    "simple": lambda p, r: pack_simple_reply(r.cookie) + b"x" * 30,
    "no-error": lambda p, r: p.chunk(r, ReplyType.ERROR, struct.pack(">IH", 0, 0), done=True),
    "error-place": lambda p, r: p.chunk(r, ReplyType.ERROR_OFFSET, payloads.pack_error(5, offset=130), done=True),
    "again": lambda p, r: 2 * p.chunk(r, ReplyType.OFFSET_DATA, _pack(100, b"x" * 30), done=True),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("shape", ["structured", "extended"])
async def test_a_server_that_breaks_the_protocol_is_left(puppet_of, shape, lie):
    connection, puppet = await puppet_of(shape)
    tasks = [asyncio.ensure_future(read(connection, 100, 30)) for _ in range(2)]
    request = await puppet.request()
    await puppet.send(LIES[lie](puppet, request))
    failed = [error for error in await asyncio.gather(*tasks, return_exceptions=True) if not isinstance(error, bytes)]
    assert failed
    assert {type(error) for error in failed} == {ProtocolError}
    with pytest.raises(ProtocolError):
        await read(connection, 0, 1)
    with pytest.raises((EOFError, ConnectionError)):
        await puppet.receive(1000)


@pytest.mark.parametrize(
    "payload",
    [
        payloads.pack_block_status(8, [(30, 0)]),
        payloads.pack_block_status(7, [(30, 0), (1, 1)]),
        payloads.pack_block_status(7, [(31, 0)]),
    ],
    ids=["context", "many", "long"],
)
async def test_a_status_that_cannot_be(puppet_of, payload):
    connection, puppet = await puppet_of()
    task = asyncio.ensure_future(connection.block_status(100, 30, one=True))
    await puppet.send(puppet.chunk(await puppet.request(), ReplyType.BLOCK_STATUS, payload, done=True))
    with pytest.raises(ProtocolError):
        await task


async def test_requests_of_one_turn_go_out_together(puppet_of, monkeypatch):
    connection, puppet = await puppet_of()
    sent = []
    channel = connection._channel
    monkeypatch.setattr(
        channel,
        "send",
        lambda buffers, **more: (sent.append(len(buffers)), type(channel).send(channel, buffers, **more)),
    )
    tasks = [asyncio.ensure_future(connection.write(at, memoryview(b"x"))) for at in range(5)]
    await turns(4)
    assert sent == [10]
    for _ in tasks:
        request = await puppet.request()
        assert await puppet.receive(1) == b"x"
        await puppet.send(puppet.chunk(request, ReplyType.NONE, done=True))
    await asyncio.gather(*tasks)


async def test_an_early_reply_does_not_give_the_data_back(puppet_of):
    connection, puppet = await puppet_of()
    data = b"w" * MIB
    task = asyncio.ensure_future(connection.write(0, memoryview(data)))
    request = await puppet.request()
    await puppet.send(puppet.chunk(request, ReplyType.ERROR, payloads.pack_error(NbdErrno.ENOSPC), done=True))
    await turns()
    assert not task.done()
    assert await puppet.receive(MIB) == data
    with pytest.raises(NoSpaceError):
        await task


async def test_a_cancelled_write_waits_until_its_data_are_sent(puppet_of):
    connection, puppet = await puppet_of()
    data = bytearray(b"w" * MIB)
    task = asyncio.ensure_future(connection.write(0, memoryview(data)))
    request = await puppet.request()
    task.cancel()
    await turns()
    assert not task.done()
    assert await puppet.receive(MIB) == data
    with pytest.raises(asyncio.CancelledError):
        await task
    await puppet.send(puppet.chunk(request, ReplyType.NONE, done=True))
    later = asyncio.ensure_future(connection.command(Command.FLUSH))
    await puppet.send(puppet.chunk(await puppet.request(), ReplyType.NONE, done=True))
    await later


async def test_a_server_that_takes_nothing_loses_a_cancelled_write(puppet_of, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.01)
    connection, puppet = await puppet_of()
    task = asyncio.ensure_future(connection.write(0, memoryview(b"w" * MIB)))
    await puppet.request()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(connection.error, TimedOutError)


async def test_a_read_that_is_cancelled_amid_its_payload(puppet_of):
    connection, puppet = await puppet_of()
    buffer = bytearray(b"?" * 100 * KIB)
    task = asyncio.ensure_future(connection.read_into(0, memoryview(buffer)))
    request = await puppet.request()
    reply = puppet.chunk(request, ReplyType.OFFSET_DATA, _pack(0, b"d" * 100 * KIB), done=True)
    await puppet.send(reply[:9000])
    await turns(60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    arrived = buffer.count(b"d")
    assert 0 < arrived < 10_000
    await puppet.send(reply[9000:])
    later = asyncio.ensure_future(connection.command(Command.FLUSH))
    await puppet.send(puppet.chunk(await puppet.request(), ReplyType.NONE, done=True))
    await later
    assert buffer.count(b"d") == arrived


async def test_a_request_without_an_answer_ends_the_connection(puppet_of):
    connection, _ = await puppet_of(request_timeout_s=0.01)
    with pytest.raises(TimedOutError, match=r"0\.01 seconds"):
        await read(connection, 0, 1)
    assert isinstance(connection.error, TimedOutError)


async def test_closing_takes_leave(puppet_of):
    connection, puppet = await puppet_of()
    await connection.close()
    assert (await puppet.request()).command == Command.DISC
    await connection.close()
    with pytest.raises(IOFailedError, match="closed"):
        await read(connection, 0, 1)


async def test_a_server_that_never_speaks():
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(TimedOutError, match="no answer"):
        await Connection.open(ours, Wish(), open_timeout_s=0.01)
    assert ours.fileno() == -1


async def test_a_server_that_hangs_up_at_once():
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(IOFailedError, match="before the greeting"):
        await Connection.open(ours, Wish())


async def test_no_server_at_all():
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(ProtocolError, match="no NBD server"):
        theirs.send(b"SSH-2.0-OpenSSH_9.2p1 Debian")
        await Connection.open(ours, Wish())
