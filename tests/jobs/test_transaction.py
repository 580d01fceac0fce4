"""Jobs that end together."""

from __future__ import annotations

import anyio
import pytest

from blocklayer.base.errors import IOFailedError, JobCancelledError
from blocklayer.jobs.backup import BackupJob, BackupRequest
from blocklayer.jobs.manager import JobManager
from tests.helpers.backups import SIZE, pair, pattern
from tests.helpers.scripted import fail_on, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_members_of_a_group_wait_for_each_other_and_conclude_together() -> None:
    async with scripted_graph() as graph:
        first, second = await pair(graph, "a"), await pair(graph, "b")
        requests = [BackupRequest.build(*first), BackupRequest.build(*second, speed=SIZE)]
        quick, slow = await JobManager(graph).start_backups(requests, grouped=True)
        await anyio.sleep(0.5)
        assert (quick.status.value, slow.status.value) == ("waiting", "running")
        await slow.wait()
        assert quick.concluded
        assert scripted(first[1]).bytes == scripted(second[1]).bytes == pattern(SIZE)


@virtual_time
async def test_one_failure_cancels_a_group() -> None:
    async with scripted_graph() as graph:
        first, second = await pair(graph, "a"), await pair(graph, "b")
        requests = [BackupRequest.build(*first), BackupRequest.build(*second, speed=SIZE)]
        scripted(second[1]).script = fail_on("flush")
        waiting, failing = await JobManager(graph).start_backups(requests, grouped=True)
        with pytest.raises(IOFailedError):
            await failing.wait()
        with pytest.raises(JobCancelledError, match="'backup1' of its group"):
            await waiting.wait()


@virtual_time
async def test_cancelling_one_member_cancels_a_group() -> None:
    async with scripted_graph() as graph:
        requests = [BackupRequest.build(*await pair(graph, name), speed=1) for name in "abc"]
        jobs = await JobManager(graph).start_backups(requests, grouped=True)
        await jobs[1].cancel()
        for job in jobs:
            with pytest.raises(JobCancelledError):
                await job.wait()


@virtual_time
async def test_jobs_that_are_not_grouped_end_each_for_itself() -> None:
    async with scripted_graph() as graph:
        pairs = [await pair(graph, name) for name in "ab"]
        scripted(pairs[0][1]).script = fail_on("flush")
        failing, other = await JobManager(graph).start_backups([BackupRequest.build(*nodes) for nodes in pairs])
        with pytest.raises(IOFailedError):
            await failing.wait()
        await other.wait()


@virtual_time
async def test_finalizing_one_member_finalizes_all() -> None:
    async with scripted_graph() as graph:
        first, second = await pair(graph, "a"), await pair(graph, "b")
        requests = [BackupRequest.build(*first, auto_finalize=False), BackupRequest.build(*second)]
        jobs: list[BackupJob] = await JobManager(graph).start_backups(requests, grouped=True)
        await anyio.sleep(100)
        assert [job.status.value for job in jobs] == ["pending", "pending"]
        await jobs[0].finalize()
        for job in jobs:
            await job.wait()


@virtual_time
async def test_a_member_that_cannot_prepare_cancels_the_others() -> None:
    async with scripted_graph() as graph:
        requests = [BackupRequest.build(*await pair(graph, name)) for name in "ab"]
        jobs = await JobManager(graph).start_backups(requests, grouped=True)

        async def fail() -> None:
            await anyio.sleep(1)
            raise IOFailedError("no close")

        jobs[1].prepare = fail  # type: ignore[method-assign]
        with pytest.raises(JobCancelledError):
            await jobs[0].wait()
        with pytest.raises(IOFailedError, match="no close"):
            await jobs[1].wait()
