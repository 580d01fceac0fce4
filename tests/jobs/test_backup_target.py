"""Target files: created beside their final place, opened with the right backing node, and never left half-made."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import anyio
import pytest

from blocklayer.base.errors import (
    InUseError,
    IOFailedError,
    JobCancelledError,
    LockedError,
    MissingFileError,
    OptionError,
    UnknownFormatError,
)
from blocklayer.base.units import MIB
from tests.helpers.backups import backup, pattern
from tests.helpers.scripted import disk, fail_on, scripted
from tests.helpers.tiny import TinyFormat, names, tiny_graph
from tests.helpers.virtual_time import run_virtual, virtual_loop, virtual_time

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node


async def chain(graph: Graph, folder: Path) -> Node:
    """Make and open ``base.tiny`` under ``disk.tiny``."""
    await graph.create(folder / "base.tiny", format="tiny", size=MIB)
    base = await graph.open(folder / "base.tiny")
    await base.write(0, pattern(MIB))
    await base.close()
    await graph.create(
        folder / "disk.tiny", format="tiny", size=MIB, backing_file=str(folder / "base.tiny"), backing_fmt="tiny"
    )
    node = await graph.open(folder / "disk.tiny", node_name="disk")
    await node.write(0, b"top layer" + bytes(503))
    return node


@virtual_time
async def test_full_creates_a_target_that_stands_alone(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        expected = await source.read(0, MIB)
        job = await backup(graph, source, tmp_path / "copy.tiny")
        assert {name for name in names(tmp_path) if name.startswith("copy")} != {"copy.tiny"}
        await source.write(4096, b"new" * 1000)
        result = await job.wait()
        assert result.target == str(tmp_path / "copy.tiny")
        assert names(tmp_path) == {"base.tiny", "disk.tiny", "copy.tiny"}
        copy = await graph.open(tmp_path / "copy.tiny", read_only=True)
        assert copy.backing is None
        assert await copy.read(0, MIB) == expected


@virtual_time
async def test_holes_cost_no_write_on_a_target_that_was_created_for_it(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await disk(graph, "holes", MIB)
        job = await backup(graph, source, tmp_path / "copy.tiny")
        target = job.target
        result = await job.wait()
        assert result.zero_bytes == MIB
        assert {entry[0] for entry in scripted(target).log} == {"flush"}


@virtual_time
async def test_top_records_the_sources_backing_file_and_shares_its_node(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        expected = await source.read(0, MIB)
        job = await backup(graph, source, tmp_path / "copy.tiny", sync="top")
        assert job.target.backing is source.backing
        await source.write(0, b"after the instant" + bytes(495))
        result = await job.wait()
        assert result.skipped_bytes == MIB - 65536
        assert TinyFormat.create_options["backing_file"] == str(tmp_path / "base.tiny")
        assert TinyFormat.create_options["backing_fmt"] == "tiny"
        await source.close()
        copy = await graph.open(tmp_path / "copy.tiny", read_only=True)
        assert await copy.read(0, MIB) == expected


@virtual_time
async def test_none_makes_the_source_the_backing_node_of_a_target_that_stays(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        expected = await source.read(0, MIB)
        job = await backup(graph, source, tmp_path / "point.tiny", sync="none")
        assert job.target.backing is source
        assert "point.tiny" in names(tmp_path)
        await source.write(0, b"new" + bytes(509))
        await source.discard(65536, 65536)
        assert await job.target.read(0, MIB) == expected
        await job.cancel()
        await job.wait()
        header = json.loads((tmp_path / "point.tiny").read_bytes().partition(b"\n")[0])
        assert header["backing"] == str(tmp_path / "disk.tiny")


@pytest.mark.parametrize("sync", ["full", "top"])
@virtual_time
async def test_a_job_that_does_not_succeed_leaves_no_file_and_what_was_there(tmp_path: Path, sync: str) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        (tmp_path / "copy.tiny").write_bytes(b"yesterday's")
        before = names(tmp_path)
        job = await backup(graph, source, tmp_path / "copy.tiny", sync=sync, speed=1)
        assert len(names(tmp_path)) == len(before) + 1
        await anyio.sleep(1)
        await job.cancel()
        with pytest.raises(JobCancelledError):
            await job.wait()
        job = await backup(graph, source, tmp_path / "copy.tiny", sync=sync)
        scripted(job.target).script = fail_on("flush")
        with pytest.raises(IOFailedError):
            await job.wait()
        assert names(tmp_path) == before
        assert (tmp_path / "copy.tiny").read_bytes() == b"yesterday's"


@virtual_time
async def test_a_target_that_cannot_be_closed_cleanly_fails_the_job(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        job = await backup(graph, source, tmp_path / "copy.tiny", auto_finalize=False)
        await anyio.sleep(1)
        await job.target.write(0, bytes(512))
        scripted(job.target).script = fail_on("flush")
        await job.finalize()
        with pytest.raises(IOFailedError):
            await job.wait()
        assert names(tmp_path) == {"base.tiny", "disk.tiny"}


@virtual_time
async def test_an_existing_target_is_opened_as_it_is_and_kept(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        await graph.create(tmp_path / "there.tiny", format="tiny", size=MIB)
        await (await backup(graph, source, tmp_path / "there.tiny", mode="existing")).wait()
        copy = await graph.open(tmp_path / "there.tiny")
        assert await copy.read(0, MIB) == await source.read(0, MIB)
        with pytest.raises(MissingFileError):
            await backup(graph, source, tmp_path / "missing.tiny", mode="existing")
        (tmp_path / "there.img").write_bytes(b"")
        with pytest.raises(UnknownFormatError):
            await backup(graph, source, tmp_path / "there.img", mode="existing")


@virtual_time
async def test_files_that_are_open_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        await graph.create(tmp_path / "other.tiny", format="tiny", size=MIB)
        await graph.open(tmp_path / "other.tiny")
        (tmp_path / "link.tiny").symlink_to(tmp_path / "base.tiny")
        (tmp_path / "held.tiny").write_bytes(b"somebody's")
        (tmp_path / "held.tiny.lock").write_bytes(b"")
        before = names(tmp_path)
        for name in ("disk.tiny", "base.tiny", "link.tiny"):
            with pytest.raises(OptionError, match="file of the source"):
                await backup(graph, source, tmp_path / name)
        with pytest.raises(InUseError, match="open as node"):
            await backup(graph, source, tmp_path / "other.tiny")
        with pytest.raises(LockedError):
            await backup(graph, source, tmp_path / "held.tiny")
        assert names(tmp_path) == before
        assert not source.path.hooks


@virtual_time
async def test_a_check_that_fails_after_the_target_was_created_removes_it(tmp_path: Path) -> None:
    async with tiny_graph() as graph:
        source = await chain(graph, tmp_path)
        before = names(tmp_path)
        with pytest.raises(OptionError, match="max-chunk"):
            await backup(graph, source, tmp_path / "copy.tiny", max_chunk=4096)
        with pytest.raises(OptionError, match="max-workers"):
            await backup(graph, source, tmp_path / "copy.tiny", max_workers=0)
        assert names(tmp_path) == before


async def start_and_cancel(folder: Path, tick: int) -> bool:
    """Start a backup in a task that is cancelled at ``tick``; look for traces. Answers whether it ended by itself."""
    async with tiny_graph() as graph:
        source = await disk(graph, "source", MIB)
        loop = virtual_loop()
        task = asyncio.ensure_future(backup(graph, source, folder / "copy.tiny"))
        loop.ticks, loop.act_at, loop.action = 0, tick, task.cancel
        await asyncio.wait([task])
        loop.act_at = -1
        if task.cancelled():
            assert not source.path.hooks
            assert [edge.role for edge in source.parents] == ["disk"]
            assert len(graph.nodes) == 1
            assert names(folder) == set()
            return False
        await task.result().wait()
        assert names(folder) == {"copy.tiny"}
        return True


def test_cancelling_who_starts_at_each_turn_leaves_no_trace(tmp_path: Path) -> None:
    tick, done = 1, False
    while not done:
        folder = tmp_path / str(tick)
        folder.mkdir()
        done = run_virtual(start_and_cancel(folder, tick))
        tick += 1
    assert tick > 3
