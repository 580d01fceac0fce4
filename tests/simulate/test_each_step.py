"""A fault in each single request, and a cancellation at each single turn of the event loop, of a backup in each mode.

Afterwards nothing may be left: no hook, no edge of the job, no request in flight; the guest's writes have ended, the
source holds what the guest wrote, and a job that says that it succeeded has the point in time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from blocklayer.base.errors import BlockError, IOFailedError, JobError
from blocklayer.base.units import KIB
from blocklayer.jobs.backup import BackupJob, BackupRequest
from blocklayer.jobs.manager import JobManager
from tests.helpers.scripted import disk, scripted, scripted_graph
from tests.helpers.virtual_time import run_virtual, virtual_loop
from tests.simulate.point_in_time import content

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blocklayer.graph.node import Node

CLUSTER = 64 * KIB
SIZE = 4 * CLUSTER
WRITES = (CLUSTER + 512, 3 * CLUSTER - 512)
MODES = ("full", "top", "none")


@dataclass
class Scene:
    """One run: what tests steer, and what is left to be looked at."""

    mode: str
    options: dict[str, object] = field(default_factory=dict)
    fault_at: int = -1
    act_at: int = -1
    act: Callable[[Scene], object] = lambda _scene: None
    requests: int = 0
    ticks: int = 0
    job: BackupJob | None = None
    starter: asyncio.Task[None] | None = None
    guest: asyncio.Future[None] | None = None
    closer: asyncio.Future[None] | None = None
    close: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint
    written: set[int] = field(default_factory=set)
    ending: str = ""

    async def script(self, kind: str, _offset: int, _length: int) -> None:
        """Let others run; fail one request."""
        self.requests += 1
        mine = self.requests
        await anyio.lowlevel.checkpoint()
        if mine == self.fault_at:
            raise IOFailedError(f"injected into {kind}")

    async def run(self) -> None:
        """Start a backup, write to two clusters meanwhile, wait for the end, look around."""
        async with scripted_graph() as graph:
            self.close = graph.close
            base = await disk(graph, "base", SIZE)
            source = await disk(graph, "source", SIZE, backing="base")
            below = {"full": None, "top": "base", "none": "source"}[self.mode]
            target = await disk(graph, "target", SIZE, backing=below)
            scripted(base).put(0, b"b" * SIZE)
            scripted(source).put(CLUSTER, b"s" * CLUSTER)
            before = content(source)
            for node in (source, target):
                scripted(node).script = self.script
            loop = virtual_loop()
            loop.ticks, loop.act_at, loop.action = 0, self.act_at, lambda: self.act(self)
            self.starter = asyncio.create_task(self._start(JobManager(graph), source, target))
            self.guest = asyncio.create_task(self._write(source))
            await asyncio.wait([self.starter, self.guest])
            if self.closer is not None:
                await self.closer
            self.ticks = loop.ticks
            if self.job is not None:
                if self.mode == "none" and not self.job.concluded:
                    self.job.end(force=False)
                await self.job.wait_concluded()
            loop.act_at = self.fault_at = -1
            self._check(source, target, before)

    async def _start(self, manager: JobManager, source: Node, target: Node) -> None:
        request = BackupRequest.build(source, target, sync=self.mode, **self.options)
        (self.job,) = await manager.start_backups([request])
        if self.mode == "none":
            assert self.guest is not None
            await asyncio.wait([self.guest])
            if not self.job.concluded and self.job.status.value == "running":
                await self.job.cancel()
        try:
            await self.job.wait()
            self.ending = "success"
        except (JobError, IOFailedError) as error:
            self.ending = type(error).__name__

    async def _write(self, source: Node) -> None:
        for offset in WRITES:
            try:
                await source.write(offset, b"g" * 1024)
                self.written.add(offset)
            except BlockError:
                continue

    def _check(self, source: Node, target: Node, before: bytes) -> None:
        assert not source.path.hooks
        assert not source.path.requests
        assert not target.path.requests
        assert all(edge.role in ("disk", "backing") for node in (source, target) for edge in node.parents)
        now = content(source)
        for offset in WRITES:
            wanted = {b"g" * 1024} if offset in self.written else {b"g" * 1024, before[offset : offset + 1024]}
            assert now[offset : offset + 1024] in wanted
        if self.ending == "success" and self.mode != "none":
            assert content(target) == before


def run(scene: Scene) -> Scene:
    """Run it in virtual time."""
    run_virtual(scene.run())
    return scene


@pytest.mark.parametrize("cbw", ["break-guest-write", "break-snapshot"])
@pytest.mark.parametrize("retry", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_fault_in_each_single_request(mode: str, retry: int, cbw: str) -> None:
    options: dict[str, object] = {"retry": retry, "on_cbw_error": cbw}
    whole = run(Scene(mode, options))
    assert whole.ending == "success"
    assert len(whole.written) == len(WRITES)
    endings = {run(Scene(mode, options, fault_at=number)).ending for number in range(1, whole.requests + 1)}
    assert endings <= {"success", "IOFailedError", "SnapshotBrokenError"}
    assert "success" in endings


def cancel_job(scene: Scene) -> None:
    """As an operator in a hurry."""
    if scene.job is not None and not scene.job.concluded:
        scene.job.end(force=True)


def cancel_job_softly(scene: Scene) -> None:
    """As an operator."""
    if scene.job is not None and not scene.job.concluded:
        scene.job.end(force=False)


def cancel_starter(scene: Scene) -> None:
    """The task that starts the job and waits for it."""
    assert scene.starter is not None
    scene.starter.cancel()


def cancel_guest(scene: Scene) -> None:
    """A guest that gives up."""
    assert scene.guest is not None
    scene.guest.cancel()


def close_graph(scene: Scene) -> None:
    """The end of everything."""
    scene.closer = asyncio.ensure_future(scene.close())


@pytest.mark.parametrize("act", [cancel_job, cancel_job_softly, cancel_guest])
@pytest.mark.parametrize("mode", MODES)
def test_a_cancellation_at_each_turn(mode: str, act: Callable[[Scene], object]) -> None:
    ticks = run(Scene(mode)).ticks
    for number in range(1, ticks + 1):
        scene = run(Scene(mode, act=act, act_at=number))
        assert scene.ending in ("success", "JobCancelledError")


@pytest.mark.parametrize("mode", MODES)
def test_cancelling_who_waits_leaves_the_job_and_cancelling_who_starts_leaves_nothing(mode: str) -> None:
    for number in range(2, run(Scene(mode)).ticks):
        scene = run(Scene(mode, act=cancel_starter, act_at=number))
        assert scene.job is None or scene.job.error is None
        assert len(scene.written) == len(WRITES)


@pytest.mark.parametrize("mode", MODES)
def test_closing_the_graph_at_each_turn(mode: str) -> None:
    for number in range(2, run(Scene(mode)).ticks):
        scene = run(Scene(mode, act=close_graph, act_at=number))
        assert scene.job is None or scene.job.concluded
