"""A disk in memory for tests of jobs: layers, holes, and a script that sees each request before it happens.

``script(kind, offset, length)`` is awaited before each read, write, write_zeroes, discard and flush; it may wait (a
gate, a delay) or raise (a fault). Allocation is kept by sector, so that a layer can hold parts of a cluster.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from blocklayer.base.errors import IOFailedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import Permission, WriteFlags
from blocklayer.base.options import build
from blocklayer.base.units import SECTOR
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.graph.driver import Driver
from blocklayer.graph.graph import Graph

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Self

    from blocklayer.base.options import Options
    from blocklayer.graph.node import Node
    from blocklayer.graph.opener import Opener

    Script = Callable[[str, int, int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ScriptedOptions:
    """``size`` in bytes; ``cluster`` that it tells (0: none); whether it can ``compress``."""

    size: int
    cluster: int = 0
    compress: bool = False


class ScriptedDriver(Driver):
    """See the module's text. Sectors are unallocated, zero or data; ``peek`` looks at the bytes of this layer."""

    name = "scripted"
    handles_fua = True
    limits = BlockLimits(request_alignment=SECTOR)

    def __init__(self, options: ScriptedOptions) -> None:
        """A layer that holds nothing."""
        self.options = options
        self.bytes = bytearray(options.size)
        self.kinds = bytearray(options.size // SECTOR)
        self.script: Script | None = None
        self.log: list[tuple[str, int, int]] = []

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """With a backing node, or without."""
        driver = cls(build(ScriptedOptions, options))
        await opener.optional_child("backing")
        return driver

    @classmethod
    def child_permissions(cls, role: str, *, writable: bool) -> tuple[Permission, Permission]:
        """Backing nodes may be written by others: tests decide."""
        assert role == "backing"
        assert not writable
        return Permission.CONSISTENT_READ, Permission.ALL

    @property
    def size(self) -> int:
        """In bytes."""
        return self.options.size

    @property
    def cluster_size(self) -> int | None:
        """As the options say."""
        return self.options.cluster or None

    @property
    def can_compress(self) -> bool:
        """As the options say."""
        return self.options.compress

    async def _step(self, kind: str, offset: int, length: int) -> None:
        self.log.append((kind, offset, length))
        if self.script is not None:
            await self.script(kind, offset, length)

    def _mark(self, offset: int, length: int, kind: int) -> None:
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        self.kinds[first:last] = bytes([kind]) * (last - first)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Sectors of this layer, or of the backing node."""
        await self._step("read", offset, len(buffer))
        backing = self.children.get("backing")
        at, end = offset, offset + len(buffer)
        while at < end:
            status = self._status(at, end - at)
            piece = buffer[at - offset : status.end - offset]
            if status.is_allocated or backing is None:
                piece[:] = self.bytes[at : status.end]
            else:
                await backing.read_into(at, piece)
            at = status.end

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:  # noqa: ARG002
        """Store."""
        await self._step("write", offset, len(data))
        self.bytes[offset : offset + len(data)] = data
        self._mark(offset, len(data), 1)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Store; only the log knows the difference."""
        await self._step("write_compressed", offset, len(data))
        self.bytes[offset : offset + len(data)] = data
        self._mark(offset, len(data), 1)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:  # noqa: ARG002
        """Zero."""
        await self._step("write_zeroes", offset, length)
        self.bytes[offset : offset + length] = bytes(length)
        self._mark(offset, length, 2)

    async def discard(self, offset: int, length: int) -> None:
        """Zero: what was discarded does not come back from the backing node."""
        await self._step("discard", offset, length)
        self.bytes[offset : offset + length] = bytes(length)
        self._mark(offset, length, 2)

    async def flush(self) -> None:
        """Only logged."""
        await self._step("flush", 0, 0)

    def _status(self, offset: int, length: int) -> Extent:
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        kind = self.kinds[first]
        run = first + 1
        while run < last and self.kinds[run] == kind:
            run += 1
        word = (ExtentKind.UNALLOCATED, ExtentKind.DATA, ExtentKind.ZERO)[kind]
        return Extent(offset, min(run * SECTOR, offset + length) - offset, word)

    async def block_status(self, offset: int, length: int) -> Extent:
        """By runs of sectors."""
        await self._step("block_status", offset, length)
        return self._status(offset, length)

    def put(self, offset: int, data: bytes) -> None:
        """Change this layer behind everybody's back."""
        self.bytes[offset : offset + len(data)] = data
        self._mark(offset, len(data), 1)


class NoEngine:
    """Memory needs no I/O engine."""

    async def close(self) -> None:
        """Nothing to close."""


def scripted(node: Node) -> ScriptedDriver:
    """The driver of ``node``, to script it."""
    assert isinstance(node.driver, ScriptedDriver)
    return node.driver


@asynccontextmanager
async def scripted_graph() -> AsyncIterator[Graph]:
    """A graph that knows memory and scripted disks."""
    drivers: dict[str, type[Driver]] = {"scripted": ScriptedDriver, "memory": MemoryDriver}
    async with Graph(drivers, engine=NoEngine) as graph:  # type: ignore[arg-type]  # no engine is used
        yield graph


async def disk(graph: Graph, name: str, size: int, **options: object) -> Node:
    """Open a scripted disk."""
    return await graph.open({"driver": "scripted", "size": size, **options}, node_name=name)


def bad_medium() -> Exception:
    """What a disk says when it breaks."""
    return IOFailedError("bad medium")


def fail_on(kind: str, *, times: int = 1, error: Callable[[], Exception] = bad_medium) -> Script:
    """A script that raises for the first ``times`` requests of ``kind``."""
    left = times

    async def script(seen: str, _offset: int, _length: int) -> None:
        nonlocal left
        if seen == kind and left:
            left -= 1
            raise error()

    return script


class FailNth:
    """A script that raises for the ``nth`` request of ``kind`` (from 1; "any": whatever it is) and counts them."""

    def __init__(self, kind: str, nth: int, error: Callable[[], Exception] = bad_medium) -> None:
        """Nothing was seen yet."""
        self.kind = kind
        self.nth = nth
        self.error = error
        self.seen = 0

    async def __call__(self, kind: str, _offset: int, _length: int) -> None:
        """Let others run; fail one."""
        if self.kind in ("any", kind):
            self.seen += 1
            mine = self.seen
            await anyio.lowlevel.checkpoint()
            if mine == self.nth:
                raise self.error()


class Gate:
    """A script that holds requests of ``kind`` until it is opened; ``reached`` tells that one stands there."""

    def __init__(self, kind: str) -> None:
        """Closed."""
        self.kind = kind
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    async def __call__(self, kind: str, _offset: int, _length: int) -> None:
        """Stand still here."""
        if kind == self.kind:
            self.reached.set()
            await self.opened.wait()
