"""``Disk`` is what the server asks for: a Node is one, and so is any object with these methods."""

from __future__ import annotations

import inspect

import pytest

import blocklayer
from blocklayer.exports.nbd_server import NbdExport
from blocklayer.exports.nbd_server.disk import Disk
from blocklayer.graph.node import Node
from tests.helpers.nbd_disk import PaperDisk

MEMBERS = [name for name in vars(Disk) if not name.startswith("_")]


@pytest.mark.parametrize("kind", [Node, PaperDisk])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_disk_has_each_member_as_the_protocol_has_it(kind, name):
    wanted, found = getattr(Disk, name), getattr(kind, name, None)
    if isinstance(wanted, property):
        assert found is None or isinstance(found, property)  # read_only of a PaperDisk is set by its constructor
        return
    assert found is not None
    names = list(inspect.signature(wanted).parameters)
    assert list(inspect.signature(found).parameters)[: len(names)] == names
    assert inspect.iscoroutinefunction(found) == inspect.iscoroutinefunction(wanted) or name == "extents"


def test_mypy_takes_a_node_for_a_disk():
    def takes(disk: Disk) -> Disk:
        return disk

    assert takes is not None
    assert set(MEMBERS) <= set(dir(Node))


async def test_an_object_is_exported_without_opening_an_image(server, connect):
    disk = PaperDisk(10_000)
    server.add(NbdExport("paper", disk, writable=True))
    client = await connect("structured", "paper")
    await client.write(9_990, b"to the end")
    assert (client.size, await client.read(9_995, 5)) == (10_000, b"e end")


async def test_a_node_is_exported(server, connect):
    async with blocklayer.Graph() as graph:
        node = await graph.open({"driver": "memory", "size": 1 << 20})
        server.add(NbdExport("node", node, writable=True))
        client = await connect("extended", "node")
        await client.write(5, b"hello")
        assert await node.read(0, 10) == bytes(5) + b"hello"
        await server.remove("node", hard=True)
