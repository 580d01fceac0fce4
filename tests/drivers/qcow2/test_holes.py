"""Clusters that are in use and were never written: found in sparse files, and not looked for in others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.base.units import KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path


async def test_room_that_the_file_never_stored_is_zero_until_it_is_written(tmp_path: Path) -> None:
    """A backup of such a disk reads nothing but what was written."""
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=8 * MIB, preallocation="metadata")
        disk = await graph.open(path)
        whole = [(extent.kind, extent.unwritten) async for extent in disk.extents(0, disk.size)]
        assert whole == [(ExtentKind.ZERO, True)]
        await disk.write(MIB, b"x" * 64 * KIB)
        found = [(extent.offset, extent.kind) async for extent in disk.extents(0, disk.size)]
        assert found == [(0, ExtentKind.ZERO), (MIB, ExtentKind.DATA), (MIB + 64 * KIB, ExtentKind.ZERO)]


async def test_a_file_without_holes_is_not_asked_where_it_has_some(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=MIB, preallocation="falloc")
        disk = await graph.open(path)
        first = [extent async for extent in disk.extents(0, disk.size)]
        assert [(extent.kind, extent.unwritten) for extent in first] == [(ExtentKind.DATA, False)]
        assert disk.driver.try_block_status(0, MIB) is not None


async def test_free_clusters_in_holes_are_no_reason_to_ask(tmp_path: Path) -> None:
    """The file is sparse because space was given back, not because something in use was never written."""
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=8 * MIB)
        disk = await graph.open(path)
        await disk.write(0, b"x" * 4 * MIB)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + 64 * MIB)
    async with blocklayer.Graph() as graph:
        disk = await graph.open(path, read_only=True)
        assert [extent.kind async for extent in disk.extents(0, 4 * MIB)] == [ExtentKind.DATA]
        assert disk.driver.try_block_status(0, MIB) is not None


async def test_a_cluster_beyond_the_end_of_the_file_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=8 * MIB, preallocation="metadata")
    os.truncate(path, path.stat().st_size - MIB)
    async with blocklayer.Graph() as graph:
        disk = await graph.open(path, read_only=True)
        found = [(extent.kind, extent.unwritten) async for extent in disk.extents(0, disk.size)]
        assert found == [(ExtentKind.ZERO, True)]
        assert await disk.read(7 * MIB, 64 * KIB) == bytes(64 * KIB)


async def test_refcounts_that_cannot_be_read_are_no_concern_of_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=8 * MIB, preallocation="metadata")
    with path.open("rb+") as file:
        file.seek(64 * KIB)  # the refcount table
        file.write((1 << 60).to_bytes(8, "big"))
    async with blocklayer.Graph() as graph:
        disk = await graph.open(path, read_only=True)
        assert {extent.kind async for extent in disk.extents(0, disk.size)} == {ExtentKind.DATA}
