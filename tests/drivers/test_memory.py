"""The disk in memory: its one option, and that it never waits. The rest is in tests/conformance."""

from __future__ import annotations

import pytest

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.drivers.memory import MemoryDriver


async def test_a_size_is_bytes_or_text():
    async with blocklayer.Graph() as graph:
        sizes = [(await graph.open({"driver": "memory", "size": size})).size for size in (5, "5", "1.5k", "2M", 0)]
        assert sizes == [5, 5, 1536, 2 << 20, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option 'size' is required"),
        ({"size": "large"}, "option 'size' cannot be 'large'; it takes a number or size"),
        ({"size": -1}, "option 'size' cannot be -1; it takes a number or size"),
        ({"size": 1 << 63}, f"option 'size' cannot be {1 << 63}; it takes a number or size"),
        ({"size": True}, "option 'size' cannot be True; it takes a number or size"),
        ({"size": None}, "option 'size' cannot be None; it takes a number or size"),
        ({"size": 1, "seize": 2}, "unknown option 'seize'; known options: size"),
    ],
    ids=str,
)
async def test_wrong_options_are_refused_by_name(options, message):
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.OptionError) as caught:
            await graph.open({"driver": "memory", **options})
        assert str(caught.value) == message
        assert graph.nodes == {}


async def test_a_file_is_no_child_of_it():
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.OptionError, match="driver 'memory' takes no child 'file'"):
            await graph.open({"driver": "memory", "size": 1, "file": {"driver": "memory", "size": 1}})


async def test_an_empty_disk_has_no_bytes():
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "memory", "size": 0})
        assert await disk.read(0, 0) == b""
        assert [extent async for extent in disk.extents()] == []
        await disk.truncate(3)
        await disk.write(0, b"abc")
        assert await disk.read(0, 3) == b"abc"


async def test_everything_is_answered_without_a_turn_of_the_loop():
    """No coroutine of it ever suspends, so one step runs it to its end."""
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "memory", "size": 4096})
        for request in (
            disk.write(0, b"x"),
            disk.write_zeroes(0, 9),
            disk.discard(0, 9),
            disk.flush(),
            disk.read(0, 9),
        ):
            with pytest.raises(StopIteration):
                request.send(None)


async def test_it_is_all_data_and_a_new_one_is_known_to_be_zero():
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "memory", "size": 4096})
        assert [(e.offset, e.length, e.kind) async for e in disk.extents()] == [(0, 4096, ExtentKind.DATA)]
        assert MemoryDriver.zero_init
        assert MemoryDriver.handles_fua


async def test_what_is_discarded_reads_as_zeroes():
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "memory", "size": 8})
        await disk.write(0, b"abcdefgh")
        await disk.discard(2, 3)
        assert await disk.read(0, 8) == b"ab\0\0\0fgh"
