"""Copies before guests' writes: who waits for whom, and for how long."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from blocklayer.base.errors import IOFailedError, SnapshotBrokenError, TimedOutError
from blocklayer.base.units import MIB
from tests.helpers.backups import CLUSTER, SIZE, backup, pair, pattern
from tests.helpers.scripted import Gate, fail_on, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time


@virtual_time
async def test_writes_to_one_cluster_wait_for_one_copy() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none")
        gate = scripted(target).script = Gate("write")
        async with anyio.create_task_group() as guests:
            for number in range(5):
                guests.start_soon(source.write, 512 * number, b"g" * 512)
            await gate.reached.wait()
            await anyio.sleep(1)
            assert scripted(source).bytes[:CLUSTER] == pattern(CLUSTER)
            gate.opened.set()
        assert [entry for entry in scripted(target).log if entry[0] == "write"] == [("write", 0, CLUSTER)]
        await job.cancel()
        assert (await job.wait()).guest_waits == 5


@virtual_time
async def test_a_write_after_the_copy_waits_for_nothing() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none")
        await source.write(0, b"first")
        scripted(target).script = Gate("write")
        await source.write(100, b"second")
        await job.cancel()
        assert (await job.wait()).guest_waits == 1


@virtual_time
async def test_a_guest_that_waited_for_a_copy_that_failed_copies_itself() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none")
        scripted(target).script = fail_on("write")
        outcomes = await asyncio.gather(
            source.write(0, b"g" * 512), source.write(512, b"g" * 512), return_exceptions=True
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["IOFailedError", "NoneType"]
        assert scripted(target).bytes[:CLUSTER] == pattern(CLUSTER)
        await job.cancel()


@virtual_time
async def test_a_guest_that_is_cancelled_leaves_its_cluster_to_be_copied() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=1)
        await anyio.sleep(1)
        gate = scripted(target).script = Gate("write")
        guest = asyncio.ensure_future(source.write(SIZE - 512, b"g" * 512))
        await gate.reached.wait()
        guest.cancel()
        await asyncio.wait([guest])
        assert scripted(source).bytes[-512:] == pattern(SIZE)[-512:]
        gate.opened.set()
        await job.set_speed(0)
        await job.wait()
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_a_large_request_is_copied_in_bounded_pieces() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none")
        await source.discard(CLUSTER, SIZE - CLUSTER)
        assert max(entry[2] for entry in scripted(target).log if entry[0] == "write") == MIB
        assert scripted(target).bytes[CLUSTER:] == pattern(SIZE)[CLUSTER:]
        await job.cancel()


@virtual_time
async def test_after_the_timeout_the_guests_write_fails_and_the_copy_goes_on() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none", cbw_timeout=5)
        gate = scripted(target).script = Gate("write")
        with pytest.raises(TimedOutError, match="longer than 5 s"):
            await source.write(0, b"g" * 512)
        assert asyncio.get_running_loop().time() == 5
        assert scripted(source).bytes[:512] == pattern(512)
        gate.opened.set()
        await source.write(0, b"g" * 512)
        assert [entry for entry in scripted(target).log if entry[0] == "write"] == [("write", 0, CLUSTER)]
        await job.cancel()
        assert (await job.wait()).before_write_bytes == CLUSTER


@virtual_time
async def test_after_the_timeout_break_snapshot_lets_the_guest_write() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, cbw_timeout=5, on_cbw_error="break-snapshot", speed=1)
        await anyio.sleep(1)
        scripted(target).script = Gate("write")
        await source.write(SIZE - 512, b"g" * 512)
        with pytest.raises(SnapshotBrokenError, match="longer than 5 s"):
            await job.wait()
        assert scripted(source).bytes[-512:] == b"g" * 512


@virtual_time
async def test_within_the_timeout_errors_are_as_without_one() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none", cbw_timeout=5)
        scripted(target).script = fail_on("write")
        with pytest.raises(IOFailedError, match="bad medium"):
            await source.write(0, b"g" * 512)
        scripted(target).script = fail_on("write", error=lambda: ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError):
            await source.write(0, b"g" * 512)
        await source.write(0, b"g" * 512)
        await job.cancel()
        await job.wait()


@virtual_time
async def test_a_forced_cancel_of_sync_none_gives_up_copies_that_hang() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, sync="none")
        gate = scripted(target).script = Gate("write")
        guest = asyncio.ensure_future(source.write(0, b"g" * 512))
        await gate.reached.wait()
        await job.cancel()
        await anyio.sleep(10)
        assert not job.concluded
        await job.cancel(force=True)
        await job.wait()
        await guest
        assert scripted(source).bytes[:512] == b"g" * 512
