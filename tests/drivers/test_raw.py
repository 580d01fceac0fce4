"""The raw format: slices and what lies around them, growing, creating, and images whose format was guessed."""

from __future__ import annotations

import asyncio
import errno

import pytest

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import Permission
from blocklayer.drivers.faults import FaultsDriver, Rule
from blocklayer.graph.child import Child
from blocklayer.graph.graph import Caller

QCOW2_HEAD = b"QFI\xfb\x00\x00\x00\x03"


@pytest.fixture
async def graph():
    async with blocklayer.Graph() as made:
        yield made


async def memory(graph, content, name="file"):
    """A disk in memory that holds ``content``."""
    node = await graph.open({"driver": "memory", "size": len(content)}, node_name=name)
    if content:
        await node.write(0, content)
    return node


async def slice_of(graph, content, **options):
    """A raw node over a memory disk that only the raw node holds."""
    file = {"driver": "memory", "size": len(content), "node-name": "file"}
    raw = await graph.open({"driver": "raw", "file": file, **options})
    edge = Child(Caller(), "test", graph.node("file"), Permission.WRITE_UNCHANGED, Permission.ALL)
    await edge.write(0, memoryview(content))
    return raw


async def everything(graph):
    """What the whole file holds."""
    file = graph.node("file")
    return await file.read(0, file.size)


# -- slices ----------------------------------------------------------------------------------------------------------

ALPHABET = b"abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALPHABET),
        ({"offset": 3}, ALPHABET[3:]),
        ({"size": 5}, ALPHABET[:5]),
        ({"offset": 3, "size": 5}, ALPHABET[3:8]),
        ({"offset": "3", "size": "5b"}, ALPHABET[3:8]),
        ({"offset": 0, "size": 26}, ALPHABET),
        ({"offset": 26}, b""),
        ({"offset": 26, "size": 0}, b""),
        ({"offset": 3, "size": 0}, b""),
        ({"size": None}, ALPHABET),
    ],
    ids=str,
)
async def test_a_slice_is_what_offset_and_size_cut_out(graph, options, expected):
    raw = await slice_of(graph, ALPHABET, **options)
    assert raw.size == len(expected)
    assert await raw.read(0, raw.size) == expected
    assert raw.try_read(0, raw.size) == (expected or None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": 27}, "offset 27 and size None stick out of 26 bytes"),
        ({"size": 27}, "offset 0 and size 27 stick out of 26 bytes"),
        ({"offset": 20, "size": 7}, "offset 20 and size 7 stick out of 26 bytes"),
        ({"offset": 27, "size": 0}, "offset 27 and size 0 stick out of 26 bytes"),
        ({"offset": "5E", "size": "5E"}, f"offset {5 << 60} and size {5 << 60} stick out of 26 bytes"),
        ({"offset": -1}, "option 'offset' cannot be -1; it takes a number or size"),
        ({"offset": None}, "option 'offset' cannot be None; it takes a number or size"),
        ({"size": "much"}, "option 'size' cannot be 'much'; it takes a number or size"),
        ({"length": 5}, "unknown option 'length'; known options: offset, probed, size"),
    ],
    ids=str,
)
async def test_a_slice_that_cannot_be_is_refused(graph, options, message):
    with pytest.raises(blocklayer.OptionError) as caught:
        await graph.open({"driver": "raw", "file": {"driver": "memory", "size": 26}, **options})
    assert str(caught.value) == message
    assert graph.nodes == {}


async def test_a_file_is_required(graph):
    with pytest.raises(blocklayer.OptionError, match="option 'file' is required"):
        await graph.open({"driver": "raw", "size": 26})


@pytest.mark.parametrize("options", [{"offset": 100}, {"size": 100}, {"offset": 512, "size": 100}], ids=str)
async def test_a_slice_of_a_disk_that_takes_sectors_is_made_of_sectors(graph, tmp_path, options):
    (tmp_path / "disk").write_bytes(bytes(16384))
    file = {"driver": "file", "filename": str(tmp_path / "disk"), "cache": "none"}
    with pytest.raises(blocklayer.OptionError, match="offset and size must be multiples of"):
        await graph.open({"driver": "raw", "file": file, **options})
    await graph.open({"driver": "raw", "file": file, "offset": 4096, "size": 8192})


async def test_nothing_is_changed_around_a_slice(graph):
    raw = await slice_of(graph, ALPHABET, offset=3, size=5)
    await raw.write(0, b"DEFGH")
    assert await everything(graph) == b"abcDEFGHijklmnopqrstuvwxyz"
    await raw.write_zeroes(1, 3)
    await raw.discard(4, 1)
    assert await everything(graph) == b"abcD\0\0\0\0ijklmnopqrstuvwxyz"
    for request in (raw.write(5, b"x"), raw.write_zeroes(0, 6), raw.discard(5, 1)):
        with pytest.raises(blocklayer.OutOfRangeError):
            await request
    assert await everything(graph) == b"abcD\0\0\0\0ijklmnopqrstuvwxyz"


async def test_the_status_of_a_slice_tells_offsets_in_the_file(graph, tmp_path):
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(512 << 10)
        file.write(b"d" * (128 << 10))
    below = {"driver": "file", "filename": str(tmp_path / "disk"), "node-name": "f"}
    raw = await graph.open({"driver": "raw", "offset": 256 << 10, "file": below}, node_name="r")
    for _ in range(2):  # from the file system, and from what is remembered
        found = [(e.offset, e.length, e.kind, e.host_offset, e.host_node, e.node) async for e in raw.extents()]
        assert found == [
            (0, 256 << 10, ExtentKind.ZERO, 256 << 10, "f", "r"),
            (256 << 10, 128 << 10, ExtentKind.DATA, 512 << 10, "f", "r"),
            (384 << 10, 384 << 10, ExtentKind.ZERO, 640 << 10, "f", "r"),
        ]


# -- growing ---------------------------------------------------------------------------------------------------------


async def test_a_slice_of_fixed_size_keeps_it(graph):
    raw = await slice_of(graph, ALPHABET, offset=3, size=5)
    with pytest.raises(blocklayer.UnsupportedError, match="a raw node with a fixed size cannot be resized"):
        await raw.truncate(6)
    assert (raw.size, await everything(graph)) == (5, ALPHABET)


async def test_a_tail_is_resized_with_its_file(graph):
    raw = await slice_of(graph, ALPHABET, offset=3)
    await raw.truncate(2)
    assert await everything(graph) == b"abcde"
    await raw.truncate(4)
    assert await everything(graph) == b"abcde\0\0"
    await raw.truncate(0)
    assert await everything(graph) == b"abc"


async def test_a_whole_image_grows_when_a_user_writes_behind_its_end_and_a_slice_does_not(graph, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(4096))
    needs = Permission.WRITE | Permission.RESIZE
    for options, grows in [({}, True), ({"offset": 512}, False), ({"size": 4096}, False)]:
        file = {"driver": "file", "filename": str(tmp_path / "disk")}
        raw = await graph.open({"driver": "raw", "file": file, **options})
        edge = Child(Caller(), "file", raw, needs, Permission.ALL)
        size = raw.size
        if grows:
            await edge.write(size, memoryview(b"more"))
            assert (raw.size, await raw.read(size, 4)) == (size + 4, b"more")
            await raw.truncate(4096)
        else:
            with pytest.raises(blocklayer.NoSpaceError, match=f"it has {size} bytes and cannot grow") as caught:
                await edge.write(size, memoryview(b"more"))
            assert caught.value.errno == errno.ENOSPC
            assert raw.size == size
        edge.detach()
        await raw.close()


async def test_a_format_on_a_slice_runs_out_of_space_like_on_a_full_disk(graph, tmp_path):
    """A caller can stop and make room: it is no mistake of the caller's."""
    await graph.create(tmp_path / "a.qcow2", format="qcow2", size="10M")
    with (tmp_path / "a.qcow2").open("ab") as file:
        file.truncate(1 << 20)
    below = {"driver": "raw", "size": "1M", "file": {"driver": "file", "filename": str(tmp_path / "a.qcow2")}}
    disk = await graph.open({"driver": "qcow2", "file": below})
    await disk.write(0, b"fits" * 1024)
    with pytest.raises(blocklayer.NoSpaceError):
        await disk.write(1 << 20, bytes(b"x" * (2 << 20)))
    await disk.flush()
    await disk.write(64 << 10, b"fits" * 1024)
    assert await disk.read(0, 4096) == await disk.read(64 << 10, 4096) == b"fits" * 1024


async def test_an_image_grows_and_shrinks_with_the_node_below_it(graph):
    raw = await graph.open({"driver": "raw", "file": {"driver": "memory", "size": 8, "node-name": "file"}})
    await graph.node("file").path.truncate(12)
    assert raw.size == 12


# -- creating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
async def test_a_new_image_is_zeroes(graph, tmp_path, preallocation):
    (tmp_path / "new.raw").write_bytes(b"something older")
    await graph.create(tmp_path / "new.raw", format="raw", size="1M", preallocation=preallocation)
    assert (tmp_path / "new.raw").read_bytes() == bytes(1 << 20)
    reserved = (tmp_path / "new.raw").stat().st_blocks * 512 >= 1 << 20
    assert reserved == (preallocation != "off")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5, "preallocation": "metadata"}, "raw has no metadata: preallocation can be off, falloc or full"),
        ({"size": 5, "cluster_size": 512}, "unknown option 'cluster-size'; known options: preallocation, size"),
        ({}, "option 'size' is required"),
        ({"size": -5}, "option 'size' cannot be -5; it takes a number or size"),
    ],
    ids=str,
)
async def test_an_image_that_cannot_be_made_leaves_no_file(graph, tmp_path, options, message):
    with pytest.raises(blocklayer.OptionError) as caught:
        await graph.create(tmp_path / "new.raw", format="raw", **options)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


async def test_the_ending_raw_means_raw(graph, tmp_path):
    await graph.create(tmp_path / "new.raw", format="raw", size=1000)
    disk = await graph.open(tmp_path / "new.raw")
    assert (disk.driver.name, disk.size) == ("raw", 1000)
    await disk.write(0, QCOW2_HEAD)  # a name is no guess
    assert await disk.read(0, 8) == QCOW2_HEAD


# -- images whose format was guessed -----------------------------------------------------------------------------------


@pytest.fixture
async def guessed(graph, tmp_path):
    """A disk that was opened as raw because nothing else was recognised."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xeb\x63 boot sector".ljust(4096, b"."))
    return await graph.open(path, probe=True)


async def test_a_guest_cannot_write_the_header_of_a_format(guessed):
    before = await guessed.read(0, 4096)
    for offset, data in [
        (0, QCOW2_HEAD),
        (0, QCOW2_HEAD.ljust(512, b"\0")),
        (0, QCOW2_HEAD.ljust(4096, b"\0")),
        (0, b"QFI\xfb\xff\xff\xff\xff"),
    ]:
        with pytest.raises(blocklayer.ReadOnlyError, match="this write would make it look like qcow2") as caught:
            await guessed.write(offset, data)
        assert (caught.value.node, caught.value.offset, caught.value.length) == (guessed.name, offset, len(data))
    assert await guessed.read(0, 4096) == before


async def test_a_guest_cannot_write_such_a_header_in_parts(guessed):
    await guessed.write(4, QCOW2_HEAD[4:])
    await guessed.write(1, QCOW2_HEAD[1:4])
    with pytest.raises(blocklayer.ReadOnlyError):
        await guessed.write(0, b"Q")
    await guessed.write(4, bytes(4))  # no version
    await guessed.write(0, b"Q")
    with pytest.raises(blocklayer.ReadOnlyError):
        await guessed.write(7, b"\3")


async def test_a_guest_cannot_write_such_a_header_in_parts_at_once(graph, tmp_path):
    """Each part is harmless beside what is stored; the second has to see the first."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    file = {"driver": "faults", "file": {"driver": "file", "filename": str(path)}, "node-name": "slow"}
    guessed = await graph.open({"driver": "raw", "probed": True, "file": file})
    faults = graph.node("slow").driver
    assert isinstance(faults, FaultsDriver)
    held = faults.add(Rule("write", hold=True, errno=0))
    first = asyncio.ensure_future(guessed.write(0, QCOW2_HEAD[:4]))
    await faults.wait_held(held)
    second = asyncio.ensure_future(guessed.write(4, QCOW2_HEAD[4:]))
    for _ in range(20):
        await asyncio.sleep(0)
    faults.release(held)
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), blocklayer.ReadOnlyError]
    assert await guessed.read(0, 8) == QCOW2_HEAD[:4] + bytes(4)


async def test_everything_else_can_be_written(guessed):
    await guessed.write(0, b"QFI\xfa\x00\x00\x00\x03")
    await guessed.write(512, QCOW2_HEAD)
    await guessed.write(1, QCOW2_HEAD)
    await guessed.write_zeroes(0, 512)
    await guessed.write(0, bytes(4096))
    await guessed.discard(0, 4096)
    assert await guessed.read(0, 4096) == bytes(4096)


async def test_the_slice_counts_not_the_file(graph):
    """The head of the node is what somebody would guess from, wherever it lies in the file."""
    raw = await slice_of(graph, bytes(4096), offset=1024, probed=True)
    with pytest.raises(blocklayer.ReadOnlyError):
        await raw.write(0, QCOW2_HEAD)
    await raw.write(1024, QCOW2_HEAD)


async def test_a_disk_shorter_than_a_sector_is_watched_too(graph):
    raw = await slice_of(graph, bytes(8), probed=True)
    with pytest.raises(blocklayer.ReadOnlyError):
        await raw.write(0, QCOW2_HEAD)
    await raw.write(0, b"harmless")


async def test_a_named_format_is_no_guess(graph, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(4096))
    named = await graph.open(tmp_path / "disk", format="raw")
    await named.write(0, QCOW2_HEAD)
    assert await named.read(0, 8) == QCOW2_HEAD


async def test_a_copy_by_the_storage_does_not_bring_such_a_header_in(graph, tmp_path):
    (tmp_path / "source").write_bytes(QCOW2_HEAD.ljust(4096, b"\0"))
    (tmp_path / "target").write_bytes(bytes(8192))
    source = await graph.open(tmp_path / "source", format="raw")
    target = await graph.open(tmp_path / "target", probe=True)
    assert not await source.driver.copy_range_to(target.driver, 0, 0, 4096)
    assert await target.read(0, 8) == bytes(8)
    assert await source.driver.copy_range_to(target.driver, 0, 4096, 4096)
    assert await target.read(4096, 8) == QCOW2_HEAD


async def test_slices_are_copied_by_the_storage(graph, tmp_path):
    (tmp_path / "source").write_bytes(b"." * 1024 + b"data" * 1024)
    (tmp_path / "target").write_bytes(b"." * 8192)
    source, target = [
        await graph.open({"driver": "raw", "offset": at, "file": {"driver": "file", "filename": str(tmp_path / name)}})
        for name, at in (("source", 1024), ("target", 2048))
    ]
    assert await source.driver.copy_range_to(target.driver, 4, 8, 400)
    assert (tmp_path / "target").read_bytes()[2048 : 2048 + 412] == b"." * 8 + b"data" * 100 + b"." * 4
    other = await memory(graph, bytes(8192), "m")
    assert not await source.driver.copy_range_to(other.driver, 0, 0, 4)
