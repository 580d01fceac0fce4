"""Disks to measure with: made by qemu-img and qemu-io, so that neither side reads what it wrote itself.

Content is random and incompressible: no zero detection, deduplication or sparse file takes work away from a side.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
CLUSTER = 64 << 10
"""qcow2's default, in bytes."""

PIECE = 4 * MIB
"""Files are filled and read in pieces of this many bytes."""

SEED = 20_240_607
"""Of everything random here: two runs measure the same work."""


def qemu_img(*arguments: str) -> None:
    """Run qemu-img; ``CalledProcessError`` with its message if it fails."""
    subprocess.run(("qemu-img", *arguments), check=True, capture_output=True, text=True)


def fill_raw(path: Path, size: int) -> None:
    """Make a raw disk of ``size`` bytes of random data."""
    generator = random.Random(SEED)
    with path.open("wb") as file:
        for start in range(0, size, PIECE):
            file.write(generator.randbytes(min(PIECE, size - start)))


def make_disk(path: Path, image_format: str, size: int) -> Path:
    """A disk full of random data in ``image_format``."""
    if image_format == "raw":
        fill_raw(path, size)
        return path
    raw = path.with_suffix(".filling")
    fill_raw(raw, size)
    qemu_img("convert", "-f", "raw", "-O", image_format, str(raw), str(path))
    raw.unlink()
    return path


def make_empty(path: Path, image_format: str, size: int) -> Path:
    """A target as both sides find it: created, nothing allocated."""
    path.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", image_format, str(path), str(size))
    return path


def make_overlay(path: Path, backing: Path, backing_format: str, *, allocated: float, size: int) -> Path:
    """A qcow2 overlay in which that share of the clusters, chosen at random, is allocated."""
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(backing), "-F", backing_format, str(path))
    clusters = range(0, size, CLUSTER)
    fill_clusters(path, sorted(random.Random(SEED).sample(clusters, int(len(clusters) * allocated))))
    return path


def make_sparse(path: Path, virtual_size: int, data: int) -> Path:
    """A qcow2 disk of ``virtual_size`` bytes with ``data`` bytes in it: single clusters, spread at random."""
    make_empty(path, "qcow2", virtual_size)
    places = random.Random(SEED).sample(range(virtual_size // CLUSTER), data // CLUSTER)
    fill_clusters(path, [place * CLUSTER for place in sorted(places)])
    return path


def fill_clusters(path: Path, offsets: list[int]) -> None:
    """Write the clusters at ``offsets`` of a qcow2 image, by one run of qemu-io."""
    commands = "".join(f"write -q -P {1 + i % 255} {offset} {CLUSTER}\n" for i, offset in enumerate(offsets))
    arguments = ("qemu-io", "-f", "qcow2", "-t", "unsafe", str(path))
    subprocess.run(arguments, input=commands, check=True, capture_output=True, text=True)


def warm(*paths: Path) -> None:
    """Bring whole files into the page cache; holes are passed over."""
    buffer = bytearray(PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            for start, end in _data_of(file.fileno()):
                file.seek(start)
                while file.tell() < end and file.readinto(memoryview(buffer)[: end - file.tell()]):
                    pass


def _data_of(fd: int) -> Iterator[tuple[int, int]]:
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def warm_in_small_pages(path: Path) -> None:
    """Bring a whole file into the page cache page by page, as a guest's small requests would.

    A file that was written or read in large pieces is cached in folios of up to 2 MiB, and ext4 goes through all
    buffer heads of a folio for each small write: 4 KiB writes are then 5 to 50 times as slow, whoever makes them,
    and what is measured is the history of the file. Disks that are written in small requests are warmed by this.
    """
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for start, end in _data_of(fd):
            for offset in range(start, end, CLUSTER):
                os.pread(fd, min(CLUSTER, end - offset), offset)


@contextmanager
def workspace(directory: Path, name: str) -> Iterator[Path]:
    """A directory for one scenario's files; gone afterwards."""
    place = directory / f"blocklayer-bench-{name}-{os.getpid()}"
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place)


@dataclass(frozen=True, slots=True)
class Offsets:
    """``count`` offsets of ``request`` bytes each, spread over ``size`` bytes by a constant step that wraps around.

    It is the only spread that ``qemu-img bench`` can do, so both sides use it. The step is odd in units of
    ``request``: no offset repeats before all were used (if the size is a power of two).
    """

    size: int
    request: int
    count: int

    @property
    def step(self) -> int:
        """Bytes from one request to the next: about 0.38 of the disk, below qemu-img's limit of 2 GiB."""
        units = int(min(self.size, 2 << 30) * 0.381966) // self.request
        return (units | 1) * self.request

    def __iter__(self) -> Iterator[int]:
        """The offsets in order."""
        return ((i * self.step) % self.size for i in range(self.count))
