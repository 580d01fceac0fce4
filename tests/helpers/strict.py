"""A disk in memory that insists on what a driver is promised: inside the disk, aligned, within its limits, never empty.

``script(kind, offset, length)`` is awaited before each request has its effect, and may wait or raise. ``log`` lists the
requests as they came; ``bytes`` is the content, whole alignment units. ``quick``: whether ``try_read_into`` answers.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.ranges import align_up
from blocklayer.drivers.filter import FilterDriver
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.graph.driver import Driver
from blocklayer.graph.graph import Graph
from tests.helpers.scripted import NoEngine, ScriptedDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Self

    from blocklayer.base.options import Options
    from blocklayer.graph.node import Node
    from blocklayer.graph.opener import Opener

    Script = Callable[[str, int, int], Awaitable[None]]


class StrictDriver(Driver):
    """Options: ``size``, ``align``, ``transfer_max``, ``zeroes_max``, ``fua``, ``growable``, ``quick``."""

    name = "strict"

    def __init__(self, options: Options) -> None:
        """All zeroes."""
        given = {"size": 4096, "align": 1, "transfer_max": 1 << 20, "zeroes_max": 1 << 20, **options}
        self._size = int(given["size"])  # type: ignore[call-overload]  # a table of numbers
        self.align = int(given["align"])  # type: ignore[call-overload]  # as above
        self.limits = BlockLimits(self.align, 1, given["transfer_max"], given["zeroes_max"])  # type: ignore[arg-type]
        self.handles_fua = bool(given.get("fua"))
        self.growable = bool(given.get("growable"))
        self.quick = bool(given.get("quick"))
        self.bytes = bytearray(align_up(self._size, self.align))
        self.log: list[tuple[str, int, int]] = []
        self.flags: list[WriteFlags] = []
        self.script: Script | None = None
        self.closed = False

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """At once."""
        return cls(options)

    @property
    def size(self) -> int:
        """In bytes."""
        return self._size

    async def _step(self, kind: str, offset: int = 0, length: int = 0) -> None:
        assert not self.closed, f"{kind} after close"
        self.log.append((kind, offset, length))
        if self.script is not None:
            await self.script(kind, offset, length)

    def _check(self, offset: int, length: int, length_max: int) -> None:
        assert 0 < length <= length_max
        assert offset >= 0
        assert offset % self.align == 0
        assert length % self.align == 0
        assert self.growable or offset + length <= align_up(self._size, self.align)

    def _grow(self, end: int) -> None:
        """A write past the end extends the disk: by whole units, as a file does that is written so."""
        if end > len(self.bytes):
            self.bytes.extend(bytes(end - len(self.bytes)))
            self._size = end

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Only if it is quick."""
        if self.quick:
            buffer[:] = memoryview(self.bytes)[offset : offset + len(buffer)]
        return self.quick

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy out, with zeroes behind the end."""
        self._check(offset, len(buffer), self.limits.transfer_max)
        await self._step("read", offset, len(buffer))
        buffer[:] = bytes(self.bytes[offset : offset + len(buffer)]).ljust(len(buffer), b"\0")

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Copy in."""
        self._check(offset, len(data), self.limits.transfer_max)
        assert WriteFlags.FUA not in flags or self.handles_fua
        self.flags.append(flags)
        await self._step("write", offset, len(data))
        self._grow(offset + len(data))
        self.bytes[offset : offset + len(data)] = data

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """The same."""
        await self._step("write_compressed", offset, len(data))
        self.bytes[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero."""
        self._check(offset, length, self.limits.zeroes_max)
        self.flags.append(flags)
        await self._step("write_zeroes", offset, length)
        self._grow(offset + length)
        self.bytes[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        """Fill with 0xDD, so that tests see it."""
        self._check(offset, length, self.limits.zeroes_max)
        await self._step("discard", offset, length)
        self.bytes[offset : offset + length] = b"\xdd" * length

    async def flush(self) -> None:
        """Only logged."""
        await self._step("flush")

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Cut or extend."""
        await self._step("truncate", size)
        self._size = size
        del self.bytes[size:]
        self.bytes.extend(bytes(align_up(size, self.align) - len(self.bytes)))

    async def block_status(self, offset: int, length: int) -> Extent:
        """Data as far as one can see: clipping is not the driver's business."""
        assert length > 0
        await self._step("block_status", offset, length)
        return Extent(offset, self._size - offset, ExtentKind.DATA, host_offset=offset, host_node="somewhere")

    async def close(self) -> None:
        """Nothing may come after it."""
        await self._step("close")
        self.closed = True


class PlainFilter(FilterDriver):
    """A filter that changes nothing."""

    name = "plain-filter"

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """With its child."""
        return cls(await opener.child("file"))


def strict(node: Node) -> StrictDriver:
    """The driver of ``node``."""
    assert isinstance(node.driver, StrictDriver)
    return node.driver


@asynccontextmanager
async def strict_graph() -> AsyncIterator[Graph]:
    """A graph that knows strict, scripted and memory disks, and a plain filter."""
    drivers: dict[str, type[Driver]] = {
        driver.name: driver for driver in (StrictDriver, ScriptedDriver, MemoryDriver, PlainFilter)
    }
    async with Graph(drivers, engine=NoEngine) as graph:  # type: ignore[arg-type]  # no engine is used
        yield graph


def slow(seconds: float, *kinds: str) -> Script:
    """A script by which requests of ``kinds`` (none: all) take time."""

    async def script(kind: str, _offset: int, _length: int) -> None:
        if not kinds or kind in kinds:
            await anyio.sleep(seconds)

    return script
