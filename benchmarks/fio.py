"""The load on a peer's disk: fio's NBD client, which writes at random places with a fixed number in flight.

fio opens no window of its own choice onto the time in which a backup runs; its log of completions (one line each, in
milliseconds since the epoch) is cut to that time afterwards.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PROGRAM = "fio"

START_S = 30.0
"""Time in which fio has to begin: it forks, connects, and lays nothing out."""


@dataclass(frozen=True, slots=True)
class Load:
    """4 KiB random writes to an NBD export, for ``runtime_s`` seconds or ``count`` requests, whichever is set."""

    socket: Path
    export: str
    size: int
    depth: int
    logs: Path
    runtime_s: float = 0.0
    count: int = 0

    def arguments(self) -> list[str]:
        """The command line."""
        uri = f"nbd+unix:///{self.export}?socket={self.socket}"
        limit = [f"--number_ios={self.count}"] if self.count else ["--time_based", f"--runtime={self.runtime_s:g}"]
        return [
            PROGRAM,
            "--name=guest",
            "--ioengine=nbd",
            f"--uri={uri}",
            "--rw=randwrite",
            "--bs=4k",
            "--norandommap",
            f"--size={self.size}",
            f"--iodepth={self.depth}",
            *limit,
            "--randseed=7",
            "--output-format=json",
            f"--write_bw_log={self.logs / 'guest'}",
            "--log_unix_epoch=1",
        ]

    def completions(self) -> list[float]:
        """When each write completed, in seconds since the epoch; after the load has ended."""
        text = (self.logs / "guest_bw.1.log").read_text(encoding="ascii")
        return [int(line.partition(",")[0]) / 1000 for line in text.splitlines()]


@asynccontextmanager
async def running(load: Load) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start fio; it is dead when the block is left. Use ``result`` inside to wait for its end."""
    load.logs.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *load.arguments(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def result(process: asyncio.subprocess.Process) -> float:
    """Wait until fio has ended; writes per second by its own clock, which leaves out its start."""
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"fio failed with {process.returncode}")
    return parse_rate(output.decode())


def parse_rate(output: str) -> float:
    """Writes per second in fio's JSON."""
    report = json.loads(output[output.index("{") :])
    return float(report["jobs"][0]["write"]["iops"])


def rate_within(completions: list[float], start: float, end: float) -> float:
    """Completions per second in the time from ``start`` to ``end``."""
    return sum(start <= moment <= end for moment in completions) / (end - start)
