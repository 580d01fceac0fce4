"""The copy engine: what it writes, what it saves itself, and when the storage copies for it."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import IOFailedError
from blocklayer.base.units import KIB, MIB
from blocklayer.graph.driver import Driver
from tests.helpers.backups import CLUSTER, SIZE, backup, pair, pattern
from tests.helpers.scripted import ScriptedDriver, disk, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time


def writes(driver: ScriptedDriver) -> list[tuple[str, int, int]]:
    """What reached the target."""
    return sorted(entry for entry in driver.log if entry[0].startswith("write"))


@virtual_time
async def test_zeroes_inside_data_become_write_zeroes() -> None:
    async with scripted_graph() as graph:
        source, target = await disk(graph, "source", 4 * CLUSTER), await disk(graph, "target", 4 * CLUSTER)
        scripted(source).put(0, b"d" * CLUSTER + bytes(2 * CLUSTER) + b"d" * CLUSTER)
        result = await (await backup(graph, source, target)).wait()
        assert writes(scripted(target)) == [
            ("write", 0, CLUSTER), ("write", 3 * CLUSTER, CLUSTER), ("write_zeroes", CLUSTER, 2 * CLUSTER),
        ]  # fmt: skip
        assert (result.background_bytes, result.zero_bytes) == (2 * CLUSTER, 2 * CLUSTER)


@virtual_time
async def test_neighbouring_clusters_are_copied_in_one_request() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        await (await backup(graph, source, target)).wait()
        assert writes(scripted(target)) == [("write", offset, MIB) for offset in range(0, SIZE, MIB)]


@virtual_time
async def test_clusters_larger_than_a_buffer_are_copied_in_pieces() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        result = await (await backup(graph, source, target, min_cluster_size=4 * MIB)).wait()
        assert result.cluster_size == 4 * MIB
        assert max(entry[2] for entry in scripted(source).log if entry[0] == "read") == MIB
        assert scripted(target).bytes == pattern(SIZE)


async def offload(self: ScriptedDriver, target: Driver, source_offset: int, target_offset: int, length: int) -> bool:
    """Copy inside the storage, up to the middle of the disk; then fail."""
    assert isinstance(target, ScriptedDriver)
    if source_offset >= SIZE // 2:
        raise IOFailedError("no more offload")
    self.log.append(("offload", source_offset, length))
    target.put(target_offset, bytes(self.bytes[source_offset : source_offset + length]))
    return True


@virtual_time
async def test_the_storage_copies_until_it_fails_for_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedDriver, "copy_range_to", offload)
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        await (await backup(graph, source, target, use_copy_range=True, max_chunk=2 * MIB, max_workers=1)).wait()
        assert scripted(target).bytes == pattern(SIZE)
        assert sum(entry[2] for entry in scripted(source).log if entry[0] == "offload") == SIZE // 2
        assert scripted(target).log[-1][0] == "flush"


@virtual_time
async def test_storage_that_cannot_copy_is_read_and_written() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        await (await backup(graph, source, target, use_copy_range=True)).wait()
        assert scripted(target).bytes == pattern(SIZE)


@virtual_time
async def test_a_cluster_is_never_copied_twice() -> None:
    async with scripted_graph() as graph:
        source, target = await pair(graph)
        job = await backup(graph, source, target, speed=10 * CLUSTER, max_chunk=CLUSTER)
        for offset in range(0, SIZE, 48 * KIB):
            await source.write_zeroes(offset, 4096)
        await job.wait()
        assert sum(length for _kind, _offset, length in writes(scripted(target))) == SIZE
        assert scripted(target).bytes == pattern(SIZE)
