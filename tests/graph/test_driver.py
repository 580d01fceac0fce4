"""The Driver contract: what a driver gets for nothing when it has the three required members only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from blocklayer.base.buffers import ZEROES
from blocklayer.base.errors import UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import Permission, WriteFlags
from blocklayer.base.units import MIB
from blocklayer.graph.child import Child
from blocklayer.graph.driver import Driver
from blocklayer.graph.graph import Caller, Graph
from tests.helpers.scripted import NoEngine
from tests.helpers.strict import StrictDriver, strict

if TYPE_CHECKING:
    from typing import Self

    from blocklayer.base.options import Options
    from blocklayer.graph.opener import Opener


class Smallest(Driver):
    """Nothing but the three required members: a disk of "s"."""

    name = "smallest"

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        for role in ("file", "backing"):
            await opener.optional_child(role)
        return cls()

    @property
    def size(self) -> int:
        return 3 * MIB

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = b"s" * len(buffer)


class Writing(Smallest):
    """One that can write, too, and keeps a log."""

    name = "writing"
    limits = BlockLimits(request_alignment=512, transfer_max=MIB // 2)

    def __init__(self) -> None:
        self.log: list[tuple[int, int, bool, WriteFlags]] = []

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        self.log.append((offset, len(data), any(data), flags))


def make_graph() -> Graph:
    drivers: dict[str, type[Driver]] = {"smallest": Smallest, "writing": Writing, "strict": StrictDriver}
    return Graph(drivers, engine=NoEngine)


async def test_three_members_make_a_disk_that_can_be_read() -> None:
    async with make_graph() as graph:
        disk = await graph.open({"driver": "smallest"})
        assert await disk.read(5, 3) == b"sss"
        assert disk.try_read(5, 3) is None
        assert await disk.block_status(0, 100) == Extent(0, 100, ExtentKind.DATA, node=disk.name)
        await disk.flush()
        await disk.discard(0, 512)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda disk: disk.write(512, b"x"), "driver 'smallest' cannot write (at 0x200+1)"),
        (lambda disk: disk.write_zeroes(512, 8), "driver 'smallest' cannot write (at 0x200+8)"),
        (lambda disk: disk.write_compressed(512, b"x"), "driver 'smallest' cannot compress (at 0x200+1)"),
        (lambda disk: disk.truncate(512), "driver 'smallest' cannot be resized to 512 bytes"),
        (
            lambda disk: disk.write_zeroes(512, 8, WriteFlags.NO_FALLBACK),
            "driver 'smallest' has no fast way to write zeroes (at 0x200+8)",
        ),
    ],
)
async def test_what_a_driver_does_not_have_it_says_it_cannot_do(change, text) -> None:
    async with make_graph() as graph:
        disk = await graph.open({"driver": "smallest", "node-name": "disk"})
        with pytest.raises(UnsupportedError) as raised:
            await change(disk)
        assert str(raised.value) == f"node 'disk': {text}"


async def test_zeroes_are_written_in_pieces_that_the_driver_takes() -> None:
    async with make_graph() as graph:
        disk = await graph.open({"driver": "writing"})
        await disk.write_zeroes(512, MIB + 512, WriteFlags.MAY_UNMAP)
        half = MIB // 2
        assert disk.driver.log == [
            (512, half, False, WriteFlags.NONE),
            (512 + half, half, False, WriteFlags.NONE),
            (512 + MIB, 512, False, WriteFlags.NONE),
        ]
        assert len(ZEROES) >= half


async def test_a_flush_reaches_the_children_that_the_driver_may_write_to() -> None:
    async with make_graph() as graph:
        disk = await graph.open(
            {"driver": "writing", "file": {"driver": "strict"}, "backing": {"driver": "strict"}, "node-name": "disk"}
        )
        await disk.write(0, b"x" * 512)
        await disk.flush()
        assert strict(disk.children["file"].node).log == [("flush", 0, 0)]
        assert strict(disk.children["backing"].node).log == []


READ, WRITE, RESIZE, UNCHANGED = (
    Permission.CONSISTENT_READ,
    Permission.WRITE,
    Permission.RESIZE,
    Permission.WRITE_UNCHANGED,
)


@pytest.mark.parametrize(
    ("role", "writable", "needs"),
    [
        ("file", True, READ | WRITE | RESIZE),
        ("file", False, READ),
        ("data-file", True, READ | WRITE | RESIZE),
        ("backing", False, READ),
        ("backing", True, READ),
    ],
)
def test_a_driver_owns_its_file_alone_and_shares_its_backing_node_with_readers(role, writable, needs) -> None:
    assert Driver.child_permissions(role, writable=writable) == (needs, READ | UNCHANGED)


async def test_by_default_a_driver_tells_nothing_special_about_itself() -> None:
    async with make_graph() as graph:
        driver = (await graph.open({"driver": "smallest"})).driver
        assert (driver.can_compress, driver.zero_init, driver.cluster_size, driver.backing_reference) == (
            False, False, None, None,
        )  # fmt: skip
        assert (driver.is_format, driver.is_filter, driver.suffixes, driver.growable, driver.handles_fua) == (
            False, False, (), False, False,
        )  # fmt: skip
        assert driver.limits == BlockLimits()
        assert await driver.info() == {}
        assert driver.try_block_status(0, 512) is None
        assert not await driver.copy_range_to(driver, 0, 512, 512)
        assert not Driver.probe(b"QFI\xfb")
        driver.permissions_changed(READ, Permission.ALL)


async def test_by_default_a_driver_creates_nothing() -> None:
    with pytest.raises(UnsupportedError, match="driver 'smallest' cannot create images"):
        await Smallest.create({}, None)


async def test_a_driver_may_not_leave_out_a_required_member() -> None:
    class Lacking(Driver):
        name = "lacking"

    with pytest.raises(TypeError, match="abstract"):
        Lacking()


async def test_an_edge_to_a_disk_that_cannot_write_fails_when_it_writes_not_before() -> None:
    async with make_graph() as graph:
        disk = await graph.open({"driver": "smallest"})
        edge = Child(Caller(), "target", disk, READ | WRITE, Permission.ALL)
        with pytest.raises(UnsupportedError):
            await edge.write(0, memoryview(b"x"))
