"""Nodes: notifiers, drained sections, closing, facts, resizing and edges."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest

from blocklayer.base.errors import (
    InUseError,
    IOFailedError,
    PermissionConflictError,
    ReadOnlyError,
    StateError,
)
from blocklayer.base.modes import Permission, WriteFlags
from blocklayer.graph.child import Child
from blocklayer.graph.graph import Caller
from blocklayer.graph.requests import RequestKind
from tests.helpers.scripted import Gate, bad_medium, disk, scripted
from tests.helpers.strict import slow, strict, strict_graph
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node
    from blocklayer.graph.requests import Request

READ, WRITE, ALL = Permission.CONSISTENT_READ, Permission.WRITE, Permission.ALL

CHANGES = {
    "write": lambda node: node.write(0, b"x" * 512),
    "write_zeroes": lambda node: node.write_zeroes(0, 512),
    "discard": lambda node: node.discard(0, 512),
    "write_compressed": lambda node: node.write_compressed(0, b"x" * 512),
}


async def opened(graph: Graph, name: str = "disk", **options: object) -> Node:
    return await graph.open({"driver": "strict", "node-name": name, **options})


def hold(node: Node, needs: Permission = READ, shares: Permission = ALL, role: str = "source") -> Child:
    return Child(Caller(), role, node, needs, shares)


# -- notifiers ---------------------------------------------------------------------------------------------------


async def test_notifiers_run_in_the_order_of_their_registration_before_the_driver() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        log = strict(node).log

        def notifier(name: str):
            async def hook(request: Request) -> None:
                await asyncio.sleep(0)
                log.append((name, request.offset, request.length))

            return hook

        node.before_write(notifier("first"))
        node.before_write(notifier("second"))
        await node.write(100, b"x" * 10)
        assert log == [("first", 100, 10), ("second", 100, 10), ("write", 100, 10)]


@pytest.mark.parametrize("name", CHANGES)
async def test_every_change_is_notified_and_no_read(name: str) -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        seen = []

        async def notifier(request: Request) -> None:
            seen.append((request.kind, request.offset, request.length))

        node.before_write(notifier)
        await node.read(0, 512)
        await node.flush()
        assert seen == []
        await CHANGES[name](node)
        kind = RequestKind.WRITE if name == "write_compressed" else RequestKind(name)
        assert seen == [(kind, 0, 512)]


async def test_a_notifier_sees_what_the_guest_asked_for_whatever_the_drivers_limits_are() -> None:
    async with strict_graph() as graph:
        node = await opened(graph, align=512, transfer_max=512)
        seen = []

        async def notifier(request: Request) -> None:
            seen.append((request.offset, request.length))

        node.before_write(notifier)
        await node.write(100, b"x" * 1000)
        await node.write_zeroes(100, 1000)
        assert seen == [(100, 1000), (100, 1000)]


@pytest.mark.parametrize("name", CHANGES)
async def test_a_notifier_that_raises_fails_the_request_and_the_disk_is_unchanged(name: str) -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        strict(node).bytes[:] = b"o" * 4096
        later = []

        async def failing(_request: Request) -> None:
            raise bad_medium()

        async def second(request: Request) -> None:
            later.append(request)

        with node.before_write(failing), node.before_write(second):
            with pytest.raises(IOFailedError, match="^node 'disk': bad medium"):
                await CHANGES[name](node)
        assert strict(node).log == []
        assert strict(node).bytes == b"o" * 4096
        assert later == []
        assert len(node.path.requests) == 0
        counted = node.statistics
        assert sum(getattr(counted, kind).errors for kind in ("write", "write_zeroes", "discard")) == 1


async def test_an_error_of_any_type_in_a_notifier_fails_the_write() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)

        async def failing(_request: Request) -> None:
            raise KeyError("bug")

        node.before_write(failing)
        with pytest.raises(KeyError, match="bug"):
            await node.write(0, b"x")
        assert strict(node).log == []
        assert len(node.path.requests) == 0


async def test_a_removed_notifier_is_not_called_and_removing_twice_is_fine() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        seen = []

        async def notifier(_request: Request) -> None:
            seen.append(1)

        handles = [node.before_write(notifier), node.before_write(notifier)]
        handles[0].remove()
        handles[0].remove()
        await node.write(0, b"x")
        assert seen == [1]
        handles[1].remove()
        await node.write(0, b"x")
        assert seen == [1]


async def test_a_notifier_may_remove_itself_and_others_that_follow_still_run() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        seen = []

        async def once(_request: Request) -> None:
            seen.append("once")
            handle.remove()

        async def always(_request: Request) -> None:
            seen.append("always")

        handle = node.before_write(once)
        node.before_write(always)
        await node.write(0, b"x")
        await node.write(0, b"x")
        assert seen == ["once", "always", "always"]


async def test_unchanged_data_is_not_notified() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        seen = []

        async def notifier(request: Request) -> None:
            seen.append(request)

        node.before_write(notifier)
        await node.write(0, b"x", WriteFlags.UNCHANGED)
        await node.write_zeroes(0, 1, WriteFlags.UNCHANGED)
        assert seen == []


async def test_a_detected_zero_write_is_notified_once() -> None:
    async with strict_graph() as graph:
        node = await opened(graph, **{"detect-zeroes": "on"})
        seen = []

        async def notifier(request: Request) -> None:
            seen.append((request.kind, request.length))

        node.before_write(notifier)
        await node.write(0, bytes(512))
        assert seen == [(RequestKind.WRITE_ZEROES, 512)]


@virtual_time
async def test_a_cancelled_notifier_leaves_the_disk_and_the_list_as_they_were() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)

        async def forever(_request: Request) -> None:
            await anyio.sleep(3600)

        node.before_write(forever)
        with anyio.move_on_after(1):
            await node.write(0, b"x")
        assert strict(node).log == []
        assert len(node.path.requests) == 0


# -- drained sections --------------------------------------------------------------------------------------------


@virtual_time
async def test_a_drained_section_waits_for_what_is_in_flight_and_holds_callers_back() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        strict(node).script = slow(2)
        now = asyncio.get_running_loop().time
        log = []

        async def write(after_s: float, name: str) -> None:
            await anyio.sleep(after_s)
            await node.write(0, b"x")
            log.append((name, now()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write, 0, "early")
            tasks.start_soon(write, 3, "late")
            await anyio.sleep(1)
            async with node.drained():
                assert now() == 2
                assert len(node.path.requests) == 0
                await anyio.sleep(8)
                assert log == [("early", 2)]
                assert strict(node).log == [("write", 0, 1)]
        assert log == [("early", 2), ("late", 12)]


REQUESTS = {
    **CHANGES,
    "read": lambda node: node.read(0, 512),
    "flush": lambda node: node.flush(),
    "truncate": lambda node: node.truncate(8192),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_of_a_caller_waits_for_the_end_of_a_drained_section(name: str) -> None:
    @virtual_time
    async def main() -> None:
        async with strict_graph() as graph:
            node = await opened(graph, quick=True)
            async with node.drained():
                assert node.try_read(0, 512) is None
                assert node.try_read_into(0, memoryview(bytearray(512))) is False
                task = asyncio.ensure_future(REQUESTS[name](node))
                await anyio.sleep(5)
                assert not task.done()
                assert strict(node).log == []
            await task
            assert node.try_read(0, 1) is not None

    main()


@virtual_time
async def test_drained_sections_nest_and_overlap() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        done = asyncio.Event()

        async def write() -> None:
            await node.write(0, b"x")
            done.set()

        first, second = node.drained(), node.drained()
        await first.__aenter__()
        await second.__aenter__()
        writing = asyncio.ensure_future(write())
        await anyio.sleep(1)
        await first.__aexit__(None, None, None)
        await anyio.sleep(1)
        assert not done.is_set()
        await second.__aexit__(None, None, None)
        await writing


@virtual_time
async def test_a_section_whose_waiting_is_cancelled_lets_callers_in_again() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        held = Gate("write")
        strict(node).script = held
        writing = asyncio.ensure_future(node.write(0, b"x"))
        await held.reached.wait()
        with anyio.move_on_after(1):
            async with node.drained():
                raise AssertionError("a write is in flight")
        assert await node.read(0, 1) == b"\0"
        held.opened.set()
        await writing


@virtual_time
async def test_a_caller_that_is_cancelled_at_the_door_takes_nobody_along() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        async with node.drained():
            tasks = [asyncio.ensure_future(node.write(at, b"x")) for at in range(3)]
            await anyio.sleep(1)
            tasks[0].cancel()
            await anyio.sleep(1)
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        assert strict(node).log == [("write", 1, 1), ("write", 2, 1)]


@virtual_time
async def test_edges_pass_a_drained_section() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        edge = hold(node, READ | WRITE)
        async with node.drained():
            await edge.write(0, memoryview(b"x"))
            assert await edge.read(0, 1) == b"x"
        edge.detach()


@virtual_time
async def test_draining_a_backing_node_drains_the_overlay_above_it() -> None:
    async with strict_graph() as graph:
        base = await disk(graph, "base", 4096)
        top = await disk(graph, "top", 4096, backing=base)
        scripted(top).script = slow(2, "read")
        reading = asyncio.ensure_future(top.read(0, 512))
        await anyio.sleep(1)
        async with base.drained():
            assert reading.done()
            late = asyncio.ensure_future(top.read(0, 512))
            await anyio.sleep(5)
            assert not late.done()
            assert len(scripted(top).log) == 1
        await late


@virtual_time
async def test_a_drained_overlay_does_not_hold_back_its_backing_node() -> None:
    async with strict_graph() as graph:
        base = await disk(graph, "base", 4096)
        top = await disk(graph, "top", 4096, backing=base)
        async with top.drained():
            assert await base.read(0, 512) == bytes(512)


@virtual_time
async def test_who_attaches_to_a_drained_node_is_drained_until_it_detaches_or_the_section_ends() -> None:
    async with strict_graph() as graph:
        base = await disk(graph, "base", 4096)
        async with base.drained(), base.drained():
            top = await disk(graph, "top", 4096, backing=base)
            held = asyncio.ensure_future(top.read(0, 512))
            await anyio.sleep(1)
            assert not held.done()
        await held
        async with base.drained():
            await top.close()
        assert await base.read(0, 512) == bytes(512)
        again = await disk(graph, "again", 4096, backing=base)
        assert await again.read(0, 512) == bytes(512)


# -- closing -----------------------------------------------------------------------------------------------------


@virtual_time
async def test_closing_waits_for_requests_in_flight_then_flushes() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        driver = strict(node)
        driver.script = slow(1)
        writing = asyncio.ensure_future(node.write(0, b"x"))
        await anyio.sleep(0.5)
        await node.close()
        await writing
        assert [kind for kind, *_ in driver.log] == ["write", "flush", "close"]
        assert node.closed
        await node.close()


@virtual_time
async def test_closing_does_not_wait_for_those_who_go_on_asking() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        driver = strict(node)
        driver.script = slow(1)
        written = 0

        async def write_on() -> None:
            nonlocal written
            with pytest.raises(StateError, match="it is closed"):
                while True:
                    await node.write(0, b"x")
                    written += 1

        async with anyio.create_task_group() as tasks:
            for after_s in (0, 0.5):
                tasks.start_soon(write_on)
                await anyio.sleep(after_s)
            await anyio.sleep(3)
            with anyio.fail_after(10):
                await node.close()
        assert driver.closed
        assert written == driver.log.count(("write", 0, 1))


@virtual_time
async def test_a_durable_write_in_flight_is_durable_although_the_node_is_closing() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        strict(node).script = slow(1)
        writing = asyncio.ensure_future(node.write(0, b"x", WriteFlags.FUA))
        await anyio.sleep(0.5)
        await node.close()
        await writing
        assert [kind for kind, *_ in strict(node).log] == ["write", "flush", "close"]


@virtual_time
async def test_a_caller_that_waits_at_the_door_of_a_closing_node_is_told_so() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        async with node.drained():
            waiting = asyncio.ensure_future(node.write(0, b"x"))
            await anyio.sleep(1)
            await node.close()
        with pytest.raises(StateError, match="it is closed"):
            await waiting


@virtual_time
async def test_a_node_that_somebody_else_holds_stays_open() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        edge = hold(node)
        await node.close()
        assert not node.closed
        assert await edge.read(0, 4) == bytes(4)
        edge.detach()
        await graph.release_unused(node)
        assert node.closed


async def test_a_node_whose_last_flush_fails_is_closed_and_says_so() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        await node.write(0, b"x")

        async def failing(kind: str, _offset: int, _length: int) -> None:
            if kind == "flush":
                raise bad_medium()

        strict(node).script = failing
        with pytest.raises(IOFailedError, match="^node 'disk': bad medium"):
            await node.close()
        assert node.closed
        assert strict(node).closed
        assert graph.nodes == {}


# -- facts, sizes and edges --------------------------------------------------------------------------------------


async def test_a_node_tells_what_it_is() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        assert repr(node) == "<Node 'disk' strict 4096 bytes rw, 1 users, 0 in flight>"
        assert node.describe() == "node 'disk'"
        assert (node.size, node.read_only, node.closed, node.children, node.backing) == (4096, False, False, {}, None)
        assert (node.chain_depth, node.filename) == (0, None)
        plain = await graph.open({"driver": "memory", "size": 512, "read-only": True})
        assert repr(plain) == "<Node '#block001' memory 512 bytes ro, 1 users, 0 in flight>"


async def test_the_backing_node_is_found_through_filters() -> None:
    async with strict_graph() as graph:
        base = await disk(graph, "base", 4096, **{"read-only": True})
        filtered = await graph.open({"driver": "plain-filter", "file": base}, read_only=True)
        middle = await disk(graph, "middle", 4096, backing=filtered, **{"read-only": True})
        top = await graph.open({"driver": "plain-filter", "file": middle}, read_only=True)
        assert top.backing is filtered
        assert filtered.backing is None
        assert top.chain_depth == 1


@pytest.mark.parametrize("buffer", [bytearray(8), memoryview(bytearray(8)), memoryview(bytearray(8)).cast("I")])
async def test_reads_fill_any_buffer_of_bytes(buffer) -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        await node.write(0, memoryview(b"abcdefgh").cast("I"))
        await node.read_into(0, buffer)
        assert bytes(buffer) == b"abcdefgh"


async def test_a_user_that_does_not_share_resizing_keeps_the_size() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        edge = hold(node, READ, ALL & ~Permission.RESIZE)
        with pytest.raises(InUseError) as raised:
            await node.truncate(8192)
        text = "node 'disk': cannot be resized: the caller who opened it (as its source) needs its size to stay"
        assert str(raised.value) == text
        edge.detach()
        await node.truncate(8192)
        assert node.size == 8192


async def test_a_user_that_excludes_another_is_refused_and_not_attached() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)
        with pytest.raises(PermissionConflictError) as raised:
            hold(node, READ, READ, role="target")
        text = "node 'disk': the caller who opened it (as its disk) wants to write to it, "
        assert str(raised.value) == text + "which the caller who opened it (as its target) does not allow"
        assert len(node.parents) == 1


async def test_a_read_only_node_takes_no_writer() -> None:
    async with strict_graph() as graph:
        node = await opened(graph, **{"read-only": True})
        with pytest.raises(ReadOnlyError) as raised:
            hold(node, READ | WRITE, role="target")
        text = "node 'disk': it was opened read-only, but the caller who opened it (as its target) wants to write to it"
        assert str(raised.value) == text
        hold(node, READ | Permission.WRITE_UNCHANGED).detach()


async def test_the_driver_hears_what_all_users_together_need_and_share() -> None:
    async with strict_graph() as graph:
        node = await opened(graph, **{"read-only": True})
        heard = []
        node.driver.permissions_changed = lambda needed, shared: heard.append((needed, shared))
        edge = hold(node, READ | Permission.WRITE_UNCHANGED, ALL & ~WRITE)
        edge.detach()
        edge.detach()
        assert heard == [(READ | Permission.WRITE_UNCHANGED, ALL & ~WRITE), (READ, ALL)]


async def test_a_user_whom_the_driver_refuses_is_not_attached() -> None:
    async with strict_graph() as graph:
        node = await opened(graph)

        def refuse(_needed: Permission, _shared: Permission) -> None:
            raise bad_medium()

        node.driver.permissions_changed = refuse
        with pytest.raises(IOFailedError):
            hold(node)
        assert len(node.parents) == 1
