"""qcow2 disks on a file in memory that tests can look into, script, and crash.

``MemoryFile`` is the driver "memfile": it grows, logs writes and flushes as ``crash.Event``, and awaits ``script`` before
each request (a gate, a fault). Its bytes belong to the test, who opens and checks them again and again.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio.lowlevel

import blocklayer
from blocklayer.aio.engine import Engine
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.check import check, run_check
from blocklayer.codec.qcow2.create import CreateOptions, plan_create
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.drivers.qcow2 import Qcow2Driver
from tests.helpers.crash import apply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import Self

    from blocklayer.base.modes import Preallocation, WriteFlags
    from blocklayer.base.options import Options
    from blocklayer.codec.qcow2.check_result import CheckResult
    from blocklayer.graph.node import Node
    from blocklayer.graph.opener import Opener
    from tests.helpers.crash import Event
    from tests.helpers.scripted import Script


class MemoryFile(MemoryDriver):
    """A file whose ``bytes`` are the test's. A flush is logged when it starts: what ends later is not covered by it."""

    name = "memfile"
    growable = True

    def __init__(self, content: bytearray) -> None:
        super().__init__(0)
        self._bytes = content
        self.script: Script | None = None
        self.log: list[Event] = []

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """Options ``content`` and, if it is to see the first requests too, ``script``."""
        content = options["content"]
        assert isinstance(content, bytearray)
        file = cls(content)
        file.script = cast("Script | None", options.get("script"))
        return file

    async def _step(self, kind: str, offset: int, length: int) -> None:
        if self.script is not None:
            await self.script(kind, offset, length)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """A script sees every read."""
        return self.script is None and super().try_read_into(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._step("read", offset, len(buffer))
        super().try_read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        await self._step("write", offset, len(data))
        self._store(offset, bytes(data))

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        await self._step("write_zeroes", offset, length)
        self._store(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        """Space that is given back reads as something else: nobody may count on it."""
        await self._step("discard", offset, length)
        self._store(offset, b"\xdd" * min(length, len(self._bytes) - offset))

    def _store(self, offset: int, data: bytes) -> None:
        self.log.append(("write", offset, data))
        apply(self._bytes, [(offset, data)])

    async def flush(self) -> None:
        self.log.append(("flush",))
        await self._step("flush", 0, 0)

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        await self._step("truncate", size, 0)
        del self._bytes[size:]
        self._bytes.extend(bytes(size - len(self._bytes)))


class InlineEngine(Engine):
    """Does heavy work at once: no threads, so that runs repeat themselves."""

    async def read(self, fd: int, buffer: memoryview, offset: int) -> None:
        raise NotImplementedError

    async def write(self, fd: int, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        raise NotImplementedError

    async def sync(self, fd: int) -> None:
        raise NotImplementedError

    async def allocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        raise NotImplementedError

    async def call(self, function: Callable[..., Any], *args: object, weight: int = 0) -> Any:
        await anyio.lowlevel.checkpoint()
        return function(*args)

    async def close(self) -> None:
        """Nothing runs."""


def memory_graph(**options: Any) -> blocklayer.Graph:
    """A graph without threads that knows "memfile"."""
    return blocklayer.Graph(drivers={"memfile": MemoryFile}, engine=InlineEngine, **options)


def new_image(size: int, **options: Any) -> bytearray:
    """The bytes of a new image."""
    plan = plan_create(CreateOptions(size, **options))
    return apply(bytearray(plan.file_size), plan.writes())


async def open_image(graph: blocklayer.Graph, content: bytearray, **options: Any) -> Node:
    """Open an image in memory."""
    return await graph.open({"driver": "qcow2", "file": {"driver": "memfile", "content": content}, **options})


@asynccontextmanager
async def opened(content: bytearray, **options: Any) -> AsyncIterator[Node]:
    """The same in a graph of its own, closed at the end."""
    async with memory_graph() as graph:
        disk = await open_image(graph, content, **options)
        yield disk
        await disk.close()


def qcow2(disk: Node) -> Qcow2Driver:
    """The driver of a qcow2 disk."""
    assert isinstance(disk.driver, Qcow2Driver)
    return disk.driver


def file_of(disk: Node) -> MemoryFile:
    """The file below a qcow2 disk."""
    driver = disk.children["file"].node.driver
    assert isinstance(driver, MemoryFile)
    return driver


def check_bytes(content: bytes | bytearray) -> CheckResult:
    """Our check of an image in memory."""
    header = qcow2_header.parse(bytes(content[: 2 << 20]), file_size=len(content))
    return run_check(
        check(header, file_size=len(content)), lambda offset, length: bytes(content[offset : offset + length])
    )


def assert_sound(content: bytes | bytearray, *, leaks: bool = False) -> None:
    """Nothing is corrupt, and nothing is leaked unless that is allowed."""
    result = check_bytes(content)
    assert [*result.broken.described, *result.counts.described, *result.flags.described] == []
    if not leaks:
        assert result.leaks.described == []


def header_of(content: bytes | bytearray) -> qcow2_header.Header:
    """The header as it is in the file."""
    return qcow2_header.parse(bytes(content[: 2 << 20]), file_size=len(content))
