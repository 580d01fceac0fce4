"""4 KiB random guest writes per second, 16 in flight, while a backup of the disk runs, against qemu-storage-daemon.

    idle          no backup; the peer is qemu-img bench, which has neither transport nor backup: an upper bound
    none          the first writes after a backup with sync=none has started: most of them copy 64 KiB first
    full          all writes between the start and the end of an unthrottled full backup, whose time is measured too
    full, paced   the same with the backup's speed limited, so that both sides have the same time for writes

Ours are awaits of ``Node.write`` in one process. The daemon has no guest inside: it exports the node by NBD over a Unix
socket, and fio is the client; the peer's figure includes that transport.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks import fio, loops, ours, storage_daemon, workers
from benchmarks.backups import PEER
from benchmarks.command_line import main
from benchmarks.guest import REQUEST, Guest
from benchmarks.harness import Case, Scenario, requests_per_second, seconds
from benchmarks.images import Offsets, make_disk, make_empty, warm_in_small_pages, workspace
from benchmarks.qemu_img import Bench
from benchmarks.storage_daemon import StorageDaemon, node_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    import blocklayer
    from benchmarks.harness import Figure, Figures, Settings

DEPTH = 16
FORMAT = "qcow2"
WARM_UP_S = 1.0
"""The guest writes for this long before a full backup starts; fio needs a third of it to come up."""

LOAD_MAX_S = 600.0
"""fio is stopped when the backup has ended; if something hangs, it stops by itself."""

PACED_S = 4
"""A paced backup takes this many seconds: its speed is the disk's size divided by it."""

BAR, AIM = 1.0, 1.5
VIA_NBD = f"{PEER}, NBD, fio"
NOTE = (
    "16 writes in flight on a full qcow2 disk, backed up to a new qcow2, flushes ignored. Ours in process; the peer's "
    "by fio over NBD on a Unix socket (it has no other way in), so its figure includes that transport. 'idle' compares "
    "with qemu-img bench, in process and without a backup."
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What goes on while the guest writes: ``kind`` is idle, none or full; ``speed`` in bytes/s, 0: no limit."""

    name: str
    kind: str
    peer: str
    figures: tuple[Figure, ...]
    speed: int = 0


@dataclass(frozen=True, slots=True)
class Disks:
    """A source, its target, and where the peer's logs and its socket are (sockets need short paths)."""

    source: Path
    target: Path
    place: Path
    socket: Path
    size: int
    count: int

    # -- ours --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, engine: str) -> AsyncIterator[tuple[blocklayer.Graph, blocklayer.Node, blocklayer.Node]]:
        """A graph with both disks in it."""
        async with ours.graph(engine) as graph:
            source = await ours.open_disk(graph, self.source, FORMAT, unsafe=True)
            target = await ours.open_disk(graph, self.target, FORMAT, unsafe=True)
            yield graph, source, target

    async def idle(self, engine: str) -> Figures:
        """Writes without a backup, at qemu-img bench's offsets."""
        async with self.opened(engine) as (_, source, _):
            return {"rate": await self._write_all(source)}

    async def none(self, engine: str) -> Figures:
        """The first ``count`` writes after the point in time."""
        async with self.opened(engine) as (graph, source, target):
            job = await graph.backup(source, target, sync="none")
            rate = await self._write_all(source)
            await job.cancel()
            await job.wait()
            return {"rate": rate}

    async def full(self, engine: str, speed: int) -> Figures:
        """All writes from start to end of a full backup, and its seconds."""
        async with self.opened(engine) as (graph, source, target):
            guest = Guest(source, DEPTH)
            async with guest.running():
                await asyncio.sleep(WARM_UP_S)
                before = guest.completed
                with loops.timed() as watch:
                    job = await graph.backup(source, target, sync="full", speed=speed)
                    await job.wait()
                written = guest.completed - before
            return {"rate": written / watch.seconds, "backup": watch.seconds}

    async def _write_all(self, node: blocklayer.Node) -> float:
        data = memoryview(bytes(range(256)) * (REQUEST // 256))
        return await workers.rate(self.offsets, DEPTH, lambda offset: node.write(offset, data))

    @property
    def offsets(self) -> Offsets:
        """Where a fixed number of writes goes."""
        return Offsets(self.size, REQUEST, self.count)

    # -- the peer's --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def exported(self) -> AsyncIterator[StorageDaemon]:
        """A daemon with both disks, the source exported by NBD."""
        async with storage_daemon.running() as daemon:
            for name, path in (("source", self.source), ("target", self.target)):
                await daemon.execute("blockdev-add", **node_options(name, path, FORMAT, unsafe=True))
            address = {"type": "unix", "data": {"path": str(self.socket)}}
            await daemon.execute("nbd-server-start", addr=address)
            export = {"type": "nbd", "id": "guest", "node_name": "source", "name": "disk", "writable": True}
            await daemon.execute("block-export-add", **export)
            yield daemon

    async def peer_none(self) -> Figures:
        """As ``none``."""
        async with self.exported() as daemon:
            await _start(daemon, sync="none")
            async with fio.running(self._load(count=self.count)) as load:
                rate = await fio.result(load)
            await daemon.execute("block-job-cancel", device="job")
            await daemon.wait_event("BLOCK_JOB_CANCELLED")
            return {"rate": rate}

    async def peer_full(self, speed: int) -> Figures:
        """As ``full``."""
        load = self._load(runtime_s=LOAD_MAX_S)
        async with self.exported() as daemon, fio.running(load) as process:
            await asyncio.sleep(WARM_UP_S)
            start = time.time()
            await _start(daemon, sync="full", speed=speed)
            await daemon.finish_job()
            end = time.time()
            process.send_signal(signal.SIGINT)
            await process.communicate()
        return {"rate": fio.rate_within(load.completions(), start, end), "backup": end - start}

    def _load(self, *, runtime_s: float = 0.0, count: int = 0) -> fio.Load:
        return fio.Load(self.socket, "disk", self.size, DEPTH, self.place / "logs", runtime_s, count)

    # -- sides -------------------------------------------------------------------------------------------------

    def by_us(self, kind: str, loop: str, engine: str, speed: int) -> Figures:
        """Run one of ours on a new target."""
        make_empty(self.target, FORMAT, self.size)
        if kind == "full":
            return loops.run(loop, lambda: self.full(engine, speed))
        return loops.run(loop, lambda: self.none(engine) if kind == "none" else self.idle(engine))

    def by_peer(self, kind: str, speed: int) -> Figures:
        """Run one of the peer's on a new target."""
        make_empty(self.target, FORMAT, self.size)
        if kind == "idle":
            return {"rate": Bench(self.source, FORMAT, self.offsets, DEPTH, write=True).rate()}
        return loops.run(loops.STOCK, self.peer_none if kind == "none" else lambda: self.peer_full(speed))


async def _start(daemon: StorageDaemon, **options: object) -> None:
    await daemon.execute("blockdev-backup", job_id="job", device="source", target="target", **options)


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """See the module's text."""
    with workspace(settings.directory, "guest-writes") as place, TemporaryDirectory(prefix="nbd-") as sockets:
        source = make_disk(place / f"source.{FORMAT}", FORMAT, settings.size)
        warm_in_small_pages(source)
        target, socket = place / f"target.{FORMAT}", Path(sockets) / "s"
        disks = Disks(source, target, place, socket, settings.size, settings.requests)
        yield [_case(situation, disks, settings) for situation in situations(settings.size // PACED_S)]


def situations(speed: int) -> tuple[Situation, ...]:
    """All of them; ``speed`` is that of the paced backup."""
    rate = requests_per_second(BAR, AIM)
    return (
        Situation("idle", "idle", "qemu-img bench -w -d 16", (requests_per_second(),)),
        Situation("none", "none", VIA_NBD, (rate,)),
        Situation("full", "full", VIA_NBD, (rate, seconds(name="backup"))),
        Situation("full, paced", "full", VIA_NBD, (requests_per_second(),), speed),
    )


def _case(situation: Situation, disks: Disks, settings: Settings) -> Case:
    kind, speed = situation.kind, situation.speed
    return Case(
        name=situation.name,
        peer=situation.peer,
        figures=situation.figures,
        ours={loop: partial(disks.by_us, kind, loop, settings.engine, speed) for loop in settings.loops},
        theirs=partial(disks.by_peer, kind, speed),
        note=NOTE,
    )


SCENARIO = Scenario("guest_writes", __doc__.partition("\n")[0], cases)

if __name__ == "__main__":
    main(SCENARIO)
