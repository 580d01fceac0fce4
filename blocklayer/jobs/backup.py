"""BackupJob: a copy of a live disk as it was at one instant.

    guest write -> before-write notifier -> do_cow --+
                                                     +-> BlockCopy: source edge -> target edge
    the job's own loop (``Background``) -------------+

The instant is when the notifier is registered, inside a drained section (``backup_start.py``). From then on a cluster
is copied before it changes, by whoever comes first: the guest's write that is about to change it, or the loop.

    full   the loop copies every cluster of the chain; zeroes and holes are not read
    top    the loop and the notifier skip clusters of which the topmost layer holds no sector
    none   there is no loop; the job waits until it is cancelled, and that is its success

Invariants
- A cluster whose bit is set still has the content that it had at the instant.
- ``do_cow`` returns only when no bit in the write's range is set and none of its clusters is in flight, or it raises,
  or the point in time is given up: then it returns at once, and nobody waits for the job any more.
- When ``run`` ends, however it does, the hook is removed and nothing is in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar

import anyio

from blocklayer.base.errors import SnapshotBrokenError
from blocklayer.base.modes import Permission
from blocklayer.bitmap.copy_bitmap import CopyBitmap
from blocklayer.graph.child import Child
from blocklayer.jobs.background import Background, ErrorPolicy
from blocklayer.jobs.backup_options import BackupOptions, BackupRequest, SyncMode
from blocklayer.jobs.before_write import BeforeWrite
from blocklayer.jobs.block_copy import BlockCopy, CopyMode
from blocklayer.jobs.claims import Claims
from blocklayer.jobs.job import Job
from blocklayer.jobs.policy import OnCbwError
from blocklayer.jobs.survey import Survey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blocklayer.base.errors import BlockError
    from blocklayer.graph.node import HookHandle, Node
    from blocklayer.graph.requests import WriteRequest
    from blocklayer.jobs.backup_target import BackupTarget

__all__ = ["BackupJob", "BackupOptions", "BackupPlan", "BackupRequest", "BackupResult"]

_SHARED = Permission.ALL & ~Permission.RESIZE
"""The job lets others do anything with its nodes but change their sizes."""


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did. Bytes, and times in UTC.

    ``sync_requested``, ``sync``  the mode asked for and the mode taken; ``reason`` says why they differ, or is ""
    ``background_bytes``          data copied by the job's loop; ``before_write_bytes``: before guests' writes
    ``zero_bytes``                areas that read as zeroes; ``skipped_bytes``: areas left to the target's backing file
    ``guest_waits``               guests' writes that had to wait for a copy
    ``target``                    path of the target, or its node's name
    """

    job_id: str
    sync_requested: SyncMode
    sync: SyncMode
    reason: str
    background_bytes: int
    before_write_bytes: int
    zero_bytes: int
    skipped_bytes: int
    guest_waits: int
    cluster_size: int
    started: datetime
    ended: datetime
    target: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """A request after all checks: ``sync`` is the mode taken, ``reason`` why it is not the one asked for."""

    source: Node
    target: BackupTarget
    options: BackupOptions
    sync: SyncMode
    reason: str
    mode: CopyMode
    warnings: tuple[str, ...]


class BackupJob(Job):
    """One backup; started by ``Graph.backup``. ``wait`` gives the ``BackupResult``."""

    kind: ClassVar[str] = "backup"

    def __init__(self, job_id: str, plan: BackupPlan, spawn: Callable[..., None]) -> None:
        """Attach to source and target; ``spawn(function, *args, name=...)`` starts tasks that outlive their caller."""
        options = plan.options
        finalize, dismiss = options.auto_finalize, options.auto_dismiss
        super().__init__(
            job_id, total=plan.source.size, speed=options.speed, auto_finalize=finalize, auto_dismiss=dismiss
        )
        self._plan = plan
        self._hook: HookHandle | None = None
        self._ending = False
        self._started = self._ended = datetime.now(UTC)
        bitmap = CopyBitmap(-(-plan.source.size // plan.mode.cluster))
        self._source = Child(self, "source", plan.source, Permission.CONSISTENT_READ, _SHARED)
        try:
            needs = Permission.CONSISTENT_READ | Permission.WRITE
            self._target = Child(self, "target", plan.target.node, needs, _SHARED)
        except BaseException:
            self._source.detach()
            raise
        top_only = plan.sync is SyncMode.TOP
        self._claims = claims = Claims(bitmap, self.changed)
        survey = Survey(plan.source, plan.mode.cluster, top_only=top_only)
        self._copy = copy = BlockCopy(
            self._source, self._target, plan.mode,
            bitmap=bitmap, claims=claims, survey=survey, done=self.advance, dropped=self.drop,
        )  # fmt: skip
        self._before = BeforeWrite(copy, claims, surveyed=top_only, timeout_s=options.cbw_timeout, spawn=spawn)
        policy = ErrorPolicy(options.on_source_error, options.on_target_error, options.retry)
        self._background = Background(
            self, copy, bitmap=bitmap, claims=claims, survey=survey, policy=policy, workers=options.max_workers
        )

    # -- for people --------------------------------------------------------------------------------------------

    @property
    def source(self) -> Node:
        """The disk."""
        return self._source.node

    @property
    def target(self) -> Node:
        """The node that is written to; with ``sync="none"`` it reads as the point in time while the job runs."""
        return self._target.node

    @property
    def sync(self) -> SyncMode:
        """The mode taken."""
        return self._plan.sync

    @property
    def busy(self) -> bool:
        """Whether background requests of the job are in flight."""
        return self._background.busy

    async def wait(self) -> BackupResult:
        """Wait for the end and answer what was done; raises what made the job fail, or ``JobCancelledError``.

        If the waiting task is cancelled the job goes on.
        """
        await self.wait_concluded()
        if self.error is not None:
            raise self.error
        return self._result()

    def _result(self) -> BackupResult:
        counters, plan = self._copy.counters, self._plan
        return BackupResult(
            job_id=self.id,
            sync_requested=plan.options.sync,
            sync=plan.sync,
            reason=plan.reason,
            background_bytes=counters.background,
            before_write_bytes=counters.before_write,
            zero_bytes=counters.zero,
            skipped_bytes=counters.skipped,
            guest_waits=self._before.waits,
            cluster_size=plan.mode.cluster,
            started=self._started,
            ended=self._ended,
            target=plan.target.label,
            warnings=plan.warnings,
        )

    # -- the point in time -------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Register the notifier: this is the instant. Only while the source is drained."""
        self._hook = self.source.before_write(self._before_write)
        self._started = datetime.now(UTC)

    async def disarm(self) -> None:
        """Undo a job that was never started."""
        self._remove_hook()
        await self._before.leave(abandon=True)
        await self.abort()
        await self.clean()

    async def do_cow(self, offset: int, length: int) -> None:
        """Save the old data of every cluster that ``[offset, offset + length)`` touches and that is not saved yet.

        Raises the error of a copy that failed, if that is to break the guest's write. If cancelled, clusters whose copy
        was under way are asked for again.
        """
        failure = await self._before.save(offset, length)
        if failure is None or self._before.over:
            return
        if self._plan.options.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE:
            raise failure.error
        self._break_snapshot(failure.error)

    def _before_write(self, request: WriteRequest) -> Awaitable[None] | None:
        if self._before.is_saved(request.offset, request.length):
            return None
        return self.do_cow(request.offset, request.length)

    def _break_snapshot(self, cause: BlockError) -> None:
        error = SnapshotBrokenError(f"the point in time was given up for a guest's write: {cause}", job=self.id)
        error.__cause__ = cause
        self._before.over = True
        self._background.fatal = error
        self.changed.notify()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    # -- the life of the job -----------------------------------------------------------------------------------

    @property
    def cancel_is_success(self) -> bool:
        """Sync none can only end by being cancelled."""
        return self._plan.sync is SyncMode.NONE

    def request_end(self) -> bool:
        """Sync none finishes the copies that guests wait for; the others have nothing that is worth finishing."""
        self._ending = self.cancel_is_success
        return self._ending

    async def run(self) -> None:
        """Keep the point in time, and copy what the mode asks for."""
        abandon = True
        try:
            if self._plan.sync is SyncMode.NONE:
                await self._keep()
            else:
                await self._background.run()
            await self._copy.flush()
            abandon = False
        finally:
            self._remove_hook()
            with anyio.CancelScope(shield=True):
                await self._before.leave(abandon=abandon)

    async def _keep(self) -> None:
        """Wait to be cancelled; then let the copies in flight finish."""
        while not self._ending:
            await self.pause_point()
            if self._background.fatal is not None:
                raise self._background.fatal
            if not self._ending:
                await self.changed.wait()
        self._remove_hook()
        self._before.over = True
        await self._claims.wait_none()

    async def prepare(self) -> None:
        """Close a target that the job opened: from now on all of it is on the storage."""
        self._target.detach()
        await self._plan.target.close()

    async def commit(self) -> None:
        """Give a created target its final name."""
        await self._plan.target.publish()

    async def abort(self) -> None:
        """Remove a created target, unless it is of use (sync none)."""
        self._target.detach()
        if self._plan.sync is SyncMode.NONE:
            await self._plan.target.close()
        else:
            await self._plan.target.discard()

    async def clean(self) -> None:
        """Let go of the source."""
        self._target.detach()
        self._source.detach()
        self._ended = datetime.now(UTC)
        await self._plan.target.release()
