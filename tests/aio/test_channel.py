"""Channel: bytes go out in their order however much the kernel takes, buffers are given back once, the end is told once."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from blocklayer.aio.channel import VECTORS_MAX, Channel
from blocklayer.base.errors import StateError

PATIENCE_S = 20


class User:
    """Collects what a channel tells; ``on_received`` and ``on_drained`` may do something about it."""

    def __init__(self, room=64):
        self.buffer = memoryview(bytearray(room))
        self.data = bytearray()
        self.drains = 0
        self.ends = []
        self.on_received = self.on_drained = lambda: None
        self.changed = asyncio.Event()

    def receive_into(self):
        return self.buffer

    def received(self, count):
        self.data += self.buffer[:count]
        self.on_received()
        self.changed.set()

    def drained(self):
        self.drains += 1
        self.on_drained()
        self.changed.set()

    def lost(self, error):
        self.ends.append(error)
        self.changed.set()

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
async def channel(pair):
    channel = Channel(pair[0], User())
    yield channel
    channel.close()


@pytest.fixture
def peer(pair):
    return pair[1]


async def receive(peer, length):
    loop, data = asyncio.get_running_loop(), bytearray()
    async with asyncio.timeout(PATIENCE_S):
        while len(data) < length:
            piece = await loop.sock_recv(peer, length - len(data))
            assert piece, "the channel hung up"
            data += piece
    return bytes(data)


def fill(channel):
    """Send until the kernel takes no more; all that was sent."""
    data = random.Random(1).randbytes(1 << 20)
    channel.send([data])
    assert channel.unsent
    return data


async def test_nothing_is_read_before_it_is_wanted(channel, peer):
    peer.send(b"early")
    await asyncio.sleep(0)
    assert channel.user.data == b""
    channel.resume_reading()
    channel.resume_reading()
    await channel.user.until(lambda: channel.user.data == b"early")


async def test_a_paused_channel_leaves_bytes_in_the_socket(channel, peer):
    channel.user.on_received = channel.pause_reading
    channel.resume_reading()
    peer.send(bytes(100))
    await channel.user.until(lambda: channel.user.data)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(channel.user.data) == 64
    channel.pause_reading()
    channel.resume_reading()
    await channel.user.until(lambda: len(channel.user.data) == 100)


async def test_the_user_names_memory_for_each_piece(channel, peer):
    target = bytearray(10)
    places = [memoryview(target)[:4], memoryview(target)[4:]]
    channel.user.receive_into = lambda: places.pop(0)
    channel.user.received = lambda count: channel.user.changed.set() if places else channel.pause_reading()
    channel.resume_reading()
    peer.send(b"0123456789")
    async with asyncio.timeout(PATIENCE_S):
        while places:
            await asyncio.sleep(0)
    assert target == b"0123456789"


async def test_what_fits_is_sent_at_once_and_drains_nothing(channel, peer):
    channel.send([b"one", b"", bytearray(b"two"), memoryview(b"three")])
    assert channel.unsent == 0
    assert peer.recv(100) == b"onetwothree"
    assert channel.user.drains == 0


@pytest.mark.parametrize("buffers", [[], [b""], [b"", b""]])
async def test_nothing_to_send_is_nothing(channel, peer, buffers):
    released = []
    channel.send(buffers, release=lambda: released.append(1))
    assert (released, channel.unsent, channel.user.ends) == ([1], 0, [])
    fill(channel)
    before = channel.unsent
    channel.send(buffers, release=lambda: released.append(2))
    assert (released, channel.unsent) == ([1, 2], before)


async def test_what_the_kernel_does_not_take_waits_and_comes_in_its_order(channel, peer):
    first = fill(channel)
    pieces = [bytes([number]) * number for number in range(1, 200)]
    channel.send(pieces)
    expected = first + b"".join(pieces)
    assert await receive(peer, len(expected)) == expected
    await channel.user.until(lambda: channel.user.drains)
    assert (channel.unsent, channel.user.drains) == (0, 1)


@pytest.mark.parametrize("seed", range(20))
async def test_random_sends_arrive_as_they_were_sent(channel, peer, seed):
    chance = random.Random(seed)
    expected, released, owed = bytearray(), [], []
    tray = bytearray(100_000)
    got = asyncio.ensure_future(receive(peer, 1_500_000))
    while len(expected) < 1_500_000:
        buffers = [chance.randbytes(chance.choice([0, 1, 10, 5000, 60_000])) for _ in range(chance.randrange(1, 40))]
        volatile = chance.random() < 0.5
        if volatile:  # all of them in one piece of memory that is overwritten afterwards
            flat = b"".join(buffers)[: len(tray)]
            tray[: len(flat)] = flat
            buffers = [memoryview(tray)[: len(flat) // 2], memoryview(tray)[len(flat) // 2 : len(flat)]]
        expected += b"".join(buffers)
        owed.append(len(owed))
        channel.send(buffers, volatile=volatile, release=lambda number=owed[-1]: released.append(number))
        tray[:] = bytes([chance.randrange(256)]) * len(tray)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    assert await got == expected[:1_500_000]
    assert await receive(peer, len(expected) - 1_500_000) == expected[1_500_000:]
    await channel.user.until(lambda: not channel.unsent)
    assert sorted(released) == owed, "each once; sends of nothing do not wait"


async def test_more_buffers_than_one_call_takes(channel, peer):
    pieces = [b"%05d" % number for number in range(3 * VECTORS_MAX + 1)]
    channel.send(pieces)
    assert await receive(peer, 5 * len(pieces)) == b"".join(pieces)
    await channel.user.until(lambda: not channel.unsent)


async def test_a_buffer_is_released_only_when_it_has_gone(channel, peer):
    released = []
    data = bytes(200_000)
    channel.send([data], release=lambda: released.append("large"))
    channel.send([b"x"], release=lambda: released.append("small"))
    assert released == []
    await receive(peer, 200_001)
    await channel.user.until(lambda: channel.user.drains)
    assert released == ["large", "small"]


async def test_a_closed_channel_releases_what_waits_and_tells_nobody(channel, peer):
    released = []
    channel.send([bytes(200_000)], release=lambda: released.append(1))
    channel.close()
    channel.close()
    channel.send([b"late"], release=lambda: released.append(2))
    channel.resume_reading()
    assert (released, channel.unsent, channel.closed, channel.user.ends) == ([1, 2], 0, True, [])


async def test_a_release_may_close_the_channel(channel, peer):
    """Each is released once all the same, and nobody hears that the rest has gone."""
    released = []
    fill(channel)
    channel.send([b"a"], release=lambda: (released.append("a"), channel.close()))
    channel.send([b"b"], release=lambda: released.append("b"))
    async with asyncio.timeout(PATIENCE_S):
        while not channel.closed:
            try:
                peer.recv(1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0)
    assert (sorted(released), channel.user.drains, channel.user.ends) == (["a", "b"], 0, [])


async def test_a_release_may_send(channel, peer):
    data = fill(channel)
    channel.send([b"one"], release=lambda: channel.send([b"two"]))
    assert (await receive(peer, len(data) + 6))[-6:] == b"onetwo"


async def test_drained_may_send_again(channel, peer):
    data = fill(channel)
    channel.user.on_drained = lambda: channel.user.drains < 3 and channel.send([data])
    assert await receive(peer, 3 * len(data)) == 3 * data
    await channel.user.until(lambda: channel.user.drains == 3)


async def test_a_peer_that_closes_is_lost_once_without_an_error(channel, peer):
    channel.resume_reading()
    peer.send(b"last words")
    peer.close()
    await channel.user.until(lambda: channel.user.ends)
    assert (channel.user.ends, channel.user.data, channel.closed) == ([None], b"last words", True)
    channel.send([b"anybody?"])
    assert channel.user.ends == [None]


async def test_an_error_while_sending_is_lost_once_with_the_error(channel, peer):
    peer.close()
    released = []
    channel.send([b"hello"], release=lambda: released.append(1))
    channel.send([b"hello"], release=lambda: released.append(2))
    assert [type(error) for error in channel.user.ends] == [BrokenPipeError]
    assert (released, channel.closed) == ([1, 2], True)


async def test_an_error_while_the_rest_waits_is_lost_with_the_error(channel, peer):
    released = []
    channel.send([bytes(1 << 20)], release=lambda: released.append(1))
    peer.close()
    await channel.user.until(lambda: channel.user.ends)
    assert len(channel.user.ends) == 1
    assert isinstance(channel.user.ends[0], OSError)
    assert (released, channel.unsent, channel.user.drains) == ([1], 0, 0)


async def test_a_connection_that_is_reset_is_lost_with_the_error(channel, peer):
    channel.resume_reading()
    channel.send([b"unread"])  # a Unix socket that is closed with unread bytes resets
    peer.close()
    await channel.user.until(lambda: channel.user.ends)
    assert [type(error) for error in channel.user.ends] == [ConnectionResetError]


async def test_closing_inside_received_is_the_end_of_it(channel, peer):
    channel.user.on_received = channel.close
    channel.resume_reading()
    peer.send(bytes(1000))
    await channel.user.until(lambda: channel.closed)
    for _ in range(10):
        await asyncio.sleep(0)
    assert (len(channel.user.data), channel.user.ends) == (64, [])


async def test_closing_inside_drained_is_the_end_of_it(channel, peer):
    data = fill(channel)
    channel.user.on_drained = channel.close
    assert await receive(peer, len(data)) == data
    await channel.user.until(lambda: channel.closed)
    assert channel.user.ends == []


async def test_a_socket_is_given_away_open_unless_bytes_wait(channel, pair):
    fill(channel)
    with pytest.raises(StateError, match="unsent"):
        channel.detach()
    other = Channel(pair[1], User())
    other.resume_reading()
    assert other.detach() is pair[1]
    assert pair[1].fileno() >= 0
    other.close()
    assert pair[1].fileno() >= 0, "it is somebody else's now"


async def test_bytes_that_are_given_away_are_the_new_owners(channel, peer):
    peer.send(b"for the next one")
    channel.resume_reading()
    second = Channel(channel.detach(), User())
    second.resume_reading()
    await second.user.until(lambda: second.user.data)
    assert (second.user.data, channel.user.data) == (b"for the next one", b"")
    second.close()


@pytest.mark.parametrize("loop", ["stock", "uvloop"])
def test_a_reset_behind_bytes_that_wait_is_noticed_in_every_event_loop(loop):
    """uvloop calls a reader once more for the bytes, and never again."""
    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop

    async def main():
        ours, theirs = socket.socketpair()
        channel = Channel(ours, User())
        channel.send([b"unread"])
        theirs.send(bytes(1000))
        theirs.close()
        channel.resume_reading()
        await channel.user.until(lambda: channel.user.ends)
        assert isinstance(channel.user.ends[0], ConnectionResetError)
        assert len(channel.user.ends) == 1
        assert channel.closed

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
