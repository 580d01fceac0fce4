"""TlsChannel: what a channel does, encrypted: both sides over a socket pair, and what happens when they do not agree."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl

import pytest

from blocklayer.aio.channel import Channel
from blocklayer.aio.tls_channel import TlsChannel
from tests.helpers.peers import needs
from tests.helpers.pki import make_pki

pytestmark = needs("openssl")

PATIENCE_S = 20


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


def server_context(pki, *, verify=False):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
    if verify:
        context.load_verify_locations(pki / "ca-cert.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(pki, *, cert=False):
    context = ssl.create_default_context(cafile=pki / "ca-cert.pem")
    if cert:
        context.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    return context


class Side:
    """One end: its channel, what it got, and how it ended."""

    def __init__(self, sock, context, *, server, room=1000, hostname="localhost"):
        self.buffer = memoryview(bytearray(room))
        self.data = bytearray()
        self.ends = []
        self.drains = 0
        self.sessions = []
        self.on_received = lambda: None
        self.changed = asyncio.Event()
        name = None if server else hostname
        self.channel = None
        self.channel = TlsChannel(sock, self, context, server_side=server, hostname=name, established=self.established)

    def established(self, session):
        self.sessions.append(session)
        self.changed.set()

    def receive_into(self):
        return self.buffer

    def received(self, count):
        self.data += self.buffer[:count]
        self.on_received()
        self.changed.set()

    def drained(self):
        self.drains += 1
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
def sockets():
    pair = socket.socketpair()
    yield pair
    for sock in pair:
        sock.close()


@pytest.fixture
async def sides(sockets, pki):
    server = Side(sockets[0], server_context(pki), server=True)
    client = Side(sockets[1], client_context(pki), server=False)
    yield server, client
    server.channel.close()
    client.channel.close()


async def test_both_sides_are_told_once_that_it_is_established(sides):
    for side in sides:
        await side.until(lambda side=side: side.sessions)
        assert [session.version() for session in side.sessions] == ["TLSv1.3"]


async def test_what_is_sent_before_the_handshake_waits_for_it(sides):
    server, client = sides
    released = []
    client.channel.send([b"early ", bytearray(b"bird")], release=lambda: released.append(1))
    assert released == [1]
    await server.until(lambda: server.data == b"early bird")


@pytest.mark.parametrize("seed", range(5))
async def test_random_sends_arrive_in_both_directions(sides, seed):
    chance = random.Random(seed)
    sent = [bytearray(), bytearray()]
    tray, released, count = bytearray(50_000), [], 0
    for _ in range(60):
        number = chance.randrange(2)
        pieces = [chance.randbytes(chance.choice([0, 1, 100, 20_000])) for _ in range(chance.randrange(5))]
        flat = b"".join(pieces)[: len(tray)]
        tray[: len(flat)] = flat
        sent[number] += flat
        count += 1
        view = memoryview(tray)[: len(flat)]
        sides[number].channel.send([view[:5], view[5:]], volatile=True, release=lambda: released.append(1))
        tray[:] = bytes(len(tray))
        await asyncio.sleep(0)
    server, client = sides
    await server.until(lambda: len(server.data) == len(sent[1]))
    await client.until(lambda: len(client.data) == len(sent[0]))
    assert (client.data, server.data, len(released)) == (*sent, count)


async def test_a_reader_that_pauses_gets_no_more_and_then_the_rest(sides):
    """Also of what has been decrypted already."""
    server, client = sides
    server.on_received = server.channel.pause_reading
    client.channel.send([bytes(range(200)) * 100])
    while len(server.data) < 20_000:
        before = len(server.data)
        server.channel.resume_reading()
        await server.until(lambda before=before: len(server.data) > before)
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(server.data) <= before + 1000
    assert server.data == bytes(range(200)) * 100


async def test_a_slow_reader_makes_the_sender_wait(sides):
    server, client = sides
    await server.until(lambda: server.sessions)
    await client.until(lambda: client.sessions)
    server.channel.pause_reading()
    data = random.Random(3).randbytes(4_000_000)
    client.channel.send([data])
    assert client.channel.unsent > 1_000_000
    server.channel.resume_reading()
    await server.until(lambda: len(server.data) == len(data))
    await client.until(lambda: client.drains)
    assert (server.data, client.channel.unsent) == (data, 0)


async def test_closing_is_the_other_sides_end(sides):
    server, client = sides
    server.channel.send([b"hello"])
    await client.until(lambda: client.data == b"hello")
    client.channel.send([b"goodbye"])
    client.channel.close()
    client.channel.close()
    client.channel.send([b"late"])
    await server.until(lambda: server.ends)
    assert (server.data, server.ends, client.ends) == (b"goodbye", [None], [])


async def test_closing_inside_received_is_the_end_of_it(sides):
    server, client = sides
    server.on_received = server.channel.close
    client.channel.send([bytes(10_000)])
    await client.until(lambda: client.ends)
    assert (len(server.data), server.ends) == (1000, [])


async def test_a_stranger_is_refused_by_the_client(sockets, pki):
    server = Side(sockets[0], server_context(pki / "stranger"), server=True)
    client = Side(sockets[1], client_context(pki), server=False)
    await client.until(lambda: client.ends)
    await server.until(lambda: server.ends)
    assert isinstance(client.ends[0], ssl.SSLCertVerificationError)
    assert isinstance(server.ends[0], ssl.SSLError)
    assert "unknown ca" in str(server.ends[0]).lower(), "the alert said why"
    assert (len(client.ends), len(server.ends), client.sessions, server.sessions) == (1, 1, [], [])


async def test_a_certificate_for_another_host_is_refused(sockets, pki):
    server = Side(sockets[0], server_context(pki), server=True)
    client = Side(sockets[1], client_context(pki), server=False, hostname="elsewhere")
    await client.until(lambda: client.ends)
    await server.until(lambda: server.ends)
    assert isinstance(client.ends[0], ssl.SSLCertVerificationError)


@pytest.mark.parametrize(("cert", "accepted"), [(False, False), (True, True), ("stranger", False)])
async def test_a_server_may_want_a_certificate(sockets, pki, cert, accepted):
    context = client_context(pki)
    if cert:
        folder = pki / "stranger" if cert == "stranger" else pki
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    server = Side(sockets[0], server_context(pki, verify=True), server=True)
    client = Side(sockets[1], context, server=False)
    await server.until(lambda: server.ends or server.sessions)
    if accepted:
        subject = dict(field[0] for field in server.sessions[0].getpeercert()["subject"])
        assert (subject, server.ends) == ({"commonName": "tester"}, [])
    else:
        assert isinstance(server.ends[0], ssl.SSLError)
        await client.until(lambda: client.ends)
    server.channel.close()
    client.channel.close()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.0\r\n\r\n", bytes(100), b"\x16\x03\x01\xff\xff" + bytes(70_000)])
async def test_a_peer_that_does_not_speak_tls_is_lost(sockets, pki, noise):
    server = Side(sockets[0], server_context(pki), server=True)
    sockets[1].setblocking(False)
    await asyncio.get_running_loop().sock_sendall(sockets[1], noise)
    await server.until(lambda: server.ends)
    assert isinstance(server.ends[0], ssl.SSLError)
    assert (len(server.ends), server.channel.closed, server.sessions) == (1, True, [])


async def test_a_peer_that_closes_during_the_handshake_is_lost(sockets, pki):
    server = Side(sockets[0], server_context(pki), server=True)
    sockets[1].close()
    await server.until(lambda: server.ends)
    assert (server.ends, server.sessions) == ([None], [])


async def test_bytes_that_were_changed_on_the_way_are_an_error(sockets, pki):
    """A man in the middle that flips one bit of the second kilobyte of application data."""
    far = socket.socketpair()
    server = Side(sockets[0], server_context(pki), server=True)
    client = Side(far[1], client_context(pki), server=False)
    left, right = Relay(sockets[1]), Relay(far[0])
    left.other, right.other = right, left
    await server.until(lambda: server.sessions)
    client.channel.send([b"first"])
    await server.until(lambda: server.data == b"first")
    right.change = True
    client.channel.send([b"second"])
    await server.until(lambda: server.ends)
    assert (server.data, isinstance(server.ends[0], ssl.SSLError)) == (b"first", True)
    for channel in (client.channel, left.channel, right.channel):
        channel.close()


class Relay:
    """Passes bytes on to the ``other``; may change the last one."""

    def __init__(self, sock):
        self.buffer = memoryview(bytearray(100_000))
        self.change = False
        self.other = None
        self.channel = Channel(sock, self)
        self.channel.resume_reading()

    def receive_into(self):
        return self.buffer

    def received(self, count):
        if self.change:
            self.buffer[count - 1] ^= 1
        self.other.channel.send([bytes(self.buffer[:count])])

    def drained(self):
        pass

    def lost(self, error):
        pass
