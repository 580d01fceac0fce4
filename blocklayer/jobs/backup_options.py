"""What a backup is asked to do, and the checks that need no image: pure, and done before anything is touched.

The order of the checks is QEMU's, so that of several mistakes the same one is reported.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping  # noqa: TC003 - ``build`` resolves the annotations of the options at run time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blocklayer.base.errors import OptionError
from blocklayer.base.options import build
from blocklayer.base.ranges import is_power_of_two
from blocklayer.base.units import GIB, KIB, MIB
from blocklayer.graph.node import Node
from blocklayer.jobs.job import check_job_id
from blocklayer.jobs.policy import OnCbwError, OnError
from blocklayer.jobs.speed import check_speed

if TYPE_CHECKING:
    from typing import Self

CLUSTER_DEFAULT = 64 * KIB
"""QEMU's unit of backups: a guest's write waits little for one, and a bit for each is cheap."""

CLUSTER_MAX = GIB
"""Largest ``min_cluster_size``: a guest's write waits for at least one cluster."""

CHUNK_DEFAULT = MIB
"""Longest background request when ``max_chunk`` is 0, as for QEMU's buffered copies."""

COPY_RANGE_MAX = 16 * MIB
"""Longest request to the storage's own copying: it cannot be interrupted, so it has to be over soon."""

INT_MAX = 2**31 - 1
"""QEMU's limit for ``max-workers``."""


class SyncMode(enum.Enum):
    """What is copied: the whole chain, the topmost layer, or only what is about to be overwritten."""

    FULL = "full"
    TOP = "top"
    NONE = "none"


class TargetMode(enum.Enum):
    """Whether a target path is created (whatever file has that name is replaced) or has to be there."""

    ABSOLUTE_PATHS = "absolute-paths"
    EXISTING = "existing"


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """All options; names are QEMU's with ``_`` for ``-``.

    ``sync``             what is copied
    ``job_id``           a letter, then letters, digits, ``-._``; made up if None
    ``format``           of a target path; default: what its ending says, else the source's, else qcow2
    ``mode``             of a target path
    ``speed``            bytes per second of background copying; 0: no limit
    ``compress``         write compressed clusters; only if the target can
    ``max_workers``      background copies in flight (at most 16 are)
    ``max_chunk``        longest background copy in bytes; 0: 1 MiB or one cluster
    ``min_cluster_size`` the job's cluster is max(64 KiB, the target's cluster, this); a power of two, or 0
    ``use_copy_range``   let the storage copy, file to file
    ``on_source_error``, ``on_target_error``  see ``OnError``; ``retry``: attempts before that
    ``on_cbw_error``     see ``OnCbwError``; ``cbw_timeout``: seconds before a copy counts as failed; 0: none
    ``auto_finalize``, ``auto_dismiss``       whether the job concludes, and is forgotten, by itself
    ``target_options``   for a target path: options of ``Graph.create``, or of ``Graph.open`` with ``mode="existing"``
    """

    sync: SyncMode = SyncMode.FULL
    job_id: str | None = None
    format: str | None = None
    mode: TargetMode = TargetMode.ABSOLUTE_PATHS
    speed: int = 0
    compress: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0
    use_copy_range: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: float = 0.0
    retry: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True
    target_options: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        """Refuse what can never be; see ``check_numbers`` for the rest."""
        if self.job_id is not None:
            check_job_id(self.job_id)

    def check_numbers(self) -> None:
        """Raise ``OptionError`` for a number out of its range, in QEMU's order."""
        check_speed(self.speed)
        if not 1 <= self.max_workers <= INT_MAX:
            raise OptionError(f"max-workers must be between 1 and {INT_MAX}")
        if self.max_chunk < 0:
            raise OptionError("max-chunk must be zero (which means no limit) or positive")
        if self.min_cluster_size and not is_power_of_two(self.min_cluster_size):
            raise OptionError(f"min-cluster-size must be a power of two, not {self.min_cluster_size}")
        if self.min_cluster_size > CLUSTER_MAX:
            raise OptionError(f"min-cluster-size must be at most {CLUSTER_MAX}, not {self.min_cluster_size}")
        if self.retry < 0:
            raise OptionError("retry must be zero or positive")
        if self.cbw_timeout < 0:
            raise OptionError("cbw-timeout must be zero (which means none) or positive")


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """One backup to start: an open ``source``, a ``target`` (open node, or path), and options."""

    source: Node
    target: Node | str
    options: BackupOptions = field(default_factory=BackupOptions)

    @classmethod
    def build(cls, source: Node, target: Node | str | os.PathLike[str], **options: object) -> Self:
        """Make one from words and numbers (``sync="top"``, ``speed="10M"``); ``OptionError`` if one is wrong."""
        place = target if isinstance(target, Node) else os.fspath(target)
        return cls(source, place, build(BackupOptions, options))


@dataclass(frozen=True, slots=True)
class ClusterChoice:
    """The job's cluster in bytes, and what the user should know about it."""

    cluster: int
    warnings: tuple[str, ...] = ()


def choose_cluster(target_cluster: int | None, *, tells: bool, min_cluster_size: int) -> ClusterChoice:
    """The job's cluster: max(64 KiB, the target's cluster, ``min_cluster_size``).

    ``tells``: the target need not tell its cluster, because it is a plain file or has a backing file to fall back on.
    """
    warnings: tuple[str, ...] = ()
    if target_cluster is None and not tells:
        what = "the target does not tell its cluster size and has no backing file"
        warnings = (f"{what}; {CLUSTER_DEFAULT} bytes are assumed, and if they are larger the backup may be unusable",)
    return ClusterChoice(max(CLUSTER_DEFAULT, target_cluster or 0, min_cluster_size), warnings)


def choose_chunk(max_chunk: int, cluster: int) -> int:
    """The longest background copy in bytes, whole clusters. ``OptionError`` if ``max_chunk`` is less than one."""
    if max_chunk and max_chunk < cluster:
        raise OptionError(f"required max-chunk ({max_chunk}) is less than backup cluster size ({cluster})")
    return max(cluster, max_chunk - max_chunk % cluster if max_chunk else CHUNK_DEFAULT)
