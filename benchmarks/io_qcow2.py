"""4 KiB reads and writes on a qcow2 overlay with a backing file in this process, against qemu-img bench.

Half of the overlay's clusters are allocated, at random: reads are answered by both layers in turn, and the first write
to each other cluster copies 60 KiB of it on write. Every writing run starts from the same copy of the overlay.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.command_line import main
from benchmarks.harness import Case, Scenario, requests_per_second
from benchmarks.images import make_disk, make_overlay, warm_in_small_pages, workspace
from benchmarks.in_process import SHARE, Disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.harness import Settings

ALLOCATED = 0.5
READ_BAR, READ_AIM = 3.0, 5.0


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """A qcow2 base, full of data, under a qcow2 overlay."""
    with workspace(settings.directory, "io-qcow2") as place:
        size = settings.size // SHARE
        base = make_disk(place / "base.qcow2", "qcow2", size)
        pristine = make_overlay(place / "pristine.qcow2", base, "qcow2", allocated=ALLOCATED, size=size)
        path = place / "overlay.qcow2"

        def prepare() -> None:
            shutil.copyfile(pristine, path)
            warm_in_small_pages(path)

        prepare()
        warm_in_small_pages(base)
        disk = Disk(path, "qcow2", size, prepare)
        yield [*disk.cases(settings, requests_per_second(READ_BAR, READ_AIM))]


SCENARIO = Scenario("io_qcow2", __doc__.partition("\n")[0], cases)

if __name__ == "__main__":
    main(SCENARIO)
