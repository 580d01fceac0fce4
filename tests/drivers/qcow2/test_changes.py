"""How writes, zeroes and discards change mappings: what each kind of cluster becomes, and what happens to its place."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from blocklayer.base.errors import IOFailedError, UnsupportedError
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.qcow2.entries import ALL_ZERO, COMPRESSED, COPIED, ZERO
from tests.helpers.qcow2_disk import assert_sound, file_of, memory_graph, new_image, open_image, opened, qcow2
from tests.helpers.scripted import FailNth, Gate, fail_on
from tests.helpers.virtual_time import virtual_time

CLUSTER = 4096
SIZE = MIB
BASE = {"driver": "memfile", "content": bytearray(b"\xba" * SIZE)}


def entry(disk, number: int = 0) -> int:
    """An L2 entry of the first table."""
    words = qcow2(disk).l2.cached[0].words
    return words[number * qcow2(disk).geometry.l2_entry_words]


async def make(disk, kind: str) -> bytes:
    """Turn the first cluster into one of a kind; answers its content."""
    if kind == "data":
        await disk.write(0, b"d" * CLUSTER)
    elif kind == "compressed":
        await disk.write_compressed(0, b"c" * CLUSTER)
    elif kind == "zero":
        await disk.write_zeroes(0, CLUSTER, WriteFlags.MAY_UNMAP)
    elif kind == "zero with room":
        await disk.write(0, b"d" * CLUSTER)
        await disk.write_zeroes(0, CLUSTER)
    return {"data": b"d", "compressed": b"c"}.get(kind, b"\xba" if kind == "unallocated" else b"\0") * CLUSTER


KINDS = ["unallocated", "data", "compressed", "zero", "zero with room"]
CHANGES = {
    "write": lambda disk: disk.write(100, b"new"),
    "write all": lambda disk: disk.write(0, b"n" * CLUSTER),
    "zeroes": lambda disk: disk.write_zeroes(0, CLUSTER),
    "zeroes that may unmap": lambda disk: disk.write_zeroes(0, CLUSTER, WriteFlags.MAY_UNMAP),
    "zeroes of a part": lambda disk: disk.write_zeroes(512, 512),
    "discard": lambda disk: disk.discard(0, CLUSTER),
    "discard of a part": lambda disk: disk.discard(0, CLUSTER - 512),
    "compressed write": lambda disk: disk.write_compressed(0, b"p" * CLUSTER),
}


def expected(before: bytes, change: str) -> bytes:
    """What a cluster holds after a change."""
    if change == "write":
        return before[:100] + b"new" + before[103:]
    if change == "zeroes of a part":
        return before[:512] + bytes(512) + before[1024:]
    if change == "discard of a part":
        return before
    return {"write all": b"n", "compressed write": b"p"}.get(change, b"\0") * CLUSTER


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, CHANGES)))
@virtual_time
async def test_every_change_of_every_kind_of_cluster(first: str, second: str) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, backing=dict(BASE)) as disk:
        before = await make(disk, first)
        await CHANGES[second](disk)
        after = expected(before, second)
        assert await disk.read(0, CLUSTER) == after
        assert await disk.read(CLUSTER, 512) == b"\xba" * 512
        await disk.flush()
    assert_sound(content)
    async with opened(content, backing=dict(BASE), read_only=True) as disk:
        assert await disk.read(0, CLUSTER) == after


@virtual_time
async def test_zeroes_keep_the_room_unless_they_may_unmap() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"d" * CLUSTER)
        place = entry(disk)
        await disk.write_zeroes(0, CLUSTER)
        assert entry(disk) == place | ZERO
        await disk.write(0, b"d")
        assert entry(disk) == place, "the room that was kept is used again"
        assert await disk.read(0, CLUSTER) == b"d" + bytes(CLUSTER - 1)
        await disk.write_zeroes(0, CLUSTER, WriteFlags.MAY_UNMAP)
        assert entry(disk) == ZERO
    assert_sound(content)


@virtual_time
async def test_zeroes_of_what_is_zero_already_allocate_nothing() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    before = bytes(content)
    async with opened(content) as disk:
        await disk.write_zeroes(0, SIZE)
        await disk.write_zeroes(100, 1000)
        await disk.discard(0, SIZE)
    assert content == before


@virtual_time
async def test_over_a_backing_file_zeroes_hide_what_is_below() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, backing=dict(BASE)) as disk:
        await disk.write_zeroes(0, 3 * CLUSTER + 100)
        assert await disk.read(0, 4 * CLUSTER) == bytes(3 * CLUSTER + 100) + b"\xba" * (CLUSTER - 100)
        assert entry(disk, 1) == ZERO
    assert_sound(content)


@virtual_time
async def test_version_2_writes_zeroes_over_a_backing_file_and_says_so_if_that_must_be_fast() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER, compat="0.10")
    async with opened(content, backing=dict(BASE)) as disk:
        with pytest.raises(UnsupportedError, match="no fast way"):
            await disk.write_zeroes(0, CLUSTER, WriteFlags.NO_FALLBACK)
        assert await disk.read(0, CLUSTER) == b"\xba" * CLUSTER
        await disk.write_zeroes(0, CLUSTER)
        assert await disk.read(0, CLUSTER) == bytes(CLUSTER)
        await disk.discard(CLUSTER, CLUSTER)
        assert await disk.read(CLUSTER, CLUSTER) == b"\xba" * CLUSTER, (
            "a discard would show what is below: it does nothing"
        )
    assert_sound(content)


@virtual_time
async def test_version_2_without_a_backing_file_drops_zeroed_clusters() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER, compat="0.10")
    async with opened(content) as disk:
        await disk.write(0, b"x" * CLUSTER)
        await disk.write_zeroes(0, CLUSTER)
        assert entry(disk) == 0
    assert_sound(content)


# -- subclusters ---------------------------------------------------------------------------------------------------------

BIG = 32 * 2 * KIB
PART = 2 * KIB


def bitmap(disk, number: int = 0) -> int:
    """The subclusters of a cluster of the first table."""
    return qcow2(disk).l2.cached[0].words[2 * number + 1]


@virtual_time
async def test_a_write_allocates_only_its_subclusters() -> None:
    content = new_image(SIZE, cluster_size=BIG, extended_l2=True)
    async with opened(content, backing=dict(BASE)) as disk:
        await disk.write(3 * PART + 5, b"x" * PART)
        assert bitmap(disk) == 0b11000
        wanted = b"\xba" * (3 * PART + 5) + b"x" * PART + b"\xba" * (BIG - 4 * PART - 5)
        assert await disk.read(0, BIG) == wanted
        place = entry(disk)
        await disk.write(10 * PART, b"y" * PART)
        assert (entry(disk), bitmap(disk)) == (place, 0b10000011000)
        kinds = [(extent.length, extent.kind) async for extent in disk.extents(0, BIG, base=disk.backing)]
        assert kinds == [
            (3 * PART, ExtentKind.UNALLOCATED),
            (2 * PART, ExtentKind.DATA),
            (5 * PART, ExtentKind.UNALLOCATED),
            (PART, ExtentKind.DATA),
            (21 * PART, ExtentKind.UNALLOCATED),
        ]
    assert_sound(content)


@virtual_time
async def test_single_subclusters_become_zero_and_data_again() -> None:
    content = new_image(SIZE, cluster_size=BIG, extended_l2=True)
    async with opened(content, backing=dict(BASE)) as disk:
        await disk.write_zeroes(2 * PART, PART)
        assert (entry(disk), bitmap(disk)) == (0, 1 << 34)
        await disk.write(0, b"x" * PART)
        assert bitmap(disk) & 1
        await disk.write_zeroes(0, PART)
        assert bitmap(disk) & (1 << 32 | 1) == 1 << 32
        await disk.write(512, b"y")
        assert (
            await disk.read(0, 4 * PART)
            == bytes(512) + b"y" + bytes(PART - 513) + b"\xba" * PART + bytes(PART) + b"\xba" * PART
        )
    assert_sound(content)


@virtual_time
async def test_a_whole_discarded_cluster_gives_its_place_back_and_is_zero() -> None:
    content = new_image(SIZE, cluster_size=BIG, extended_l2=True)
    async with opened(content, backing=dict(BASE)) as disk:
        await disk.write(0, b"x" * BIG)
        await disk.discard(0, BIG)
        assert (entry(disk), bitmap(disk)) == (0, ALL_ZERO)
        assert await disk.read(0, BIG) == bytes(BIG)
    assert_sound(content)


@pytest.mark.parametrize("backed", [True, False])
@virtual_time
async def test_zeroes_that_cut_a_compressed_cluster_of_subclusters_unpack_it(backed: bool) -> None:
    content = new_image(SIZE, cluster_size=BIG, extended_l2=True)
    async with opened(content, **({"backing": dict(BASE)} if backed else {})) as disk:
        await disk.write_compressed(0, b"c" * BIG)
        assert entry(disk) & COMPRESSED
        await disk.write_zeroes(PART, 2 * PART)
        assert await disk.read(0, BIG) == b"c" * PART + bytes(2 * PART) + b"c" * (BIG - 3 * PART)
    assert_sound(content)


# -- at once -------------------------------------------------------------------------------------------------------------


@virtual_time
async def test_writes_into_one_new_cluster_at_once_allocate_it_once_and_both_stay() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, backing=dict(BASE)) as disk:
        file_of(disk).script = FailNth("any", -1)
        await asyncio.gather(*(disk.write(512 * number, bytes([number]) * 512) for number in range(8)))
        assert await disk.read(0, CLUSTER) == b"".join(bytes([number]) * 512 for number in range(8))
    assert_sound(content)


@pytest.mark.parametrize("other", ["discard", "zeroes", "write", "compressed write"])
@virtual_time
async def test_what_meets_an_allocating_write_waits_for_it(other: str) -> None:
    """QEMU let a discard run beside one, and counted the cluster wrong."""
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content, backing=dict(BASE)) as disk:
        gate = file_of(disk).script = Gate("write")
        writing = asyncio.create_task(disk.write(100, b"first"))
        await gate.reached.wait()
        later = asyncio.create_task(CHANGES[other](disk))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not later.done()
        gate.opened.set()
        await asyncio.gather(writing, later)
        first = b"\xba" * 100 + b"first" + b"\xba" * (CLUSTER - 105)
        assert await disk.read(0, CLUSTER) == expected(first, other)
    assert_sound(content)


@virtual_time
async def test_a_write_in_place_that_is_overtaken_by_a_discard_harms_nobody() -> None:
    """Its cluster is freed under it; it must not be somebody else's before it has ended."""
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        await disk.write(0, b"a" * CLUSTER)
        await disk.flush()
        gate = Gate("write")
        file_of(disk).script = gate
        writing = asyncio.create_task(disk.write(0, b"late" * 1024))
        await gate.reached.wait()
        file_of(disk).script = None
        await disk.discard(0, CLUSTER)
        for number in range(1, 8):
            await disk.write(number * CLUSTER, bytes([number]) * CLUSTER)
            await disk.flush()
        gate.opened.set()
        await writing
        for number in range(1, 8):
            assert await disk.read(number * CLUSTER, CLUSTER) == bytes([number]) * CLUSTER
    assert_sound(content)


@virtual_time
async def test_a_failed_copy_on_write_leaves_the_mapping_as_it_was() -> None:
    content, base = new_image(SIZE, cluster_size=CLUSTER), bytearray(b"\xba" * SIZE)
    async with memory_graph() as graph:
        disk = await open_image(graph, content, backing={"driver": "memfile", "content": base})
        disk.backing.driver.script = fail_on("read")
        with pytest.raises(IOFailedError):
            await disk.write(100, b"x")
        assert await disk.read(0, CLUSTER) == b"\xba" * CLUSTER
        await disk.write(100, b"x")
        assert await disk.read(99, 3) == b"\xbax\xba"
        await disk.close()
    assert_sound(content)


# -- data files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extended", [False, True])
@virtual_time
async def test_in_a_data_file_every_cluster_has_its_own_place(extended: bool) -> None:
    data = bytearray(SIZE)
    content = new_image(SIZE, cluster_size=BIG, data_file="data", extended_l2=extended)
    async with opened(content, data_file={"driver": "memfile", "content": data}) as disk:
        await disk.write(5 * PART, b"x" * PART)
        assert data[5 * PART : 6 * PART] == b"x" * PART
        assert entry(disk) == COPIED
        await disk.write(3 * BIG, b"y" * BIG)
        assert data[3 * BIG : 4 * BIG] == b"y" * BIG
        assert entry(disk, 3) == COPIED | 3 * BIG
        await disk.discard(3 * BIG, BIG)
        assert await disk.read(3 * BIG, BIG) == bytes(BIG)
        assert data[3 * BIG : 4 * BIG] == b"\xdd" * BIG, "the file was told"
        await disk.write(3 * BIG, b"z")
        assert await disk.read(3 * BIG, BIG) == b"z" + bytes(BIG - 1)
        with pytest.raises(IOFailedError):
            disk.children["data-file"].node.driver.script = fail_on("flush")
            await disk.flush()
    assert_sound(content)


@virtual_time
async def test_a_raw_data_file_always_reads_like_the_disk() -> None:
    data = bytearray(SIZE)
    content = new_image(SIZE, cluster_size=BIG, data_file="data", data_file_raw=True)
    async with opened(content, data_file={"driver": "memfile", "content": data}) as disk:
        await disk.write(100, b"x" * BIG)
        await disk.write_zeroes(0, BIG)
        await disk.discard(BIG, BIG)
        await disk.truncate(SIZE + BIG)
        await disk.write(SIZE + 5, b"grown")
        assert await disk.read(0, disk.size) == data
        await disk.truncate(SIZE - BIG)
        assert await disk.read(0, disk.size) == data
    assert_sound(content)


@virtual_time
async def test_nothing_is_compressed_into_a_data_file() -> None:
    content = new_image(SIZE, cluster_size=BIG, data_file="data")
    async with opened(content, data_file={"driver": "memfile", "content": bytearray(SIZE)}) as disk:
        assert not disk.driver.can_compress
        await disk.write_compressed(0, b"c" * BIG)
        assert entry(disk) == COPIED
        assert await disk.read(0, BIG) == b"c" * BIG
    assert_sound(content)
