"""The NBD server and the clients that people use: libnbd's and QEMU's tools, nbdkit, and fio.

The clients run in threads' subprocesses, beside the event loop that serves them. What they wrote is judged by the node
that was exported, and by ``qemu-img check`` on the file when it is closed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket

import pytest

import blocklayer
from blocklayer.base.units import KIB, MIB
from blocklayer.exports.nbd_server import NbdExport, NbdServer
from blocklayer.exports.nbd_server.tls import ServerTls
from tests.helpers import peers
from tests.helpers.peers import needs, qemu_check
from tests.helpers.pki import make_pki

PROGRAMS = ("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "qemu-nbd", "nbdkit", "fio", "openssl")
pytestmark = [needs(*PROGRAMS), pytest.mark.interop]

SIZE = 8 * MIB
SEEDS = max(2, int(os.environ.get("BLOCKLAYER_SEEDS", "100")) // 50)


async def run(*command, status=0):
    """What ``command`` prints, while the server serves."""
    return await asyncio.to_thread(peers.run, *command, status=status)


async def qemu_io(uri, *commands):
    """Programs of qemu-io; a failed command is an assertion."""
    steps = [part for command in commands for part in ("-c", command)]
    text = await run("qemu-io", "-f", "raw", *steps, uri)
    assert "failed" not in text, text
    return text


class Served:
    """A server on a Unix socket with one qcow2 image on a backing file; ``uri`` is the export's."""

    def __init__(self, graph, server, node, folder):
        self.graph, self.server, self.node, self.folder = graph, server, node, folder
        self.path = folder / "image.qcow2"
        self.socket = folder / "nbd.sock"
        self.uri = self.uri_of("disk")

    def uri_of(self, name, extra=""):
        return f"nbd+unix:///{name}?socket={self.socket}{extra}"

    async def content(self):
        return await self.node.read(0, self.node.size)


@pytest.fixture
async def served(tmp_path, caplog):
    async with blocklayer.Graph() as graph, NbdServer() as server:
        base, path = tmp_path / "base.qcow2", tmp_path / "image.qcow2"
        await graph.create(base, format="qcow2", size=SIZE)
        below = await graph.open(base)
        await below.write(MIB, b"b" * MIB)
        await below.close()
        await graph.create(path, format="qcow2", size=SIZE, backing_file=str(base), backing_fmt="qcow2")
        node = await graph.open(path)
        await node.write(3 * MIB, random.Random(1).randbytes(MIB))
        server.add(NbdExport("disk", node, "the disk", writable=True, allocation_depth=True))
        served = Served(graph, server, node, tmp_path)
        await server.listen_unix(served.socket)
        yield served
        await server.close()
        await node.close()
        qemu_check(path)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


# -- nbdinfo -----------------------------------------------------------------------------------------------------


async def test_nbdinfo_tells_what_is_exported(served):
    text = await run("nbdinfo", served.uri)
    assert "newstyle-fixed without TLS, using structured packets" in text
    assert "export-size: 8388608" in text
    (export,) = json.loads(await run("nbdinfo", "--json", served.uri))["exports"]
    assert (export["export-name"], export["description"], export["export-size"]) == ("disk", "the disk", SIZE)
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert (export["block_size_minimum"], export["block_size_preferred"], export["block_size_maximum"]) == (
        1,
        4096,
        32 * MIB,
    )
    assert (await run("nbdinfo", "--size", served.uri)).strip() == str(SIZE)


async def test_nbdinfo_tells_what_can_be_done(served):
    served.server.add(NbdExport("fixed", served.node))
    for word in ("connect", "cache", "df", "fast-zero", "flush", "fua", "multi-conn", "read", "trim", "write", "zero"):
        await run("nbdinfo", "--can", word, served.uri)
    await run("nbdinfo", "--is", "read-only", served.uri, status=2)
    await run("nbdinfo", "--is", "read-only", served.uri_of("fixed"))
    for word in ("write", "trim", "zero"):
        await run("nbdinfo", "--can", word, served.uri_of("fixed"), status=2)
    await run("nbdinfo", "--size", served.uri_of("missing"), status=1)


async def test_nbdinfo_maps_the_disk(served):
    found = json.loads(await run("nbdinfo", "--map", "--json", served.uri))
    assert [(entry["offset"], entry["length"], entry["type"]) for entry in found] == [
        (0, MIB, 3), (MIB, MIB, 0), (2 * MIB, MIB, 3), (3 * MIB, MIB, 0), (4 * MIB, 4 * MIB, 3),
    ]  # fmt: skip
    found = json.loads(await run("nbdinfo", "--map=qemu:allocation-depth", "--json", served.uri))
    assert [(entry["offset"], entry["length"], entry["type"]) for entry in found] == [
        (0, MIB, 0), (MIB, MIB, 2), (2 * MIB, MIB, 0), (3 * MIB, MIB, 1), (4 * MIB, 4 * MIB, 0),
    ]  # fmt: skip


async def test_maps_are_those_that_qemu_nbd_tells_of_the_same_file(served):
    await served.node.write_zeroes(5 * MIB, 128 * KIB)  # whole clusters: QEMU looks for holes inside those of the file
    await served.node.write(6 * MIB + 64 * KIB, b"x" * 64 * KIB)
    await served.node.discard(3 * MIB, 64 * KIB)
    ours = [await run("nbdinfo", f"--map={context}", "--json", served.uri) for context in CONTEXTS]
    await served.server.remove("disk")
    await served.node.flush()
    theirs = []
    for context in CONTEXTS:
        command = ["qemu-nbd", "-r", "-t", "-A", "--image-opts"]
        image = f"driver=qcow2,file.filename={served.path},file.locking=off,backing.file.locking=off"
        theirs.append(await run("nbdinfo", f"--map={context}", "--json", "--", "[", *command, image, "]"))
    assert list(map(_merged, ours)) == list(map(_merged, theirs))


CONTEXTS = ["base:allocation", "qemu:allocation-depth"]


def _merged(text):
    found = []
    for entry in json.loads(text):
        if found and found[-1][2] == entry["type"]:
            found[-1][1] += entry["length"]
        else:
            found.append([entry["offset"], entry["length"], entry["type"]])
    return found


async def test_nbdinfo_lists_exports(served):
    for number in range(40):
        served.server.add(NbdExport(f"number {number}", served.node))
    found = json.loads(await run("nbdinfo", "--list", "--json", served.uri_of("")))["exports"]
    assert [export["export-name"] for export in found] == ["disk", *(f"number {number}" for number in range(40))]


# -- nbdcopy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["--connections=4", "--requests=64"], ["--synchronous"], ["--request-size=33554432"], ["--no-extents"]],
)  # fmt: skip
async def test_nbdcopy_in_both_directions(served, options):
    out = served.folder / "out.raw"
    await run("nbdcopy", *options, served.uri, out)
    assert out.read_bytes() == await served.content()
    data = random.Random(5).randbytes(3 * MIB) + bytes(2 * MIB) + random.Random(6).randbytes(3 * MIB)
    source = served.folder / "in.raw"
    source.write_bytes(data)
    await run("nbdcopy", "--flush", *options, source, served.uri)
    assert await served.content() == data


async def test_sparse_disks_stay_sparse(served):
    out = served.folder / "out.raw"
    await run("nbdcopy", served.uri, out)
    assert out.stat().st_blocks * 512 <= 2 * MIB + 64 * KIB
    assert out.stat().st_size == SIZE
    target = await served.graph.create(served.folder / "copy.qcow2", format="qcow2", size=SIZE)
    del target
    node = await served.graph.open(served.folder / "copy.qcow2")
    served.server.add(NbdExport("copy", node, writable=True))
    await run("nbdcopy", "--destination-is-zero", served.uri, served.uri_of("copy"))
    assert await node.read(0, SIZE) == await served.content()
    extents = [extent async for extent in node.extents()]
    assert sum(extent.length for extent in extents if not extent.is_zero) == 2 * MIB
    await served.server.remove("copy", hard=True)
    await node.close()
    qemu_check(served.folder / "copy.qcow2")


# -- qemu-img ----------------------------------------------------------------------------------------------------


async def test_qemu_img_reads_and_writes_it(served):
    info = json.loads(await run("qemu-img", "info", "--output=json", served.uri))
    assert (info["virtual-size"], info["format"]) == (SIZE, "raw")
    found = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", served.uri))
    data = [(entry["start"], entry["length"]) for entry in found if entry["data"]]
    assert data == [(MIB, MIB), (3 * MIB, MIB)]
    out = served.folder / "out.qcow2"
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, out)
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri, out)
    raw = served.folder / "in.raw"
    raw.write_bytes(random.Random(9).randbytes(SIZE - MIB) + bytes(MIB))
    await run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", raw, served.uri)
    assert await served.content() == raw.read_bytes()
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri, out, status=1)


# -- qemu-io -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_random_programs_of_qemu_io(served, seed):
    """Each read is checked by qemu-io itself, what is left by us and by the file."""
    chance = random.Random(seed)
    model = bytearray(await served.content())
    commands = []
    for _ in range(80):
        offset = chance.randrange(SIZE)
        length = min(SIZE - offset, chance.choice([1, 511, 512, 4096, 5000, 65536, 300_000]))
        value = chance.randrange(1, 256)
        action = chance.randrange(6)
        flag = chance.choice(["", "-f "])
        if action <= 1:
            commands.append(f"write {flag}-P {value} {offset} {length}")
            model[offset : offset + length] = bytes([value]) * length
        elif action == 2:
            commands.append(f"write -z {flag}{chance.choice(['', '-u '])}{offset} {length}")
            model[offset : offset + length] = bytes(length)
        elif action == 3:
            offset, length = offset // 65536 * 65536, 65536
            commands.append(f"discard {offset} {length}")
            commands.append(f"write -z {offset} {length}")
            model[offset : offset + length] = bytes(length)
        elif action == 4:
            commands.append("flush")
        else:
            commands.append(f"write -P {value} {offset} {length}")
            commands.append(f"read -P {value} {offset} {length}")
            model[offset : offset + length] = bytes([value]) * length
    text = await qemu_io(served.uri, *commands)
    assert "Pattern verification" not in text
    assert await served.content() == model


async def test_qemu_io_is_told_of_errors(served):
    served.server.add(NbdExport("fixed", served.node))
    text = await asyncio.to_thread(
        peers.run, "qemu-io", "-f", "raw", "-c", "write 0 512", served.uri_of("fixed"), status=None
    )
    assert "failed" not in (await run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", served.uri_of("fixed")))
    assert "wrote" not in text


# -- other clients, other sockets --------------------------------------------------------------------------------


async def test_fio_verifies_what_it_wrote(served):
    await run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite", "--bs=4k-64k",
        f"--size={SIZE}", "--iodepth=32", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7",
    )  # fmt: skip


async def test_nbdkit_passes_it_on(served):
    socket_path = served.folder / "kit.sock"
    command = ["nbdkit", "-f", "--exit-with-parent", "-U", socket_path, "nbd", f"uri={served.uri}"]
    process = await asyncio.create_subprocess_exec(*map(str, command))
    try:
        async with asyncio.timeout(20):
            while not socket_path.exists():
                await asyncio.sleep(0.01)
        uri = f"nbd+unix:///?socket={socket_path}"
        await qemu_io(uri, "write -P 7 100 5000", "flush", "read -P 7 100 5000")
        out = served.folder / "out.raw"
        await run("nbdcopy", uri, out)
        assert out.read_bytes() == await served.content()
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_over_tcp(served, host):
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = await served.server.listen_tcp(host, 0)
    uri = f"nbd://{f'[{host}]' if ':' in host else host}:{port}/disk"
    assert (await run("nbdinfo", "--size", uri)).strip() == str(SIZE)
    out = served.folder / "out.raw"
    await run("nbdcopy", uri, out)
    assert out.read_bytes() == await served.content()
    await qemu_io(uri, "write -P 3 12345 54321", "read -P 3 12345 54321")


def _has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def test_what_one_client_flushed_is_in_the_file(served):
    """Written by one, flushed by another connection, read from the file by a third program."""
    await qemu_io(served.uri, "write -P 9 0 64k")
    await qemu_io(served.uri, "flush")
    image = f"driver=qcow2,file.filename={served.path},file.locking=off,backing.file.locking=off"
    text = await run("qemu-io", "-r", "--image-opts", "-c", "read -P 9 0 64k", image)
    assert "failed" not in text


# -- TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


def _client_folder(pki, folder, *, cert):
    folder.mkdir()
    names = ["ca-cert.pem", *(["client-cert.pem", "client-key.pem"] if cert else [])]
    for name in names:
        (folder / name).write_bytes((pki / name).read_bytes())
    return folder


@pytest.mark.parametrize("verify", [False, True])
async def test_tls_with_libnbd_and_qemu(tmp_path, pki, verify):
    certs = _client_folder(pki, tmp_path / "with", cert=True)
    bare = _client_folder(pki, tmp_path / "without", cert=False)
    path = tmp_path / "nbd.sock"
    async with blocklayer.Graph() as graph, NbdServer(tls=ServerTls.from_directory(pki, verify_peer=verify)) as server:
        node = await graph.open({"driver": "memory", "size": SIZE})
        await node.write(0, data := random.Random(3).randbytes(SIZE))
        server.add(NbdExport("disk", node, writable=True))
        await server.listen_unix(path)
        port = await server.listen_tcp("127.0.0.1", 0)
        secure = f"nbds://localhost:{port}/disk?tls-certificates={certs}"
        if not _has_ipv6():
            secure = secure.replace("localhost", "127.0.0.1")
        assert "with TLS" in await run("nbdinfo", secure)
        await run("nbdcopy", secure, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == data
        (tmp_path / "in.raw").write_bytes(data[::-1])
        await run("nbdcopy", "--connections=2", tmp_path / "in.raw", secure)
        assert await node.read(0, SIZE) == data[::-1]
        await run("nbdinfo", f"nbd+unix:///disk?socket={path}", status=1)
        await run("nbdinfo", f"nbd://127.0.0.1:{port}/disk", status=1)
        await run("nbdinfo", secure.replace(str(certs), str(bare)), status=1 if verify else 0)
        image = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=disk,tls-creds=tls0"
        creds = f"tls-creds-x509,id=tls0,dir={certs},endpoint=client"
        text = await run("qemu-img", "info", "--output=json", "--object", creds, "--image-opts", image)
        assert json.loads(text)["virtual-size"] == SIZE
        await server.close()
