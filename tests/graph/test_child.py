"""Edges: reads past the end, writes that grow, and what an edge may do by its permissions."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import NoSpaceError, OutOfRangeError, PermissionConflictError, ReadOnlyError
from blocklayer.base.modes import Permission
from blocklayer.graph.child import Child
from tests.helpers.strict import strict, strict_graph

READ, WRITE, RESIZE, UNCHANGED, ALL = (
    Permission.CONSISTENT_READ,
    Permission.WRITE,
    Permission.RESIZE,
    Permission.WRITE_UNCHANGED,
    Permission.ALL,
)


class Job:
    """An owner that counts how often it is drained."""

    drained = 0

    def describe(self) -> str:
        return "job 'backup0'"

    def drain_begin(self) -> None:
        self.drained += 1

    async def drain_wait(self) -> None:
        pass

    def drain_end(self) -> None:
        self.drained -= 1


async def edge_to(graph, needs: Permission, **options: object) -> Child:
    node = await graph.open({"driver": "strict", "node-name": "disk", "size": 1000, **options})
    return Child(Job(), "target", node, needs, ALL)


async def test_an_edge_says_whose_it_is() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ)
        assert edge.describe() == "job 'backup0' (as its target)"
        assert repr(edge) == "<edge target: job 'backup0' -> 'disk'>"
        assert edge.size == 1000


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("align", [1, 512])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1000), (900, 200), (999, 2), (1000, 8), (5000, 100), (0, 2000), (7, 0)]
)
async def test_what_lies_behind_the_end_reads_as_zeroes(quick, align, offset, length) -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ, quick=quick, align=align)
        strict(edge.node).bytes[:1000] = b"d" * 1000
        expected = (b"d" * 1000)[offset : offset + length].ljust(length, b"\0")
        assert await edge.read(offset, length) == expected
        buffer = bytearray(b"?" * length)
        await edge.read_into(offset, memoryview(buffer))
        assert buffer == expected


@pytest.mark.parametrize(("offset", "length"), [(0, 1000), (900, 200), (1000, 8), (5000, 100)])
async def test_the_nowait_read_answers_the_same(offset, length) -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ, quick=True)
        strict(edge.node).bytes[:] = b"d" * 1000
        buffer = bytearray(b"?" * length)
        assert edge.try_read_into(offset, memoryview(buffer))
        assert buffer == await edge.read(offset, length)
        strict(edge.node).quick = False
        assert edge.try_read_into(offset, memoryview(buffer)) is (offset >= 1000)


async def test_an_edge_for_reading_refuses_changes() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ)
        for change in (
            lambda: edge.write(8, memoryview(b"x")),
            lambda: edge.write_compressed(8, memoryview(b"x")),
            lambda: edge.write_zeroes(8, 1),
            lambda: edge.discard(8, 1),
            lambda: edge.truncate(8),
        ):
            with pytest.raises(ReadOnlyError) as raised:
                await change()
            expected = "node 'disk': job 'backup0' (as its target) holds it for reading only (at 0x8)"
            assert str(raised.value) == expected
        assert strict(edge.node).log == []


@pytest.mark.parametrize("name", ["write", "write_zeroes"])
async def test_writes_past_the_end_grow_the_node_only_if_the_edge_may_resize_and_the_driver_can(name) -> None:
    async with strict_graph() as graph:

        async def put(edge: Child) -> None:
            if name == "write":
                await edge.write(990, memoryview(b"x" * 20))
            else:
                await edge.write_zeroes(990, 20)

        refused = [(READ | WRITE, True, OutOfRangeError), (READ | WRITE | RESIZE, False, NoSpaceError)]
        for number, (needs, growable, error) in enumerate(refused):
            edge = await edge_to(graph, needs, growable=growable, **{"node-name": f"disk{number}"})
            with pytest.raises(error):
                await put(edge)
            assert edge.size == 1000
        edge = await edge_to(graph, READ | WRITE | RESIZE, growable=True)
        await put(edge)
        assert edge.size == 1010
        with pytest.raises(OutOfRangeError):
            await edge.write(-1, memoryview(b"x"))


async def test_resizing_takes_the_permission_to_resize() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ | WRITE)
        with pytest.raises(ReadOnlyError, match="may not resize it"):
            await edge.truncate(2000)
        edge.detach()
        edge = Child(Job(), "target", edge.node, READ | WRITE | RESIZE, ALL)
        await edge.truncate(2000)
        assert edge.size == 2000


async def test_a_discard_behind_the_end_drops_nothing_and_one_across_it_what_is_there() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ | WRITE)
        await edge.discard(1000, 50)
        await edge.discard(5000, 50)
        assert strict(edge.node).log == []
        await edge.discard(900, 500)
        assert strict(edge.node).log == [("discard", 900, 100)]


async def test_writes_of_an_edge_are_notified_too() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ | WRITE)
        seen = []

        async def notifier(request) -> None:
            seen.append((request.kind.value, request.offset))

        edge.node.before_write(notifier)
        await edge.write(5, memoryview(b"x"))
        await edge.write_zeroes(6, 1)
        await edge.discard(7, 1)
        await edge.write_compressed(8, memoryview(b"x"))
        assert seen == [("write", 5), ("write_zeroes", 6), ("discard", 7), ("write", 8)]


async def test_an_owner_is_drained_as_long_as_the_node_is_and_it_is_attached() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ)
        async with edge.node.drained(), edge.node.drained():
            assert edge.owner.drained == 2
            edge.detach()
            edge.detach()
            assert edge.owner.drained == 0
            late = Child(Job(), "late", edge.node, READ, ALL)
            assert late.owner.drained == 2
        assert (edge.owner.drained, late.owner.drained) == (0, 0)


async def test_an_edge_that_conflicts_leaves_the_node_as_it_was() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ | WRITE)
        with pytest.raises(PermissionConflictError, match="which job 'backup0' \\(as its other\\) does not allow"):
            Child(Job(), "other", edge.node, READ, ALL & ~WRITE)
        assert edge.node.parents[1:] == [edge]


async def test_block_status_and_flush_go_to_the_nodes_own_layer() -> None:
    async with strict_graph() as graph:
        edge = await edge_to(graph, READ | WRITE)
        assert (await edge.block_status(100, 50)).range == (100, 50)
        await edge.write(0, memoryview(b"x"))
        await edge.flush()
        assert strict(edge.node).log == [("block_status", 100, 50), ("write", 0, 1), ("flush", 0, 0)]
