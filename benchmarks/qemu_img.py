"""The peer of single requests: ``qemu-img bench``, QEMU's block layer in one process without a guest or a transport."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.images import Offsets

PROGRAM = "qemu-img"
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: ``depth`` requests in flight at ``offsets``, by worker threads, through the page cache."""

    path: Path
    format: str
    offsets: Offsets
    depth: int
    write: bool = False

    def arguments(self) -> list[str]:
        """The command line."""
        return [
            PROGRAM,
            "bench",
            *(["-w"] if self.write else []),
            "-f",
            self.format,
            "-t",
            "writeback",
            "-i",
            "threads",
            "-c",
            str(self.offsets.count),
            "-d",
            str(self.depth),
            "-s",
            str(self.offsets.request),
            "-S",
            str(self.offsets.step),
            str(self.path),
        ]

    def rate(self) -> float:
        """Run it; requests per second by qemu-img's own clock, which leaves out opening and closing the image."""
        done = subprocess.run(self.arguments(), check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        return self.offsets.count / parse_seconds(done.stdout)


def parse_seconds(output: str) -> float:
    """The time in the last line, "Run completed in 1.234 seconds."; ``ValueError`` if it is not there."""
    match = re.search(r"^Run completed in ([0-9.]+) seconds\.$", output, re.MULTILINE)
    if match is None:
        raise ValueError(f"qemu-img bench says no time: {output!r}")
    return float(match[1])
