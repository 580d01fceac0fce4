"""Exports: what a user may ask for, what clients are told, and the hold on a node."""

from __future__ import annotations

import pytest

import blocklayer
from blocklayer.base.errors import OptionError, PermissionConflictError, ReadOnlyError
from blocklayer.base.modes import Permission
from blocklayer.codec.nbd.protocol import NAME_MAX, REQUEST_MAX, TransmissionFlags
from blocklayer.exports.nbd_server import ExportStatistics, NbdExport, NbdServer
from blocklayer.exports.nbd_server.export import ActiveExport
from blocklayer.graph.child import Child
from blocklayer.graph.statistics import LATENCY_BOUNDS_S
from tests.helpers.nbd_disk import PaperDisk


class Context:
    """Only a name."""

    def __init__(self, name):
        self.name = name


class Owner:
    """Of an edge."""

    def describe(self):
        return "a jealous user"

    def drain_begin(self): ...

    async def drain_wait(self): ...

    def drain_end(self): ...


@pytest.fixture
async def node():
    async with blocklayer.Graph() as graph:
        yield await graph.open({"driver": "memory", "size": 1 << 20})


@pytest.mark.parametrize("text", ["x" * (NAME_MAX + 1), "ä" * (NAME_MAX // 2 + 1), "nul\0", "\udc80"])
@pytest.mark.parametrize("field", ["name", "description"])
def test_a_text_that_clients_could_not_be_told(field, text):
    with pytest.raises(OptionError):
        NbdExport(**{"name": "disk", field: text}, disk=PaperDisk())


@pytest.mark.parametrize("name", ["none", ":x", "x:\0", "x:" + "y" * NAME_MAX, "base:allocation"])
def test_a_context_whose_name_is_none(name):
    with pytest.raises(OptionError):
        NbdExport("disk", PaperDisk(), contexts=(Context(name),))


def test_the_longest_texts():
    export = NbdExport("x" * NAME_MAX, PaperDisk(), "d" * NAME_MAX, contexts=(Context("x:" + "y" * (NAME_MAX - 2)),))
    assert len(export.all_contexts()) == 2


def test_contexts_come_behind_those_that_are_always_there():
    export = NbdExport("disk", PaperDisk(), allocation_depth=True, contexts=(Context("x:a"),))
    assert [context.name for context in export.all_contexts()] == ["base:allocation", "qemu:allocation-depth", "x:a"]


def test_a_disk_that_is_read_only_is_not_exported_writable():
    with pytest.raises(OptionError, match="read-only"):
        NbdExport("disk", PaperDisk(read_only=True), writable=True)


def test_what_clients_are_told():
    offer = ActiveExport(NbdExport("disk", PaperDisk(5000), "words", writable=True)).offer()
    assert (offer.name, offer.description, offer.size, offer.maximum) == ("disk", "words", 5000, REQUEST_MAX)
    assert TransmissionFlags.SEND_TRIM in offer.flags
    assert TransmissionFlags.READ_ONLY not in offer.flags
    offer = ActiveExport(NbdExport("disk", PaperDisk())).offer()
    assert TransmissionFlags.READ_ONLY in offer.flags
    changes = TransmissionFlags.SEND_TRIM | TransmissionFlags.SEND_WRITE_ZEROES | TransmissionFlags.SEND_FAST_ZERO
    assert not offer.flags & changes


async def test_a_node_that_somebody_else_wants_for_himself(node):
    keeper = Child(Owner(), "disk", node, Permission.CONSISTENT_READ, Permission.ALL)
    await node.close()  # its caller would write to it
    edge = Child(Owner(), "disk", node, Permission.CONSISTENT_READ, Permission.CONSISTENT_READ)
    users = len(node.parents)
    async with NbdServer() as server:
        with pytest.raises(PermissionConflictError, match="a jealous user"):
            server.add(NbdExport("disk", node, writable=True))
        assert (len(node.parents), server.statistics) == (users, {})
    edge.detach()
    keeper.detach()


async def test_a_user_that_would_exclude_the_export_is_refused(node):
    async with NbdServer() as server:
        server.add(NbdExport("disk", node, writable=True))
        await node.close()
        with pytest.raises(PermissionConflictError, match="NBD export 'disk'"):
            Child(Owner(), "disk", node, Permission.CONSISTENT_READ, Permission.CONSISTENT_READ)


async def test_a_node_that_was_opened_read_only(tmp_path):
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    async with blocklayer.Graph() as graph:
        node = await graph.open(tmp_path / "disk.raw", format="raw", read_only=True)
        with pytest.raises((OptionError, ReadOnlyError)):
            NbdExport("disk", node, writable=True)
        active = ActiveExport(NbdExport("disk", node))
        await active.release()
        await active.release()
        assert not node.closed


async def test_a_node_is_let_go_of_once(node):
    users = len(node.parents)
    active = ActiveExport(NbdExport("disk", node))
    assert len(node.parents) == users + 1
    assert "NBD export 'disk'" in repr(node.parents[-1])
    await active.release()
    await active.release()
    assert (len(node.parents), node.closed) == (users, False)


async def test_an_export_is_drained_without_anything_to_do(node):
    active = ActiveExport(NbdExport("disk", node))
    async with node.drained():
        pass
    await active.release()


def test_each_latency_has_its_place():
    statistics = ExportStatistics()
    for seconds in (0, *LATENCY_BOUNDS_S, 1e9):
        statistics.record(seconds)
    assert sum(statistics.latency) == statistics.requests == len(LATENCY_BOUNDS_S) + 2
    assert statistics.latency[0] == 2
    assert statistics.latency[-1] == 1


async def test_a_graph_that_closes_before_its_exports_has_written_everything(tmp_path):
    """Whoever closes in the wrong order loses no data: the node is flushed and closed, and the export lets go of it."""
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size="1M")
        disk = await graph.open(path)
        active = ActiveExport(NbdExport("disk", disk, writable=True))
        await disk.write(0, b"kept")
    assert disk.closed
    await active.release()
    async with blocklayer.Graph() as graph:
        assert await (await graph.open(path, read_only=True)).read(0, 4) == b"kept"
