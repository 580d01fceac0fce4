"""What happens to jobs, told to whoever wants to know: frozen records, and streams with bounded memory.

A stream gets every event from the moment it was made. It never holds up a job: a reader that falls more than
``EVENTS_MAX`` behind loses the oldest events, and ``EventStream.dropped`` counts them. Names and fields of the records
are those of QEMU's events (``device`` carries the job's id).
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing import Self

EVENTS_MAX = 1024
"""How many events wait for a slow reader. A job makes about ten, and one more for each failed request."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Root of the records. ``id`` is the job's."""

    name: ClassVar[str] = ""
    id: str

    def to_dict(self) -> dict[str, object]:
        """JSON-able, with the keys that QEMU uses."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"event": self.name, "data": {key: value for key, value in data.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class JobStatusChanged(JobEvent):
    """The job is in another state now."""

    name: ClassVar[str] = "JOB_STATUS_CHANGE"
    status: str


@dataclass(frozen=True, slots=True)
class _BlockJobEvent(JobEvent):
    """``type`` of the job; bytes done (``offset``) of ``len``; ``speed`` limit in bytes/s."""

    type: str
    len: int
    offset: int
    speed: int

    def to_dict(self) -> dict[str, object]:
        """As QEMU names it: ``device`` for the id."""
        record = JobEvent.to_dict(self)
        data = record["data"]
        if isinstance(data, dict):
            data["device"] = data.pop("id")
        return record


@dataclass(frozen=True, slots=True)
class BlockJobCompleted(_BlockJobEvent):
    """The job has ended; with ``error`` it failed."""

    name: ClassVar[str] = "BLOCK_JOB_COMPLETED"
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BlockJobCancelled(_BlockJobEvent):
    """The job has ended because it was cancelled."""

    name: ClassVar[str] = "BLOCK_JOB_CANCELLED"


@dataclass(frozen=True, slots=True)
class BlockJobReady(_BlockJobEvent):
    """The job could be completed now (a mirror)."""

    name: ClassVar[str] = "BLOCK_JOB_READY"


@dataclass(frozen=True, slots=True)
class BlockJobFailing(JobEvent):
    """A background request failed: ``operation`` is "read" or "write", ``action`` is "report", "ignore" or "stop"."""

    name: ClassVar[str] = "BLOCK_JOB_ERROR"
    operation: str
    action: str

    def to_dict(self) -> dict[str, object]:
        """As QEMU names it: ``device`` for the id."""
        return {"event": self.name, "data": {"device": self.id, "operation": self.operation, "action": self.action}}


@dataclass(frozen=True, slots=True)
class BlockJobPending(JobEvent):
    """The job's work is done and waits for ``finalize``."""

    name: ClassVar[str] = "BLOCK_JOB_PENDING"
    type: str


class EventStream:
    """An async iterator over events; it ends when the graph closes. One reader each."""

    def __init__(self) -> None:
        """Start empty."""
        self.dropped = 0
        """How many events were lost because the reader was slow."""
        self._events: deque[JobEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def put(self, event: JobEvent) -> None:
        """Add one; the oldest makes room if need be."""
        if len(self._events) >= EVENTS_MAX:
            self._events.popleft()
            self.dropped += 1
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """End the iteration after the events that are there."""
        self._closed = True
        self._wake()

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> JobEvent:
        """The next event; cancelling the wait loses none."""
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventHub:
    """Where jobs put events; streams that nobody holds any more vanish by themselves."""

    def __init__(self) -> None:
        """Start without streams."""
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._closed = False

    def emit(self, event: JobEvent) -> None:
        """Tell all streams."""
        for stream in self._streams:
            stream.put(event)

    def stream(self) -> EventStream:
        """A new stream of the events from now on."""
        stream = EventStream()
        self._streams.add(stream)
        if self._closed:
            stream.close()
        return stream

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for stream in self._streams:
            stream.close()
