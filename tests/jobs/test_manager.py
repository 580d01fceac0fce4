"""The manager: ids, lookups, and the end of the graph."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import DuplicateError, JobCancelledError, NotFoundError, OptionError, StateError
from blocklayer.jobs.backup import BackupRequest
from blocklayer.jobs.manager import JobManager
from tests.helpers.backups import backup, pair
from tests.helpers.scripted import disk, scripted_graph
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_jobs_are_found_by_their_ids_while_they_exist() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        job = await backup(graph, source, target, manager, job_id="nightly", speed=1)
        assert manager.get("nightly") is job
        assert list(manager) == [job]
        assert [record.id for record in manager.query()] == ["nightly"]
        await job.cancel()
        await job.wait_concluded()
        with pytest.raises(NotFoundError, match="'nightly'"):
            manager.get("nightly")


@virtual_time
async def test_ids_are_unique_and_made_up_where_none_is_given() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        other = await disk(graph, "other", source.size)
        manager = JobManager(graph)
        await backup(graph, source, target, manager, job_id="backup0", speed=1)
        with pytest.raises(DuplicateError, match="'backup0' already in use"):
            await backup(graph, source, other, manager, job_id="backup0")
        assert (await backup(graph, source, other, manager)).id == "backup1"
        with pytest.raises(OptionError, match="invalid job ID"):
            BackupRequest.build(source, other, job_id="7")


@virtual_time
async def test_closing_the_graph_cancels_all_jobs_and_ends_the_events() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager, speed=1)
    assert job.concluded
    assert isinstance(job.error, JobCancelledError)
    assert [event async for event in events]
    with pytest.raises(StateError):
        await backup(graph, source, target, manager)
