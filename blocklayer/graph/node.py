"""Node: what callers hold. A name, a driver, the edges up and down, and the caller's own requests.

The caller's requests wait at the door while the node is drained; requests of edges (``Child``) do not, their owners
were told to stop. Otherwise both take the same ``RequestPath``.

A node lives as long as somebody holds an edge to it; the caller who opened it holds one and gives it back with ``close``.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from blocklayer.base.buffers import as_view
from blocklayer.base.errors import InUseError, OutOfRangeError, ReadOnlyError
from blocklayer.base.modes import Permission, Preallocation, WriteFlags
from blocklayer.graph.block_status import allocation_status, chain_extents, chain_status, layer_status, unfiltered
from blocklayer.graph.permissions import check_compatible, combined
from blocklayer.graph.request_path import RequestPath

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from typing_extensions import Buffer

    from blocklayer.base.errors import BlockError
    from blocklayer.base.extents import Extent
    from blocklayer.graph.child import Child
    from blocklayer.graph.driver import Driver
    from blocklayer.graph.node_options import NodeOptions
    from blocklayer.graph.request_path import BeforeWrite
    from blocklayer.graph.statistics import Statistics


class HookHandle:
    """A registered before-write notifier; ``remove`` it, or use the handle as a context manager. Removing twice is fine."""

    __slots__ = ("_hook", "_hooks")

    def __init__(self, hooks: list[BeforeWrite], hook: BeforeWrite) -> None:
        """Register ``hook``."""
        hooks.append(hook)
        self._hooks: list[BeforeWrite] | None = hooks
        self._hook = hook

    def remove(self) -> None:
        """No request that starts from now on runs the hook; those that are in it finish."""
        if self._hooks is not None:
            self._hooks.remove(self._hook)
            self._hooks = None

    def __enter__(self) -> Self:
        """Nothing to do: it is registered."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.remove()


class Node:
    """One block device. Offsets and lengths are bytes; every method may run at once with every other.

    If a task is cancelled inside ``write`` or its kin, the range holds old or new data, or a mixture; nothing else
    changes. A cancelled read leaves its buffer in any state, but nobody writes to it any more.
    """

    def __init__(
        self, name: str, driver: Driver, options: NodeOptions, release: Callable[[Node], Awaitable[None]]
    ) -> None:
        """Made by a ``Graph``, which passes ``release``: close the node if nobody holds it any more."""
        self.name = name
        self.driver = driver
        self.options = options
        self.path = RequestPath(name, driver, options)
        self.parents: list[Child] = []
        self.filename: str | None = None
        """What the node was opened from, as its user would name it; None if it has no name."""
        self._release = release
        self._quiesced = 0
        self._wakeup: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        """``<Node 'disk' qcow2 1073741824 bytes rw, 2 users, 0 in flight>``."""
        mode = "ro" if self.read_only else "rw"
        users = f"{len(self.parents)} users, {len(self.path.requests)} in flight"
        return f"<Node {self.name!r} {self.driver.name} {self.size} bytes {mode}, {users}>"

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes that can be read and written."""
        return self.driver.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.options.read_only

    @property
    def closed(self) -> bool:
        """Whether the node is gone."""
        return self.path.closed

    @property
    def children(self) -> dict[str, Child]:
        """The edges down, by role."""
        return self.driver.children

    @property
    def backing(self) -> Node | None:
        """The node that answers for what is unallocated here, filters passed over; None at the bottom."""
        edge = unfiltered(self).driver.children.get("backing")
        return None if edge is None else edge.node

    @property
    def statistics(self) -> Statistics:
        """Counters as they are now."""
        return self.path.statistics.snapshot()

    # -- the caller's requests ---------------------------------------------------------------------------------

    def try_read(self, offset: int, length: int) -> bytes | None:
        """Read at once, or answer None if anything would have to wait. Creates no coroutine, task or future."""
        if self._quiesced or offset < 0 or not 0 <= length <= self.driver.size - offset:
            return None
        data = bytearray(length)
        return bytes(data) if self.path.try_read_into(offset, memoryview(data)) else None

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` at once, or answer False and leave it in any state."""
        return not self._quiesced and self.path.try_read_into(offset, buffer)

    async def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes. Raises ``OutOfRangeError``, ``IOFailedError``, ``CorruptImageError``."""
        if length < 0 or offset < 0 or offset + length > self.driver.size:
            message = f"request outside the node's {self.driver.size} bytes"
            raise OutOfRangeError(message, node=self.name, offset=offset, length=length)
        data = bytearray(length)
        await self.read_into(offset, data)
        return bytes(data)

    async def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill all of ``buffer`` or raise; the same errors as ``read``."""
        if self._quiesced:
            await self._wait_open()
        await self.path.read_into(offset, as_view(buffer))

    async def write(self, offset: int, data: Buffer, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write all of ``data``; durable after a ``flush``, or at return with ``FUA``.

        Raises ``ReadOnlyError``, ``OutOfRangeError``, ``IOFailedError``, and what a before-write notifier raises.
        """
        if self._quiesced:
            await self._wait_open()
        await self.path.write(offset, as_view(data), flags)

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a write without waiting, or answer False and do nothing: then use ``write``.

        If it began, ``done(error)`` is called later in the event loop, with None for success. Nobody can cancel it, and
        ``data`` must not change before. For callers with many small writes: no coroutine, task or future is made.
        """
        return not self._quiesced and self.path.start_write(offset, data, done)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Write one cluster compressed; ``UnsupportedError`` where the driver cannot."""
        if self._quiesced:
            await self._wait_open()
        await self.path.write_compressed(offset, as_view(data))

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Make the range read as zeroes, as cheaply as the driver can."""
        if self._quiesced:
            await self._wait_open()
        await self.path.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is not needed any more."""
        if self._quiesced:
            await self._wait_open()
        await self.path.discard(offset, length)

    async def flush(self) -> None:
        """Make every write that has completed durable."""
        if self._quiesced:
            await self._wait_open()
        await self.path.flush()

    async def truncate(self, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Change the size; what is new reads as zeroes. ``InUseError`` if a user does not share resizing."""
        for edge in self.parents:
            if Permission.RESIZE not in edge.shares:
                raise InUseError(f"cannot be resized: {edge.describe()} needs its size to stay", node=self.name)
        if self._quiesced:
            await self._wait_open()
        await self.path.truncate(size, preallocation)

    # -- block status ------------------------------------------------------------------------------------------

    async def block_status(self, offset: int, length: int, *, base: Node | None = None) -> Extent:
        """Which layer of the chain above ``base`` answers from ``offset`` on, and how; see ``block_status.py``."""
        return await chain_status(self, offset, length, base=base)

    def extents(self, offset: int = 0, length: int | None = None, *, base: Node | None = None) -> AsyncIterator[Extent]:
        """All extents of a range (default: to the end), joined where they are alike."""
        length = self.size - offset if length is None else length
        return chain_extents(self, offset, length, base=base)

    async def is_allocated(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether this layer alone answers at ``offset``, and for how many bytes (at most ``length``) that holds."""
        status = await layer_status(self, offset, length)
        return status.is_allocated, status.length

    async def is_allocated_above(self, offset: int, length: int, base: Node | None) -> tuple[bool, int]:
        """The same for all layers above ``base``, not including it; with None, for the whole chain."""
        status = await allocation_status(self, offset, length, base=base)
        return status.is_allocated, status.length

    @property
    def chain_depth(self) -> int:
        """How many backing layers lie below."""
        depth, node = 0, self.backing
        while node is not None:
            depth, node = depth + 1, node.backing
        return depth

    # -- hooks and drain ---------------------------------------------------------------------------------------

    def before_write(self, hook: BeforeWrite) -> HookHandle:
        """Run ``hook`` before each write, write_zeroes and discard that starts from now on.

        It is called with the request and answers what to await before the driver sees it, or None for nothing; so a
        coroutine function will do.
        For a point in time register it inside ``drained``: then no write is under way that has not seen it.
        """
        return HookHandle(self.path.hooks, hook)

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Hold off new requests (the caller's, and those of owners above) and wait until none is in flight.

        Edges may still use the node inside; callers that try wait until the block is left.
        """
        self.drain_begin()
        try:
            await self.drain_wait()
            yield
        finally:
            self.drain_end()

    def describe(self) -> str:
        """Who it is, for messages."""
        return f"node {self.name!r}"

    def drain_begin(self) -> None:
        """Part of ``drained``, and of the ``Owner`` protocol for the nodes below."""
        self._quiesced += 1
        for edge in tuple(self.parents):
            edge.owner.drain_begin()

    async def drain_wait(self) -> None:
        """Part of ``drained``: owners above first, then what is in flight here."""
        for edge in tuple(self.parents):
            await edge.owner.drain_wait()
        await self.path.requests.wait_idle()

    def drain_end(self) -> None:
        """Part of ``drained``."""
        for edge in tuple(self.parents):
            edge.owner.drain_end()
        self._quiesced -= 1
        if not self._quiesced and self._wakeup is not None:
            self._wakeup.set_result(None)
            self._wakeup = None

    async def _wait_open(self) -> None:
        while self._quiesced:
            if self._wakeup is None:
                self._wakeup = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._wakeup)

    # -- edges -------------------------------------------------------------------------------------------------

    def attach(self, edge: Child) -> None:
        """Called by ``Child``: take a new user, or raise ``PermissionConflictError`` or ``ReadOnlyError``."""
        if self.read_only and edge.needs & (Permission.WRITE | Permission.RESIZE):
            raise ReadOnlyError(f"it was opened read-only, but {edge.describe()} wants to write to it", node=self.name)
        check_compatible(self.name, edge, self.parents)
        users = [*self.parents, edge]
        self.driver.permissions_changed(*combined(users))
        for _ in range(self._quiesced):
            edge.owner.drain_begin()
        self.parents.append(edge)

    def detach(self, edge: Child) -> None:
        """Called by ``Child``: lose a user; detaching twice is fine."""
        if edge in self.parents:
            self.parents.remove(edge)
            for _ in range(self._quiesced):
                edge.owner.drain_end()
            if self.parents:
                self.driver.permissions_changed(*combined(self.parents))

    async def close(self) -> None:
        """Give the node back: it is flushed and closed when its last user is gone. Closing twice is fine."""
        await self._release(self)
