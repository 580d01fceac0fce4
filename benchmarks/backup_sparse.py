"""Full backup of a 1 TiB qcow2 disk that holds little data in single clusters, against qemu-storage-daemon.

What is measured is how cheap the empty 99.9 % are, and how well lone clusters are found and copied.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.backups import PEER, Backup
from benchmarks.command_line import main
from benchmarks.harness import Case, Scenario, seconds
from benchmarks.images import make_sparse, warm, workspace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.harness import Settings

VIRTUAL_SIZE = 1 << 40
NOTE = "1 TiB qcow2 that holds --size bytes in lone 64 KiB clusters at random places; flushes ignored."


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """One case: qcow2 to qcow2."""
    with workspace(settings.directory, "backup-sparse") as place:
        source = make_sparse(place / "source.qcow2", VIRTUAL_SIZE, settings.size)
        warm(source)
        backup = Backup(source, "qcow2", place / "target.qcow2", "qcow2", VIRTUAL_SIZE)
        yield [
            Case(
                name="1 TiB qcow2 -> qcow2",
                peer=PEER,
                figures=(seconds(1.0, 3.0),),
                ours={loop: partial(backup.by_us, loop, settings.engine) for loop in settings.loops},
                theirs=backup.by_peer,
                note=NOTE,
            )
        ]


SCENARIO = Scenario("backup_sparse", __doc__.partition("\n")[0], cases)

if __name__ == "__main__":
    main(SCENARIO)
