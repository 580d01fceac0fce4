"""One full backup, done by us and by qemu-storage-daemon in the same way.

Both open source and target before the clock starts; the target was created by the same program for both. Then

    cached    flushes are ignored on all nodes; the clock stops when the job has completed
    durable   the clock stops when the job has completed and the target is flushed and closed

so neither side is charged for durability that the other does not give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import loops, ours, storage_daemon
from benchmarks.images import make_empty
from benchmarks.storage_daemon import node_options, peak_memory

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness import Figures

PEER = "qemu-storage-daemon blockdev-backup"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Backup:
    """What is backed up to what; ``size`` is the disk's in bytes."""

    source: Path
    source_format: str
    target: Path
    target_format: str
    size: int
    durable: bool = False

    def by_us(self, loop: str, engine: str) -> Figures:
        """``time`` in seconds."""
        make_empty(self.target, self.target_format, self.size)
        try:
            return {"time": loops.run(loop, lambda: self.run_ours(engine))}
        finally:
            self.target.unlink()

    def by_peer(self) -> Figures:
        """``time`` in seconds, and ``peak`` of the daemon's memory in MiB."""
        make_empty(self.target, self.target_format, self.size)
        try:
            time, peak = loops.run(loops.STOCK, self._run_peer)
        finally:
            self.target.unlink()
        return {"time": time, "peak": peak / MIB}

    async def run_ours(self, engine: str) -> float:
        """Seconds of the backup in this process; the target exists."""
        unsafe = not self.durable
        async with ours.graph(engine) as graph:
            source = await ours.open_disk(graph, self.source, self.source_format, unsafe=unsafe)
            target = await ours.open_disk(graph, self.target, self.target_format, unsafe=unsafe)
            with loops.timed() as watch:
                job = await graph.backup(source, target, sync="full")
                await job.wait()
                if self.durable:
                    await target.close()
            return watch.seconds

    async def _run_peer(self) -> tuple[float, int]:
        unsafe = not self.durable
        async with storage_daemon.running() as daemon:
            source = node_options("source", self.source, self.source_format, unsafe=unsafe)
            target = node_options("target", self.target, self.target_format, unsafe=unsafe)
            await daemon.execute("blockdev-add", **source)
            await daemon.execute("blockdev-add", **target)
            with loops.timed() as watch:
                await daemon.execute("blockdev-backup", job_id="job", device="source", target="target", sync="full")
                await daemon.finish_job()
                if self.durable:
                    await daemon.forget_job()
                    await daemon.execute("blockdev-del", node_name="target")
            return watch.seconds, peak_memory(daemon.pid)
