"""ThreadEngine: blocking calls in batches on few worker threads.

A hop to a thread and back costs 40 to 100 us, whether it carries one request or sixty. So requests are collected during
one tick of the event loop and handed over together: one queue item, one wake-up, one ``call_soon_threadsafe`` when the
batch is done. Small writes, which as a rule end in the page cache, are collected for as long as a batch of them is under
way: else requests that arrive one by one would travel one by one. Requests of 128 KiB or more take long enough to pay for their own hop and go one by one at once, so that
two of them run on two cores (the copying releases the GIL).

    event loop    run() ... run() | end of tick, or enough: _hand_over       _complete: futures get their results
    queue                         +--> [small, small, small], [large], [large]
    worker                              function(*args) each --> call_soon_threadsafe(_complete, batch)

Invariant: an operation is in exactly one of three places: ``_collected`` (may be dropped), handed over (a thread may be
using its buffers; only ``_complete`` ends that), or done.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeVar, cast

from blocklayer.aio import positional
from blocklayer.aio.engine import Engine
from blocklayer.aio.fallocate import fallocate
from blocklayer.base.errors import StateError, from_os_error
from blocklayer.base.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

WORKERS: Final = 4
"""Threads of an engine. Cached I/O is bound by two cores; a few more let slow devices overlap requests."""

LARGE: Final = 128 * KIB
"""From this weight on an operation is handed over alone."""

BATCH: Final = MIB
"""Bytes that small operations of one tick bring together at most. Smaller batches on more threads are slower, not faster:
threads that write to one file wait for its lock in the kernel, and all of them for the interpreter's."""


HOLD_S: Final = 0.001
"""Small writes wait for the batch before them, but not longer than this: a device may be slow, or the file system busy."""


class _Operation:
    """One call on its way. ``future`` is what the caller awaits; ``drained`` what a cancelled caller awaits instead.

    ``done`` is called in place of a future that nobody waits for.
    """

    __slots__ = ("args", "done", "drained", "error", "function", "future", "handed_over", "result")

    def __init__(
        self,
        future: asyncio.Future[object] | None,
        function: Callable[..., object],
        args: tuple[object, ...],
        done: Callable[[OSError | None], None] | None = None,
    ) -> None:
        self.done = done
        self.future = future
        self.function = function
        self.args = args
        self.handed_over = False
        self.drained: asyncio.Future[None] | None = None
        self.result: object = None
        self.error: BaseException | None = None


class _Collector:
    """Small operations that are handed over together: at the end of the tick, or when ``BATCH`` bytes have come together.

    With ``hold_s`` they also wait until no batch of theirs is in flight, at most so long.
    """

    __slots__ = ("_due", "_hold_s", "_in_flight", "_loop", "_operations", "_put", "_timer", "_weight")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        put: Callable[[list[_Operation], _Collector | None], None],
        *,
        hold_s: float = 0.0,
    ) -> None:
        """``put(batch, self)`` hands over."""
        self._loop = loop
        self._put = put
        self._hold_s = hold_s
        self._operations: list[_Operation] = []
        self._weight = 0
        self._due = False  # the hand-over at the end of this tick is scheduled
        self._in_flight = 0  # batches
        self._timer: asyncio.TimerHandle | None = None

    def add(self, operation: _Operation, weight: int) -> None:
        """Collect ``operation``, of ``weight`` bytes."""
        self._operations.append(operation)
        self._weight += weight
        if self._weight >= BATCH:
            self._hand_over()
        elif not self._due:
            if not (self._in_flight and self._hold_s):
                self._schedule()
            elif self._timer is None:
                self._timer = self._loop.call_later(self._hold_s, self._hand_over)

    def completed(self) -> None:
        """A batch has got its results. Those whom that wakes up often ask for more: it goes on its way in the same tick."""
        self._in_flight -= 1
        if not (self._due or (self._in_flight and self._hold_s)):
            self._schedule()

    def _schedule(self) -> None:
        self._due = True
        self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        """What is here becomes a batch, but for what was cancelled meanwhile."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = False
        collected, self._operations, self._weight = self._operations, [], 0
        batch = [each for each in collected if each.future is None or not each.future.done()]
        if batch:
            self._in_flight += 1
            self._put(batch, self)


class ThreadEngine(Engine):
    """See the module's text. Made inside a running event loop; threads start when the first work arrives."""

    def __init__(self, *, workers: int = WORKERS) -> None:
        """Bind to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[tuple[list[_Operation], _Collector | None] | None] = SimpleQueue()
        self._small = _Collector(self._loop, self._put)
        self._small_writes = _Collector(self._loop, self._put, hold_s=HOLD_S)
        self._in_flight = 0
        self._batches = 0  # handed over and not completed: each may be blocking a thread
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._idle: asyncio.Event = asyncio.Event()
        self._closed = False

    # -- calls -------------------------------------------------------------------------------------------------

    async def read(self, fd: int, buffer: memoryview, offset: int) -> None:
        """See ``Engine.read``."""
        try:
            await self._run(positional.read_full, (fd, buffer, offset), len(buffer))
        except OSError as error:
            raise from_os_error(error, "read", offset=offset, length=len(buffer)) from None

    async def write(self, fd: int, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        """See ``Engine.write``. As ``_run``, but without its coroutine: this is the call that counts."""
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        collector = self._small if durable else self._small_writes
        operation, future = self._begin(collector, positional.write_full, (fd, buffers, offset, durable), length)
        try:
            await future
        except asyncio.CancelledError:
            await self._let_go(operation)
            raise
        except OSError as error:
            raise from_os_error(error, "write", offset=offset, length=length) from None

    def start_write(self, fd: int, data: memoryview, offset: int, done: Callable[[OSError | None], None]) -> bool:
        """See ``Engine.start_write``."""
        if self._closed:
            return False
        operation = _Operation(None, positional.write_full, (fd, (data,), offset, False), done)
        self._in_flight += 1
        length = len(data)
        if length >= LARGE:
            self._put([operation], None)
        else:
            self._small_writes.add(operation, length)
        return True

    async def sync(self, fd: int) -> None:
        """See ``Engine.sync``."""
        try:
            await self._run(os.fdatasync, (fd,), LARGE)
        except OSError as error:
            raise from_os_error(error, "flush") from None

    async def allocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See ``Engine.allocate``."""
        try:
            await self._run(fallocate, (fd, mode, offset, length), 0)
        except OSError as error:
            raise from_os_error(error, "fallocate", offset=offset, length=length) from None

    async def call(self, function: Callable[..., T], *args: object, weight: int = 0) -> T:
        """See ``Engine.call``."""
        try:
            return cast("T", await self._run(function, args, weight))
        except OSError as error:
            raise from_os_error(error, getattr(function, "__name__", "call")) from None

    async def close(self) -> None:
        """See ``Engine.close``."""
        self._closed = True
        while self._in_flight:
            self._idle.clear()
            await self._idle.wait()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    # -- the way there and back --------------------------------------------------------------------------------

    async def _run(self, function: Callable[..., object], args: tuple[object, ...], weight: int) -> object:
        operation, future = self._begin(self._small, function, args, weight)
        try:
            return await future
        except asyncio.CancelledError:
            await self._let_go(operation)
            raise

    def _begin(
        self, collector: _Collector, function: Callable[..., object], args: tuple[object, ...], weight: int
    ) -> tuple[_Operation, asyncio.Future[object]]:
        """Collect an operation, or hand it over; the caller awaits its future, and if cancelled ``_let_go``."""
        if self._closed:
            raise StateError("the I/O engine is closed")
        future: asyncio.Future[object] = self._loop.create_future()
        operation = _Operation(future, function, args)
        self._in_flight += 1
        if weight >= LARGE:
            self._put([operation], None)
        else:
            collector.add(operation, weight)
        return operation, future

    async def _let_go(self, operation: _Operation) -> None:
        """The caller was cancelled: take the operation back if that is possible, else wait until its thread is done."""
        if not operation.handed_over:
            self._finished()
            return
        while operation.result is _PENDING:
            operation.drained = self._loop.create_future()
            try:
                await operation.drained
            except asyncio.CancelledError:
                continue

    def _put(self, batch: list[_Operation], collector: _Collector | None) -> None:
        for operation in batch:
            operation.handed_over = True
            operation.result = _PENDING
        self._queue.put((batch, collector))
        self._batches += 1
        if len(self._threads) < min(self._workers, self._batches):
            thread = threading.Thread(target=self._work, name="blocklayer-io", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        """A worker thread's life."""
        while (item := self._queue.get()) is not None:
            batch, collector = item
            for operation in batch:
                try:
                    operation.result = operation.function(*operation.args)
                except BaseException as error:  # noqa: BLE001 - every outcome belongs to the caller
                    operation.result, operation.error = None, error
            self._loop.call_soon_threadsafe(self._complete, batch, collector)
            del item, batch, operation  # an idle thread keeps no buffer alive

    def _complete(self, batch: list[_Operation], collector: _Collector | None) -> None:
        """Back in the event loop: give a whole batch its results."""
        self._batches -= 1
        for operation in batch:
            future, error = operation.future, operation.error
            if future is None:
                self._tell(operation)
            elif not future.done():
                if error is None:
                    future.set_result(operation.result)
                elif isinstance(error, StopIteration):  # no future takes it
                    future.set_exception(RuntimeError(f"{operation.function} raised StopIteration"))
                else:
                    future.set_exception(error)
            elif operation.drained is not None and not operation.drained.done():
                operation.drained.set_result(None)
        if collector is not None:
            collector.completed()
        self._finished(len(batch))

    def _tell(self, operation: _Operation) -> None:
        """Call who has no future; what is raised there is a bug, and must not keep others from their results."""
        error = operation.error
        try:
            if operation.done is not None:
                operation.done(
                    error if error is None or isinstance(error, OSError) else OSError(errno.EIO, repr(error))
                )
        except Exception as bug:  # noqa: BLE001 - as asyncio does with callbacks
            self._loop.call_exception_handler({"message": "a write's callback failed", "exception": bug})

    def _finished(self, count: int = 1) -> None:
        self._in_flight -= count
        if not self._in_flight:
            self._idle.set()


_PENDING: Final = object()
"""The result of an operation that a thread has not finished."""
