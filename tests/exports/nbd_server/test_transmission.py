"""The transmission phase: pieces, pipelines, bounds, slow readers, and every way in which it ends."""

from __future__ import annotations

import asyncio
import random

import pytest

from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd.protocol import REQUEST_MAX, Command, CommandFlags, NbdErrno
from blocklayer.codec.nbd.transmission import pack_request
from blocklayer.exports.nbd_server import NbdExport
from blocklayer.exports.nbd_server.transmission import FILTER_MAX, IN_FLIGHT_MAX, INPUT, UNSENT_MAX, WORKERS
from tests.helpers.blocking import turns
from tests.helpers.nbd_client import PATIENCE_S, SHAPES, Reply, until_clients
from tests.helpers.nbd_disk import PaperDisk


class Gate:
    """A script that holds requests of some kinds; ``waiting`` counts them."""

    def __init__(self, *kinds):
        self.kinds = kinds
        self.waiting = self.waiting_max = 0
        self.opened = asyncio.Event()

    async def __call__(self, kind, offset, length):
        if kind in self.kinds:
            self.waiting += 1
            self.waiting_max = max(self.waiting, self.waiting_max)
            try:
                await self.opened.wait()
            finally:
                self.waiting -= 1

    async def reached(self, count):
        async with asyncio.timeout(PATIENCE_S):
            while self.waiting < count:
                await asyncio.sleep(0)


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
async def client(connect, disk, shape):
    return await connect(shape)


# -- pieces and pipelines ----------------------------------------------------------------------------------------


async def test_a_request_may_be_cut_at_every_byte(client, disk):
    for command, payload in [(Command.READ, b""), (Command.WRITE, b"payload"), (Command.FLUSH, b"")]:
        whole = client.pack(command, 0, 0 if payload or command == Command.FLUSH else 9, payload=payload)
        for cut in range(1, len(whole)):
            data = client.pack(command, 0, 0 if payload or command == Command.FLUSH else 9, payload=payload)
            cookie = client.last
            await client.send(data[:cut])
            await turns(5)
            await client.send(data[cut:])
            assert not (await client.reply(cookie)).error


async def test_a_stream_that_comes_byte_by_byte(client, disk):
    data = b"".join(client.pack(Command.WRITE, at, payload=bytes([at])) for at in range(1, 30))
    for byte in data:
        await client.send(bytes([byte]))
        await turns(3)
    await client.reply(client.last)
    assert disk.bytes[:31] == bytes(range(30)) + b"\0"


@pytest.mark.parametrize("spot", [False, True])
async def test_many_requests_in_one_segment(client, disk, spot):
    disk.spot = spot
    disk.bytes[:] = random.Random(4).randbytes(disk.size)
    cookies, stream = {}, bytearray()
    for number in range(3000):
        offset, length = number * 331 % 900_000, 1 + number % 1500
        stream += client.pack(Command.READ, offset, length)
        cookies[client.last] = offset, length
    sending = asyncio.ensure_future(client.send(stream))
    for cookie, (offset, length) in cookies.items():
        assert (await client.reply(cookie)).content == disk.bytes[offset : offset + length]
    await sending


@pytest.mark.parametrize("seed", range(6))
async def test_a_random_program_in_random_pieces(client, disk, seed):
    """Nothing overlaps what is in flight, so a model knows every reply."""
    chance = random.Random(seed)
    disk.spot = seed % 2 == 0
    model, expected, stream = bytearray(disk.size), {}, bytearray()
    slots = [number * 16 * KIB for number in range(64)]
    for offset in slots:
        length = chance.randint(1, 16 * KIB)
        data = chance.randbytes(length)
        stream += client.pack(Command.WRITE, offset, payload=data)
        model[offset : offset + length] = data
        expected[client.last] = Reply()
    await _send_in_pieces(client, stream, chance)
    for cookie, reply in expected.items():
        assert await client.reply(cookie) == reply
    assert disk.bytes == model
    stream, reads = bytearray(), {}
    for _ in range(300):
        offset = chance.randrange(disk.size)
        length = chance.randint(1, min(disk.size - offset, chance.choice([100, 5000, 150_000])))
        stream += client.pack(Command.READ, offset, length)
        reads[client.last] = offset, length
    sending = asyncio.ensure_future(_send_in_pieces(client, stream, chance))
    for cookie, (offset, length) in reads.items():
        assert (await client.reply(cookie)).content == model[offset : offset + length]
    await sending


async def _send_in_pieces(client, stream, chance):
    at = 0
    while at < len(stream):
        count = chance.choice([1, 27, 28, 29, 1000, 70_000])
        await client.send(stream[at : at + count])
        at += count
        await turns(chance.randrange(3))


async def test_requests_right_behind_the_handshake(raw, disk):
    """As many bytes as there can be: GO and a pipeline in one segment."""
    from blocklayer.codec.nbd import options as opt

    client = raw("simple", buffer=4 * MIB)
    await client.greet()
    stream = bytearray(opt.pack_option(7, opt.pack_info_request("disk", [])))
    cookies = []
    while len(stream) < 2 * INPUT:
        stream += client.pack(Command.WRITE, 0, payload=bytes(5000))
        cookies.append(client.last)
    await client.send(stream)
    assert [answer.type for answer in await client.option_replies()] == [3, 1]
    for cookie in cookies:
        assert await client.reply(cookie) == Reply()


async def test_the_largest_write_in_pieces_and_the_largest_read(connect, server, shape):
    disk = PaperDisk(REQUEST_MAX)
    server.add(NbdExport("large", disk, writable=True))
    client = await connect(shape, "large")
    data = random.Random(7).randbytes(REQUEST_MAX)
    cookie = await client.ask(Command.WRITE, 0, payload=data)
    assert await client.reply(cookie) == Reply()
    assert disk.bytes == data
    assert await client.read(0, REQUEST_MAX) == data


@pytest.mark.parametrize("length", [REQUEST_MAX + 1, REQUEST_MAX + 3 * MIB])
async def test_the_payload_of_a_write_that_is_too_long_is_skipped(client, disk, length):
    sending = asyncio.ensure_future(client.ask(Command.WRITE, 0, payload=bytes(length)))
    assert (await client.reply(await sending)).error == NbdErrno.EINVAL
    assert disk.log == []
    await client.write(3, b"still here")
    assert await client.read(3, 10) == b"still here"


async def test_a_long_payload_of_another_command_is_skipped(connect, disk):
    client = await connect("extended")
    flags = CommandFlags.PAYLOAD_LEN
    for length in (FILTER_MAX, FILTER_MAX + 1, 3 * MIB):
        reply = await client.request(Command.BLOCK_STATUS, 0, flags=flags, payload=bytes(length))
        assert reply.error == NbdErrno.EINVAL
    assert await client.read(0, 2) == b"\0\0"


# -- bounds ------------------------------------------------------------------------------------------------------


async def test_replies_may_overtake_each_other(client, disk):
    disk.script = gate = Gate("write")
    slow = await client.ask(Command.WRITE, 0, payload=b"x")
    await gate.reached(1)
    assert await client.read(0, 1) == b"\0"
    gate.opened.set()
    assert await client.reply(slow) == Reply()


async def test_no_more_requests_are_under_way_than_there_are_workers(client, disk, connect):
    disk.script = gate = Gate("write")
    cookies = [await client.ask(Command.WRITE, number, payload=b"x") for number in range(3 * WORKERS)]
    await gate.reached(WORKERS)
    other = await connect("simple")
    assert await other.read(9, 1) == b"\0", "others are served"
    await turns(100)
    assert gate.waiting_max == WORKERS
    gate.opened.set()
    for cookie in cookies:
        assert await client.reply(cookie) == Reply()


async def test_no_more_bytes_are_under_way_than_the_bound(connect, server):
    disk = PaperDisk(REQUEST_MAX)
    server.add(NbdExport("large", disk, writable=True))
    disk.script = gate = Gate("write")
    client = await connect("simple", "large")
    data = memoryview(bytes(8 * MIB))
    sending = asyncio.ensure_future(_ask_often(client, 16, data))
    count = IN_FLIGHT_MAX // len(data)
    await gate.reached(count)
    await turns(200)
    assert gate.waiting_max == count
    gate.opened.set()
    for cookie in await sending:
        assert await client.reply(cookie) == Reply()


async def _ask_often(client, count, data):
    return [await client.ask(Command.WRITE, 0, payload=bytes(data)) for _ in range(count)]


@pytest.mark.parametrize("spot", [False, True])
async def test_a_client_that_does_not_read_its_replies_has_to_wait(connect, disk, server, spot):
    disk.spot = spot
    disk.bytes[:] = random.Random(2).randbytes(disk.size)
    client = await connect("simple", buffer=64 * KIB)
    length, count = 100 * KIB, 1000
    stream = b"".join(client.pack(Command.READ, number, length) for number in range(count))
    last = client.last
    sending = asyncio.ensure_future(client.send(stream))
    async with asyncio.timeout(PATIENCE_S):
        while server.statistics["disk"].bytes_read < UNSENT_MAX:
            await asyncio.sleep(0)
        for _ in range(20):
            await turns(50)
    served = server.statistics["disk"].bytes_read
    assert served <= UNSENT_MAX + (WORKERS + 12) * length
    other = await connect("structured")
    assert await other.read(5, 10) == disk.bytes[5:15], "others are served"
    for number in range(count):
        reply = await client.reply(last - count + 1 + number)
        assert reply.content == disk.bytes[number : number + length]
    await sending
    assert await client.read(3, 4) == disk.bytes[3:7]


async def test_a_pipeline_of_one_client_does_not_shut_out_another(connect, disk):
    disk.spot = True
    busy, other = await connect("simple"), await connect("simple")
    stream = b"".join(busy.pack(Command.READ, 0, 512) for _ in range(20_000))
    last = busy.last
    sending = asyncio.ensure_future(busy.send(stream))
    reading = asyncio.ensure_future(busy.reply(last))
    for _ in range(10):
        assert await other.read(0, 4) == bytes(4)
    assert not reading.done(), "it was served in between"
    await asyncio.gather(sending, reading)


# -- the end -----------------------------------------------------------------------------------------------------


async def test_a_client_takes_its_leave(client, disk, server, caplog):
    await client.leave()
    await until_clients(server, 0)
    assert "the client left" in caplog.text


async def test_what_stands_before_a_leave_is_answered_and_what_stands_behind_it_is_not(client, disk):
    disk.script = gate = Gate("write")
    stream = client.pack(Command.WRITE, 0, payload=b"before")
    before = client.last
    stream += client.pack(Command.DISC) + client.pack(Command.WRITE, 0, payload=b"behind")
    await client.send(stream)
    await gate.reached(1)
    gate.opened.set()
    assert await client.reply(before) == Reply()
    assert await client.at_end()
    assert disk.bytes[:6] == b"before"


@pytest.mark.parametrize("magic", [bytes(4), b"\xff" * 4, b"GET "])
async def test_a_wrong_magic_is_the_end(client, disk, server, magic, caplog):
    disk.script = gate = Gate("write")
    cookie = await client.ask(Command.WRITE, 0, payload=b"answered")
    await gate.reached(1)
    await client.send(magic + bytes(100))
    await turns()
    gate.opened.set()
    assert await client.reply(cookie) == Reply()
    assert await client.at_end()
    await until_clients(server, 0)
    assert "a request begins with 0x" in caplog.text


async def test_the_magic_of_the_other_shape_is_wrong(connect, disk):
    for shape in ("simple", "extended"):
        client = await connect(shape)
        await client.send(pack_request(Command.READ, 0, 1, 0, 1, extended=shape == "simple") + bytes(4))
        assert await client.at_end()


@pytest.mark.parametrize("cut", [0, 1, 27, 28, 29, 100, 1000, 4000])
async def test_a_client_that_vanishes_in_the_middle_of_a_request(client, disk, server, cut):
    disk.script = gate = Gate("write")
    await client.ask(Command.WRITE, 0, payload=b"x")
    await gate.reached(1)
    await client.send(client.pack(Command.WRITE, 0, payload=bytes(5000))[:cut])
    client.close()
    await until_clients(server, 0)
    assert gate.waiting == 0


async def test_a_client_that_vanishes_while_it_is_answered(connect, disk, server):
    client = await connect("simple", buffer=64 * KIB)
    stream = b"".join(client.pack(Command.READ, 0, 500_000) for _ in range(30))
    await client.send(stream)
    await client.receive(1000)
    client.close()
    await until_clients(server, 0)


async def test_a_client_that_vanishes_while_its_payload_is_skipped(connect, disk, server):
    client = await connect("extended")
    await client.send(pack_request(Command.WRITE, 0, 1, 0, 1 << 60, extended=True) + bytes(MIB))
    client.close()
    await until_clients(server, 0)
    assert disk.log == []


async def test_a_disk_whose_request_was_cancelled_from_elsewhere_fails_that_request(client, disk):
    """A driver may wait for a future that somebody else cancels; the connection is not what ends."""

    async def script(kind, offset, length):
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    disk.script = script
    assert (await client.request(Command.WRITE, 0, payload=b"x")).error == NbdErrno.EIO
    disk.script = None
    await client.write(0, b"x")


async def test_statistics_count_what_was_done(client, disk, server):
    await client.write(0, b"12345")
    await client.read(0, 3)
    await client.request(Command.READ, disk.size, 1)
    found = server.statistics["disk"]
    assert (found.connections, found.requests, found.errors) == (1, 3, 1)
    assert (found.bytes_read, found.bytes_written, sum(found.latency)) == (3, 5, 3)


class Starting(PaperDisk):
    """Begins writes without a task, or raises."""

    bug = False

    def start_write(self, offset, data, done):
        if self.bug:
            raise ZeroDivisionError("oops")
        self.bytes[offset : offset + len(data)] = data
        asyncio.get_running_loop().call_soon(done, None)
        return True


async def test_a_write_that_begins_at_once_has_the_rules_of_any_other(connect, server, shape):
    server.add(NbdExport("starting", disk := Starting(), writable=True))
    client = await connect(shape, "starting")
    await client.write(0, b"begun")
    assert (disk.bytes[:5], disk.log) == (b"begun", [])
    if shape != "extended":
        reply = await client.request(Command.WRITE, 0, flags=CommandFlags.PAYLOAD_LEN, payload=b"wrong")
        assert reply.error == NbdErrno.EINVAL
    disk.bug = True
    await client.write(0, b"by a worker")
    assert disk.bytes[:11] == b"by a worker"
