"""Each command with each flag in each shape of session, and each error with its number."""

from __future__ import annotations

import random

import pytest

from blocklayer.base.errors import IOFailedError, NoSpaceError, StateError, UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.protocol import REQUEST_MAX, Command, CommandFlags, NbdErrno, TransmissionFlags
from blocklayer.exports.nbd_server import NbdExport, Run
from blocklayer.exports.nbd_server.commands import SPARSE_MIN
from tests.helpers.nbd_client import SHAPES, Reply
from tests.helpers.nbd_disk import UNIT, PaperDisk

FUA, DF, REQ_ONE = CommandFlags.FUA, CommandFlags.DF, CommandFlags.REQ_ONE
BOTH = ["base:allocation", "qemu:allocation-depth"]


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
async def client(connect, disk, shape):
    return await connect(shape, contexts=BOTH if shape != "simple" else ())


@pytest.fixture
def chunked(shape):
    return shape != "simple"


def error(reply):
    assert not (reply.data or reply.holes or reply.status), reply
    return reply.error


# -- what goes well ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("flags", [0, FUA, DF, FUA | DF])
async def test_read(client, disk, spot, flags):
    disk.bytes[:] = random.Random(0).randbytes(disk.size)
    disk.spot = spot
    for offset, length in [(0, 1), (1, 511), (4096, 4096), (3, 130 * KIB), (disk.size - 1, 1), (0, disk.size)]:
        assert await client.read(offset, length, flags) == disk.bytes[offset : offset + length]


@pytest.mark.parametrize(("flags", "expected"), [(0, WriteFlags.NONE), (FUA, WriteFlags.FUA)])
async def test_write(client, disk, flags, expected):
    await client.write(7, b"hello", flags)
    assert (disk.bytes[:14], disk.log) == (bytes(7) + b"hello\0\0", [("write", 7, 5, expected)])


async def test_flush(client, disk):
    for flags in (0, FUA):
        assert await client.request(Command.FLUSH, flags=flags) == Reply()
    assert [step[0] for step in disk.log] == ["flush", "flush"]


async def test_trim_and_with_fua_a_flush_behind_it(client, disk):
    assert await client.request(Command.TRIM, 4096, 8192) == Reply()
    assert await client.request(Command.TRIM, 0, disk.size, flags=FUA) == Reply()
    steps = [step[:3] for step in disk.log]
    assert steps == [("discard", 4096, 8192), ("discard", 0, disk.size), ("flush", 0, 0)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (0, WriteFlags.MAY_UNMAP),
        (CommandFlags.NO_HOLE, WriteFlags.NONE),
        (CommandFlags.FAST_ZERO, WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK),
        (FUA | CommandFlags.NO_HOLE, WriteFlags.FUA),
    ],
)
async def test_write_zeroes(client, disk, flags, expected):
    assert await client.request(Command.WRITE_ZEROES, 512, 1000, flags=flags) == Reply()
    assert disk.log == [("write_zeroes", 512, 1000, expected)]


async def test_cache_reads_in_pieces_and_sends_nothing(connect, server, shape):
    disk = PaperDisk(5 * MIB)
    server.add(NbdExport("large", disk))
    client = await connect(shape, "large")
    assert await client.request(Command.CACHE, 100, 4 * MIB) == Reply()
    assert sum(step[2] for step in disk.log) == 4 * MIB
    assert max(step[2] for step in disk.log) <= MIB


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES])
async def test_a_request_of_no_bytes_does_nothing(client, disk, command):
    for offset in (0, 5, disk.size):
        assert await client.request(command, offset, 0) == Reply()


# -- holes -------------------------------------------------------------------------------------------------------


async def test_holes_are_sent_as_their_length(connect, disk):
    for shape in ("structured", "extended"):
        client = await connect(shape)
        disk.bytes[2 * UNIT : 3 * UNIT] = b"x" * UNIT
        reply = await client.request(Command.READ, 100, SPARSE_MIN)
        assert reply.data == ((2 * UNIT, b"x" * UNIT),)
        assert sum(length for _, length in reply.holes) == SPARSE_MIN - UNIT
        assert reply.content == disk.bytes[100 : 100 + SPARSE_MIN]


async def test_with_df_and_in_short_or_simple_replies_there_are_no_holes(connect, disk):
    for shape, length, flags in [
        ("structured", SPARSE_MIN, DF), ("extended", SPARSE_MIN, DF), ("simple", SPARSE_MIN, 0),
        ("structured", SPARSE_MIN - 1, 0), ("extended", SPARSE_MIN - 1, 0),
    ]:  # fmt: skip
        client = await connect(shape)
        reply = await client.request(Command.READ, 0, length, flags=flags)
        assert (reply.data, reply.holes) == (((0, bytes(length)),), ())


async def test_df_is_offered_only_where_there_are_chunks(client, shape):
    offered = TransmissionFlags(client.flags)
    assert (TransmissionFlags.SEND_DF in offered) == (shape != "simple")
    assert (TransmissionFlags.BLOCK_STATUS_PAYLOAD in offered) == (shape == "extended")
    assert TransmissionFlags.CAN_MULTI_CONN in offered


@pytest.mark.parametrize("seed", range(10))
async def test_random_reads_of_a_disk_with_random_holes(client, disk, seed):
    chance = random.Random(seed)
    for _ in range(40):
        at = chance.randrange(disk.size // UNIT) * UNIT
        disk.bytes[at : at + UNIT] = chance.randbytes(UNIT)
    for _ in range(30):
        offset = chance.randrange(disk.size)
        length = chance.randint(1, disk.size - offset)
        assert await client.read(offset, length) == disk.bytes[offset : offset + length]


# -- block status ------------------------------------------------------------------------------------------------


async def statuses(client, offset, length, **options):
    reply = await client.request(Command.BLOCK_STATUS, offset, length, **options)
    assert not reply.error, reply
    names = {number: name for name, number in client.contexts.items()}
    return {names[status.context_id]: status.extents for status in reply.status}


@pytest.fixture(params=["structured", "extended"])
async def asking(request, connect, disk):
    disk.bytes[UNIT : 3 * UNIT] = b"x" * 2 * UNIT
    return await connect(request.param, contexts=BOTH)


async def test_block_status_of_several_contexts_neighbours_joined(asking):
    assert await statuses(asking, 0, 4 * UNIT) == {
        "base:allocation": [(UNIT, 3), (2 * UNIT, 0), (UNIT, 3)],
        "qemu:allocation-depth": [(4 * UNIT, 1)],
    }


async def test_req_one_is_answered_with_one_extent_inside_the_range(asking):
    expected = {"base:allocation": [(UNIT - 5, 3)], "qemu:allocation-depth": [(10 * UNIT, 1)]}
    assert await statuses(asking, 5, 10 * UNIT, flags=REQ_ONE) == expected


async def test_block_status_without_contexts_is_wrong(connect, disk, shape):
    client = await connect(shape)
    assert error(await client.request(Command.BLOCK_STATUS, 0, 512)) == NbdErrno.EINVAL
    assert await client.read(0, 3) == bytes(3)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (1 << 20, 1), (0, (1 << 20) + 1), (1 << 62, 1)])
async def test_block_status_outside_the_disk_is_wrong(asking, offset, length):
    assert error(await asking.request(Command.BLOCK_STATUS, offset, length)) == NbdErrno.EINVAL


async def test_a_filter_chooses_among_the_contexts(connect, disk):
    client = await connect("extended", contexts=BOTH)
    for names in (BOTH, BOTH[:1], BOTH[1:]):
        wanted = payloads.pack_filter(disk.size, [client.contexts[name] for name in names])
        flags = CommandFlags.PAYLOAD_LEN
        assert list(await statuses(client, 0, 0, flags=flags, payload=wanted)) == names
        one = await statuses(client, 0, 0, flags=flags | REQ_ONE, payload=wanted)
        assert set(map(len, one.values())) == {1}


@pytest.mark.parametrize(
    "payload",
    [
        b"x", bytes(8), bytes(7), bytes(13), payloads.pack_filter(512, [99]), payloads.pack_filter(512, [0, 0]),
        payloads.pack_filter(0, [0]), payloads.pack_filter((1 << 20) + 1, [0]), payloads.pack_filter(1 << 63, [0]),
        payloads.pack_filter(512, range(1 << 16)),
    ],
    ids=len,
)  # fmt: skip
async def test_a_wrong_filter_is_wrong_and_the_connection_goes_on(connect, disk, payload):
    client = await connect("extended", contexts=BOTH)
    reply = await client.request(Command.BLOCK_STATUS, 0, 0, flags=CommandFlags.PAYLOAD_LEN, payload=payload)
    assert error(reply) == NbdErrno.EINVAL
    assert await client.read(0, 3) == bytes(3)


async def test_a_range_of_more_than_four_gigabytes(connect, server):
    """Extended requests have lengths of 64 bits."""

    class Huge(PaperDisk):
        size = 1 << 50

        async def extents(self, offset, length):
            yield Extent(offset, length, ExtentKind.ZERO)

        async def discard(self, offset, length):
            await self._step("discard", offset, length)

    server.add(NbdExport("huge", huge := Huge(1), writable=True))
    client = await connect("extended", "huge", contexts=BOTH)
    reply = await client.request(Command.BLOCK_STATUS, 0, 1 << 50)
    assert [status.extents for status in reply.status] == [[(1 << 50, 3)]]
    assert await client.request(Command.TRIM, 5, 1 << 49) == Reply()
    assert ("discard", 5, 1 << 49) in [step[:3] for step in huge.log]
    compact = await connect("structured", "huge", contexts=BOTH[:1])
    reply = await compact.request(Command.BLOCK_STATUS, 1 << 40, 0xFFFFFFFF)
    assert [status.extents for status in reply.status] == [[(0xFFFFFFFF, 3)]]


# -- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
async def test_a_read_only_export_refuses_changes(connect, server, shape, command):
    disk = PaperDisk()
    server.add(NbdExport("fixed", disk))
    client = await connect(shape, "fixed")
    assert TransmissionFlags.READ_ONLY in TransmissionFlags(client.flags)
    payload = bytes(512) if command == Command.WRITE else b""
    assert error(await client.request(command, 0, 512, payload=payload)) == NbdErrno.EPERM
    outside = await client.request(command, disk.size, 512, payload=payload)
    assert error(outside) == NbdErrno.EPERM
    assert await client.read(0, 3) == bytes(3)
    assert [step for step in disk.log if step[0] not in ("read", "extents")] == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (Command.READ, NbdErrno.EINVAL), (Command.WRITE, NbdErrno.ENOSPC), (Command.TRIM, NbdErrno.EINVAL),
        (Command.CACHE, NbdErrno.EINVAL), (Command.WRITE_ZEROES, NbdErrno.ENOSPC),
    ],
)  # fmt: skip
@pytest.mark.parametrize("offset", [(1 << 20) - 511, 1 << 20, (1 << 64) - 512, (1 << 64) - 1])
async def test_behind_the_end(client, disk, command, expected, offset):
    payload = bytes(512) if command == Command.WRITE else b""
    assert error(await client.request(command, offset, 512, payload=payload)) == expected
    assert (disk.size, disk.log) == (1 << 20, [])


@pytest.mark.parametrize("command", [Command.RESIZE, 9, 100, 0xFFFF])
async def test_an_unknown_command_is_wrong(client, disk, command):
    assert error(await client.request(command, 0, 0)) == NbdErrno.EINVAL
    assert error(await client.request(command, 0, 512)) == NbdErrno.EINVAL
    assert await client.read(0, 3) == bytes(3)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (Command.READ, REQ_ONE), (Command.READ, 1 << 15), (Command.READ, CommandFlags.NO_HOLE), (Command.WRITE, DF),
        (Command.FLUSH, REQ_ONE), (Command.TRIM, CommandFlags.NO_HOLE), (Command.CACHE, CommandFlags.FAST_ZERO),
        (Command.WRITE_ZEROES, DF), (Command.BLOCK_STATUS, CommandFlags.NO_HOLE), (Command.WRITE, 1 << 6),
    ],
)  # fmt: skip
async def test_flags_that_a_command_does_not_have_are_wrong(client, disk, command, flags):
    payload = bytes(16) if command == Command.WRITE else b""
    assert error(await client.request(command, 0, 16, flags=flags, payload=payload)) == NbdErrno.EINVAL
    assert disk.log == []
    assert await client.read(0, 3) == bytes(3)


async def test_a_payload_flag_without_extended_headers_is_wrong(connect, disk):
    for shape in ("simple", "structured"):
        client = await connect(shape)
        flags = CommandFlags.PAYLOAD_LEN
        assert error(await client.request(Command.WRITE, 0, flags=flags, payload=b"data")) == NbdErrno.EINVAL
        assert error(await client.request(Command.BLOCK_STATUS, 0, 12, flags=flags)) == NbdErrno.EINVAL
        assert await client.read(0, 4) == bytes(4)


async def test_an_extended_payload_where_none_belongs_is_wrong_and_skipped(connect, disk):
    client = await connect("extended")
    for command in (Command.READ, Command.TRIM, Command.FLUSH, 77):
        for length in (1, 1000, 200_000):
            reply = await client.request(command, 0, flags=CommandFlags.PAYLOAD_LEN, payload=b"z" * length)
            assert error(reply) == NbdErrno.EINVAL
    assert await client.read(0, 4) == bytes(4)


async def test_a_read_that_is_too_long_is_wrong(connect, server, shape):
    server.add(NbdExport("large", PaperDisk(REQUEST_MAX + 2)))
    client = await connect(shape, "large")
    assert error(await client.request(Command.READ, 0, REQUEST_MAX + 1)) == NbdErrno.EINVAL
    assert await client.read(1, REQUEST_MAX) == bytes(REQUEST_MAX)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (NoSpaceError("full", errno=28), NbdErrno.ENOSPC), (IOFailedError("broken"), NbdErrno.EIO),
        (StateError("closed"), NbdErrno.ESHUTDOWN), (UnsupportedError("no"), NbdErrno.ENOTSUP),
        (MemoryError(), NbdErrno.ENOMEM),
    ],
)  # fmt: skip
async def test_what_a_disk_raises_is_the_requests_error(client, disk, chunked, raised, expected):
    async def script(kind, offset, length):
        raise raised

    disk.script = script
    for command, payload in [(Command.READ, b""), (Command.WRITE, b"x"), (Command.FLUSH, b""), (Command.TRIM, b"")]:
        reply = await client.request(command, 0, 1, payload=payload)
        assert error(reply) == expected
        assert bool(reply.message) == chunked
    disk.script = None
    assert await client.read(0, 3) == bytes(3)


async def test_an_error_in_the_middle_of_a_read(client, disk):
    """Nothing of it was sent: the reply is the error alone."""
    disk.bytes[:] = b"x" * disk.size

    async def script(kind, offset, length):
        if kind == "read" and offset + length > 80_000:
            raise IOFailedError("bad medium")

    disk.script = script
    assert error(await client.request(Command.READ, 0, 200_000)) == NbdErrno.EIO
    assert await client.read(0, 70_000) == b"x" * 70_000


async def test_a_bug_in_a_disk_is_one_requests_failure(client, disk, expected_errors):
    expected_errors.append("failed")

    async def script(kind, offset, length):
        raise ZeroDivisionError("oops")

    disk.script = script
    assert error(await client.request(Command.READ, 0, 16)) == NbdErrno.EIO
    assert error(await client.request(Command.WRITE, 0, payload=b"hi")) == NbdErrno.EIO
    disk.script = None
    assert await client.read(0, 3) == bytes(3)


async def test_a_disk_that_fails_at_once_is_asked_again_by_a_worker(client, disk, monkeypatch):
    def fail(_offset, _buffer):
        raise ZeroDivisionError("oops")

    disk.bytes[:3] = b"abc"
    monkeypatch.setattr(disk, "try_read_into", fail)
    assert await client.read(0, 3) == b"abc"


@pytest.mark.parametrize("length", [10, SPARSE_MIN])
async def test_a_disk_that_has_become_shorter(client, disk, length, chunked, monkeypatch):
    """Also when it tells of nothing behind its new end."""
    if not chunked or length < SPARSE_MIN:
        return

    async def extents(offset, length):
        yield Extent(offset, length - 1, ExtentKind.ZERO)

    monkeypatch.setattr(disk, "extents", extents)
    assert error(await client.request(Command.READ, 0, length)) == NbdErrno.EINVAL


async def test_a_context_that_says_nothing_is_an_error(connect, server):
    class Silent:
        name = "x:silent"

        async def runs(self, offset, length):
            return
            yield Run(0, 0)

    server.add(NbdExport("odd", PaperDisk(), contexts=(Silent(),)))
    client = await connect("structured", "odd", contexts=["x:silent"])
    assert error(await client.request(Command.BLOCK_STATUS, 0, 512)) == NbdErrno.EIO
