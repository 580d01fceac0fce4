"""Starting backups: the order of checks, one instant for many disks, and nothing left after a failure."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from blocklayer.base.errors import BlockError, InUseError, OptionError, UnsupportedError
from blocklayer.base.units import KIB, MIB
from blocklayer.jobs.backup import BackupRequest
from blocklayer.jobs.manager import JobManager
from tests.helpers.backups import SIZE, backup, pair
from tests.helpers.scripted import Gate, disk, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_of_several_mistakes_qemus_first_one_is_told() -> None:
    async with scripted_graph() as graph:
        source, _ = await pair(graph)
        small = await disk(graph, "small", MIB, cluster=128 * KIB)
        manager = JobManager(graph)
        wrong: dict[str, object] = {"compress": True, "max_workers": 0, "max_chunk": 64 * KIB}
        with pytest.raises(OptionError, match="cannot be the same"):
            await backup(graph, source, source, manager, **wrong)
        with pytest.raises(UnsupportedError, match="ompression is not supported"):
            await backup(graph, source, small, manager, **wrong)
        del wrong["compress"]
        with pytest.raises(OptionError, match="max-workers must be between 1 and 2147483647"):
            await backup(graph, source, small, manager, **wrong)
        wrong["max_workers"] = 1
        with pytest.raises(OptionError, match="different sizes"):
            await backup(graph, source, small, manager, **wrong)
        fitting = await disk(graph, "fitting", SIZE, cluster=128 * KIB)
        with pytest.raises(OptionError, match="less than backup cluster size"):
            await backup(graph, source, fitting, manager, **wrong)
        assert not source.path.hooks
        assert [edge.role for edge in fitting.parents] == ["disk"]
        assert len(manager) == 0


@virtual_time
async def test_a_target_that_the_source_is_made_of_is_refused() -> None:
    async with scripted_graph() as graph:
        base = await disk(graph, "base", SIZE)
        source = await disk(graph, "source", SIZE, backing="base")
        with pytest.raises(OptionError, match="lies in the chain"):
            await backup(graph, source, base)


@virtual_time
async def test_a_node_that_another_job_uses_is_no_target() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        other, manager = await disk(graph, "other", SIZE), JobManager(graph)
        await backup(graph, source, target, manager, speed=1)
        for wanted in (target, source):
            with pytest.raises(InUseError, match="backup job 'backup0'"):
                await backup(graph, other, wanted, manager)
        with pytest.raises(InUseError, match="cannot be a source"):
            await backup(graph, target, other, manager)


@virtual_time
async def test_several_jobs_may_run_on_one_source() -> None:
    async with scripted_graph() as graph:
        source, first = await pair(graph)
        second, manager = await disk(graph, "second", SIZE), JobManager(graph)
        start = bytes(scripted(source).bytes)
        one = await backup(graph, source, first, manager, speed=MIB)
        await source.write(SIZE - 512, b"x" * 512)
        middle = bytes(scripted(source).bytes)
        two = await backup(graph, source, second, manager)
        await source.write(SIZE - 1024, b"y" * 512)
        await one.wait()
        await two.wait()
        assert scripted(first).bytes == start
        assert scripted(second).bytes == middle


@virtual_time
async def test_many_disks_share_one_instant() -> None:
    async with scripted_graph() as graph:
        pairs = [await pair(graph, name) for name in "abc"]
        gate = scripted(pairs[0][0]).script = Gate("write")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pairs[0][0].write, 0, b"before" + bytes(506))
            await gate.reached.wait()
            manager = JobManager(graph)
            started = anyio.Event()

            async def start() -> None:
                jobs = await manager.start_backups([BackupRequest.build(*pair_) for pair_ in pairs])
                started.set()
                for job in jobs:
                    await job.wait()

            tasks.start_soon(start)
            await anyio.sleep(1)
            assert not started.is_set()
            tasks.start_soon(pairs[1][0].write, 0, b"after" + bytes(507))
            await anyio.sleep(1)
            assert scripted(pairs[1][0]).bytes[:5] != b"after"
            gate.opened.set()
        assert scripted(pairs[0][1]).bytes[:6] == b"before"
        assert scripted(pairs[1][0]).bytes[:5] == b"after"
        assert scripted(pairs[1][1]).bytes[:5] != b"after"


@virtual_time
async def test_if_one_cannot_start_none_does() -> None:
    async with scripted_graph() as graph:
        good, bad = await pair(graph, "good"), (await disk(graph, "x", SIZE), await disk(graph, "y", MIB))
        manager = JobManager(graph)
        with pytest.raises(BlockError):
            await manager.start_backups([BackupRequest.build(*good), BackupRequest.build(*bad)])
        assert len(manager) == 0
        for node in graph.nodes.values():
            assert not node.path.hooks
            assert [edge.role for edge in node.parents] == ["disk"]


@virtual_time
async def test_a_target_that_does_not_tell_its_cluster_gets_a_warning() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        result = await (await backup(graph, source, target)).wait()
        assert "cluster size" in result.warnings[0]
        telling = await disk(graph, "telling", SIZE, cluster=256 * KIB)
        result = await (await backup(graph, source, telling)).wait()
        assert (result.warnings, result.cluster_size) == ((), 256 * KIB)
