"""Peak resident memory of a process that makes one backup, against qemu-storage-daemon.

Ours is a fresh Python process with everything that the library imports; its high-water mark is read at the end of the
backup, as the daemon's is. With ``--child`` this module is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import loops
from benchmarks.backups import MIB, PEER, Backup
from benchmarks.command_line import main
from benchmarks.harness import Case, Figure, Scenario
from benchmarks.images import make_disk, make_empty, make_sparse, warm, workspace
from benchmarks.storage_daemon import peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.harness import Figures, Settings

PEAK = Figure("peak", "MiB", higher_is_better=False)
SPARSE_SIZE = 1 << 40
NOTE = "high-water mark of the resident set (VmHWM) of the process; ours includes the Python interpreter."
TIMEOUT_S = 600.0


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """A full disk in both formats, and a sparse one of 1 TiB."""
    with workspace(settings.directory, "peak-memory") as place:
        full = make_disk(place / "full.qcow2", "qcow2", settings.size)
        raw = make_disk(place / "full.raw", "raw", settings.size)
        sparse = make_sparse(place / "sparse.qcow2", SPARSE_SIZE, settings.size // 8)
        warm(full, raw, sparse)
        target = place / "target"
        backups = {
            "raw -> raw": Backup(raw, "raw", target, "raw", settings.size),
            "qcow2 -> qcow2": Backup(full, "qcow2", target, "qcow2", settings.size),
            "1 TiB sparse qcow2 -> qcow2": Backup(sparse, "qcow2", target, "qcow2", SPARSE_SIZE),
        }
        yield [
            Case(
                name=name,
                peer=PEER,
                figures=(PEAK,),
                ours={loop: partial(in_child, backup, loop, settings.engine) for loop in settings.loops},
                theirs=backup.by_peer,
                note=NOTE,
            )
            for name, backup in backups.items()
        ]


def in_child(backup: Backup, loop: str, engine: str) -> Figures:
    """Run the backup in a new process; ``peak`` in MiB."""
    make_empty(backup.target, backup.target_format, backup.size)
    order = {
        "source": str(backup.source),
        "source_format": backup.source_format,
        "target": str(backup.target),
        "target_format": backup.target_format,
        "size": backup.size,
        "loop": loop,
        "engine": engine,
    }
    command = (sys.executable, "-m", "benchmarks.peak_memory", "--child", json.dumps(order))
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    finally:
        backup.target.unlink()
    return {"peak": int(done.stdout) / MIB}


def child(order: str) -> int:
    """Make the backup that ``order`` (JSON) describes; the process's peak in bytes."""
    fields = json.loads(order)
    loop, engine = fields.pop("loop"), fields.pop("engine")
    backup = Backup(Path(fields.pop("source")), target=Path(fields.pop("target")), **fields)
    loops.run(loop, lambda: backup.run_ours(engine))
    return peak_memory(os.getpid())


SCENARIO = Scenario("peak_memory", __doc__.partition("\n")[0], cases)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(f"{child(sys.argv[2])}\n")
    else:
        main(SCENARIO)
