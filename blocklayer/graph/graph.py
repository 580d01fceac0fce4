"""Graph: owns nodes, the I/O engine and every task. Two graphs in one process know nothing of each other.

    open       options -> children, bottom up -> driver -> node, then one edge for the caller
    close      tasks are cancelled and awaited, then nodes are flushed and closed, users before what they use

A node lives while an edge to it exists. Opening that fails half-way closes what it had opened.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aiofiles
import anyio

from blocklayer.aio.shield import to_the_end
from blocklayer.base.errors import (
    BlockError,
    ChainError,
    DuplicateError,
    NotFoundError,
    OptionError,
    StateError,
    UnknownFormatError,
    from_os_error,
)
from blocklayer.base.modes import Permission
from blocklayer.graph.child import Child
from blocklayer.graph.gate import Gate
from blocklayer.graph.node import Node
from blocklayer.graph.node_options import NodeOptions, take_node_options
from blocklayer.graph.opener import Ancestry, CreateContext, NodeReference, Opener, PendingOwner, filename_of

if TYPE_CHECKING:
    from typing import Self

    from blocklayer.aio.engine import Engine
    from blocklayer.base.options import Options
    from blocklayer.graph.driver import Driver

PROBE_LENGTH = 4096
"""How much of a file's head decides its format, when that was asked for."""

CHILD_ROLES = frozenset({"file", "backing", "data-file"})
"""Option names that mean a child; ``data_file`` is accepted for ``data-file``."""


class Caller:
    """Owner of the edge of whoever opened a node through the public API."""

    def describe(self) -> str:
        """For messages."""
        return "the caller who opened it"

    def drain_begin(self) -> None:
        """The caller's requests wait at the node's own door."""

    async def drain_wait(self) -> None:
        """The caller's requests are on the node's own list."""

    def drain_end(self) -> None:
        """Nothing to undo."""


class Graph:
    """Use it as ``async with Graph(...) as graph``.

    ``drivers`` maps names to driver classes, ``find_driver`` is asked for names that it lacks; ``gate`` is the default.
    """

    def __init__(
        self,
        drivers: Mapping[str, type[Driver]],
        *,
        engine: Callable[[], Engine],
        gate: Gate | None = None,
        find_driver: Callable[[str], type[Driver] | None] = lambda _name: None,
    ) -> None:
        """Remember; nothing runs before ``__aenter__``."""
        self.drivers = dict(drivers)
        self._find_driver = find_driver
        self.gate = gate or Gate()
        self._make_engine = engine
        self._engine: Engine | None = None
        self._nodes: dict[str, Node] = {}
        self._callers: dict[Node, list[Child]] = {}
        self._names_opening: set[str] = set()
        self._names_made = 0
        self._tasks: anyio.abc.TaskGroup | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        self._closing: list[Callable[[], Awaitable[None]]] = []

    # -- life --------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start the engine and the task group.

        The task group lives in a task of its own, so that a graph may be entered and left in different tasks
        (as test fixtures and web frameworks do).
        """
        self._engine = self._make_engine()
        ready = anyio.Event()
        self._supervisor = asyncio.create_task(self._supervise(ready), name="blocklayer graph")
        try:
            await ready.wait()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close; see ``close``."""
        await self.close()

    async def close(self) -> None:
        """Cancel and await all tasks, then close all nodes. Closing twice is fine; the first error is raised at the end."""
        await to_the_end(self._close())

    async def _close(self) -> None:
        errors: list[BlockError] = []
        while self._closing:
            await self._closing.pop()()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = self._tasks = None
        for edges in self._callers.values():
            for edge in edges:
                edge.detach()
        self._callers.clear()
        for node in self._nodes.values():
            for edge in [edge for edge in node.parents if not isinstance(edge.owner, Node)]:
                edge.detach()  # an export, say: it will find the node closed, and what was written is safe
        while unused := [node for node in self._nodes.values() if not node.parents]:
            for node in unused:
                try:
                    await self.release_unused(node)
                except BlockError as error:
                    errors.append(error)
        while self._releasing:
            await asyncio.wait(self._releasing)
        if self._engine is not None:
            await self._engine.close()
            self._engine = None
        if errors:
            raise errors[0]

    async def _supervise(self, ready: anyio.Event) -> None:
        async with anyio.create_task_group() as self._tasks:
            ready.set()
            await anyio.sleep_forever()

    def start_task(self, run: Callable[..., Coroutine[Any, Any, object]], *args: object, name: str) -> None:
        """Run a coroutine function in the graph's task group; it must not raise."""
        if self._tasks is None:
            raise StateError("the graph is not open: use it as `async with Graph() as graph`")
        self._tasks.start_soon(run, *args, name=name)

    def at_close(self, action: Callable[[], Awaitable[None]]) -> None:
        """Await ``action`` when the graph closes, before tasks are cancelled; last in, first out."""
        self._closing.append(action)

    @property
    def engine(self) -> Engine:
        """The I/O engine; ``StateError`` outside ``async with``."""
        if self._engine is None:
            raise StateError("the graph is not open: use it as `async with Graph() as graph`")
        return self._engine

    @property
    def nodes(self) -> Mapping[str, Node]:
        """All nodes by name."""
        return dict(self._nodes)

    def node(self, name: str) -> Node:
        """The node called ``name``, or ``NotFoundError``."""
        try:
            return self._nodes[name]
        except KeyError:
            raise NotFoundError(f"no node is called {name!r}") from None

    # -- opening -----------------------------------------------------------------------------------------------

    async def open(
        self,
        what: str | os.PathLike[str] | Options,
        *,
        format: str | None = None,  # noqa: A002 - the field's word
        gate: Gate | None = None,
        probe: bool = False,
        **options: object,
    ) -> Node:
        """Open an image with its whole backing chain, or block device options, and hold the top node.

        ``what`` is a path, a URI (``nbd://host/export``), or a mapping like ``{"driver": "qcow2", "file": {"driver": "file", "filename": ...}}``.
        ``format`` names the driver for a path; without it the file name's ending decides (``.qcow2``), and content only
        if ``probe`` is true. ``options`` are node and driver options with ``_`` for ``-`` (``read_only=True``,
        ``cache="none"``, ``detect_zeroes="unmap"``, ``backing=node``...). ``gate`` says what image headers may refer to.

        Raises ``MissingFileError``, ``LockedError``, ``FormatError`` and kin, ``ReferenceRefusedError``, ``ChainError``,
        ``OptionError``. Nothing stays open after an error or a cancellation.
        """
        wanted = {key.replace("_", "-"): value for key, value in options.items()}
        if isinstance(what, Mapping):
            wanted = {**what, **wanted}
        else:
            wanted = {**await self._path_options(os.fspath(what), format, probe=probe), **wanted}
        ancestry = Ancestry().below(filename_of(wanted))
        node, fresh = await self.resolve(wanted, inherited=NodeOptions(), gate=gate or self.gate, ancestry=ancestry)
        try:
            self._hold(node)
        except BaseException:
            if fresh:
                await self.release_unused(node)
            raise
        return node

    async def _path_options(self, path: str, driver: str | None, *, probe: bool) -> dict[str, object]:
        probed = False
        below = self._uri_options(path)
        if below is not None and driver in (None, below["driver"]):
            return below
        if driver is None:
            driver = self._format_by_name(path)
        if driver is None:
            if not probe:
                message = "its name does not tell its format; pass format='raw' or format='qcow2' (or probe=True to trust its content)"
                raise UnknownFormatError(message, filename=path)
            driver = await self.probe(path)
            probed = driver == "raw"
        if not self._driver(driver).is_format:
            return {"driver": driver, "filename": path}
        extra: dict[str, object] = {"probed": True} if probed else {}
        return {"driver": driver, "file": below or {"driver": "file", "filename": path}, **extra}

    def _uri_options(self, text: str) -> dict[str, object] | None:
        """Options of the node that a URI names; None if it is a path. Without a format the node itself is meant."""
        scheme, colon, _ = text.partition("://")
        name = next((name for name, driver in self.drivers.items() if colon and scheme.lower() in driver.schemes), None)
        return None if name is None else {"driver": name, "uri": text}

    def _format_by_name(self, path: str) -> str | None:
        ending = os.path.splitext(path)[1].lower()
        return next((name for name, driver in self.drivers.items() if ending in driver.suffixes), None)

    async def probe(self, path: str) -> str:
        """The format that the first bytes of ``path`` claim; "raw" if none. Only for content that is to be trusted."""
        try:
            async with aiofiles.open(path, "rb") as file:
                head = await file.read(PROBE_LENGTH)
        except OSError as error:
            raise from_os_error(error, "open", filename=path) from None
        return self.probe_head(head)

    def probe_head(self, head: bytes) -> str:
        """The same for bytes at hand."""
        return next((name for name, driver in self.drivers.items() if driver.probe(head)), "raw")

    async def resolve(
        self, value: object, *, inherited: NodeOptions, gate: Gate, ancestry: Ancestry
    ) -> tuple[Node, bool]:
        """The node that a child option means, and whether it was opened just now (else it is somebody's already)."""
        if isinstance(value, NodeReference):
            value = value.node
        if isinstance(value, Node):
            return value, False
        if isinstance(value, str):
            return self.node(value), False
        if not isinstance(value, Mapping):
            raise OptionError(f"{value!r} is neither a node nor block device options")
        return await self._open_options(value, inherited=inherited, gate=gate, ancestry=ancestry), True

    async def _open_options(
        self, options: Mapping[str, object], *, inherited: NodeOptions, gate: Gate, ancestry: Ancestry
    ) -> Node:
        node_options, rest = take_node_options(options, inherited)
        name = node_options.node_name or self._make_name()
        if self._is_taken(name):
            raise DuplicateError(f"a node called {name!r} exists already")
        self._names_opening.add(name)
        try:
            node = await self._open_node(name, node_options, rest, filename_of(options), gate=gate, ancestry=ancestry)
        finally:
            self._names_opening.remove(name)
        self._nodes[name] = node
        return node

    async def _open_node(
        self,
        name: str,
        node_options: NodeOptions,
        rest: dict[str, object],
        filename: str | None,
        *,
        gate: Gate,
        ancestry: Ancestry,
    ) -> Node:
        driver_name = rest.pop("driver", None)
        if driver_name is None:
            raise OptionError(f"option 'driver' is required; there are {', '.join(sorted(self.drivers))}")
        driver_class = self._driver(str(driver_name))
        children = {key.replace("_", "-"): rest.pop(key) for key in tuple(rest) if key.replace("_", "-") in CHILD_ROLES}
        owner = PendingOwner(name, driver_class)
        opener = Opener(self, owner, node_options, children, gate=gate, ancestry=ancestry)
        opener.filename = filename
        try:
            driver = await driver_class.open(rest, opener)
            if unused := opener.unused():
                await driver.close()
                raise OptionError(f"driver {driver_class.name!r} takes no child {unused.pop()!r}")
        except BaseException:
            await to_the_end(self._drop(list(opener.opened.values())))
            raise
        driver.children = opener.opened
        node = Node(name, driver, replace(opener.options, node_name=name), self._give_back)
        node.filename = opener.filename or next(
            (e.node.filename for r, e in opener.opened.items() if r == "file"), None
        )
        for edge in opener.opened.values():
            edge.owner = node
        for _ in range(owner.drained):
            node.drain_begin()
        return node

    def _driver(self, name: str) -> type[Driver]:
        driver = self.drivers.get(name) or self._find_driver(name)
        if driver is None:
            raise OptionError(f"no driver is called {name!r}; there are {', '.join(sorted(self.drivers))}")
        self.drivers[name] = driver
        return driver

    def _is_taken(self, name: str) -> bool:
        return name in self._nodes or name in self._names_opening

    def _make_name(self) -> str:
        while True:
            self._names_made += 1
            name = f"#block{self._names_made:03d}"
            if not self._is_taken(name):
                return name

    # -- creating ----------------------------------------------------------------------------------------------

    async def create(
        self,
        path: str | os.PathLike[str],
        *,
        format: str,
        size: int | str | None = None,
        **options: object,
    ) -> None:
        """Make a new image at ``path``, replacing what is there unless somebody holds it.

        ``size`` in bytes or like "10G"; an image with a backing file may leave it to that. ``options`` are the
        format's own (``backing_file``, ``cluster_size``, ``preallocation``...). The image is complete and durable when
        this returns. Wrong options touch nothing; after any other error the file is removed.
        """
        name = os.fspath(path)
        driver = self._driver(format)
        wanted: dict[str, object] = {
            key.replace("_", "-"): value for key, value in options.items() if value is not None
        }
        if size is not None:
            wanted["size"] = size
        edges: list[Child] = []

        async def create_file(filename: str) -> Child:
            await to_the_end(self._create_file(filename, edges))
            return edges[-1]

        async def backing_size(filename: str, backing_format: str | None) -> int:
            path = os.path.join(os.path.dirname(name), filename)
            if os.path.realpath(path) == os.path.realpath(name):
                raise ChainError("an image cannot be its own backing file", filename=name)
            base = await self.open(path, format=backing_format, read_only=True, force_share=True)
            await base.close()
            return base.size

        try:
            await driver.create(wanted, CreateContext(name, create_file, backing_size))
            for edge in edges:
                await edge.flush()
            await self._drop(edges)
        except BaseException:
            await to_the_end(self._drop_and_remove(edges))
            raise

    async def _create_file(self, filename: str, edges: list[Child]) -> None:
        """An empty file, added to ``edges`` as soon as it is ours to remove."""
        spec = {"driver": "file", "filename": filename, "create": True}
        node = await self._open_options(spec, inherited=NodeOptions(), gate=self.gate, ancestry=Ancestry())
        needs = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        try:
            edges.append(Child(Caller(), "new file", node, needs, Permission.CONSISTENT_READ))
        except BaseException:
            await self.release_unused(node)
            raise
        await edges[-1].truncate(0)

    # -- letting go --------------------------------------------------------------------------------------------

    def _hold(self, node: Node) -> None:
        needs = Permission.CONSISTENT_READ
        if not node.read_only:
            needs |= Permission.WRITE
        self._callers.setdefault(node, []).append(Child(Caller(), "disk", node, needs, Permission.ALL))

    async def _give_back(self, node: Node) -> None:
        edges = self._callers.get(node, [])
        if edges:
            edges.pop().detach()
        if not edges:
            self._callers.pop(node, None)
        await self.release_unused(node)

    async def release_unused(self, node: Node) -> None:
        """Flush and close ``node`` if nobody holds it, then what it held. The node is gone even if flushing failed."""
        if node.parents or node.closed:
            return
        del self._nodes[node.name]
        node.path.closed = True
        release = asyncio.create_task(self._release(node), name=f"release {node.name}")
        self._releasing.add(release)
        release.add_done_callback(self._releasing.discard)
        await to_the_end(release)

    async def _release(self, node: Node) -> None:
        try:
            await node.path.settle()
        finally:
            try:
                await node.driver.close()
            finally:
                await self._drop(list(node.children.values()))

    async def _drop(self, edges: list[Child]) -> None:
        """Let go of all ``edges``, whatever fails on the way; raises the first error."""
        errors: list[BlockError] = []
        for edge in edges:
            edge.detach()
            try:
                await self.release_unused(edge.node)
            except BlockError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _drop_and_remove(self, edges: list[Child]) -> None:
        """The same for files that were not finished: they are removed, and what closing them says is of no interest."""
        with suppress(BlockError):
            await self._drop(edges)
        for edge in edges:
            if edge.node.filename is not None:
                await asyncio.to_thread(_remove_quietly, edge.node.filename)


def _remove_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return
