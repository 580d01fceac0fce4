"""What metadata contexts tell of a disk: flags of base:allocation, depths of a chain, and runs that are joined."""

from __future__ import annotations

import asyncio
import itertools

import pytest

import blocklayer
from blocklayer.aio import breath
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.nbd.protocol import AllocationState
from blocklayer.exports.nbd_server.contexts import (
    AllocationDepth,
    BaseAllocation,
    Run,
    allocation_flags,
    joined_runs,
)
from tests.helpers.nbd_disk import UNIT, PaperDisk

HOLE, ZERO = AllocationState.HOLE, AllocationState.ZERO


class Runs:
    """A context that says what it was told."""

    name = "x:runs"

    def __init__(self, *runs):
        self.all = runs
        self.taken = 0

    async def runs(self, offset, length):
        for run in self.all:
            self.taken += 1
            yield Run(*run)


@pytest.mark.parametrize(
    ("extent", "expected"),
    [
        (Extent(0, 1, ExtentKind.DATA), 0),
        (Extent(0, 1, ExtentKind.DATA, compressed=True), 0),
        (Extent(0, 1, ExtentKind.ZERO), HOLE | ZERO),
        (Extent(0, 1, ExtentKind.ZERO, unwritten=True), ZERO),
        (Extent(0, 1, ExtentKind.UNALLOCATED), 0),
    ],
)
def test_flags_of_an_extent(extent, expected):
    assert allocation_flags(extent) == expected


async def test_neighbours_with_the_same_flags_are_one():
    runs = Runs((1, 0), (2, 0), (3, 1), (4, 1), (5, 0))
    assert await joined_runs(runs, 0, 15, count_max=99) == [(3, 0), (7, 1), (5, 0)]


@pytest.mark.parametrize(
    ("count_max", "expected"), [(1, [(3, 0)]), (2, [(3, 0), (7, 1)]), (3, [(3, 0), (7, 1), (5, 0)])]
)
async def test_no_more_runs_than_wanted_are_looked_for(count_max, expected):
    runs = Runs((1, 0), (2, 0), (3, 1), (4, 1), (5, 0), (6, 1), (7, 0))
    assert await joined_runs(runs, 0, 28, count_max=count_max) == expected
    assert runs.taken == [3, 5, 6][count_max - 1]


async def test_others_get_their_turn_while_a_long_map_is_made(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(breath, "perf_counter", lambda: next(clock) * 0.0001)  # ten runs take a millisecond
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    found = await joined_runs(Runs(*((1, number % 2) for number in range(10_000))), 0, 10_000, count_max=10_000)
    task.cancel()
    assert (len(found), turns > 500) == (10_000, True)


async def test_base_allocation_of_a_disk():
    disk = PaperDisk(4 * UNIT)
    disk.bytes[UNIT] = 1
    runs = [run async for run in BaseAllocation(disk).runs(100, 3 * UNIT)]
    assert runs == [(UNIT - 100, 3), (UNIT, 0), (UNIT, 3), (100, 3)]


async def test_contexts_of_a_chain(tmp_path):
    """1 is the top, 2 the layer below it, 0 where no layer holds anything."""
    async with blocklayer.Graph() as graph:
        base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
        await graph.create(base, format="qcow2", size=MIB)
        node = await graph.open(base)
        await node.write(0, b"x" * 128 * KIB)
        await node.close()
        await graph.create(top, format="qcow2", size=MIB, backing_file=str(base), backing_fmt="qcow2")
        node = await graph.open(top)
        await node.write(64 * KIB, b"y" * 128 * KIB)
        await node.write_zeroes(512 * KIB, 64 * KIB)
        depth = await joined_runs(AllocationDepth(node), 0, MIB, count_max=99)
        unit = 64 * KIB
        assert depth == [(unit, 2), (2 * unit, 1), (5 * unit, 0), (unit, 1), (7 * unit, 0)]
        base_runs = await joined_runs(BaseAllocation(node), 0, MIB, count_max=99)
        assert base_runs == [(3 * unit, 0), (13 * unit, 3)]
        await node.close()
