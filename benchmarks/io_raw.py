"""4 KiB reads and writes on a raw disk in this process, against qemu-img bench."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.command_line import main
from benchmarks.harness import Case, Scenario, requests_per_second
from benchmarks.images import make_disk, warm_in_small_pages, workspace
from benchmarks.in_process import SHARE, Disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.harness import Settings


@contextmanager
def cases(settings: Settings) -> Iterator[Sequence[Case]]:
    """A file that is all allocated, so that writes find no holes."""
    with workspace(settings.directory, "io-raw") as place:
        size = settings.size // SHARE
        path = make_disk(place / "disk.raw", "raw", size)
        warm_in_small_pages(path)
        yield [*Disk(path, "raw", size, prepare=lambda: path).cases(settings, requests_per_second())]


SCENARIO = Scenario("io_raw", __doc__, cases)

if __name__ == "__main__":
    main(SCENARIO)
