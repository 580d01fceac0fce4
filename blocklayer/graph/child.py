"""An edge of the graph: somebody's hold on a node, with what it needs and what it shares.

All I/O that is not the caller's own goes through an edge: a format driver reads its file and its backing node, a job
reads its source and writes its target. Unlike the caller's requests these are never held back by a drained section
(``Node.drained``): the owner of the edge is told to stop making new ones instead, and what is in flight can finish.

Reads past the end of the node see zeroes (a short backing file, the tail of an image file); writes past it extend the
node if the edge may resize it and the driver can grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from blocklayer.base.buffers import fill_zero
from blocklayer.base.errors import ReadOnlyError
from blocklayer.base.modes import Permission, Preallocation, WriteFlags

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklayer.base.errors import BlockError
    from blocklayer.base.extents import Extent
    from blocklayer.graph.node import Node

_WRITERS = Permission.WRITE | Permission.WRITE_UNCHANGED


class Owner(Protocol):
    """Who holds an edge: a node, a job, an export, or the caller."""

    def describe(self) -> str:
        """Who it is, for messages: ``node 'disk'``, ``job 'backup0'``."""

    def drain_begin(self) -> None:
        """Start no new requests until ``drain_end``. Nests."""

    async def drain_wait(self) -> None:
        """Return when none of the owner's own requests is in flight."""

    def drain_end(self) -> None:
        """Undo one ``drain_begin``."""


class Child:
    """One edge. ``role`` is the owner's word for it: "file", "backing", "source", "target"."""

    __slots__ = ("_resize", "_writes", "needs", "node", "owner", "role", "shares")

    def __init__(self, owner: Owner, role: str, node: Node, needs: Permission, shares: Permission) -> None:
        """Attach to ``node``; raises ``PermissionConflictError`` if that would exclude somebody."""
        self.owner = owner
        self.role = role
        self.node = node
        self.needs = needs
        self.shares = shares
        self._resize = Permission.RESIZE in needs
        self._writes = bool(needs & _WRITERS)
        node.attach(self)

    def __repr__(self) -> str:
        """``<edge file: node 'top' -> 'base'>``."""
        return f"<edge {self.role}: {self.owner.describe()} -> {self.node.name!r}>"

    def describe(self) -> str:
        """Who uses the node, for messages."""
        return f"{self.owner.describe()} (as its {self.role})"

    @property
    def size(self) -> int:
        """Bytes of the node."""
        return self.node.driver.size

    async def read(self, offset: int, length: int) -> bytearray:
        """Read into fresh memory; what lies behind the end is zeroes."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; what lies behind the end is zeroes."""
        inside = self.node.driver.size - offset
        if inside < len(buffer):
            inside = max(0, inside)
            fill_zero(buffer[inside:])
            buffer = buffer[:inside]
        if buffer:
            await self.node.path.read_into(offset, buffer)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """The nowait form of ``read_into``."""
        inside = self.node.driver.size - offset
        if inside >= len(buffer):
            return self.node.path.try_read_into(offset, buffer)
        inside = max(0, inside)
        if inside and not self.node.path.try_read_into(offset, buffer[:inside]):
            return False
        fill_zero(buffer[inside:])
        return True

    async def write(self, offset: int, data: memoryview, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write all of ``data``."""
        if not self._writes:
            self._check_writer(offset)
        await self.node.path.write(offset, data, flags, grow=self._resize)

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a plain write inside the node, or answer False; see ``Driver.start_write``."""
        return self._writes and self.node.path.start_write(offset, data, done)

    async def write_compressed(self, offset: int, data: memoryview, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write one cluster compressed."""
        self._check_writer(offset)
        await self.node.path.write_compressed(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Make a range read as zeroes."""
        self._check_writer(offset)
        await self.node.path.write_zeroes(offset, length, flags, grow=self._resize)

    async def discard(self, offset: int, length: int) -> None:
        """Drop a range's content; what lies behind the end is none."""
        self._check_writer(offset)
        length = min(length, self.node.driver.size - offset)
        if length > 0:
            await self.node.path.discard(offset, length)

    async def flush(self) -> None:
        """Make completed writes durable."""
        await self.node.path.flush()

    async def truncate(self, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Change the node's size, if the edge may."""
        self._check_writer(size)
        if not self._resize:
            raise ReadOnlyError(f"{self.describe()} may not resize it", node=self.node.name)
        await self.node.path.truncate(size, preallocation)

    async def block_status(self, offset: int, length: int) -> Extent:
        """Status in the node's own layer."""
        return await self.node.path.block_status(offset, length)

    def detach(self) -> None:
        """Let go of the node. Whether it lives on is up to the graph."""
        self.node.detach(self)

    def _check_writer(self, offset: int) -> None:
        if not self._writes:
            raise ReadOnlyError(f"{self.describe()} holds it for reading only", node=self.node.name, offset=offset)
