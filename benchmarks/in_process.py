"""4 KiB requests in this process on one disk, against ``qemu-img bench``: what raw and qcow2 scenarios share.

Both sides go through the same offsets in the same order, with the same number in flight, by worker threads and
through a warm page cache. ``try_read`` is our synchronous path, with ``read`` where it declines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import loops, ours, workers
from benchmarks.harness import Case, requests_per_second
from benchmarks.images import Offsets
from benchmarks.qemu_img import Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import blocklayer
    from benchmarks.harness import Figure, Figures, Settings

REQUEST = 4096
DEPTHS = (1, 16, 64)
SHARE = 4
"""The disk is ``--size`` divided by this: small requests need none larger, and it is made anew for each writing run."""

NOTE = (
    "4 KiB at offsets spread by a constant step, the same for both (qemu-img bench knows no random ones); page cache "
    "warm; the peer uses worker threads and the page cache."
)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to measure; ``prepare`` brings it to its first state before every writing run, and returns its path."""

    path: Path
    format: str
    size: int
    prepare: Callable[[], object]

    def cases(self, settings: Settings, try_read: Figure) -> Iterator[Case]:
        """Synchronous reads, which are judged by ``try_read``, then reads and writes at each depth."""
        yield self._case("try_read", settings, 1, try_read)
        for kind in ("read", "write"):
            for depth in DEPTHS:
                yield self._case(kind, settings, depth, requests_per_second())

    def _case(self, kind: str, settings: Settings, depth: int, figure: Figure) -> Case:
        offsets = Offsets(self.size, REQUEST, settings.requests)
        return Case(
            name=kind if kind == "try_read" else f"{kind}, depth {depth}",
            peer=f"qemu-img bench{' -w' if kind == 'write' else ''} -d {depth}",
            figures=(figure,),
            ours={loop: partial(self._by_us, kind, loop, settings.engine, offsets, depth) for loop in settings.loops},
            theirs=partial(self._by_peer, kind, offsets, depth),
            note=NOTE,
        )

    def _by_us(self, kind: str, loop: str, engine: str, offsets: Offsets, depth: int) -> Figures:
        if kind == "write":
            self.prepare()
        return loops.run(loop, lambda: self._run(kind, engine, offsets, depth))

    def _by_peer(self, kind: str, offsets: Offsets, depth: int) -> Figures:
        if kind == "write":
            self.prepare()
        return {"rate": Bench(self.path, self.format, offsets, depth, write=kind == "write").rate()}

    async def _run(self, kind: str, engine: str, offsets: Offsets, depth: int) -> Figures:
        async with ours.graph(engine) as graph:
            node = await ours.open_disk(graph, self.path, self.format, unsafe=False)
            if kind == "try_read":
                return await try_reads(node, offsets)
            if kind == "read":
                return {"rate": await workers.rate(offsets, depth, lambda offset: node.read(offset, REQUEST))}
            data = memoryview(bytes(range(256)) * (REQUEST // 256))
            return {"rate": await workers.rate(offsets, depth, lambda offset: node.write(offset, data))}


async def try_reads(node: blocklayer.Node, offsets: Offsets) -> Figures:
    """Read synchronously where that works; ``declined`` is the share of requests where it did not."""
    declined = 0
    places = list(offsets)
    with loops.timed() as watch:
        for offset in places:
            if node.try_read(offset, REQUEST) is None:
                declined += 1
                await node.read(offset, REQUEST)
    return {"rate": len(places) / watch.seconds, "declined": declined / len(places)}
