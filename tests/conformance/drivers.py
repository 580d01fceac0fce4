"""The disks that run the suite: each built-in driver, alone and in the stacks that people build of them.

``fussy`` is no driver of the project: a filter that takes requests in sectors only, and few of them at once, and checks
that whoever calls it keeps the promises of ``graph/driver.py``.
"""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from shutil import which
from typing import TYPE_CHECKING, Any

from blocklayer.base.errors import OptionError
from blocklayer.base.limits import BlockLimits
from blocklayer.base.ranges import align_up
from blocklayer.drivers.filter import FilterDriver
from blocklayer.drivers.nbd import NbdDriver
from blocklayer.exports.nbd_server import NbdExport, NbdServer
from tests.conformance.suite import KIB, SIZE, Can, Factory
from tests.helpers.nbd_disk import PaperDisk

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    import blocklayer
    from blocklayer.base.extents import Extent
    from blocklayer.base.modes import WriteFlags
    from blocklayer.base.options import Options
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import Opener

SECTOR = 512


class FussyDriver(FilterDriver):
    """Whole sectors, at most 8 KiB of data at once, inside the disk; asserts it."""

    name = "fussy"

    def __init__(self, file: Child) -> None:
        """Narrow limits."""
        super().__init__(file)
        self.growable = False
        self.limits = BlockLimits(SECTOR, 1, transfer_max=8 * KIB, zeroes_max=32 * KIB)

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """No options."""
        if options:
            raise OptionError(f"unknown option {min(options)!r}")
        return cls(await opener.child("file"))

    def _check(self, offset: int, length: int, length_max: int) -> None:
        assert offset >= 0
        assert 0 < length <= length_max
        assert offset % SECTOR == length % SECTOR == 0
        assert offset + length <= align_up(self.size, SECTOR)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Checked."""
        self._check(offset, len(buffer), 8 * KIB)
        return super().try_read_into(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Checked."""
        self._check(offset, len(buffer), 8 * KIB)
        await super().read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Checked; what lies behind the end is dropped."""
        self._check(offset, len(data), 8 * KIB)
        await super().write(offset, data[: self.size - offset], flags)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Checked."""
        self._check(offset, length, 32 * KIB)
        await super().write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """Checked."""
        self._check(offset, length, 32 * KIB)
        await super().discard(offset, length)

    async def block_status(self, offset: int, length: int) -> Extent:
        """Checked."""
        assert 0 <= offset < offset + length <= self.size
        return await super().block_status(offset, length)


# -- what lies in files ------------------------------------------------------------------------------------------------


def file_in(folder: Path, name: str = "disk", **options: object) -> dict[str, object]:
    """Options of a file node."""
    return {"driver": "file", "filename": str(folder / name), **options}


async def plain_file(graph: blocklayer.Graph, folder: Path, size: int) -> None:
    """An empty file of the disk's size."""
    with (folder / "disk").open("wb") as file:
        file.truncate(size)


async def file_with_margins(graph: blocklayer.Graph, folder: Path, size: int) -> None:
    """A file with a disk of zeroes from 4096 on, and data before and behind it."""
    (folder / "disk").write_bytes(b"before" * 682 + b"even" + bytes(size) + b"behind" * 512)


async def file_with_head(graph: blocklayer.Graph, folder: Path, size: int) -> None:
    """The same with nothing behind the disk."""
    (folder / "disk").write_bytes(b"before" * 682 + b"even" + bytes(size))


def margins_are_whole(folder: Path) -> None:
    """Nobody wrote outside the slice."""
    content = (folder / "disk").read_bytes()
    assert content.startswith(b"before" * 682 + b"even")
    assert content.endswith(b"behind" * 512)


def on_file(**file: object) -> Any:
    """Options of a raw node on a file."""
    return lambda folder, _size: {"driver": "raw", "file": file_in(folder, **file)}


# -- over a network ------------------------------------------------------------------------------------------------------


class ServedDriver(NbdDriver):
    """The driver with a server of its own, of our own, and a disk in memory behind that."""

    server: NbdServer | None = None

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """Options: ``size``, ``path``, and those of the driver."""
        rest = {key: value for key, value in options.items() if key != "size"}
        server = await NbdServer().__aenter__()
        try:
            server.add(NbdExport("disk", PaperDisk(int(str(options["size"]))), writable=True))
            await server.listen_unix(str(options["path"]))
            self = await super().open(rest | {"export": "disk"}, opener)
        except BaseException:
            await server.close(hard=True)
            raise
        self.server = server
        return self

    async def close(self) -> None:
        """The server too."""
        await super().close()
        if self.server is not None:
            await self.server.close()


def nbd(name: str, **options: object) -> Factory:
    """An export of a server of our own, which goes with the node."""
    return Factory(
        name,
        lambda folder, size: {"driver": "nbd", "path": str(folder / "socket"), "size": size, **options},
        Can.WRITE | Can.SPARSE,
        size=SIZE + 1,
        drivers={"nbd": ServedDriver},
    )


# -- qcow2 -------------------------------------------------------------------------------------------------------------


def qemu_finds_no_fault(folder: Path) -> None:
    """``qemu-img check``, where there is one: neither leaks nor corruptions."""
    if which("qemu-img"):
        command = ["qemu-img", "check", "--output=json", "-f", "qcow2", str(folder / "disk.qcow2")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)
        assert {key: found[key] for key in ("leaks", "corruptions", "check-errors") if found.get(key)} == {}


def qcow2(name: str, *, open: Mapping[str, object] | None = None, **create: object) -> Factory:
    """An image of its own."""

    async def make(graph: blocklayer.Graph, folder: Path, size: int) -> None:
        places = {"data_file": str(folder / "data")} if "data_file" in create else {}
        await graph.create(folder / "disk.qcow2", format="qcow2", size=size, **create | places)

    def options(folder: Path, size: int) -> dict[str, object]:
        return {"driver": "qcow2", "file": file_in(folder, "disk.qcow2"), **(open or {})}

    can = Can.STORED
    if not create.get("data_file_raw") and "preallocation" not in create:
        can |= Can.SPARSE
    if "data_file" not in create:
        can |= Can.COMPRESS
    return Factory(name, options, can, create=make, grain=SECTOR)


BASE = random.Random(7).randbytes(SIZE // 2).replace(b"\0", b"\2")


def base_content(size: int) -> bytes:
    """Runs of data and of zeroes, to the middle of the disk or to its end."""
    return BASE[:70_000] + bytes(5_000) + BASE[75_000 : min(size, len(BASE))] + bytes(max(0, size - len(BASE)))


def overlay(name: str, *, base_size: int = len(BASE), depth: int = 1, **create: object) -> Factory:
    """``depth`` qcow2 images over a raw one that holds ``base_content``."""

    async def make(graph: blocklayer.Graph, folder: Path, size: int) -> None:
        content = base_content(base_size)
        (folder / "base.raw").write_bytes(content)
        below, format = "base.raw", "raw"
        for level in range(depth - 1):
            path = f"middle{level}.qcow2"
            backed = {"backing_file": below, "backing_fmt": format}
            await graph.create(folder / path, format="qcow2", size=size - SECTOR, cluster_size=4 * KIB, **backed)
            below, format = path, "qcow2"
        path = folder / "disk.qcow2"
        await graph.create(path, format="qcow2", size=size, backing_file=below, backing_fmt=format, **create)

    def initial(size: int) -> bytes:
        return base_content(base_size)[:size].ljust(size, b"\0")

    made = qcow2(name)
    return replace(made, create=make, initial=initial, can=made.can & ~Can.SPARSE)


# -- the table ---------------------------------------------------------------------------------------------------------


def above(name: str, below: Factory, **options: object) -> Factory:
    """A filter over another factory's disk."""
    return replace(
        below,
        name=f"{name}-over-{below.name}",
        options=lambda folder, size: {"driver": name, "file": below.options(folder, size), **options},
    )


def fussy(below: Factory) -> Factory:
    """A filter with narrow limits over another factory's disk."""
    made = above("fussy", below)
    return replace(made, drivers={"fussy": FussyDriver}, can=made.can & ~Can.NOWAIT)


MEMORY = Factory(
    "memory",
    lambda folder, size: {"driver": "memory", "size": size},
    Can.WRITE | Can.RESIZE | Can.NOWAIT,
    size=SIZE + 1,
)
NULL = Factory(
    "null-co", lambda folder, size: {"driver": "null-co", "size": size, "read-zeroes": True}, Can.SPARSE | Can.NOWAIT
)
FILE = Factory("file", lambda folder, _: file_in(folder), Can.STORED | Can.SPARSE, create=plain_file, size=SIZE + 1)
RAW = replace(FILE, name="raw", options=on_file())
QCOW2 = qcow2("qcow2")
OVERLAY = overlay("overlay")

FACTORIES: tuple[Factory, ...] = (
    MEMORY,
    NULL,
    FILE,
    RAW,
    replace(RAW, name="raw-direct", options=on_file(cache="none"), size=304 * KIB, grain=4 * KIB),
    Factory(
        "raw-slice",
        lambda folder, size: {"driver": "raw", "offset": 4096, "size": size, "file": file_in(folder)},
        Can.WRITE | Can.PERSIST,
        create=file_with_margins,
        size=SIZE + 1,
        check=margins_are_whole,
    ),
    Factory(
        "raw-tail",
        lambda folder, _: {"driver": "raw", "offset": 4096, "file": file_in(folder)},
        create=file_with_head,
    ),
    replace(QCOW2, check=qemu_finds_no_fault),
    replace(qcow2("qcow2-direct", open={"cache": "none"}), check=qemu_finds_no_fault),
    qcow2("qcow2-v2", compat="0.10"),
    qcow2("qcow2-tiny-clusters", open={"l2-cache-size": 1024, "refcount-cache-size": 1024}, cluster_size=512),
    qcow2("qcow2-large-clusters", cluster_size=2 * KIB * KIB),
    qcow2("qcow2-subclusters", cluster_size=16 * KIB, extended_l2=True),
    qcow2("qcow2-lazy", lazy_refcounts=True),
    qcow2("qcow2-narrow-refcounts", refcount_bits=1, cluster_size=4 * KIB),
    qcow2("qcow2-wide-refcounts", refcount_bits=64, compression_type="zstd"),
    qcow2("qcow2-data-file", data_file="data"),
    qcow2("qcow2-raw-data-file", data_file="data", data_file_raw=True),
    qcow2("qcow2-laid-out", preallocation="metadata"),
    replace(OVERLAY, check=qemu_finds_no_fault),
    overlay("overlay-long-base", base_size=2 * SIZE),
    overlay("overlay-v2", compat="0.10", cluster_size=4 * KIB),
    overlay("overlay-subclusters", cluster_size=32 * KIB, extended_l2=True),
    overlay("overlay-thrice", depth=3, base_size=2 * SIZE, cluster_size=8 * KIB),
    nbd("nbd"),
    nbd("nbd-several", connections=4),
    above("throttle", MEMORY, **{"bps-total": "1T"}),
    above("throttle", QCOW2, **{"iops-total": 10**9}),
    above("faults", OVERLAY),
    fussy(MEMORY),
    fussy(OVERLAY),
)
