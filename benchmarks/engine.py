"""The I/O engine alone: 4 KiB writes at spread offsets, against one hop to asyncio's executor for each."""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import loops, workers
from benchmarks.command_line import main
from benchmarks.harness import Case, Scenario, requests_per_second
from benchmarks.images import Offsets, make_disk, warm_in_small_pages, workspace
from benchmarks.ours import ENGINES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.harness import Figures, Settings

REQUEST = 4096
DEPTHS = (1, 16, 64)
DATA = memoryview(bytes(range(256)) * (REQUEST // 256))
NOTE = "the peer runs under the same event loop; writes go to allocated blocks and stay in the page cache."


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """Each depth under each loop, with the peer under the same loop."""
    with workspace(settings.directory, "engine") as place:
        path = make_disk(place / "disk.raw", "raw", settings.size)
        warm_in_small_pages(path)
        offsets = Offsets(settings.size, REQUEST, settings.requests)
        yield [
            Case(
                name=f"write, depth {depth}, {loop}",
                peer="loop.run_in_executor(os.pwrite)",
                figures=(requests_per_second(),),
                ours={loop: partial(by_us, path, loop, settings.engine, offsets, depth)},
                theirs=partial(by_executor, path, loop, offsets, depth),
                note=NOTE,
            )
            for depth in DEPTHS
            for loop in settings.loops
        ]


def by_us(path: Path, loop: str, engine_name: str, offsets: Offsets, depth: int) -> Figures:
    """``rate`` of ``Engine.write``."""

    async def run(fd: int) -> float:
        engine = ENGINES[engine_name]()
        try:
            return await workers.rate(offsets, depth, lambda offset: engine.write(fd, (DATA,), offset))
        finally:
            await engine.close()

    with _opened(path) as fd:
        return {"rate": loops.run(loop, lambda: run(fd))}


def by_executor(path: Path, loop: str, offsets: Offsets, depth: int) -> Figures:
    """``rate`` of ``os.pwrite`` in asyncio's default executor."""

    async def run(fd: int) -> float:
        submit = asyncio.get_running_loop().run_in_executor
        return await workers.rate(offsets, depth, lambda offset: submit(None, os.pwrite, fd, DATA, offset))

    with _opened(path) as fd:
        return {"rate": loops.run(loop, lambda: run(fd))}


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


SCENARIO = Scenario("engine", __doc__, cases)

if __name__ == "__main__":
    main(SCENARIO)
