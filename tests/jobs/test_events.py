"""Events: streams that never hold up a job, and records as QEMU writes them."""

from __future__ import annotations

import gc

import anyio
import pytest

from blocklayer.jobs.events import (
    EVENTS_MAX,
    BlockJobCompleted,
    BlockJobFailing,
    BlockJobPending,
    EventHub,
    JobStatusChanged,
)
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_a_stream_gets_events_from_its_beginning_on() -> None:
    hub = EventHub()
    hub.emit(JobStatusChanged("a", "created"))
    stream = hub.stream()
    hub.emit(JobStatusChanged("a", "running"))
    hub.emit(JobStatusChanged("a", "paused"))
    assert [(await anext(stream)).to_dict()["data"] for _ in range(2)] == [
        {"id": "a", "status": "running"},
        {"id": "a", "status": "paused"},
    ]


@virtual_time
async def test_a_slow_reader_loses_the_oldest_and_can_tell() -> None:
    hub = EventHub()
    stream = hub.stream()
    for number in range(EVENTS_MAX + 3):
        hub.emit(JobStatusChanged(f"j{number}", "created"))
    assert (await anext(stream)).id == "j3"
    assert stream.dropped == 3


@virtual_time
async def test_a_reader_waits_and_the_end_of_the_hub_ends_it() -> None:
    hub = EventHub()
    stream = hub.stream()
    seen: list[str] = []

    async def read() -> None:
        seen.extend([event.id async for event in stream])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.sleep(1)
        hub.emit(JobStatusChanged("a", "created"))
        await anyio.sleep(1)
        hub.close()
    assert seen == ["a"]
    with pytest.raises(StopAsyncIteration):
        await anext(hub.stream())


@virtual_time
async def test_cancelling_a_reader_loses_no_event() -> None:
    hub = EventHub()
    stream = hub.stream()
    with anyio.move_on_after(1):
        await anext(stream)
    hub.emit(JobStatusChanged("a", "created"))
    assert (await anext(stream)).id == "a"


def test_a_stream_that_nobody_holds_is_forgotten() -> None:
    hub = EventHub()
    stream = hub.stream()
    del stream
    gc.collect()
    assert not list(hub._streams)


def test_records_have_qemus_keys() -> None:
    completed = BlockJobCompleted("a", "backup", 10, 5, 0, error="no")
    assert completed.to_dict() == {
        "event": "BLOCK_JOB_COMPLETED",
        "data": {"device": "a", "type": "backup", "len": 10, "offset": 5, "speed": 0, "error": "no"},
    }
    assert "error" not in BlockJobCompleted("a", "backup", 10, 10, 0).to_dict()["data"]  # type: ignore[operator]
    assert BlockJobFailing("a", "read", "stop").to_dict() == {
        "event": "BLOCK_JOB_ERROR",
        "data": {"device": "a", "operation": "read", "action": "stop"},
    }
    pending = BlockJobPending("a", "backup").to_dict()
    assert pending == {"event": "BLOCK_JOB_PENDING", "data": {"id": "a", "type": "backup"}}
