"""What was measured with and on: figures without it cannot be compared."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("blocklayer", "anyio", "uvloop", "isal", "zstandard", "bitarray")
PROGRAMS = ("qemu-img", "qemu-storage-daemon", "fio")


def environment(directory: Path, loops: Sequence[str]) -> dict[str, object]:
    """Everything that has an influence, as JSON."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": file_system_of(directory, Path("/proc/self/mounts").read_text(encoding="utf-8")),
        "loops": list(loops),
        "versions": {**_packages(), **{program: program_version(program) for program in PROGRAMS}},
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }


def file_system_of(directory: Path, mounts: str) -> str:
    """The type of the file system that holds ``directory``, by the lines of /proc/mounts; the longest prefix wins."""
    found = ("", "unknown")
    for line in mounts.splitlines():
        _, mount_point, kind, *_ = line.split(" ")
        if directory.resolve().is_relative_to(mount_point) and len(mount_point) >= len(found[0]):
            found = (mount_point, kind)
    return found[1]


def program_version(program: str) -> str | None:
    """The first number with a point that ``program --version`` prints; None if it is not installed."""
    found = re.search(r"\d+(\.\d+)+", _first_line(program, "--version") or "")
    return None if found is None else found[0]


def _packages() -> dict[str, str | None]:
    return {name: _package(name) for name in PACKAGES}


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]
