"""The graph: names, formats by name, opening and closing, creation, and nothing left open after errors and cancellations."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import anyio
import pytest

import blocklayer
from blocklayer.base.errors import (
    ChainError,
    DuplicateError,
    FormatError,
    IOFailedError,
    LockedError,
    MissingFileError,
    NotFoundError,
    OptionError,
    PermissionConflictError,
    ReadOnlyError,
    StateError,
    UnknownFormatError,
)
from blocklayer.base.modes import Permission
from blocklayer.graph.child import Child
from blocklayer.graph.graph import Caller
from tests.helpers.scripted import Gate, bad_medium, disk, scripted
from tests.helpers.strict import slow, strict, strict_graph
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.node import Node

SIZE = 256 * 1024


def open_files(folder: Path) -> list[str]:
    """What this process has open in ``folder``."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sorted(name for name in found if name.startswith(str(folder)))


async def make_chain(graph: blocklayer.Graph, folder: Path, depth: int) -> Path:
    """qcow2 images 0 (the bottom, with its number as data in every cluster of its own) to ``depth - 1``."""
    for number in range(depth):
        backing = {"backing_file": f"{number - 1}.qcow2", "backing_fmt": "qcow2"} if number else {}
        await graph.create(folder / f"{number}.qcow2", format="qcow2", size=SIZE, **backing)
    return folder / f"{depth - 1}.qcow2"


# -- names -------------------------------------------------------------------------------------------------------


async def test_nodes_are_found_by_their_names() -> None:
    async with strict_graph() as graph:
        named = await graph.open({"driver": "memory", "size": 512, "node-name": "disk"})
        unnamed = await graph.open({"driver": "memory", "size": 512})
        assert graph.node("disk") is named
        assert graph.nodes == {"disk": named, "#block001": unnamed}
        with pytest.raises(NotFoundError, match="^no node is called 'other'$"):
            graph.node("other")
        await named.close()
        with pytest.raises(NotFoundError):
            graph.node("disk")


async def test_a_name_is_taken_once_and_free_again_when_the_node_is_gone() -> None:
    async with strict_graph() as graph:
        first = await graph.open({"driver": "memory", "size": 512}, node_name="disk")
        with pytest.raises(DuplicateError, match="^a node called 'disk' exists already$"):
            await graph.open({"driver": "memory", "size": 512}, node_name="disk")
        await first.close()
        second = await graph.open({"driver": "memory", "size": 512}, node_name="disk")
        await first.close()
        assert graph.node("disk") is second
        assert not second.closed


async def test_a_name_is_taken_once_also_by_two_who_open_at_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.raw").write_bytes(bytes(512))
    async with blocklayer.Graph() as graph:
        paths = [tmp_path / f"{name}.raw" for name in "ab"]
        results = await asyncio.gather(*(graph.open(path, node_name="disk") for path in paths), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["DuplicateError", "Node"]
        (node,) = (result for result in results if isinstance(result, blocklayer.Node))
        assert graph.node("disk") is node
        assert len(open_files(tmp_path)) == 1
        await node.close()
        again = await graph.open(paths[0], node_name="disk")
        assert not again.closed
    assert open_files(tmp_path) == []


async def test_names_that_are_made_up_avoid_those_that_are_taken() -> None:
    async with strict_graph() as graph:
        await graph.open({"driver": "memory", "size": 512}, node_name="#block001")
        assert (await graph.open({"driver": "memory", "size": 512})).name == "#block002"


async def test_two_graphs_know_nothing_of_each_other() -> None:
    async with strict_graph() as first, strict_graph() as second:
        node = await first.open({"driver": "memory", "size": 512}, node_name="disk")
        other = await second.open({"driver": "memory", "size": 1024}, node_name="disk")
        assert (first.node("disk"), second.node("disk")) == (node, other)
        await node.close()
        assert second.node("disk") is other


# -- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "driver"), [("a.qcow2", "qcow2"), ("A.QCOW2", "qcow2"), ("a.raw", "raw")])
async def test_the_ending_of_a_name_tells_the_format(tmp_path: Path, name: str, driver: str) -> None:
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / name, format=driver, size=SIZE)
        node = await graph.open(tmp_path / name)
        assert (node.driver.name, node.size, node.filename) == (driver, SIZE, str(tmp_path / name))


@pytest.mark.parametrize("name", ["disk", "disk.img", "disk.qcow2.bak", ".qcow2"])
async def test_a_name_that_does_not_tell_its_format_needs_one(tmp_path: Path, name: str) -> None:
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / name, format="qcow2", size=SIZE)
        with pytest.raises(UnknownFormatError) as raised:
            await graph.open(tmp_path / name)
        assert raised.value.filename == str(tmp_path / name)
        assert "pass format='raw' or format='qcow2' (or probe=True to trust its content)" in str(raised.value)
        assert (await graph.open(tmp_path / name, format="qcow2", read_only=True)).driver.name == "qcow2"
        assert (await graph.open(tmp_path / name, probe=True, read_only=True)).driver.name == "qcow2"
        assert (await graph.open(tmp_path / name, format="raw", read_only=True)).size < SIZE * 2


async def test_a_probed_raw_disk_cannot_become_another_format(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    async with blocklayer.Graph() as graph:
        node = await graph.open(tmp_path / "disk", probe=True)
        assert node.driver.name == "raw"
        with pytest.raises(ReadOnlyError, match="would make it look like qcow2"):
            await node.write(0, b"QFI\xfb\0\0\0\3" + bytes(504))
        await node.write(0, b"x" * 512)


async def test_an_unknown_driver_is_an_error_that_lists_the_known_ones() -> None:
    async with strict_graph() as graph:
        with pytest.raises(
            OptionError, match="^no driver is called 'vhd'; there are memory, plain-filter, scripted, strict$"
        ):
            await graph.open({"driver": "vhd"})
        with pytest.raises(OptionError, match="^option 'driver' is required"):
            await graph.open({"size": 512})


async def test_a_driver_that_the_table_lacks_is_asked_for_once() -> None:
    from blocklayer.drivers.memory import MemoryDriver
    from blocklayer.graph.graph import Graph
    from tests.helpers.scripted import NoEngine

    asked = []

    def find(name: str):
        asked.append(name)
        return MemoryDriver if name == "memory" else None

    async with Graph({}, engine=NoEngine, find_driver=find) as graph:  # type: ignore[arg-type]  # no engine is used
        for _ in range(2):
            await graph.open({"driver": "memory", "size": 512})
        assert asked == ["memory"]


async def test_options_may_be_given_as_keywords_and_win() -> None:
    async with strict_graph() as graph:
        node = await graph.open({"driver": "memory", "size": 512, "read-only": "on"}, read_only=False, size="1k")
        assert (node.size, node.read_only) == (1024, False)


async def test_a_child_may_be_options_a_name_or_a_node() -> None:
    async with strict_graph() as graph:
        base = await graph.open({"driver": "memory", "size": 512}, node_name="base", read_only=True)
        for child in (base, "base", {"driver": "memory", "size": 512}):
            top = await graph.open({"driver": "plain-filter", "file": child}, read_only=True)
            assert top.children["file"].node.size == 512
        for child, error in (("nobody", NotFoundError), (5, OptionError)):
            with pytest.raises(error):
                await graph.open({"driver": "plain-filter", "file": child})
        with pytest.raises(OptionError, match="^option 'file' is required: the node or options of the child$"):
            await graph.open({"driver": "plain-filter"})


async def test_a_child_that_the_driver_does_not_ask_for_is_refused() -> None:
    async with strict_graph() as graph:
        with pytest.raises(OptionError, match="^driver 'memory' takes no child 'backing'$"):
            await graph.open({"driver": "memory", "size": 512, "backing": {"driver": "memory", "size": 512}})
        assert graph.nodes == {}


# -- opening that fails ------------------------------------------------------------------------------------------


async def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        path = tmp_path / "gone.qcow2"
        with pytest.raises(MissingFileError) as raised:
            await graph.open(path)
        assert raised.value.filename == str(path)
        assert str(path) in str(raised.value)
        assert graph.nodes == {}


async def test_nothing_stays_open_after_an_error(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        top = await make_chain(graph, tmp_path, 3)
        (tmp_path / "0.qcow2").write_bytes(b"garbage" * 100)
        with pytest.raises(FormatError) as raised:
            await graph.open(top)
        assert "0.qcow2" in str(raised.value)
        assert graph.nodes == {}
        assert open_files(tmp_path) == []


async def test_an_image_that_is_open_already_is_locked(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph, blocklayer.Graph() as other:
        top = await make_chain(graph, tmp_path, 2)
        node = await graph.open(top)
        for second in (graph, other):
            with pytest.raises(LockedError, match="1.qcow2"):
                await second.open(top)
        assert len(open_files(tmp_path)) == 2
        await node.close()
        await (await other.open(top)).close()


@pytest.mark.parametrize("native", [True, False])
async def test_cancelling_who_opens_at_any_moment_leaves_nothing_open(tmp_path: Path, native: bool) -> None:
    async with blocklayer.Graph() as graph:
        top = await make_chain(graph, tmp_path, 3)
        cancelled = 0
        for steps in range(400):
            task = asyncio.ensure_future(opened_in_scope(graph, top, scope := anyio.CancelScope()))
            for _ in range(steps):
                await asyncio.sleep(0)
            if task.done():
                break
            if native:
                task.cancel()
            else:
                scope.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.result() is not None:
                await task.result().close()
            else:
                cancelled += 1
            assert graph.nodes == {}
            assert open_files(tmp_path) == []
        assert cancelled > 3
        if not task.cancelled() and task.result() is not None and not task.result().closed:
            await task.result().close()
        node = await graph.open(top)
        assert await node.read(0, 512) == bytes(512)


async def opened_in_scope(graph: blocklayer.Graph, path: Path, scope: anyio.CancelScope) -> Node | None:
    with scope:
        return await graph.open(path)
    return None


@virtual_time
async def test_a_driver_that_fails_after_it_opened_children_leaves_none_of_them() -> None:
    async with strict_graph() as graph:
        with pytest.raises(OptionError):
            await graph.open(
                {"driver": "scripted", "size": 512, "wrong": 1, "backing": {"driver": "memory", "size": 512}}
            )
        with pytest.raises(PermissionConflictError) as raised:
            base = await graph.open({"driver": "memory", "size": 512}, node_name="base")
            await graph.open({"driver": "plain-filter", "file": base}, node_name="filter")
        text = "node 'base': node 'filter' (as its file) wants to write to it"
        assert "the caller who opened it (as its disk)" in str(raised.value)
        assert "node 'filter' (as its file)" in str(raised.value), text
        assert list(graph.nodes) == ["base"]
        assert len(base.parents) == 1


# -- closing -----------------------------------------------------------------------------------------------------


async def test_a_closed_graph_has_closed_its_nodes_users_first() -> None:
    async with strict_graph() as graph:
        base = await graph.open({"driver": "strict"}, node_name="base", read_only=True)
        middle = await graph.open({"driver": "plain-filter", "file": base}, read_only=True)
        top = await graph.open({"driver": "plain-filter", "file": middle}, read_only=True)
    assert [node.closed for node in (base, middle, top)] == [True, True, True]
    assert graph.nodes == {}
    await graph.close()


async def test_a_graph_is_used_inside_async_with_only(tmp_path: Path) -> None:
    graph = blocklayer.Graph()
    text = "^the graph is not open: use it as `async with Graph\\(\\) as graph`$"
    with pytest.raises(StateError, match=text):
        graph.engine  # noqa: B018 - it raises
    with pytest.raises(StateError, match=text):
        graph.start_task(asyncio.sleep, 0, name="task")
    (tmp_path / "a.raw").write_bytes(bytes(512))
    for _ in range(2):
        with pytest.raises(StateError, match=text):
            await graph.open(tmp_path / "a.raw")
        async with graph:
            await graph.open(tmp_path / "a.raw")


@virtual_time
async def test_a_graph_waits_for_a_node_that_is_being_closed() -> None:
    async with strict_graph() as graph:
        node = await graph.open({"driver": "strict"})
        await node.write(0, b"x")
        strict(node).script = slow(2)
        closing = asyncio.ensure_future(node.close())
        await anyio.sleep(1)
    assert strict(node).closed
    await closing


@virtual_time
async def test_cancelling_who_closes_does_not_interrupt_the_closing() -> None:
    for wait in (asyncio.wait_for, in_anyio):
        async with strict_graph() as graph:
            node = await graph.open({"driver": "strict"})
            driver = strict(node)
            driver.script = slow(2)
            writing = asyncio.ensure_future(node.write(0, b"x"))
            await anyio.sleep(1)
            with pytest.raises(TimeoutError):
                await wait(node.close(), 2)
            assert [kind for kind, *_ in driver.log] == ["write", "flush", "close"]
            await writing


async def in_anyio(action, timeout_s: float) -> None:
    with anyio.fail_after(timeout_s):
        await action
        await anyio.sleep(0)


@virtual_time
async def test_requests_in_flight_finish_when_the_graph_closes() -> None:
    async with strict_graph() as graph:
        node = await graph.open({"driver": "strict"})
        strict(node).script = slow(1)
        writing = asyncio.ensure_future(node.write(0, b"x"))
        await anyio.sleep(0.5)
    await writing
    assert strict(node).log == [("write", 0, 1), ("flush", 0, 0), ("close", 0, 0)]


@virtual_time
async def test_tasks_are_cancelled_and_awaited_before_nodes_are_closed() -> None:
    log = []

    async def task(node: Node) -> None:
        edge = Child(Caller(), "source", node, Permission.CONSISTENT_READ, Permission.ALL)
        try:
            await anyio.sleep(1000)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            log.append(("task ends", node.closed))
            edge.detach()

    async def at_close() -> None:
        log.append(("at close", node.closed))

    async with strict_graph() as graph:
        node = await graph.open({"driver": "strict"})
        graph.at_close(at_close)
        graph.start_task(task, node, name="task")
        await anyio.sleep(1)
    assert log == [("at close", False), ("task ends", False)]
    assert node.closed


async def test_all_nodes_are_closed_although_one_cannot_be_flushed_and_the_first_error_is_raised() -> None:
    with pytest.raises(IOFailedError, match="bad medium"):
        async with strict_graph() as graph:
            nodes = [await graph.open({"driver": "strict"}) for _ in range(3)]

            async def failing(kind: str, _offset: int, _length: int) -> None:
                if kind == "flush":
                    raise bad_medium()

            for node in nodes[:2]:
                strict(node).script = failing
    assert [strict(node).closed for node in nodes] == [True, True, True]


async def test_if_one_child_cannot_be_flushed_the_others_are_let_go_of_all_the_same() -> None:
    async with strict_graph() as graph:
        base = await graph.open({"driver": "strict"}, node_name="base")
        node = await graph.open({"driver": "plain-filter", "file": {"driver": "strict", "node-name": "file"}})
        extra = Child(node, "extra", base, Permission.CONSISTENT_READ, Permission.ALL)
        node.children["extra"] = extra

        async def failing(kind: str, _offset: int, _length: int) -> None:
            if kind == "flush":
                raise bad_medium()

        strict(graph.node("file")).script = failing
        await node.write(0, b"x")
        with pytest.raises(IOFailedError):
            await node.close()
        assert list(graph.nodes) == ["base"]
        assert extra not in base.parents


@virtual_time
async def test_who_is_cancelled_while_entering_a_graph_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    for steps in range(3):
        task = asyncio.ensure_future(enter_and_leave())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == before


async def enter_and_leave() -> None:
    async with strict_graph():
        await anyio.sleep(1)


# -- creating ----------------------------------------------------------------------------------------------------


async def test_a_new_image_is_complete_and_nobody_holds_it(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "a.qcow2", format="qcow2", size="1M")
        assert graph.nodes == {}
        assert open_files(tmp_path) == []
        node = await graph.open(tmp_path / "a.qcow2")
        assert node.size == 1 << 20


async def test_wrong_options_touch_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"precious")
    async with blocklayer.Graph() as graph:
        with pytest.raises(OptionError):
            await graph.create(path, format="qcow2", size="1M", shape="round")
        with pytest.raises(OptionError):
            await graph.create(path, format="qcow3", size="1M")
    assert path.read_bytes() == b"precious"


async def test_an_image_that_somebody_holds_is_not_replaced(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        path = await make_chain(graph, tmp_path, 1)
        node = await graph.open(path)
        await node.write(0, b"x" * 512)
        with pytest.raises(LockedError):
            await graph.create(path, format="qcow2", size="1M")
        assert await node.read(0, 512) == b"x" * 512
        await node.close()
        node = await graph.open(path)
        assert (node.size, await node.read(0, 512)) == (SIZE, b"x" * 512)


async def test_an_image_cannot_be_its_own_backing_file(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        with pytest.raises(ChainError):
            await graph.create(tmp_path / "a.qcow2", format="qcow2", backing_file="a.qcow2", backing_fmt="qcow2")
        assert os.listdir(tmp_path) == []


async def test_cancelling_who_creates_leaves_a_whole_image_or_none(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    async with blocklayer.Graph() as graph:
        for steps in range(300):
            task = asyncio.ensure_future(graph.create(path, format="qcow2", size=SIZE))
            for _ in range(steps):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            await asyncio.wait([task])
            assert graph.nodes == {}
            assert open_files(tmp_path) == []
            assert path.exists() is not task.cancelled()
            if done:
                break
            path.unlink(missing_ok=True)
        assert steps > 3


@virtual_time
async def test_opening_and_closing_at_once_is_fine() -> None:
    async with strict_graph() as graph:
        base = await disk(graph, "base", 4096, **{"read-only": True})
        held = Gate("flush")
        scripted(base).script = held

        async def use(number: int) -> None:
            for _ in range(number):
                top = await graph.open({"driver": "plain-filter", "file": base}, read_only=True)
                assert await top.read(0, 512) == bytes(512)
                await top.close()

        await asyncio.gather(*(use(number) for number in range(5)))
        assert list(graph.nodes) == ["base"]
        held.opened.set()
