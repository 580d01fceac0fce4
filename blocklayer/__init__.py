"""blocklayer: the block layer of a virtual-machine monitor as an asyncio library.

    async with blocklayer.Graph() as graph:
        disk = await graph.open("vm.qcow2")
        job = await graph.backup(disk, "monday.qcow2", sync="top")
        result = await job.wait()

This module only assembles: it hands the built-in drivers and the I/O engine to a ``Graph`` and adds jobs to it.
Importing it registers nothing and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.aio.threads import ThreadEngine
from blocklayer.base.errors import (
    AccessDeniedError,
    AlignmentError,
    BlockError,
    ChainError,
    CorruptImageError,
    DuplicateError,
    FormatError,
    ImageError,
    InUseError,
    IOFailedError,
    JobCancelledError,
    JobError,
    LimitError,
    LockedError,
    MissingFileError,
    NoSpaceError,
    NotFoundError,
    OptionError,
    OutOfRangeError,
    PermissionConflictError,
    ProtocolError,
    ReadOnlyError,
    ReferenceRefusedError,
    SnapshotBrokenError,
    StateError,
    TimedOutError,
    UnknownFormatError,
    UnsupportedError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import CacheMode, DetectZeroes, DiscardMode, Permission, Preallocation, WriteFlags
from blocklayer.drivers.faults import FaultsDriver
from blocklayer.drivers.file import FileDriver
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.drivers.nbd import NbdDriver
from blocklayer.drivers.null import NullDriver
from blocklayer.drivers.qcow2 import Qcow2Driver
from blocklayer.drivers.raw import RawDriver
from blocklayer.drivers.throttle import ThrottleDriver
from blocklayer.graph.driver import Driver
from blocklayer.graph.gate import Gate
from blocklayer.graph.graph import Graph as BareGraph
from blocklayer.graph.node import Node
from blocklayer.graph.requests import WriteRequest
from blocklayer.jobs.backup import BackupJob, BackupRequest, BackupResult
from blocklayer.jobs.manager import JobManager
from blocklayer.jobs.progress import Progress

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from blocklayer.aio.engine import Engine
    from blocklayer.jobs.events import JobEvent

__version__ = "0.1.0"

BUILT_IN_DRIVERS: Mapping[str, type[Driver]] = {
    driver.name: driver
    for driver in (
        Qcow2Driver,
        RawDriver,
        FileDriver,
        NbdDriver,
        MemoryDriver,
        NullDriver,
        ThrottleDriver,
        FaultsDriver,
    )
}
"""What every graph knows; a format's place in the table is its turn when content is probed."""


class Graph(BareGraph):
    """Nodes, jobs and everything they run on; use it as ``async with Graph() as graph``.

    ``gate``     what image headers may refer to, unless ``open`` is told otherwise; the default allows only files in
                 the directory of the image that names them
    ``drivers``  more drivers by name, or replacements of built-in ones; installed packages add theirs by the entry
                 point group ``blocklayer.drivers``
    ``engine``   makes the I/O engine when the graph is entered
    """

    def __init__(
        self,
        *,
        gate: Gate | None = None,
        drivers: Mapping[str, type[Driver]] | None = None,
        engine: Callable[[], Engine] = ThreadEngine,
    ) -> None:
        """Remember; nothing runs before the graph is entered."""
        super().__init__(
            {**BUILT_IN_DRIVERS, **(drivers or {})}, engine=engine, gate=gate, find_driver=_installed_driver
        )
        self.jobs = JobManager(self)

    async def backup(
        self, source: Node, target: Node | str | os.PathLike[str], *, sync: str = "full", **options: object
    ) -> BackupJob:
        """Start a backup of ``source`` as it is at this instant; returns when the point in time is taken.

        ``sync``    "full": the whole chain; "top": only what the topmost layer holds, the target sharing its backing
                    file; "none": only old data that is about to be overwritten, until the job is cancelled
        ``target``  a path, created unless ``mode="existing"``; or an open node of the same size
        ``options`` are the fields of ``BackupRequest``: ``speed``, ``compress``, ``on_target_error``, ...

        Raises ``UsageError`` kinds before anything is touched, and what creating the target raises.
        """
        (job,) = await self.backup_group([BackupRequest.build(source, target, sync=sync, **options)])
        return job

    async def backup_group(self, requests: Iterable[BackupRequest], *, grouped: bool = False) -> list[BackupJob]:
        """Start several backups that share one point in time; if one cannot start, none does.

        ``grouped`` also ties their ends together: one failure cancels all, and all conclude at once.
        """
        return await self.jobs.start_backups(list(requests), grouped=grouped)

    def events(self) -> AsyncIterator[JobEvent]:
        """What happens to jobs from now on: status changes, errors, completion; see ``jobs/events.py``."""
        return self.jobs.events()


def _installed_driver(name: str) -> type[Driver] | None:
    from importlib.metadata import entry_points  # noqa: PLC0415 - takes as long as all of our own modules

    for entry in entry_points(group="blocklayer.drivers", name=name):
        driver: type[Driver] = entry.load()
        return driver
    return None


__all__ = [
    "Graph",
    "Node",
    "Gate",
    "BackupJob",
    "BackupRequest",
    "BackupResult",
    "Progress",
    "Extent",
    "ExtentKind",
    "WriteFlags",
    "WriteRequest",
    "CacheMode",
    "DetectZeroes",
    "DiscardMode",
    "Permission",
    "Preallocation",
    "Driver",
    "BlockLimits",
    "BlockError",
    "UsageError",
    "OptionError",
    "OutOfRangeError",
    "AlignmentError",
    "ReadOnlyError",
    "UnsupportedError",
    "StateError",
    "NotFoundError",
    "DuplicateError",
    "PermissionConflictError",
    "InUseError",
    "ChainError",
    "ImageError",
    "FormatError",
    "UnknownFormatError",
    "UnsupportedFeatureError",
    "LimitError",
    "CorruptImageError",
    "ReferenceRefusedError",
    "IOFailedError",
    "NoSpaceError",
    "LockedError",
    "MissingFileError",
    "AccessDeniedError",
    "TimedOutError",
    "ProtocolError",
    "JobError",
    "JobCancelledError",
    "SnapshotBrokenError",
    "__version__",
]
