"""Starting backups on scripted disks, and the words that tests of jobs share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.base.units import KIB, MIB
from blocklayer.jobs.backup import BackupJob, BackupRequest
from blocklayer.jobs.manager import JobManager
from tests.helpers.scripted import disk, scripted

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node

CLUSTER = 64 * KIB
SIZE = 8 * MIB


def pattern(size: int) -> bytes:
    """Bytes without two clusters alike."""
    return b"".join(index.to_bytes(8, "little") for index in range(1, size // 8 + 1))


async def backup(
    graph: Graph, source: Node, target: Node | Path, manager: JobManager | None = None, **options: object
) -> BackupJob:
    """Start one backup."""
    manager = JobManager(graph) if manager is None else manager
    (job,) = await manager.start_backups([BackupRequest.build(source, target, **options)])
    return job


async def pair(graph: Graph, name: str = "", size: int = SIZE) -> tuple[Node, Node]:
    """A source full of data, and an empty target of the same size."""
    source, target = await disk(graph, f"{name}source", size), await disk(graph, f"{name}target", size)
    scripted(source).put(0, pattern(size))
    return source, target
