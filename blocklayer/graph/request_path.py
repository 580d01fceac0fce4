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
from errno import ENOSPC
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from blocklayer.base.buffers import ZEROES, aligned_buffer, is_zero
from blocklayer.base.errors import BlockError, NoSpaceError, OptionError, OutOfRangeError, ReadOnlyError, StateError
from blocklayer.base.modes import DetectZeroes, DiscardMode, Preallocation, WriteFlags
from blocklayer.base.ranges import Range, split
from blocklayer.base.units import KIB, SIZE_MAX
from blocklayer.graph.requests import Request, RequestKind, RequestList
from blocklayer.graph.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from blocklayer.base.extents import Extent
    from blocklayer.graph.driver import Driver
    from blocklayer.graph.node_options import NodeOptions
    from blocklayer.graph.statistics import OperationCounters

    BeforeWrite = Callable[[Request], Awaitable[None] | None]

T = TypeVar("T")

INLINE_READ_MAX = 128 * KIB
"""Reads up to this length are tried inside the event loop first: about 15 us from the page cache, less than a thread
hop. Longer ones go to the threads, so that the loop and the copying use two cores."""

_NO_FLAGS = WriteFlags.NONE
_WRITE = RequestKind.WRITE


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
        self._transfer_max = driver.limits.transfer_max
        self._read_only = options.read_only
        self._detects_zeroes = options.detect_zeroes is not DetectZeroes.OFF
        self._write_through = options.cache.write_through
        self._starts_writes = not (options.read_only or self._detects_zeroes or self._write_through) and self._aligned
        self._write_generation = 0
        self._flushed_generation = 0
        self._flush_lock = asyncio.Lock()

    # -- reading -----------------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Read at once or answer False; see ``Driver.try_read_into``."""
        length = len(buffer)
        driver = self.driver
        if not length or offset < 0 or offset + length > driver.size or self.closed or not self._aligned:
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
        await self._run(
            Request(RequestKind.READ, offset, length), self.statistics.read, self._read_aligned(offset, buffer)
        )

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
        if len(buffer) <= self._transfer_max:
            await self.driver.read_into(offset, buffer)
            return
        for piece in split(offset, len(buffer), length_max=self._transfer_max):
            start = piece.offset - offset
            await self.driver.read_into(piece.offset, buffer[start : start + piece.length])

    # -- writing -----------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, flags: WriteFlags = _NO_FLAGS, *, grow: bool = False) -> None:
        """Write all of ``data``; ``grow`` allows to extend a driver that can."""
        length, driver = len(data), self.driver
        if self._read_only or self.closed or offset < 0 or offset + length > driver.size:
            self._check_write(offset, length, grow=grow)
        if not length:
            return
        if self._detects_zeroes and is_zero(data):
            unmap = WriteFlags.MAY_UNMAP if self.options.detect_zeroes is DetectZeroes.UNMAP else _NO_FLAGS
            await self.write_zeroes(offset, length, (flags & ~WriteFlags.NO_FALLBACK) | unmap, grow=grow)
            return
        request = Request(_WRITE, offset, length, flags)
        request.grows = grow and driver.growable
        simple = self._aligned and length <= self._transfer_max
        action = driver.write if simple else partial(self._write_aligned, request)
        await self._run_write(request, self.statistics.write, action, data)

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a write that needs nothing but the driver, or answer False; see ``Driver.start_write``."""
        length, driver, requests = len(data), self.driver, self.requests
        if not self._starts_writes or self.hooks or requests.serialising or self.closed:
            return False
        if offset < 0 or not 0 < length <= self._transfer_max or offset + length > driver.size:
            return False
        request = Request(_WRITE, offset, length)
        started = perf_counter()

        def finished(error: BlockError | None) -> None:
            self._write_generation += 1
            requests.remove(request)
            counters = self.statistics.write
            if error is None:
                counters.record(length, perf_counter() - started)
                self.statistics.wrote(offset + length)
            else:
                self._count_error(counters, error)
            done(error)

        requests.add(request)
        began = False
        try:
            began = driver.start_write(offset, data, finished)
        finally:
            if not began:
                requests.remove(request)
        return began

    async def write_compressed(self, offset: int, data: memoryview, flags: WriteFlags = _NO_FLAGS) -> None:
        """Write one cluster compressed; the driver checks that it is one."""
        self._check_write(offset, len(data), grow=False)
        if len(data):
            request = Request(RequestKind.WRITE, offset, len(data), flags)
            await self._run_write(request, self.statistics.write, self._write_compressed, data)
            if self.driver.handles_fua and (self._write_through or WriteFlags.FUA in flags):
                await self._flush()  # drivers take FUA with plain writes only

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
        request.grows = grow and self.driver.growable
        await self._run_write(request, self.statistics.write_zeroes, partial(self._zero_aligned, request), length)

    async def discard(self, offset: int, length: int) -> None:
        """Drop the range's content, if the node passes discards on; notifiers run in any case."""
        self._check_write(offset, length, grow=False)
        if length:
            request = Request(RequestKind.DISCARD, offset, length)
            await self._run_write(request, self.statistics.discard, self._discard_aligned, length)

    async def _run_write(
        self,
        request: Request,
        counters: OperationCounters,
        action: Callable[[int, T, WriteFlags], Awaitable[None]],
        what: T,
    ) -> None:
        """Track, notify, wait for the request's turn, act, count. ``what`` is the data, or a length."""
        requests, flags = self.requests, request.flags
        offset, length = request.offset, request.length
        is_plain = flags is _NO_FLAGS and not self._write_through
        passed = flags if is_plain else self._passed(flags)
        requests.add(request)
        started = perf_counter()
        try:
            if self.hooks and (is_plain or WriteFlags.UNCHANGED not in flags):
                for hook in tuple(self.hooks):
                    waiting = hook(request)
                    if waiting is not None:
                        await waiting
            if not is_plain and WriteFlags.SERIALISING in flags:
                await self._serialise(request, Range(offset, length), Range(offset, length))
            elif requests.serialising:
                await self._wait_turn(request, offset, length)
            try:
                await action(offset, what, passed)
            finally:
                self._write_generation += 1
        except BlockError as error:
            self._count_error(counters, error)
            raise
        finally:
            requests.remove(request)
        counters.record(length, perf_counter() - started)
        self.statistics.wrote(offset + length)
        if not is_plain and (self._write_through or WriteFlags.FUA in flags) and not self.driver.handles_fua:
            await self._flush()

    def _passed(self, flags: WriteFlags) -> WriteFlags:
        """What the driver gets to see of a request's flags."""
        passed = flags & (WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK)
        if self.driver.handles_fua and (self._write_through or WriteFlags.FUA in flags):
            passed |= WriteFlags.FUA
        return passed

    async def _write_aligned(self, request: Request, offset: int, data: memoryview, flags: WriteFlags) -> None:
        if not self._aligned:
            alignment = self.driver.limits.request_alignment
            wanted = Range(offset, len(data))
            outer = wanted.aligned_out(alignment)
            if outer != wanted:
                await self._serialise(request, outer, wanted)
                data = await self._merge(outer, offset, data, alignment)
                offset = outer.offset
        for piece in split(offset, len(data), length_max=self._transfer_max):
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

    async def _write_compressed(self, offset: int, data: memoryview, _flags: WriteFlags) -> None:
        await self.driver.write_compressed(offset, data)

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

    async def _discard_aligned(self, offset: int, length: int, _flags: WriteFlags) -> None:
        if self.options.discard is DiscardMode.IGNORE:
            return
        inner = Range(offset, length).aligned_in(self.driver.limits.request_alignment)
        for piece in split(inner.offset, inner.length, length_max=self.driver.limits.zeroes_max):
            await self.driver.discard(piece.offset, piece.length)

    # -- the rest ----------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make all writes that completed before this call durable; nothing happens if none did since the last flush."""
        self._check_open()
        await self._flush()

    async def settle(self) -> None:
        """After ``closed`` is set: wait for the requests in flight, and flush."""
        await self.requests.wait_idle()
        await self._flush()

    async def _flush(self) -> None:
        if self.options.read_only:
            return
        wanted = self._write_generation
        async with self._flush_lock:
            if self._flushed_generation >= wanted and wanted:
                return
            reached = self._write_generation
            await self._run(Request(RequestKind.FLUSH, 0, 0), self.statistics.flush, self.driver.flush())
            self._flushed_generation = reached

    async def truncate(self, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Change the size; waits for, and holds off, all requests on what is cut or added."""
        self._check_write(0, 0, grow=False)
        if not 0 <= size <= SIZE_MAX:
            raise OptionError(f"a size is 0 to {SIZE_MAX} bytes, not {size}", node=self.name)
        old = self.driver.size
        start = min(old, size)
        request = Request(RequestKind.TRUNCATE, start, max(old, size) - start, serialising=True)
        await self._run(request, self.statistics.truncate, self.driver.truncate(size, preallocation))
        self._write_generation += 1

    async def block_status(self, offset: int, length: int) -> Extent:
        """Status of this layer from ``offset`` on, clipped to ``length``."""
        self._check_range(offset, length)
        if not length:
            raise OutOfRangeError("an empty range has no status", node=self.name, offset=offset, length=length)
        status = self.driver.try_block_status(offset, length)
        if status is None:
            status = await self.driver.block_status(offset, length)
        return status if status.end <= offset + length else status.clipped(offset, length)

    # -- helpers -----------------------------------------------------------------------------------------------

    async def _run(
        self, request: Request, counters: OperationCounters, action: Coroutine[object, object, None]
    ) -> None:
        """Track, wait for the request's turn, act, count: what does not change content."""
        requests = self.requests
        requests.add(request)
        started = perf_counter()
        try:
            if requests.serialising:
                await self._wait_turn(request, request.offset, request.length)
            await action
        except BlockError as error:
            self._count_error(counters, error)
            raise
        finally:
            action.close()
            requests.remove(request)
        counters.record(request.length, perf_counter() - started)

    def _count_error(self, counters: OperationCounters, error: BlockError) -> None:
        counters.errors += 1
        if error.node is None:
            error.node = self.name

    async def _serialise(self, request: Request, outer: Range, wanted: Range) -> None:
        """Make ``request`` serialising over its own range and ``outer``; ``wanted`` is what it is about to change."""
        start = min(outer.offset, request.offset)
        end = max(outer.end, request.offset + request.length)
        self.requests.promote(request, start, end - start)
        await self._wait_turn(request, wanted.offset, wanted.length)

    async def _wait_turn(self, request: Request, offset: int, length: int) -> None:
        """Wait for conflicting requests. One of them may have been a truncation that cut ``[offset, offset + length)`` off."""
        await self.requests.wait_turn(request)
        if offset + length > self.driver.size and request.kind is not RequestKind.TRUNCATE and not request.grows:
            self._check_range(offset, length)

    def _check_open(self) -> None:
        if self.closed:
            raise StateError("it is closed", node=self.name)

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self.driver.size:
            message = f"request outside the node's {self.driver.size} bytes"
            raise OutOfRangeError(message, node=self.name, offset=offset, length=length)

    def _check_write(self, offset: int, length: int, *, grow: bool) -> None:
        if self._read_only:
            raise ReadOnlyError("it was opened read-only", node=self.name, offset=offset, length=length)
        end = offset + length
        if self.closed or not 0 <= offset <= end or (end > self.driver.size and not (grow and self.driver.growable)):
            if grow and 0 <= offset <= end and not self.closed:
                message = f"it has {self.driver.size} bytes and cannot grow"
                raise NoSpaceError(message, errno=ENOSPC, node=self.name, offset=offset, length=length)
            self._check_range(offset, length)


def _edges(outer: Range, inner: Range) -> tuple[Range, ...]:
    """What ``outer`` has before and behind ``inner``."""
    if not inner.length:
        return (outer,)
    head = Range(outer.offset, inner.offset - outer.offset)
    tail = Range(inner.end, outer.end - inner.end)
    return tuple(edge for edge in (head, tail) if edge.length)
