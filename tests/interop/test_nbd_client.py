"""The NBD client and the servers that people use: qemu-nbd and nbdkit.

The servers run as subprocesses on Unix sockets; what arrived is judged by the files behind them.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
from contextlib import contextmanager

import pytest

import blocklayer
from blocklayer.base.errors import IOFailedError
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, MIB
from tests.helpers.peers import needs, qemu_check

pytestmark = [needs("qemu-nbd", "qemu-img", "nbdkit"), pytest.mark.interop]

SIZE = 8 * MIB
PATIENCE_S = 20.0


@pytest.fixture
async def graph():
    async with blocklayer.Graph() as graph:
        yield graph


@contextmanager
def serving(*command):
    """The server as long as the block lasts; it may be killed before."""
    server = subprocess.Popen([*map(str, command)])
    try:
        yield server
    finally:
        server.kill()
        server.wait(PATIENCE_S)


def qemu_nbd(folder, path, format="raw", *more):
    return serving("qemu-nbd", "-k", folder / "socket", "-t", "-x", "disk", "-f", format, *more, path)


def nbdkit(folder, *words):
    return serving("nbdkit", "-f", "--exit-with-parent", "-U", folder / "socket", *words)


async def opened(graph, folder, **options):
    """The node, as soon as the server answers."""
    place = {"driver": "nbd", "path": str(folder / "socket"), "export": "disk", **options}
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await graph.open(place)
            except IOFailedError:
                await asyncio.sleep(0.02)


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


async def exercise(node):
    """Writes, zeroes, discards, many at once; answers what it reads as at the end."""
    chance, model = random.Random(1), bytearray(SIZE)
    slots = list(range(0, SIZE, 64 * KIB))

    async def one(at):
        length = chance.choice([512, 4096, 60 * KIB, 64 * KIB])
        data = chance.randbytes(length)
        await node.write(at, data, flags=chance.choice([WriteFlags.NONE, WriteFlags.FUA]))
        model[at : at + length] = data
        if chance.random() < 0.5:
            flags = chance.choice([WriteFlags.NONE, WriteFlags.MAY_UNMAP])
            await node.write_zeroes(at, 4096, flags=flags)
            model[at : at + 4096] = bytes(4096)

    await asyncio.gather(*(one(at) for at in slots))
    await node.flush()
    for at in slots:
        assert await node.read(at, 64 * KIB) == model[at : at + 64 * KIB]
    assert await node.read(0, SIZE) == model
    return model


async def test_qemu_nbd_stores_what_is_written(graph, tmp_path, raw):
    with qemu_nbd(tmp_path, raw, "raw", "--shared=4"):
        node = await opened(graph, tmp_path, connections=4)
        model = await exercise(node)
        assert await node.driver.info() | {"uri": ""} == {
            "uri": "", "replies": "structured", "tls": False, "read-only": False, "connections": 4,
        }  # fmt: skip
        await node.discard(0, MIB)
        await node.close()
    assert raw.read_bytes()[MIB:] == model[MIB:]


async def test_qemu_nbd_on_an_image(graph, tmp_path):
    image = tmp_path / "image.qcow2"
    await graph.create(image, format="qcow2", size=SIZE)
    with qemu_nbd(tmp_path, image, "qcow2", "--discard=unmap"):
        node = await opened(graph, tmp_path)
        await node.write(MIB, b"x" * MIB)
        found = [(extent.offset, extent.length, extent.kind) async for extent in node.extents(0, SIZE)]
        assert found == [
            (0, MIB, ExtentKind.ZERO),
            (MIB, MIB, ExtentKind.DATA),
            (2 * MIB, 6 * MIB, ExtentKind.ZERO),
        ]
        await node.discard(MIB, MIB)
        assert [extent.kind async for extent in node.extents(0, SIZE)] == [ExtentKind.ZERO]
        await exercise(node)
        await node.close()
    qemu_check(image)


async def test_a_read_only_server(graph, tmp_path, raw):
    with qemu_nbd(tmp_path, raw, "raw", "-r"):
        await (await opened(graph, tmp_path, auto_read_only=True)).close()


async def test_nbdkit_stores_what_is_written(graph, tmp_path):
    with nbdkit(tmp_path, "memory", str(SIZE)):
        node = await opened(graph, tmp_path, connections=3)
        await exercise(node)
        await node.write_zeroes(0, SIZE, flags=WriteFlags.MAY_UNMAP)
        assert [extent.kind async for extent in node.extents(0, SIZE)] == [ExtentKind.ZERO]
        await node.close()


async def test_an_error_of_the_server_is_that_of_one_request(graph, tmp_path):
    with nbdkit(tmp_path, "--filter=error", "memory", str(SIZE), "error-pread=ENOSPC", "error-pread-rate=100%"):
        node = await opened(graph, tmp_path)
        with pytest.raises(blocklayer.NoSpaceError) as caught:
            await node.read(4096, 10)
        assert caught.value.offset == 4096
        await node.write(0, b"fine")
        await node.close()


async def test_a_server_that_is_killed_and_comes_back(graph, tmp_path, raw):
    with qemu_nbd(tmp_path, raw) as first:
        node = await opened(graph, tmp_path, reconnect_delay=PATIENCE_S)
        await node.write(0, b"before")
        work = [asyncio.ensure_future(node.write(at * 64 * KIB, bytes([at]) * 64 * KIB)) for at in range(1, 100)]
        await asyncio.sleep(0)
        first.kill()
        first.wait(PATIENCE_S)
        (tmp_path / "socket").unlink()
    with qemu_nbd(tmp_path, raw):
        await asyncio.gather(*work)
        assert await node.read(0, 6) == b"before"
        await node.close()
    assert raw.read_bytes()[64 * KIB : 100 * 64 * KIB : 64 * KIB] == bytes(range(1, 100))


async def test_a_server_that_is_killed_for_good(graph, tmp_path, raw):
    with qemu_nbd(tmp_path, raw) as server:
        node = await opened(graph, tmp_path)
        server.kill()
        server.wait(PATIENCE_S)
    for _ in range(2):
        with pytest.raises(IOFailedError):
            await node.read(0, 1)
    with pytest.raises(IOFailedError):
        await node.close()


async def test_a_backup_from_and_to_servers(graph, tmp_path, raw):
    (source := tmp_path / "source").mkdir()
    content = random.Random(2).randbytes(SIZE // 2) + bytes(SIZE // 2)
    (source / "disk").write_bytes(content)
    with qemu_nbd(source, source / "disk"), qemu_nbd(tmp_path, raw):
        disk, target = await opened(graph, source), await opened(graph, tmp_path)
        job = await graph.backup(disk, target, sync="full")
        await disk.write(0, b"after!")
        await job.wait()
        await disk.close()
        await target.close()
    assert raw.read_bytes() == content
    assert (source / "disk").read_bytes()[:6] == b"after!"
