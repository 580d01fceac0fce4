"""BackupJob on memory nodes: what each sync mode copies, while the guest goes on writing."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from blocklayer.base.errors import IOFailedError, JobCancelledError, SnapshotBrokenError
from blocklayer.base.units import MIB
from blocklayer.jobs.backup import BackupResult
from tests.helpers.backups import CLUSTER, SIZE, backup, pattern
from tests.helpers.scripted import Gate, disk, fail_on, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_full_copies_everything() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        scripted(source).put(0, pattern(SIZE))
        job = await backup(graph, source, target)
        result = await job.wait()
        assert isinstance(result, BackupResult)
        assert scripted(target).bytes == pattern(SIZE)
        assert result.background_bytes == SIZE


@virtual_time
async def test_full_shows_the_point_in_time_while_the_guest_writes() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        scripted(source).put(0, pattern(SIZE))
        gate = scripted(target).script = Gate("write")
        job = await backup(graph, source, target)
        await gate.reached.wait()
        async with anyio.create_task_group() as guest:
            guest.start_soon(source.write, SIZE - 100, b"x" * 100)
            guest.start_soon(source.write_zeroes, 5 * CLUSTER, 3)
            guest.start_soon(source.discard, 1 * MIB, MIB)
            gate.opened.set()
        result = await job.wait()
        assert scripted(target).bytes == pattern(SIZE)
        assert scripted(source).bytes != pattern(SIZE)
        assert result.guest_waits == 3


@virtual_time
async def test_holes_of_a_target_that_may_hold_anything_become_zeroes() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        scripted(target).put(0, pattern(SIZE))
        scripted(source).put(MIB, b"data")
        result = await (await backup(graph, source, target)).wait()
        assert scripted(target).bytes == scripted(source).bytes
        assert result.background_bytes == CLUSTER
        assert [entry for entry in scripted(source).log if entry[0] == "read"] == [("read", MIB, CLUSTER)]


@virtual_time
async def test_top_copies_only_clusters_of_the_topmost_layer() -> None:
    async with scripted_graph() as graph:
        base, source = await disk(graph, "base", SIZE), None
        scripted(base).put(0, pattern(SIZE))
        source = await disk(graph, "source", SIZE, backing="base")
        target = await disk(graph, "target", SIZE, backing="base")
        scripted(source).put(CLUSTER + 512, b"s" * 512)
        result = await (await backup(graph, source, target, sync="top")).wait()
        assert result.background_bytes == CLUSTER
        assert result.skipped_bytes == SIZE - CLUSTER
        assert await target.read(0, SIZE) == await source.read(0, SIZE)
        assert {entry[0] for entry in scripted(target).log} - {"read", "block_status"} == {"write", "flush"}


@virtual_time
async def test_top_does_not_save_what_the_topmost_layer_does_not_hold() -> None:
    async with scripted_graph() as graph:
        base = await disk(graph, "base", SIZE)
        source = await disk(graph, "source", SIZE, backing="base")
        target = await disk(graph, "target", SIZE, backing="base")
        scripted(source).put(0, b"s" * 512)
        gate = scripted(source).script = Gate("block_status")
        job = await backup(graph, source, target, sync="top")
        await gate.reached.wait()
        async with anyio.create_task_group() as guest:
            guest.start_soon(source.write, 4 * CLUSTER, b"new" * 1000)
            await anyio.lowlevel.checkpoint()
            gate.opened.set()
        await job.wait()
        assert scripted(base).bytes == bytes(SIZE)
        assert await target.read(4 * CLUSTER, 3000) == bytes(3000)
        assert scripted(target).kinds[4 * CLUSTER // 512] == 0


@virtual_time
async def test_top_of_a_disk_without_backing_file_is_full_and_says_so() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        result = await (await backup(graph, source, target, sync="top")).wait()
        assert (result.sync_requested.value, result.sync.value) == ("top", "full")
        assert "no backing file" in result.reason


@virtual_time
async def test_none_shows_the_point_in_time_through_target_and_source() -> None:
    async with scripted_graph() as graph:
        source = await disk(graph, "source", SIZE)
        scripted(source).put(0, pattern(SIZE))
        target = await disk(graph, "target", SIZE, backing="source")
        job = await backup(graph, source, target, sync="none")
        await source.write(100, b"new")
        await source.write(200, b"new")
        assert await target.read(0, SIZE) == pattern(SIZE)
        await job.cancel()
        result = await job.wait()
        assert result.before_write_bytes == CLUSTER
        assert job.status.value == "null"


@virtual_time
async def test_a_reader_of_the_target_that_is_on_its_way_to_the_source_sees_old_data() -> None:
    async with scripted_graph() as graph:
        source = await disk(graph, "source", SIZE)
        scripted(source).put(0, pattern(SIZE))
        target = await disk(graph, "target", SIZE, backing="source")
        await backup(graph, source, target, sync="none")
        gate = scripted(source).script = Gate("read")
        seen: list[bytes] = []

        async def read() -> None:
            seen.append(await target.read(0, 4096))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await gate.reached.wait()
            scripted(source).script = None
            tasks.start_soon(source.write, 0, b"new!" * 1024)  # aligned: nothing else holds it up
            for _ in range(50):
                await anyio.lowlevel.checkpoint()
            assert scripted(source).bytes[:3] != b"new"
            gate.opened.set()
        assert seen == [pattern(4096)]
        assert scripted(source).bytes[:3] == b"new"


@virtual_time
async def test_cancel_releases_a_guest_whose_copy_hangs() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        scripted(source).put(0, pattern(SIZE))
        gate = scripted(target).script = Gate("write")
        job = await backup(graph, source, target)
        await gate.reached.wait()
        async with anyio.create_task_group() as guest:
            guest.start_soon(source.write, SIZE - 100, b"x" * 100)
            await anyio.lowlevel.checkpoint()
            await job.cancel()
        with pytest.raises(JobCancelledError):
            await job.wait()
        assert scripted(source).bytes[-100:] == b"x" * 100
        assert not source.path.hooks


@virtual_time
async def test_a_copy_that_fails_breaks_the_guests_write() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        scripted(source).put(0, pattern(SIZE))
        job = await backup(graph, source, target, sync="none")
        scripted(target).script = fail_on("write")
        with pytest.raises(IOFailedError):
            await source.write(0, b"lost")
        await source.write(0, b"kept")
        await job.cancel()
        await job.wait()
        assert scripted(target).bytes[:CLUSTER] == pattern(CLUSTER)


@virtual_time
async def test_break_snapshot_lets_the_guest_write_and_fails_the_job() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", SIZE), await disk(graph, "target", SIZE)
        scripted(source).put(0, pattern(SIZE))
        job = await backup(graph, source, target, sync="none", on_cbw_error="break-snapshot")
        scripted(target).script = fail_on("write")
        await source.write(0, b"kept")
        await source.write(CLUSTER, b"kept")
        with pytest.raises(SnapshotBrokenError):
            await job.wait()
        assert scripted(source).bytes[:4] == b"kept"
        assert not source.path.hooks
