"""TLS in the NBD server: offered, required, with certificates of clients, and with an own judgement of them."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess

import pytest

from blocklayer.aio.tls_channel import TlsChannel
from blocklayer.base.errors import MissingFileError, OptionError
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd import options as opt
from blocklayer.codec.nbd.protocol import Command, Option, OptionReply
from blocklayer.exports.nbd_server import NbdExport, NbdServer, ServerLimits
from blocklayer.exports.nbd_server.tls import ServerTls
from tests.helpers.blocking import turns
from tests.helpers.nbd_client import PATIENCE_S, RawClient, raw_client, until_clients
from tests.helpers.nbd_disk import PaperDisk
from tests.helpers.peers import needs
from tests.helpers.pki import make_pki

pytestmark = needs("openssl")


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


class TlsClient(RawClient):
    """A raw client that can begin TLS."""

    inside = None

    async def begin_tls(self, pki, *, cert=False):
        """STARTTLS, and the handshake behind it."""
        assert await self.option(Option.STARTTLS) == [(OptionReply.ACK, b"")]
        context = ssl.create_default_context(cafile=pki / "ca-cert.pem")
        if cert:
            context.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
        self.inside = _Inside(self.sock, context)
        async with asyncio.timeout(PATIENCE_S):
            await self.inside.established.wait()

    async def send(self, data):
        if self.inside is None:
            await super().send(data)
        else:
            self.inside.channel.send([data])

    async def receive(self, length):
        if self.inside is None:
            return await super().receive(length)
        return await self.inside.take(length)

    def close(self):
        if self.inside is not None:
            self.inside.channel.close()
        super().close()


class _Inside:
    def __init__(self, sock, context):
        self.buffer = memoryview(bytearray(64 * KIB))
        self.data = bytearray()
        self.over = False
        self.changed, self.established = asyncio.Event(), asyncio.Event()
        self.channel = None
        self.channel = TlsChannel(
            sock, self, context, server_side=False, hostname="localhost",
            established=lambda _session: self.established.set(),
        )  # fmt: skip

    def receive_into(self):
        return self.buffer

    def received(self, count):
        self.data += self.buffer[:count]
        self.changed.set()

    def drained(self):
        pass

    def lost(self, error):
        self.over = True
        self.changed.set()
        self.established.set()

    async def take(self, length):
        async with asyncio.timeout(PATIENCE_S):
            while len(self.data) < length:
                if self.over:
                    raise EOFError("the server hung up")
                self.changed.clear()
                await self.changed.wait()
        data = bytes(self.data[:length])
        del self.data[:length]
        return data


@pytest.fixture
async def serve(caplog):
    """Makes an open server with a disk and one client of it."""
    servers, clients = [], []

    async def make(tls):
        server = await NbdServer(tls=tls, limits=ServerLimits(handshake_s=10)).__aenter__()
        servers.append(server)
        server.add(NbdExport("disk", PaperDisk(4 * MIB), writable=True))

        def client():
            clients.append(raw_client(server))
            clients[-1].__class__ = TlsClient
            return clients[-1]

        return server, client

    yield make
    for client in clients:
        client.close()
    for server in servers:
        await until_clients(server, 0)
        await server.close()


async def go(client):
    answers = await client.option(Option.GO, opt.pack_info_request("disk", []))
    return answers[-1].type


@pytest.mark.parametrize("required", [True, False])
async def test_requests_over_tls(serve, pki, required):
    _, connect = await serve(ServerTls.from_directory(pki, required=required))
    client = connect()
    await client.greet()
    await client.begin_tls(pki)
    assert await go(client) == OptionReply.ACK
    data = bytes(range(256)) * 8 * KIB
    await client.write(1000, data)
    assert await client.read(1000, len(data)) == data
    await client.send(client.pack(Command.DISC))
    assert await client.at_end()


async def test_a_server_that_requires_tls_tells_nothing_without_it(serve, pki):
    server, connect = await serve(ServerTls.from_directory(pki))
    client = connect()
    await client.greet()
    for option in (Option.LIST, Option.STRUCTURED_REPLY):
        assert (await client.option(option))[0].type == OptionReply.ERR_TLS_REQD
    for name in ("disk", "other"):
        payload = opt.pack_info_request(name, [])
        assert (await client.option(Option.GO, payload))[0].type == OptionReply.ERR_TLS_REQD
    await client.send(opt.pack_option(Option.EXPORT_NAME, b"disk"))
    assert await client.at_end()
    await until_clients(server, 0)


async def test_a_server_that_only_offers_tls_takes_others_too(serve, pki):
    _, connect = await serve(ServerTls.from_directory(pki, required=False))
    client = connect()
    await client.greet()
    assert await go(client) == OptionReply.ACK
    assert await client.read(0, 1) == b"\0"


async def test_a_server_without_tls_says_so(serve, pki):
    _, connect = await serve(None)
    client = connect()
    await client.greet()
    answer = await client.option(Option.STARTTLS)
    assert answer[0].type in (OptionReply.ERR_POLICY, OptionReply.ERR_UNSUP)
    assert await go(client) == OptionReply.ACK


async def test_bytes_behind_starttls_are_the_end(serve, pki):
    server, connect = await serve(ServerTls.from_directory(pki))
    client = connect()
    await client.greet()
    await client.send(opt.pack_option(Option.STARTTLS) + opt.pack_option(Option.LIST))
    await until_clients(server, 0)


@pytest.mark.parametrize("noise", [b"", b"no TLS at all" * 10])
async def test_a_handshake_that_fails_is_the_end(serve, pki, noise):
    server, connect = await serve(ServerTls.from_directory(pki))
    client = connect()
    await client.greet()
    await client.option(Option.STARTTLS)
    if noise:
        await client.send(noise)
    else:
        client.close()
    await until_clients(server, 0)


async def test_starttls_waits_until_the_answers_before_it_are_read(serve, pki):
    """The acknowledgement goes out unencrypted, however full the socket is."""
    server, connect = await serve(ServerTls.from_directory(pki, required=False))
    for number in range(200):
        server.add(NbdExport(f"disk{number}", PaperDisk(), description="d" * 4000))
    client = connect()
    await client.greet()
    await client.send(opt.pack_option(Option.LIST))
    await client.send(opt.pack_option(Option.STARTTLS))
    await turns(300)
    assert len(await client.option_replies()) == 202
    reply = opt.parse_option_reply_header(await client.receive(20))
    assert (reply.option, reply.type) == (Option.STARTTLS, OptionReply.ACK)
    client.option = lambda _option: asyncio.sleep(0, [(OptionReply.ACK, b"")])
    await client.begin_tls(pki)
    del client.option
    assert await go(client) == OptionReply.ACK


@pytest.mark.parametrize("cert", [False, True])
async def test_a_client_has_to_have_a_certificate(serve, pki, cert):
    server, connect = await serve(ServerTls.from_directory(pki, verify_peer=True))
    client = connect()
    await client.greet()
    await client.begin_tls(pki, cert=cert)
    if cert:
        assert await go(client) == OptionReply.ACK
        client.close()
    await until_clients(server, 0)


def _bug(_certificate):
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize("may_go_on", [True, False, None])
async def test_who_may_go_on_is_the_users_judgement_and_one_that_fails_is_no(serve, pki, may_go_on):
    seen = []

    def authorise(certificate):
        seen.append(dict(field[0] for field in certificate["subject"]))
        return may_go_on if may_go_on is not None else _bug(certificate)

    server, connect = await serve(ServerTls.from_directory(pki, verify_peer=True, authorise=authorise))
    client = connect()
    await client.greet()
    await client.begin_tls(pki, cert=True)
    if may_go_on:
        assert await go(client) == OptionReply.ACK
        client.close()
    else:
        assert await client.at_end()
    await until_clients(server, 0)
    assert seen == [{"commonName": "tester"}]


async def test_without_a_certificate_the_judge_gets_an_empty_one(serve, pki):
    seen = []
    server, connect = await serve(ServerTls.from_directory(pki, authorise=lambda cert: bool(seen.append(cert))))
    client = connect()
    await client.greet()
    await client.begin_tls(pki)
    await until_clients(server, 0)
    assert seen == [{}]


# -- files -------------------------------------------------------------------------------------------------------


def test_files_that_are_missing(pki, tmp_path):
    with pytest.raises(MissingFileError):
        ServerTls.from_directory(tmp_path)
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(pki / name, tmp_path)
    assert ServerTls.from_directory(str(tmp_path)).required
    with pytest.raises(MissingFileError):
        ServerTls.from_directory(tmp_path, verify_peer=True)


def test_files_that_are_not_what_they_should_be(pki, tmp_path):
    shutil.copy(pki / "server-cert.pem", tmp_path)
    (tmp_path / "server-key.pem").write_text("no key")
    with pytest.raises(OptionError, match="cannot be used"):
        ServerTls.from_directory(tmp_path)
    shutil.copy(pki / "client-key.pem", tmp_path / "server-key.pem")
    with pytest.raises(OptionError, match="cannot be used"):
        ServerTls.from_directory(tmp_path)


def test_a_key_with_a_password_is_refused_without_asking_for_it(pki, tmp_path):
    shutil.copy(pki / "server-cert.pem", tmp_path)
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", pki / "server-key.pem", "-out", tmp_path / "server-key.pem",
         "-passout", "pass:secret"], check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(OptionError, match="cannot be used"):
        ServerTls.from_directory(tmp_path)


def test_old_versions_of_tls_are_not_spoken(pki):
    assert ServerTls.from_directory(pki).context.minimum_version == ssl.TLSVersion.TLSv1_2
