"""The loop of a backup: errors under each policy, speed, holes, and turns for everybody else."""

from __future__ import annotations

import asyncio
from time import thread_time
from typing import TYPE_CHECKING

import anyio
import pytest

from blocklayer.base.errors import IOFailedError, NoSpaceError
from blocklayer.base.units import GIB, MIB, SECTOR, TIB
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.graph.graph import Graph
from blocklayer.jobs.events import BlockJobFailing
from blocklayer.jobs.manager import JobManager
from blocklayer.jobs.policy import IOStatus
from tests.helpers.backups import CLUSTER, SIZE, backup, pair, pattern
from tests.helpers.scripted import NoEngine, disk, fail_on, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from blocklayer.graph.node import Node


def no_space() -> NoSpaceError:
    """As a full disk says it."""
    return NoSpaceError("full")


def script_side(source: Node, target: Node, side: str, times: int) -> None:
    """Let reads of the source, or writes to the target, fail."""
    if side == "source":
        scripted(source).script = fail_on("read", times=times)
    else:
        scripted(target).script = fail_on("write", times=times)


@pytest.mark.parametrize("side", ["source", "target"])
@virtual_time
async def test_report_fails_the_job_with_the_error(side: str) -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        script_side(source, target, side, 1)
        manager = JobManager(graph)
        events = manager.events()
        job = await backup(graph, source, target, manager)
        with pytest.raises(IOFailedError, match="bad medium"):
            await job.wait()
        manager_events = [await anext(events) for _ in range(3)]
        assert BlockJobFailing("backup0", "read" if side == "source" else "write", "report") in manager_events


@pytest.mark.parametrize("side", ["source", "target"])
@virtual_time
async def test_ignore_tries_again_until_it_works(side: str) -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        script_side(source, target, side, 20)
        job = await backup(graph, source, target, None, **{f"on_{side}_error": "ignore"})
        await job.wait()
        assert scripted(target).bytes == pattern(SIZE)


@pytest.mark.parametrize("side", ["source", "target"])
@virtual_time
async def test_stop_pauses_until_resumed(side: str) -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        script_side(source, target, side, 1)
        job = await backup(graph, source, target, None, max_workers=1, **{f"on_{side}_error": "stop"})
        while job.status.value != "paused":
            await anyio.sleep(0)
        assert job.query().io_status is IOStatus.FAILED
        await anyio.sleep(1000)
        assert job.status.value == "paused"
        await job.resume()
        assert job.query().io_status is IOStatus.OK
        await job.wait()
        assert scripted(target).bytes == pattern(SIZE)


@pytest.mark.parametrize("policy", ["enospc", "auto"])
@virtual_time
async def test_enospc_and_auto_stop_for_lack_of_space_only(policy: str) -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        scripted(target).script = fail_on("write", error=no_space)
        job = await backup(graph, source, target, on_target_error=policy)
        while job.status.value != "paused":
            await anyio.sleep(0)
        assert job.query().to_dict()["io-status"] == "nospace"
        scripted(target).script = fail_on("write")
        await job.resume()
        with pytest.raises(IOFailedError, match="bad medium"):
            await job.wait()


@virtual_time
async def test_a_stopped_job_can_be_cancelled() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        scripted(target).script = fail_on("write", times=1000)
        job = await backup(graph, source, target, on_target_error="stop")
        while job.status.value != "paused":
            await anyio.sleep(0)
        await job.cancel()
        await job.wait_concluded()
        assert not source.path.hooks


@virtual_time
async def test_retry_comes_before_the_policy() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph, size=MIB)
        scripted(target).script = fail_on("write", times=2)
        manager = JobManager(graph)
        events = manager.events()
        await (await backup(graph, source, target, manager, retry=2)).wait()
        assert scripted(target).bytes == pattern(MIB)
        manager_events = [await anext(events) for _ in range(4)]
        assert not any(isinstance(event, BlockJobFailing) for event in manager_events)


@virtual_time
async def test_retries_run_out() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph, size=MIB)
        scripted(target).script = fail_on("write", times=3)
        with pytest.raises(IOFailedError, match="bad medium"):
            await (await backup(graph, source, target, retry=2)).wait()


@virtual_time
async def test_the_source_that_cannot_tell_its_extents_counts_as_a_failed_read() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        scripted(source).script = fail_on("block_status")
        with pytest.raises(IOFailedError):
            await (await backup(graph, source, target)).wait()
        scripted(source).script = fail_on("block_status")
        await (await backup(graph, source, target, on_source_error="ignore")).wait()
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_speed_limits_the_loop() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        started = asyncio.get_running_loop().time()
        await (await backup(graph, source, target, speed=MIB)).wait()
        assert 6.5 < asyncio.get_running_loop().time() - started < 8


@virtual_time
async def test_speed_can_be_changed_while_the_loop_waits() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=1)
        await anyio.sleep(3600)
        assert job.query().current < SIZE
        await job.set_speed(0)
        started = asyncio.get_running_loop().time()
        await job.wait()
        assert asyncio.get_running_loop().time() == started


@virtual_time
async def test_a_guest_is_not_slowed_down_by_the_speed() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=1)
        started = asyncio.get_running_loop().time()
        await source.write_zeroes(0, SIZE)
        await job.wait()
        assert asyncio.get_running_loop().time() == started
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_pausing_and_cancelling_take_effect_while_the_loop_waits_for_its_turn() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=1)
        await anyio.sleep(1)
        await job.pause()
        assert job.status.value == "paused"
        await job.cancel()
        await job.wait_concluded()
        assert asyncio.get_running_loop().time() < 2


@virtual_time
async def test_workers_bound_what_is_in_flight() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        flying = most = 0

        async def count(kind: str, _offset: int, _length: int) -> None:
            nonlocal flying, most
            if kind == "write":
                flying += 1
                most = max(most, flying)
                await anyio.sleep(1)
                flying -= 1

        scripted(target).script = count
        await (await backup(graph, source, target, max_workers=3)).wait()
        assert most == 3


@virtual_time
async def test_chunks_are_as_long_as_asked_for() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph, size=MIB + SECTOR)
        await (await backup(graph, source, target, max_chunk=3 * CLUSTER + 5)).wait()
        lengths = [length for kind, _offset, length in scripted(target).log if kind == "write"]
        assert lengths == [3 * CLUSTER] * 5 + [CLUSTER, SECTOR] or lengths == [3 * CLUSTER] * 5 + [CLUSTER + SECTOR]


@virtual_time
async def test_compressed_clusters_are_those_of_the_target() -> None:
    async with scripted_graph() as graph:
        source, _ = await pair(graph, size=MIB)
        target = await disk(graph, "small", MIB, cluster=4096, compress=True)
        await (await backup(graph, source, target, compress=True)).wait()
        assert {entry[2] for entry in scripted(target).log if entry[0] == "write_compressed"} == {4096}
        assert scripted(target).bytes == pattern(MIB)


class HollowDriver(MemoryDriver):
    """A huge disk of holes with one MiB of data at each end; stores nothing that is written."""

    name = "hollow"

    def __init__(self, size: int) -> None:
        super().__init__(0)
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = b"d" * len(buffer)
        return True

    async def block_status(self, offset: int, length: int):  # type: ignore[no-untyped-def]
        from blocklayer.base.extents import Extent, ExtentKind

        step = 16 * MIB
        if offset < MIB or offset >= self._size - MIB:
            return Extent(offset, min(length, MIB - offset % MIB), ExtentKind.DATA)
        return Extent(offset, min(length, step - offset % step, self._size - MIB - offset), ExtentKind.ZERO)

    async def write(self, offset: int, data: memoryview, flags: object) -> None:
        return

    async def write_zeroes(self, offset: int, length: int, flags: object) -> None:
        return


async def longest_block(done: asyncio.Event) -> float:
    """The most CPU seconds that the loop's thread spent between two turns; other programs' time does not count."""
    longest, last = 0.0, thread_time()
    while not done.is_set():
        await asyncio.sleep(0)
        now = thread_time()
        longest, last = max(longest, now - last), now
    return longest


async def test_the_event_loop_is_never_blocked_for_long() -> None:
    async with Graph({"hollow": HollowDriver}, engine=NoEngine) as graph:  # type: ignore[arg-type]
        source = await graph.open({"driver": "hollow", "size": TIB})
        target = await graph.open({"driver": "hollow", "size": TIB})
        done = asyncio.Event()
        watch = asyncio.ensure_future(longest_block(done))
        job = await backup(graph, source, target)
        result = await job.wait()
        done.set()
        assert result.background_bytes == 2 * MIB
        assert result.zero_bytes == TIB - 2 * MIB
        assert await watch < 0.01


async def test_the_event_loop_gets_turns_while_data_are_copied() -> None:
    async with Graph({"memory": MemoryDriver}, engine=NoEngine) as graph:  # type: ignore[arg-type]
        source = await graph.open({"driver": "memory", "size": GIB // 8})
        target = await graph.open({"driver": "memory", "size": GIB // 8})
        for offset in range(0, source.size, MIB):
            await source.write(offset, b"d" * MIB)
        done = asyncio.Event()
        watch = asyncio.ensure_future(longest_block(done))
        await (await backup(graph, source, target)).wait()
        done.set()
        assert await watch < 0.05, "copies of memory run in the loop itself; files have threads for that"


async def test_discarding_a_huge_disk_neither_reads_it_nor_blocks_the_event_loop() -> None:
    async with Graph({"hollow": HollowDriver}, engine=NoEngine) as graph:  # type: ignore[arg-type]
        source = await graph.open({"driver": "hollow", "size": TIB})
        target = await graph.open({"driver": "hollow", "size": TIB})
        job = await backup(graph, source, target, sync="none")
        done = asyncio.Event()
        watch = asyncio.ensure_future(longest_block(done))
        await source.discard(0, TIB)
        done.set()
        assert await watch < 0.05
        await job.cancel()
        result = await job.wait()
        assert (result.before_write_bytes, result.zero_bytes) == (2 * MIB, TIB - 2 * MIB)
