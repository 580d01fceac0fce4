"""Full backup of a disk that is full of data, between formats, against qemu-storage-daemon.

Sources are in the page cache and targets are new, so the figures are about the copying, not the device; the durable
case adds what it takes to bring the target to the disk, which is the device's work for both.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.backups import PEER, Backup
from benchmarks.command_line import main
from benchmarks.harness import Case, Scenario, seconds
from benchmarks.images import make_disk, warm, workspace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.harness import Settings

PAIRS = (("raw", "raw"), ("raw", "qcow2"), ("qcow2", "qcow2"))
BAR, AIM = 1.0, 1.5
NOTE = (
    "time from the command to the completed job, flushes ignored on both sides; 'durable': until the target is flushed "
    "and closed. Random data, source in the page cache, target created by qemu-img for both."
)


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """Each pair of formats cached, and the last one durable too."""
    with workspace(settings.directory, "backup-full") as place:
        sources = {kind: make_disk(place / f"source.{kind}", kind, settings.size) for kind in ("raw", "qcow2")}
        warm(*sources.values())
        made = []
        for source, target in PAIRS:
            backup = Backup(sources[source], source, place / f"target.{target}", target, settings.size)
            made.append(_case(f"{source} -> {target}", backup, settings, bar=BAR, aim=AIM))
        durable = Backup(sources["qcow2"], "qcow2", place / "target.qcow2", "qcow2", settings.size, durable=True)
        made.append(_case("qcow2 -> qcow2, durable", durable, settings))
        yield made


def _case(name: str, backup: Backup, settings: Settings, *, bar: float | None = None, aim: float | None = None) -> Case:
    return Case(
        name=name,
        peer=PEER,
        figures=(seconds(bar, aim),),
        ours={loop: partial(backup.by_us, loop, settings.engine) for loop in settings.loops},
        theirs=backup.by_peer,
        note=NOTE,
    )


SCENARIO = Scenario("backup_full", __doc__.partition("\n")[0], cases)

if __name__ == "__main__":
    main(SCENARIO)
