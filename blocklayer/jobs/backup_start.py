"""Starting backups: checks, targets, and the one instant that all jobs of a call share.

    for each request   checks that need no target -> the target -> checks that need it -> the job with its edges
    then               drain all sources -> register all notifiers -> leave: the point in time
    then               start all jobs

If anything raises, or the caller is cancelled, everything is undone: no hook, edge, open target or new file stays.
The order of the checks is QEMU's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import anyio

from blocklayer.base.errors import BlockError, InUseError, OptionError, StateError, UnsupportedError
from blocklayer.graph.node import Node
from blocklayer.jobs.backup import BackupJob, BackupPlan
from blocklayer.jobs.backup_options import COPY_RANGE_MAX, SyncMode, choose_chunk, choose_cluster
from blocklayer.jobs.backup_target import BackupTarget, check_not_related, open_target, subtree
from blocklayer.jobs.block_copy import CopyMode
from blocklayer.jobs.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blocklayer.jobs.backup_options import BackupOptions, BackupRequest
    from blocklayer.jobs.manager import JobManager

_log = logging.getLogger(__name__)


class _Sync(NamedTuple):
    """The mode taken, and why it is not the one asked for."""

    mode: SyncMode
    reason: str = ""


async def start_backups(manager: JobManager, requests: Sequence[BackupRequest], *, grouped: bool) -> list[BackupJob]:
    """Start all of ``requests`` at one point in time, or none. Returns when the point in time is taken."""
    jobs: list[BackupJob] = []
    try:
        for request in requests:
            jobs.append(await _make_job(manager, request))  # noqa: PERF401 - what is there has to be undone
        await _take_point_in_time(jobs)
        if grouped:
            transaction = Transaction(jobs)
            for job in jobs:
                job.transaction = transaction
        manager.start(jobs)
    except BaseException:
        with anyio.CancelScope(shield=True):
            for job in jobs:
                await job.disarm()
                manager.withdraw(job)
        raise
    return jobs


async def _make_job(manager: JobManager, request: BackupRequest) -> BackupJob:
    with manager.reserve_id(request.options.job_id, BackupJob.kind) as job_id:
        _check_request(manager, request)
        sync = _choose_sync(request)
        target = await _open(manager, request, sync.mode)
        try:
            plan = _plan(manager, request, target, sync)
            job = BackupJob(job_id, plan, manager.graph.start_task)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await target.discard()
            raise
        manager.register(job)
    return job


def _check_request(manager: JobManager, request: BackupRequest) -> None:
    source, target, options = request.source, request.target, request.options
    if isinstance(target, Node):
        check_not_related(source, target)
    for node in (source, target):
        if isinstance(node, Node) and node.closed:
            raise StateError("it is closed", node=node.name)
    if isinstance(target, Node):
        if options.compress:
            _check_compress(target)
        _check_unused(manager, target)
    _check_source_unused(manager, source)
    options.check_numbers()


def _check_compress(target: Node) -> None:
    if not target.driver.can_compress:
        raise UnsupportedError("compression is not supported for this drive", node=target.name)


def _check_unused(manager: JobManager, target: Node) -> None:
    for job in manager.backups():
        if target in (job.source, job.target):
            raise InUseError(f"it cannot be a target: {job.describe()} uses it", node=target.name)


def _check_source_unused(manager: JobManager, source: Node) -> None:
    """A target changes while it is written; only that of sync none shows one point in time."""
    for job in manager.backups():
        if source is job.target and job.sync is not SyncMode.NONE:
            raise InUseError(f"it cannot be a source: it is the target of {job.describe()}", node=source.name)


def _choose_sync(request: BackupRequest) -> _Sync:
    wanted = request.options.sync
    if wanted is SyncMode.TOP and request.source.backing is None:
        return _Sync(SyncMode.FULL, "the source has no backing file, so its topmost layer is all of it")
    return _Sync(wanted)


async def _open(manager: JobManager, request: BackupRequest, sync: SyncMode) -> BackupTarget:
    target = request.target
    if isinstance(target, Node):
        return BackupTarget(target, label=target.filename or target.name)
    return await open_target(manager.graph, request.source, target, request.options, sync)


def _plan(manager: JobManager, request: BackupRequest, target: BackupTarget, sync: _Sync) -> BackupPlan:
    source, node, options = request.source, target.node, request.options
    check_not_related(source, node)
    if options.compress:
        _check_compress(node)
    _check_unused(manager, node)
    if source.size != node.size:
        message = f"source and target image have different sizes: {source.size} and {node.size} bytes"
        raise OptionError(message, node=node.name)
    choice = choose_cluster(
        _cluster_of(node),
        tells=node.backing is not None or node.filename is not None,
        min_cluster_size=options.min_cluster_size,
    )
    for warning in choice.warnings:
        _log.warning("backup to %r: %s", node.name, warning)
    mode = CopyMode(
        cluster=choice.cluster,
        target_cluster=node.driver.cluster_size or choice.cluster,
        chunk=choose_chunk(options.max_chunk, choice.cluster),
        compress=options.compress,
        target_is_zero=target.is_zero,
        serialising=source in subtree(node),
        copy_range_chunk=_copy_range_chunk(options),
    )
    return BackupPlan(source, target, options, sync.mode, sync.reason, mode, choice.warnings)


def _copy_range_chunk(options: BackupOptions) -> int:
    if not options.use_copy_range:
        return 0
    return min(COPY_RANGE_MAX, options.max_chunk or COPY_RANGE_MAX)


def _cluster_of(target: Node) -> int | None:
    try:
        return target.driver.cluster_size
    except BlockError as error:
        if target.backing is not None:
            return None
        message = "couldn't determine the cluster size of the target image, which has no backing file"
        hint = "; aborting, since this may create an unusable destination image"
        raise UnsupportedError(message + hint, node=target.name) from error


async def _take_point_in_time(jobs: Sequence[BackupJob]) -> None:
    """Register all notifiers while no request is in flight on any source.

    A guest's write that is in flight on one source may write to another, which is its backup target; so a source that
    was idle is looked at again after the last one has become idle.
    """
    sources = list({job.source: None for job in jobs})
    begun: list[Node] = []
    try:
        for source in sources:
            source.drain_begin()
            begun.append(source)
        for source in [*sources, *sources]:
            await source.drain_wait()
        for job in jobs:
            job.arm()
    finally:
        for source in begun:
            source.drain_end()
