"""The way of a request through one node, from its edge or its caller down to the driver.

    read    bounds -> try at once -> track -> wait for serialising requests -> align, split -> driver -> count
    write   bounds -> detect zeroes -> track -> before-write notifiers -> wait for serialising requests
            -> align (read-modify-write), split -> driver -> count -> untrack, wake waiters

Invariants
- A request is on ``requests`` from before its notifiers run until the driver is done, however it ends.
- Notifiers run before the request can be serialising, so that what they read is never held up by the request itself.
- A notifier that raises fails the request; the driver has not seen it.
- Alignment and splitting happen here and nowhere else.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING

from blocklayer.base.buffers import ZEROES, aligned_buffer, is_zero
from blocklayer.base.errors import BlockError, OutOfRangeError, ReadOnlyError, StateError
from blocklayer.base.modes import DetectZeroes, DiscardMode, Preallocation, WriteFlags
from blocklayer.base.ranges import Range, split
from blocklayer.base.units import KIB
from blocklayer.graph.requests import Request, RequestKind, RequestList
from blocklayer.graph.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blocklayer.base.extents import Extent
    from blocklayer.graph.driver import Driver
    from blocklayer.graph.node_options import NodeOptions

    BeforeWrite = Callable[[Request], Awaitable[None]]

INLINE_READ_MAX = 128 * KIB
"""Reads up to this length are tried inside the event loop first: about 15 us from the page cache, less than a thread
hop. Longer ones go to the threads, so that the loop and the copying use two cores."""

_NO_FLAGS = WriteFlags.NONE


class RequestPath:
    """Runs requests on one driver. ``options`` are the node's (read-only, detect-zeroes, discard, cache)."""

    def __init__(self, name: str, driver: Driver, options: NodeOptions) -> None:
        """Start with no request in flight."""
        self.name = name
        self.driver = driver
        self.options = options
        self.requests = RequestList()
        self.statistics = Statistics()
        self.hooks: list[BeforeWrite] = []
        self.closed = False
        self._aligned = driver.limits.request_alignment == 1
        self._write_generation = 0
        self._flushed_generation = 0
        self._flush_lock = asyncio.Lock()

    # -- reading -----------------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Read at once or answer False; see ``Driver.try_read_into``."""
        length = len(buffer)
        driver = self.driver
        if offset < 0 or offset + length > driver.size or self.closed or not self._aligned:
            return False
        if self.requests.serialising and self.requests.blocks(offset, length):
            return False
        if not driver.try_read_into(offset, buffer):
            return False
        counters = self.statistics.read
        counters.operations += 1
        counters.bytes += length
        counters.latency[0] += 1
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` or raise."""
        length = len(buffer)
        if length <= INLINE_READ_MAX and self.try_read_into(offset, buffer):
            return
        self._check_range(offset, length)
        if not length:
            return
        request = Request(RequestKind.READ, offset, length)
        await self._run(request, lambda: self._read_aligned(offset, buffer))

    async def _read_aligned(self, offset: int, buffer: memoryview) -> None:
        if self._aligned:
            await self._read_split(offset, buffer)
            return
        length = len(buffer)
        outer = Range(offset, length).aligned_out(self.driver.limits.request_alignment)
        if outer == (offset, length):
            await self._read_split(offset, buffer)
            return
        bounce = aligned_buffer(outer.length)
        await self._read_split(outer.offset, bounce)
        skip = offset - outer.offset
        buffer[:] = bounce[skip : skip + length]

    async def _read_split(self, offset: int, buffer: memoryview) -> None:
        length_max = self.driver.limits.transfer_max
        if len(buffer) <= length_max:
            await self.driver.read_into(offset, buffer)
            return
        for piece in split(offset, len(buffer), length_max=length_max):
            start = piece.offset - offset
            await self.driver.read_into(piece.offset, buffer[start : start + piece.length])

    # -- writing -----------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, flags: WriteFlags = _NO_FLAGS, *, grow: bool = False) -> None:
        """Write all of ``data``; ``grow`` allows to extend a driver that can."""
        length = len(data)
        self._check_write(offset, length, grow=grow)
        if not length:
            return
        detect = self.options.detect_zeroes
        if detect is not DetectZeroes.OFF and is_zero(data):
            unmap = WriteFlags.MAY_UNMAP if detect is DetectZeroes.UNMAP else _NO_FLAGS
            await self.write_zeroes(offset, length, (flags & ~WriteFlags.NO_FALLBACK) | unmap, grow=grow)
            return
        request = Request(RequestKind.WRITE, offset, length, flags)
        await self._run_write(request, lambda fua: self._write_aligned(request, offset, data, fua))

    async def write_compressed(self, offset: int, data: memoryview, flags: WriteFlags = _NO_FLAGS) -> None:
        """Write one cluster compressed; the driver checks that it is one."""
        self._check_write(offset, len(data), grow=False)
        request = Request(RequestKind.WRITE, offset, len(data), flags)
        await self._run_write(request, lambda _fua: self.driver.write_compressed(offset, data))

    async def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = _NO_FLAGS, *, grow: bool = False
    ) -> None:
        """Make the range read as zeroes."""
        self._check_write(offset, length, grow=grow)
        if not length:
            return
        if self.options.discard is DiscardMode.IGNORE:
            flags &= ~WriteFlags.MAY_UNMAP
        request = Request(RequestKind.WRITE_ZEROES, offset, length, flags)
        await self._run_write(request, lambda fua: self._zero_aligned(request, offset, length, fua))

    async def discard(self, offset: int, length: int) -> None:
        """Drop the range's content, if the node passes discards on; notifiers run in any case."""
        self._check_write(offset, length, grow=False)
        if length:
            request = Request(RequestKind.DISCARD, offset, length)
            await self._run_write(request, lambda _fua: self._discard_aligned(offset, length))

    async def _run_write(self, request: Request, action: Callable[[WriteFlags], Awaitable[None]]) -> None:
        flags = request.flags
        fua = WriteFlags.FUA in flags or self.options.cache.write_through
        passed = flags & (WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK)
        if fua and self.driver.handles_fua:
            passed |= WriteFlags.FUA

        async def body() -> None:
            if self.hooks and WriteFlags.UNCHANGED not in flags:
                for hook in tuple(self.hooks):
                    await hook(request)
            if WriteFlags.SERIALISING in flags:
                await self._serialise(request, request.offset, request.length)
            elif self.requests.serialising:
                await self.requests.wait_turn(request)
            try:
                await action(passed)
            finally:
                self._write_generation += 1

        await self._run(request, body, waits=False)
        self.statistics.write_end_max = max(self.statistics.write_end_max, request.offset + request.length)
        if fua and not self.driver.handles_fua:
            await self.flush()

    async def _write_aligned(self, request: Request, offset: int, data: memoryview, flags: WriteFlags) -> None:
        if not self._aligned:
            alignment = self.driver.limits.request_alignment
            outer = Range(offset, len(data)).aligned_out(alignment)
            if outer != (offset, len(data)):
                await self._serialise(request, outer.offset, outer.length)
                data = await self._merge(outer, offset, data, alignment)
                offset = outer.offset
        length_max = self.driver.limits.transfer_max
        if len(data) <= length_max:
            await self.driver.write(offset, data, flags)
            return
        for piece in split(offset, len(data), length_max=length_max):
            start = piece.offset - offset
            await self.driver.write(piece.offset, data[start : start + piece.length], flags)

    async def _merge(self, outer: Range, offset: int, data: memoryview, alignment: int) -> memoryview:
        """The aligned range ``outer`` with ``data`` laid over what is stored (read-modify-write)."""
        merged = aligned_buffer(outer.length)
        edges = {outer.offset} if offset != outer.offset else set()
        if offset + len(data) != outer.end:
            edges.add(outer.end - alignment)
        for edge in edges:
            if edge < self.driver.size:
                start = edge - outer.offset
                await self.driver.read_into(edge, merged[start : start + alignment])
        start = offset - outer.offset
        merged[start : start + len(data)] = data
        return merged

    async def _zero_aligned(self, request: Request, offset: int, length: int, flags: WriteFlags) -> None:
        limits = self.driver.limits
        inner = Range(offset, length).aligned_in(limits.request_alignment)
        for edge in _edges(Range(offset, length), inner):
            await self._write_edge(request, edge, flags)
        for piece in split(inner.offset, inner.length, length_max=limits.zeroes_max):
            await self.driver.write_zeroes(piece.offset, piece.length, flags)

    async def _write_edge(self, request: Request, edge: Range, flags: WriteFlags) -> None:
        data = ZEROES[: edge.length]
        await self._write_aligned(request, edge.offset, data, flags & WriteFlags.FUA)

    async def _discard_aligned(self, offset: int, length: int) -> None:
        if self.options.discard is DiscardMode.IGNORE:
            return
        inner = Range(offset, length).aligned_in(self.driver.limits.request_alignment)
        for piece in split(inner.offset, inner.length, length_max=self.driver.limits.zeroes_max):
            await self.driver.discard(piece.offset, piece.length)

    # -- the rest ----------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make all writes that completed before this call durable; nothing happens if none did since the last flush."""
        self._check_open()
        if self.options.read_only:
            return
        wanted = self._write_generation
        async with self._flush_lock:
            if self._flushed_generation >= wanted and wanted:
                return
            reached = self._write_generation
            await self._run(Request(RequestKind.FLUSH, 0, 0), self.driver.flush)
            self._flushed_generation = reached

    async def truncate(self, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Change the size; waits for, and holds off, all requests on what is cut or added."""
        self._check_write(0, 0, grow=False)
        old = self.driver.size
        start = min(old, size)
        request = Request(RequestKind.TRUNCATE, start, max(old, size) - start, serialising=True)
        await self._run(request, lambda: self.driver.truncate(size, preallocation))
        self._write_generation += 1

    async def block_status(self, offset: int, length: int) -> Extent:
        """Status of this layer from ``offset`` on, clipped to ``length``."""
        self._check_range(offset, length)
        status = self.driver.try_block_status(offset, length)
        if status is None:
            status = await self.driver.block_status(offset, length)
        return status if status.end <= offset + length else status.clipped(offset, length)

    # -- helpers -----------------------------------------------------------------------------------------------

    async def _run(self, request: Request, body: Callable[[], Awaitable[None]], *, waits: bool = True) -> None:
        """Track, run, count."""
        requests = self.requests
        requests.add(request)
        offset, length = request.offset, request.length
        started = perf_counter()
        try:
            if waits and requests.serialising:
                await requests.wait_turn(request)
            await body()
        except BlockError as error:
            self.statistics.of(request.kind).errors += 1
            if error.node is None:
                error.node = self.name
            raise
        finally:
            requests.remove(request)
        self.statistics.of(request.kind).record(length, perf_counter() - started)
        request.offset, request.length = offset, length

    async def _serialise(self, request: Request, offset: int, length: int) -> None:
        """Make ``request`` serialising over its own range and the given one."""
        start = min(offset, request.offset)
        end = max(offset + length, request.offset + request.length)
        self.requests.promote(request, start, end - start)
        await self.requests.wait_turn(request)

    def _check_open(self) -> None:
        if self.closed:
            raise StateError("it is closed", node=self.name)

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self.driver.size:
            message = f"request outside the node's {self.driver.size} bytes"
            raise OutOfRangeError(message, node=self.name, offset=offset, length=length)

    def _check_write(self, offset: int, length: int, *, grow: bool) -> None:
        if self.options.read_only:
            raise ReadOnlyError("it was opened read-only", node=self.name, offset=offset, length=length)
        if not (grow and self.driver.growable) or offset < 0:
            self._check_range(offset, length)
        else:
            self._check_open()


def _edges(outer: Range, inner: Range) -> tuple[Range, ...]:
    """What ``outer`` has before and behind ``inner``."""
    if not inner.length:
        return (outer,)
    head = Range(outer.offset, inner.offset - outer.offset)
    tail = Range(inner.end, outer.end - inner.end)
    return tuple(edge for edge in (head, tail) if edge.length)
