"""One seed, one run: a disk under random writes is backed up, and the copy must be the disk as it was at the instant.

Everything random comes from the seed, and time is virtual, so a seed replays exactly:
``python -m tests.simulate.replay SEED``. What is drawn: the mode, sizes, the chain and its content, the job's options,
delays and faults of every request, several guests (each owns stripes of the disk, so that the disk's end state is
known), readers of the target (sync none), and an operator who pauses, resumes, limits, drains and cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from blocklayer.base.errors import BlockError, IOFailedError, JobError, NoSpaceError, StateError
from blocklayer.base.units import KIB, SECTOR
from blocklayer.jobs.backup import BackupJob, BackupRequest
from blocklayer.jobs.backup_options import SyncMode
from blocklayer.jobs.manager import JobManager
from blocklayer.jobs.policy import IOStatus
from tests.helpers.scripted import ScriptedDriver, disk, scripted, scripted_graph
from tests.helpers.virtual_time import run_virtual

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import HookHandle, Node

CLUSTER = 64 * KIB

READERS = 4
"""Readers of a target at once: enough to be on the way to the source just when a guest overwrites what they read."""


@dataclass
class Outcome:
    """What happened, for whoever counts: the mode, how the job ended, and how much the guests did."""

    mode: str = ""
    ending: str = ""
    writes: int = 0
    failed_writes: int = 0
    reads_checked: int = 0
    options: dict[str, object] = field(default_factory=dict)


def content(node: Node) -> bytes:
    """All bytes of a chain of scripted disks, behind everybody's back and without waiting."""
    driver = scripted(node)
    below = driver.children.get("backing")
    data = bytearray(content(below.node) if below is not None else bytes(driver.size))
    data = data[: driver.size].ljust(driver.size, b"\0")
    for sector, kind in enumerate(driver.kinds):
        if kind:
            data[sector * SECTOR : (sector + 1) * SECTOR] = driver.bytes[sector * SECTOR : (sector + 1) * SECTOR]
    return bytes(data)


def simulate(seed: int) -> Outcome:
    """Run ``seed``; raises ``AssertionError`` if anything is wrong."""
    outcome = Outcome()
    run_virtual(_Simulation(seed, outcome).run())
    return outcome


class _Simulation:
    def __init__(self, seed: int, outcome: Outcome) -> None:
        self.random = Random(seed)  # noqa: S311 - it has to repeat itself
        self.outcome = outcome
        self.snapshot = b""
        self.over = False
        self.faults_left = self.random.choice([0, 0, 1, 3, 10])
        self.delay_max = self.random.choice([0.0, 0.001, 0.05, 1.0])

    async def run(self) -> None:
        rng = self.random
        async with scripted_graph() as graph:
            mode = rng.choice(["full", "top", "none"])
            size = rng.randrange(4, 40) * CLUSTER + rng.choice([0, SECTOR, 7 * SECTOR, CLUSTER - SECTOR])
            source, target = await self._disks(graph, mode, size)
            self._capture(source)
            stripe = rng.choice([1, 5, 64, 200, 512, 4096]) * SECTOR
            guests = [_Guest(self, source, number, rng.randrange(3, 25)) for number in range(rng.randrange(1, 7))]
            for guest in guests:
                guest.own(stripe, len(guests))
            for node in graph.nodes.values():
                scripted(node).script = self._script
            manager = JobManager(graph)
            options = self._options(mode)
            self.outcome.mode, self.outcome.options = mode, options
            async with anyio.create_task_group() as tasks:
                for guest in guests:
                    tasks.start_soon(guest.run)
                await anyio.sleep(rng.random() * self.delay_max * 5)
                (job,) = await manager.start_backups([BackupRequest.build(source, target, sync=mode, **options)])
                async with anyio.create_task_group() as helpers:
                    helpers.start_soon(self._operate, job)
                    if mode == "none":
                        for _ in range(READERS):
                            helpers.start_soon(self._read_target, job, target)
                    await self._finish(job, target)
                    helpers.cancel_scope.cancel()
            self.faults_left = 0
            self._check_after(job, source, guests)

    # -- the scene ---------------------------------------------------------------------------------------------

    async def _disks(self, graph: Graph, mode: str, size: int) -> tuple[Node, Node]:
        rng = self.random
        backing: str | None = None
        if mode == "top" or rng.random() < 0.5:
            shorter = size - rng.choice([0, 0, SECTOR, 2 * CLUSTER + SECTOR])
            base = await disk(graph, "base", shorter)
            self._fill(scripted(base))
            backing = "base"
        source = await disk(graph, "source", size, backing=backing)
        self._fill(scripted(source))
        below = {"full": None, "top": backing, "none": "source"}[mode]
        cluster = rng.choice([0, 4 * KIB, 128 * KIB])
        target = await disk(graph, "target", size, backing=below, cluster=cluster, compress=True)
        if mode == "full":
            self._fill(scripted(target))
        return source, target

    def _fill(self, driver: ScriptedDriver) -> None:
        rng = self.random
        for _ in range(rng.randrange(12)):
            first = rng.randrange(driver.size // SECTOR)
            length = min(rng.choice([1, 3, 128, 300]) * SECTOR, driver.size - first * SECTOR)
            data = bytes(length) if rng.random() < 0.2 else rng.randbytes(length)
            driver.put(first * SECTOR, data)

    def _options(self, mode: str) -> dict[str, object]:
        rng = self.random
        policies = ["report", "ignore", "stop", "enospc", "auto"]
        return (
            {
                "speed": rng.choice([0, 0, 0, CLUSTER, 10 * CLUSTER]),
                "max_workers": rng.choice([1, 2, 64]),
                "max_chunk": rng.choice([0, 256 * KIB, 300 * KIB]),
                "min_cluster_size": rng.choice([0, 0, 256 * KIB]),
                "compress": rng.random() < 0.2,
                "on_source_error": rng.choice(policies),
                "on_target_error": rng.choice(policies),
                "on_cbw_error": rng.choice(["break-guest-write", "break-guest-write", "break-snapshot"]),
                "cbw_timeout": rng.choice([0, 0, 0, 0.02, 0.5]),
                "retry": rng.choice([0, 0, 2]),
            }
            if mode
            else {}
        )

    def _capture(self, source: Node) -> None:
        register = source.before_write

        def before_write(hook: object) -> HookHandle:
            assert not source.path.requests, "the instant must find no request in flight"
            self.snapshot = content(source)
            return register(hook)  # type: ignore[arg-type]  # passed on as it came

        source.before_write = before_write  # type: ignore[method-assign]  # a spy for this run

    async def _script(self, kind: str, _offset: int, _length: int) -> None:
        rng = self.random
        if self.delay_max and rng.random() < 0.7:
            await anyio.sleep(rng.random() * self.delay_max * rng.choice([0.01, 0.1, 1.0]))
        elif rng.random() < 0.5:
            await anyio.lowlevel.checkpoint()
        if self.faults_left and kind != "block_status" and rng.random() < 0.05:
            self.faults_left -= 1
            raise rng.choice([IOFailedError, NoSpaceError])(f"injected into {kind}")

    # -- the people --------------------------------------------------------------------------------------------

    async def _operate(self, job: BackupJob) -> None:
        rng = self.random
        cancels = rng.random() < 0.15
        while not job.concluded:
            await anyio.sleep(rng.random() * (self.delay_max + 0.01) * 4)
            try:
                await self._act(job, cancels=cancels)
            except StateError:
                continue  # the job has moved on

    async def _act(self, job: BackupJob, *, cancels: bool) -> None:
        rng = self.random
        if job.io_status is not IOStatus.OK:
            await job.resume()
            return
        match rng.randrange(8):
            case 0:
                await job.pause()
                await anyio.sleep(rng.random())
                assert not job.busy or job.concluded
                await job.resume()
            case 1:
                await job.set_speed(rng.choice([0, CLUSTER, 100 * CLUSTER]))
            case 2:
                async with rng.choice([job.source, job.target]).drained():
                    assert not job.busy
                    await anyio.sleep(rng.random() * 0.1)
            case 3 if cancels:
                await job.cancel(force=rng.random() < 0.5)

    async def _read_target(self, job: BackupJob, target: Node) -> None:
        rng = self.random
        while not job.concluded:
            await anyio.sleep(rng.random() * (self.delay_max + 0.001))
            first = rng.randrange(target.size)
            length = min(rng.randrange(1, 2 * CLUSTER), target.size - first)
            await self._check_target(job, target, first, length)

    async def _check_target(self, job: BackupJob, target: Node, offset: int, length: int) -> None:
        try:
            data = await target.read(offset, length)
        except BlockError:
            return
        if not kept(job):
            return
        assert data == self.snapshot[offset : offset + length], f"the target shows new data at {offset}+{length}"
        self.outcome.reads_checked += 1

    async def _finish(self, job: BackupJob, target: Node) -> None:
        if job.sync is SyncMode.NONE:
            await anyio.sleep(self.random.random() * self.delay_max * 60)
            if not job.concluded:
                await self._check_target(job, target, 0, target.size)
                if kept(job):
                    await job.cancel()
        try:
            await job.wait()
            self.outcome.ending = "success"
        except (JobError, IOFailedError) as error:
            self.outcome.ending = type(error).__name__
            return
        if job.sync is not SyncMode.NONE:
            assert content(target) == self.snapshot, "the copy is not the disk as it was"

    def _check_after(self, job: BackupJob, source: Node, guests: list[_Guest]) -> None:
        assert not source.path.hooks
        assert not source.path.requests
        assert {edge.role for edge in source.parents} <= {"disk", "backing"}
        assert not job.busy
        for guest in guests:
            guest.check(content(source))


def kept(job: BackupJob) -> bool:
    """Whether the point in time is kept now."""
    return job.status.value in ("running", "paused") and not job._before.over  # noqa: SLF001 - nobody else can tell


class _Guest:
    """Writes to its own stripes, one request at a time, and knows what they hold."""

    def __init__(self, simulation: _Simulation, source: Node, number: int, requests: int) -> None:
        self.simulation = simulation
        self.source = source
        self.number = number
        self.requests = requests
        self.stripes: list[tuple[int, int]] = []
        self.model: dict[int, bytearray] = {}

    def own(self, stripe: int, guests: int) -> None:
        """Take every ``guests``-th stripe."""
        start = content(self.source)
        for offset in range(self.number * stripe, self.source.size, guests * stripe):
            length = min(stripe, self.source.size - offset)
            self.stripes.append((offset, length))
            self.model[offset] = bytearray(start[offset : offset + length])

    async def run(self) -> None:
        simulation = self.simulation
        for _ in range(self.requests if self.stripes else 0):
            await anyio.sleep(simulation.random.random() * simulation.delay_max * 3)
            try:
                await self._request()
                simulation.outcome.writes += 1
            except BlockError:
                simulation.outcome.failed_writes += 1

    async def _request(self) -> None:
        rng = self.simulation.random
        stripe, limit = rng.choice(self.stripes)
        first = rng.randrange(limit)
        length = rng.randrange(1, limit - first + 1)
        model = self.model[stripe]
        kind = rng.choice(["write", "write", "write_zeroes", "discard", "flush", "read"])
        if kind == "write":
            data = rng.randbytes(length)
            await self.source.write(stripe + first, data)
            model[first : first + length] = data
        elif kind == "write_zeroes":
            await self._zero(stripe, model, first, length)
        elif kind == "discard":
            first -= first % SECTOR
            length = min(-(-length // SECTOR) * SECTOR, limit - first)
            await self.source.discard(stripe + first, length)
            model[first : first + length] = bytes(length)
        elif kind == "flush":
            await self.source.flush()
        else:
            assert await self.source.read(stripe + first, length) == model[first : first + length]

    async def _zero(self, stripe: int, model: bytearray, first: int, length: int) -> None:
        """Unaligned ends are requests of their own, so that one that fails half-way leaves a state that is known."""
        end = first + length
        cuts = sorted({first, min(end, -(-first // SECTOR) * SECTOR), max(first, end - end % SECTOR), end})
        for start, stop in zip(cuts, cuts[1:], strict=False):
            await self.source.write_zeroes(stripe + start, stop - start)
            model[start:stop] = bytes(stop - start)

    def check(self, disk_now: bytes) -> None:
        for offset, length in self.stripes:
            assert disk_now[offset : offset + length] == self.model[offset], "a guest's write was lost or came too much"
