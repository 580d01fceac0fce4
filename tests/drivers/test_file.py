"""The file driver: what can be opened and how, image locks between processes, growing, and where data lie."""

from __future__ import annotations

import errno
import os

import pytest

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import Permission, Preallocation
from blocklayer.graph.child import Child
from blocklayer.graph.graph import Caller

KIB = 1024


@pytest.fixture
async def graph():
    async with blocklayer.Graph() as made:
        yield made


@pytest.fixture
async def other():
    """Another graph: as good as another process, for locks belong to the open file."""
    async with blocklayer.Graph() as made:
        yield made


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "disk"
    made.write_bytes(bytes(64 * KIB))
    return made


def on(path, **options):
    return {"driver": "file", "filename": str(path), **options}


# -- opening ---------------------------------------------------------------------------------------------------------


async def test_a_file_has_its_own_size_however_odd(graph, tmp_path):
    for size in (0, 1, 511, 70_001):
        (tmp_path / "odd").write_bytes(b"x" * size)
        disk = await graph.open(on(tmp_path / "odd"))
        assert (disk.size, await disk.read(0, size)) == (size, b"x" * size)
        await disk.close()


async def test_a_node_is_named_after_its_file(graph, path):
    disk = await graph.open(on(path))
    assert disk.filename == str(path)
    raw = await graph.open(str(path), format="raw", read_only=True, force_share=True)
    assert raw.filename == str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option 'filename' is required"),
        ({"filename": 5}, "option 'filename' cannot be 5; it takes text"),
        ({"filename": "x", "locking": "maybe"}, "option 'locking' cannot be 'maybe'; it takes one of auto, on, off"),
        ({"filename": "x", "share-rw": "a bit"}, "option 'share-rw' cannot be 'a bit'; it takes on or off"),
        (
            {"filename": "x", "aio": "native"},
            "unknown option 'aio'; known options: create, filename, locking, share_rw",
        ),
    ],
    ids=str,
)
async def test_wrong_options_are_refused_by_name(graph, options, message):
    with pytest.raises(blocklayer.OptionError) as caught:
        await graph.open({"driver": "file", **options})
    assert str(caught.value) == message


async def test_a_missing_file_is_missing_and_is_not_made(graph, tmp_path):
    with pytest.raises(blocklayer.MissingFileError) as caught:
        await graph.open(on(tmp_path / "none"))
    error = caught.value
    assert (error.errno, error.filename) == (errno.ENOENT, str(tmp_path / "none"))
    assert str(error) == f"file '{tmp_path / 'none'}': open failed: No such file or directory"
    assert os.listdir(tmp_path) == []
    assert graph.nodes == {}


async def test_a_file_is_made_if_that_is_asked_for_and_left_as_it_is_if_it_is_there(graph, tmp_path, path):
    made = await graph.open(on(tmp_path / "new", create=True))
    assert (made.size, (tmp_path / "new").exists()) == (0, True)
    path.write_bytes(b"precious")
    assert await (await graph.open(on(path, create="on"))).read(0, 8) == b"precious"


@pytest.mark.parametrize("read_only", [True, False])
async def test_only_regular_files_and_block_devices_are_disks(graph, tmp_path, read_only):
    os.mkfifo(tmp_path / "pipe")
    for place, code in [(tmp_path, errno.EISDIR), (tmp_path / "pipe", errno.ENOTBLK), ("/dev/null", errno.ENOTBLK)]:
        with pytest.raises(blocklayer.IOFailedError) as caught:
            await graph.open(on(place), read_only=read_only)
        assert (caught.value.errno, caught.value.filename) == (code, str(place))


async def test_a_symbolic_link_is_the_file_that_it_leads_to(graph, tmp_path, path):
    (tmp_path / "link").symlink_to(path)
    disk = await graph.open(on(tmp_path / "link"))
    await disk.write(0, b"through")
    assert path.read_bytes()[:7] == b"through"


@pytest.fixture
def refused(monkeypatch):
    """The operating system lets nobody write, not even root."""
    really = os.open

    def open_for_reading(path, flags, *arguments, **named):
        if flags & (os.O_RDWR | os.O_WRONLY) and str(path).endswith("disk"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", open_for_reading)


async def test_a_file_that_may_not_be_written_is_refused(graph, path, refused):
    with pytest.raises(blocklayer.AccessDeniedError) as caught:
        await graph.open(on(path))
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(path))
    assert (await graph.open(on(path), read_only=True)).read_only


async def test_it_is_opened_read_only_instead_if_that_will_do(graph, path, refused):
    disk = await graph.open(on(path), auto_read_only=True)
    assert disk.read_only
    with pytest.raises(blocklayer.ReadOnlyError):
        await disk.write(0, b"x")
    assert await disk.read(0, 4) == bytes(4)


async def test_auto_read_only_writes_where_it_may(graph, path):
    disk = await graph.open(on(path), auto_read_only=True)
    await disk.write(0, b"x")
    assert path.read_bytes()[:1] == b"x"


# -- locks -----------------------------------------------------------------------------------------------------------


async def test_a_file_has_one_writer(graph, other, path):
    await graph.open(on(path))
    with pytest.raises(blocklayer.LockedError, match="is another process using the image") as caught:
        await other.open(on(path))
    assert (caught.value.filename, caught.value.errno) == (str(path), errno.EAGAIN)
    assert other.nodes == {}


@pytest.mark.parametrize("first_writes", [True, False])
async def test_an_image_is_written_by_one_or_read_by_many(graph, other, path, first_writes):
    await graph.open(str(path), format="raw", read_only=not first_writes)
    with pytest.raises(blocklayer.LockedError):
        await other.open(str(path), format="raw", read_only=first_writes)
    if not first_writes:
        await other.open(str(path), format="raw", read_only=True)


async def test_two_nodes_of_one_graph_lock_each_other_out_too(graph, path):
    await graph.open(on(path))
    with pytest.raises(blocklayer.LockedError):
        await graph.open(on(path))


async def test_a_lock_goes_with_its_node(graph, other, path):
    disk = await graph.open(on(path))
    await disk.close()
    await other.open(on(path))


@pytest.mark.parametrize("options", [{"locking": "off"}, {"share-rw": "on"}], ids=str)
async def test_writers_share_a_file_if_both_want_it(graph, other, path, options):
    first = await graph.open(on(path, **options))
    second = await other.open(on(path, **options))
    await first.write(0, b"first")
    assert await second.read(0, 5) == b"first"


async def test_whoever_shares_does_not_force_others_to(graph, other, path):
    await graph.open(on(path, **{"share-rw": True}))
    with pytest.raises(blocklayer.LockedError):
        await other.open(on(path))


async def test_a_reader_may_look_on_without_locks(graph, other, path):
    disk = await graph.open(on(path))
    reader = await other.open(on(path), read_only=True, force_share=True)
    await disk.write(0, b"now")
    assert await reader.read(0, 3) == b"now"


async def test_a_user_that_does_not_share_is_known_outside(graph, other, path):
    """Locks follow what all users of the node together need and share, as they come and go."""
    disk = await graph.open(on(path), read_only=True)
    edge = Child(Caller(), "source", disk, Permission.CONSISTENT_READ, Permission.CONSISTENT_READ)
    with pytest.raises(blocklayer.LockedError):
        await other.open(on(path))
    edge.detach()
    await other.open(on(path))


async def test_locks_can_be_insisted_on(graph, path, monkeypatch):
    await (await graph.open(on(path, locking="on"))).close()
    monkeypatch.setattr("blocklayer.aio.file.supported", lambda _fd: False)
    with pytest.raises(blocklayer.UnsupportedError, match="has no locks; use locking=auto or off") as caught:
        await graph.open(on(path, locking="on"))
    assert caught.value.filename == str(path)
    await graph.open(on(path, locking="auto"))


# -- sizes and data --------------------------------------------------------------------------------------------------


async def test_a_caller_writes_inside_of_the_file_only(graph, path):
    disk = await graph.open(on(path))
    with pytest.raises(blocklayer.OutOfRangeError):
        await disk.write(disk.size, b"x")
    assert path.stat().st_size == 64 * KIB


async def test_a_user_that_may_resize_it_writes_behind_its_end(graph, path):
    disk = await graph.open(on(path))
    edge = Child(Caller(), "file", disk, Permission.WRITE | Permission.RESIZE, Permission.ALL)
    await edge.write(100 * KIB, memoryview(b"behind"))
    assert disk.size == 100 * KIB + 6
    await edge.write_zeroes(200 * KIB, 5)
    assert (disk.size, path.stat().st_size) == (200 * KIB + 5, 200 * KIB + 5)
    assert (await disk.read(64 * KIB, 36 * KIB + 6)) == bytes(36 * KIB) + b"behind"
    assert bytes(await edge.read(200 * KIB, 10)) == bytes(10)
    edge.detach()


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("preallocation", [Preallocation.FALLOC, Preallocation.FULL], ids=str)
async def test_room_is_reserved_to_the_byte(graph, tmp_path, cache, preallocation):
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    disk = await graph.open(on(tmp_path / "odd"), cache=cache)
    await disk.truncate(100_001, preallocation)
    assert (tmp_path / "odd").read_bytes() == b"x" * 1000 + bytes(99_001)
    assert (tmp_path / "odd").stat().st_blocks * 512 >= 100_001
    await disk.truncate(99, preallocation)
    assert (tmp_path / "odd").read_bytes() == b"x" * 99


async def test_data_and_holes_are_told_apart_and_lie_where_they_are(graph, tmp_path):
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1024 * KIB)
        file.seek(256 * KIB)
        file.write(b"d" * 128 * KIB)
    disk = await graph.open(on(tmp_path / "holes"), node_name="f")
    found = [(e.offset, e.length, e.kind, e.host_offset, e.host_node) async for e in disk.extents()]
    assert found == [
        (0, 256 * KIB, ExtentKind.ZERO, 0, "f"),
        (256 * KIB, 128 * KIB, ExtentKind.DATA, 256 * KIB, "f"),
        (384 * KIB, 640 * KIB, ExtentKind.ZERO, 384 * KIB, "f"),
    ]


async def test_a_discard_gives_the_space_back(graph, path):
    disk = await graph.open(on(path))
    await disk.write(0, b"d" * 64 * KIB)
    await disk.flush()
    full = path.stat().st_blocks
    await disk.discard(0, 32 * KIB)
    assert path.stat().st_blocks < full
    assert path.stat().st_size == 64 * KIB


async def test_a_file_lets_the_kernel_copy_to_a_file_only(graph, path, tmp_path):
    (tmp_path / "copy").write_bytes(bytes(64 * KIB))
    source, target = await graph.open(on(path)), await graph.open(on(tmp_path / "copy"))
    memory = await graph.open({"driver": "memory", "size": 64 * KIB})
    await source.write(100, b"copied")
    assert await source.driver.copy_range_to(target.driver, 100, 200, 6)
    assert await target.read(198, 10) == b"\0\0copied\0\0"
    assert not await source.driver.copy_range_to(memory.driver, 100, 200, 6)
