"""The life of a job and the commands that steer it."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from blocklayer.base.errors import (
    IOFailedError,
    JobCancelledError,
    OptionError,
    StateError,
)
from blocklayer.jobs.events import BlockJobCancelled, BlockJobCompleted, BlockJobPending, JobEvent, JobStatusChanged
from blocklayer.jobs.job import check_job_id
from blocklayer.jobs.manager import JobManager
from blocklayer.jobs.progress import Progress
from tests.helpers.backups import SIZE, backup, pair, pattern
from tests.helpers.scripted import Gate, fail_on, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time


async def story(manager: JobManager, events: object) -> list[JobEvent]:
    """All events, after the manager has closed."""
    await manager.close()
    return [event async for event in events]  # type: ignore[attr-defined]  # an event stream


def statuses(events: list[JobEvent]) -> str:
    """The states that were passed, in order."""
    return " ".join(event.status for event in events if isinstance(event, JobStatusChanged))


@virtual_time
async def test_a_job_that_succeeds_passes_waiting_and_pending() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager)
        await job.wait()
        told = await story(manager, events)
        assert statuses(told) == "created running waiting pending concluded null"
        assert BlockJobCompleted("backup0", "backup", SIZE, SIZE, 0) in told
        assert len(manager) == 0


@virtual_time
async def test_a_job_that_is_cancelled_passes_aborting() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager, speed=1)
        await anyio.sleep(1)
        await job.pause()
        await job.cancel()
        with pytest.raises(JobCancelledError):
            await job.wait()
        told = await story(manager, events)
        assert statuses(told) == "created running paused running aborting concluded null"
        assert any(isinstance(event, BlockJobCancelled) for event in told)


@virtual_time
async def test_a_job_that_fails_says_so_when_it_completes() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        scripted(target).script = fail_on("write")
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager)
        with pytest.raises(IOFailedError):
            await job.wait()
        completed = [event for event in await story(manager, events) if isinstance(event, BlockJobCompleted)]
        assert "bad medium" in (completed[0].error or "")


@virtual_time
async def test_sync_none_ends_well_by_being_cancelled() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager, sync="none")
        await anyio.sleep(5)
        await job.cancel()
        assert (await job.wait()).background_bytes == 0
        told = await story(manager, events)
        assert statuses(told) == "created running aborting concluded null"
        assert any(isinstance(event, BlockJobCancelled) for event in told)


@virtual_time
async def test_without_auto_finalize_the_job_stays_pending() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager, auto_finalize=False)
        await anyio.sleep(100)
        assert job.status.value == "pending"
        with pytest.raises(StateError, match="'pending' cannot accept command verb 'pause'"):
            await job.pause()
        await job.finalize()
        await job.wait()
        assert BlockJobPending("backup0", "backup") in await story(manager, events)


@virtual_time
async def test_a_pending_job_can_be_cancelled() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, auto_finalize=False)
        await anyio.sleep(100)
        await job.cancel()
        with pytest.raises(JobCancelledError):
            await job.wait()


@virtual_time
async def test_without_auto_dismiss_the_job_stays_concluded_and_its_id_taken() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        job = await backup(graph, source, target, manager, auto_dismiss=False, job_id="mine")
        await job.wait()
        assert manager.get("mine") is job
        assert job.query().to_dict()["status"] == "concluded"
        await job.dismiss()
        assert len(manager) == 0
        assert job.status.value == "null"


@virtual_time
async def test_pause_returns_when_nothing_is_in_flight_and_resume_goes_on() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        gate = scripted(target).script = Gate("write")
        job = await backup(graph, source, target, max_workers=2)
        await gate.reached.wait()
        pausing = asyncio.ensure_future(job.pause())
        await anyio.sleep(1)
        assert not pausing.done()
        assert job.query().busy
        gate.opened.set()
        await pausing
        assert job.query().to_dict()["paused"] is True
        done = job.query().current
        await anyio.sleep(100)
        assert job.query().current == done < SIZE
        with pytest.raises(StateError, match="already paused"):
            await job.pause()
        await job.resume()
        with pytest.raises(StateError, match="not paused"):
            await job.resume()
        await job.wait()
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_guests_are_served_while_the_job_is_paused() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=1)
        await job.pause()
        await source.write(SIZE - 512, b"x" * 512)
        await job.resume()
        await job.set_speed(0)
        await job.wait()
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_complete_is_refused_for_a_backup() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=1)
        with pytest.raises(StateError, match="complete"):
            await job.complete()


@virtual_time
async def test_a_negative_speed_is_refused_and_changes_nothing() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=7)
        with pytest.raises(OptionError, match="non-negative"):
            await job.set_speed(-1)
        assert job.query().speed == 7


@virtual_time
async def test_progress_starts_now_skips_for_slow_readers_and_ends_with_the_job() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=SIZE // 8)
        seen: list[Progress] = []
        async for progress in job.progress():
            seen.append(progress)
            await anyio.sleep(3)
        assert seen[0].current == 0
        assert (seen[-1].current, seen[-1].total, seen[-1].eta) == (SIZE, SIZE, 0.0)
        assert [p.current for p in seen] == sorted({p.current for p in seen})
        assert len(seen) < 7
        assert job.concluded


@virtual_time
async def test_cancelling_who_waits_leaves_the_job_alone() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=SIZE)
        waiting = asyncio.ensure_future(job.wait())
        await anyio.sleep(0.1)
        waiting.cancel()
        await job.wait()
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_a_drained_section_holds_the_job_up_and_nobody_calls_that_paused() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=SIZE)
        async with source.drained(), target.drained():
            done = job.query().current
            await anyio.sleep(100)
            assert job.query().current == done
            assert job.status.value == "running"
        await job.wait()


@virtual_time
async def test_an_exception_that_is_no_storage_error_fails_the_job_and_not_the_graph() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        scripted(target).script = fail_on("write", error=lambda: ZeroDivisionError("a bug"))
        job = await backup(graph, source, target)
        with pytest.raises(ZeroDivisionError):
            await job.wait()
        assert not source.path.hooks
        scripted(target).script = None
        await (await backup(graph, source, target)).wait()


@pytest.mark.parametrize("job_id", ["a", "backup0", "A-b_c.9"])
def test_ids_are_a_letter_and_then_more(job_id: str) -> None:
    assert check_job_id(job_id) == job_id


@pytest.mark.parametrize("job_id", ["", "0a", "-a", "a b", "#a", "ä", "a\n"])
def test_other_ids_are_refused(job_id: str) -> None:
    with pytest.raises(OptionError, match="invalid job ID"):
        check_job_id(job_id)
