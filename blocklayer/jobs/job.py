"""Job: something long that the graph does in the background, and the handle by which people steer it.

A job's own work is its ``run`` coroutine; everything around it is here: states, commands, pause points, the end. The
manager runs ``live`` in the graph's task group; it never raises, whatever ``run`` does.

    run        the work. Returns: success; raises: failure; is cancelled: cancelled
    prepare    last steps that can fail; the transaction's other members have succeeded so far
    commit     makes the result visible
    abort      removes traces; shielded from cancellation
    clean      lets go of nodes; always last, shielded

Invariants
- ``status`` changes only through ``states.transition``; each change is an event.
- Background work starts only right after ``pause_point`` or a check of ``held_up``, without an await in between.
- A job belongs to the graph: cancelling a task that awaits ``wait``, ``pause`` or ``progress`` leaves the job alone.
- A job holds edges, so it is an ``Owner``: a drained section holds up its background work, unseen by users.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import anyio

from blocklayer.base.errors import BlockError, JobCancelledError, OptionError, StateError, UnsupportedError
from blocklayer.jobs.events import BlockJobCancelled, BlockJobCompleted, BlockJobPending, JobStatusChanged
from blocklayer.jobs.policy import IOStatus
from blocklayer.jobs.progress import Progress, ProgressMeter
from blocklayer.jobs.signal import Signal
from blocklayer.jobs.speed import SpeedLimit
from blocklayer.jobs.states import JobStatus, JobVerb, check_verb, transition, way_to_aborting
from blocklayer.jobs.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from blocklayer.jobs.events import JobEvent

_log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
"""QEMU's rule for identifiers."""

_PAUSED = frozenset({JobStatus.PAUSED, JobStatus.STANDBY})
_OVER = frozenset({JobStatus.CONCLUDED, JobStatus.NULL})


def check_job_id(job_id: str) -> str:
    """Answer ``job_id`` if it is well formed: a letter, then letters, digits, ``-``, ``.``, ``_``."""
    if not _ID.fullmatch(job_id):
        raise OptionError(f"invalid job ID {job_id!r}: a letter, then letters, digits, '-', '.' or '_'")
    return job_id


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What a job says of itself; ``to_dict`` gives QEMU's ``query-block-jobs``. ``current``, ``total`` in bytes."""

    id: str
    type: str
    status: JobStatus
    current: int
    total: int
    speed: int
    busy: bool
    paused: bool
    ready: bool
    io_status: IOStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None

    def to_dict(self) -> dict[str, object]:
        """JSON-able, with QEMU's keys."""
        record: dict[str, object] = {
            "device": self.id, "type": self.type, "status": self.status.value,
            "offset": self.current, "len": self.total, "speed": self.speed,
            "busy": self.busy, "paused": self.paused, "ready": self.ready,
            "io-status": self.io_status.value, "auto-finalize": self.auto_finalize, "auto-dismiss": self.auto_dismiss,
        }  # fmt: skip
        return record if self.error is None else {**record, "error": self.error}


class Job(ABC):
    """One job. ``id`` and ``status`` are for everybody; commands are coroutines that return when they have effect."""

    kind: ClassVar[str]
    """QEMU's word for the type of job: "backup"."""

    def __init__(
        self, job_id: str, *, total: int, speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        """Describe a job; it has no state until it is registered."""
        self.id = check_job_id(job_id)
        self.status = JobStatus.UNDEFINED
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.io_status = IOStatus.OK
        self.error: BaseException | None = None
        """Why the job failed; set before it is aborting."""
        self.transaction = Transaction([self])
        self.limit = SpeedLimit(speed)
        self.meter = ProgressMeter(total, 0.0)
        self.changed = Signal()
        self._user_paused = False
        self._drains = 0
        self._cancelled = False
        self._culprit: str | None = None
        self._scope = anyio.CancelScope()
        self._emit: Callable[[JobEvent], None] = lambda _event: None
        self._forget: Callable[[Job], None] = lambda _job: None

    def __repr__(self) -> str:
        """``<backup job 'backup0' running 1048576/1073741824>``."""
        return f"<{self.kind} job {self.id!r} {self.status.value} {self.meter.current}/{self.meter.total}>"

    # -- for subclasses ----------------------------------------------------------------------------------------

    @abstractmethod
    async def run(self) -> None:
        """Do the work; when this ends, however it does, the job touches the source no more."""

    async def prepare(self) -> None:  # noqa: B027 - most jobs need only some of these
        """Do the last steps that can fail."""

    async def commit(self) -> None:  # noqa: B027 - most jobs need only some of these
        """Make the result visible."""

    async def abort(self) -> None:  # noqa: B027 - most jobs need only some of these
        """Remove traces of a job that did not succeed."""

    async def clean(self) -> None:  # noqa: B027 - most jobs need only some of these
        """Let go of everything."""

    @property
    def busy(self) -> bool:
        """Whether background requests of the job are in flight."""
        return False

    @property
    def cancel_is_success(self) -> bool:
        """Whether the job can only end by being cancelled, and so has a result then."""
        return False

    def request_end(self) -> bool:
        """Take a soft cancel: answer True if ``run`` will return by itself; False to have it cancelled."""
        return False

    @property
    def held_up(self) -> bool:
        """Whether no background work may start now: paused by somebody, or inside a drained section."""
        return self._user_paused or self._drains > 0

    async def pause_point(self) -> None:
        """Return when background work may start; until then the job counts as paused once nothing is in flight."""
        while self.held_up:
            if self._user_paused and self.status is JobStatus.RUNNING and not self.busy:
                self._set_status(JobStatus.PAUSED)
            await self.changed.wait()
        if self.status is JobStatus.PAUSED:
            self._set_status(JobStatus.RUNNING)

    def stop_for(self, status: IOStatus) -> None:
        """Pause like a user would, because of an I/O error; ``resume`` ends it."""
        self.io_status = status
        self._user_paused = True
        self.changed.notify()

    def advance(self, length: int) -> None:
        """``length`` more bytes are done."""
        self.meter.advance(length, _now())
        self.changed.notify()

    def drop(self, length: int) -> None:
        """``length`` bytes turned out to need no work."""
        self.meter.drop(length)
        self.changed.notify()

    def emit(self, event: JobEvent) -> None:
        """Tell whoever listens."""
        self._emit(event)

    # -- commands ----------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Stop background work; returns when none is in flight. ``StateError`` if the job is paused already."""
        check_verb(self.id, self.status, JobVerb.PAUSE)
        if self._user_paused:
            raise StateError(f"job {self.id!r} is already paused")
        self._user_paused = True
        self.changed.notify()
        while self._user_paused and self.status in (JobStatus.CREATED, JobStatus.RUNNING, JobStatus.READY):
            await self.changed.wait()

    async def resume(self) -> None:
        """Go on after ``pause`` or an error that stopped the job. ``StateError`` if the job was not paused."""
        check_verb(self.id, self.status, JobVerb.RESUME)
        if not self._user_paused:
            raise StateError(f"cannot resume job {self.id!r}, which was not paused")
        self._user_paused = False
        self.io_status = IOStatus.OK
        self.changed.notify()

    async def set_speed(self, speed: int) -> None:
        """Limit background work to ``speed`` bytes per second from now on; 0 means no limit."""
        check_verb(self.id, self.status, JobVerb.SET_SPEED)
        self.limit.set(speed)
        self.changed.notify()

    async def cancel(self, *, force: bool = False) -> None:
        """End the job. Returns when that is under way; ``wait`` tells when it is done.

        ``force`` also gives up what a job that ends well by ``cancel`` would still finish.
        """
        check_verb(self.id, self.status, JobVerb.CANCEL)
        self.end(force=force)

    async def complete(self) -> None:
        """Tell a job that is READY to finish: no backup ever is."""
        check_verb(self.id, self.status, JobVerb.COMPLETE)
        raise UnsupportedError(f"the active block job {self.id!r} cannot be completed")

    async def finalize(self) -> None:
        """Let a PENDING job, and all of its group, conclude."""
        check_verb(self.id, self.status, JobVerb.FINALIZE)
        self.transaction.finalize()

    async def dismiss(self) -> None:
        """Forget a CONCLUDED job."""
        check_verb(self.id, self.status, JobVerb.DISMISS)
        self._dismiss()

    # -- asking ------------------------------------------------------------------------------------------------

    def query(self) -> JobRecord:
        """The job as it is now."""
        current, total = self.meter.current, self.meter.total
        error = None if self.error is None else str(self.error)
        ready = self.status in (JobStatus.READY, JobStatus.STANDBY)
        return JobRecord(
            self.id, self.kind, self.status, current, total, self.limit.speed, self.busy, self._user_paused, ready,
            self.io_status, self.auto_finalize, self.auto_dismiss, error,
        )  # fmt: skip

    async def progress(self) -> AsyncIterator[Progress]:
        """The progress now, and again when it changes, until the job has concluded. A slow reader skips values."""
        last: tuple[int, int] | None = None
        while True:
            over = self.concluded
            seen = (self.meter.current, self.meter.total)
            if seen != last:
                last = seen
                yield self.meter.snapshot(_now())
            elif over:
                return
            else:
                await self.changed.wait()

    @property
    def concluded(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status in _OVER

    @abstractmethod
    async def wait(self) -> object:
        """Wait for the end and answer the result; raises what made the job fail, or ``JobCancelledError``.

        If the waiting task is cancelled the job goes on.
        """

    async def wait_concluded(self) -> None:
        """Wait for the end; raises nothing."""
        while not self.concluded:
            await self.changed.wait()

    # -- owner of edges ----------------------------------------------------------------------------------------

    def describe(self) -> str:
        """For messages about permissions."""
        return f"{self.kind} job {self.id!r}"

    def drain_begin(self) -> None:
        """Start no background requests."""
        self._drains += 1
        self.changed.notify()

    async def drain_wait(self) -> None:
        """Wait until no background request is in flight. Guests' requests are on the source's own list."""
        while self.busy:
            await self.changed.wait()

    def drain_end(self) -> None:
        """Undo one ``drain_begin``."""
        self._drains -= 1
        self.changed.notify()

    # -- for the manager and the transaction -------------------------------------------------------------------

    def register(self, emit: Callable[[JobEvent], None], forget: Callable[[Job], None]) -> None:
        """The job exists: ``emit`` takes its events, ``forget`` is called when it is dismissed."""
        self._emit = emit
        self._forget = forget
        self.meter = ProgressMeter(self.meter.total, _now())
        self._set_status(JobStatus.CREATED)

    def unregister(self) -> None:
        """The job was never started."""
        self._set_status(JobStatus.NULL)

    def end(self, *, force: bool) -> None:
        """Cancel whatever the state; does nothing to a job that has ended."""
        self._cancelled = True
        self._user_paused = False
        if force or self.status not in (JobStatus.RUNNING, JobStatus.PAUSED) or not self.request_end():
            self._scope.cancel()
        self.changed.notify()

    def cancel_for(self, culprit: str) -> None:
        """Part of ``transaction.Member``."""
        if not self.concluded and self.status is not JobStatus.ABORTING and not self._cancelled:
            self._culprit = culprit
            self.end(force=True)

    def become_pending(self) -> None:
        """Part of ``transaction.Member``."""
        self._set_status(JobStatus.PENDING)
        if not self.auto_finalize:
            self.emit(BlockJobPending(self.id, self.kind))

    async def live(self) -> None:
        """The whole life, from CREATED to CONCLUDED; never raises but for being cancelled from outside."""
        done = False
        try:
            with self._scope:
                self._set_status(JobStatus.RUNNING)
                await self._work()
                done = True
        except Exception as error:  # noqa: BLE001 - every failure of the work is the job's outcome, bugs included
            self._note_failure(error)
        finally:
            with anyio.CancelScope(shield=True):
                await self._conclude(done=done)

    async def _work(self) -> None:
        await self.run()
        if self._cancelled:
            return
        self._set_status(JobStatus.WAITING)
        await self.transaction.arrive(self)
        await self.prepare()
        await self.transaction.prepared(self)

    async def _conclude(self, *, done: bool) -> None:
        success = done and not self._cancelled
        try:
            if success:
                await self.commit()
        except Exception as error:  # noqa: BLE001 - as above
            self._note_failure(error)
            success = False
        if not success:
            await self._abort()
        await self._guarded(self.clean)
        self._announce(success=success)
        self._set_status(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._dismiss()

    async def _abort(self) -> None:
        if self.error is None and (self._culprit is not None or not self.cancel_is_success):
            self.error = JobCancelledError(self._why_cancelled(), job=self.id)
        for status in way_to_aborting(self.status):
            self._set_status(status)
        self.transaction.fail(self)
        await self._guarded(self.abort)

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except Exception:  # noqa: BLE001 - the outcome is decided; what cannot be tidied up is told and left
            _log.exception("%s could not tidy up completely", self.describe())

    def _note_failure(self, error: Exception) -> None:
        self.error = error
        if not isinstance(error, BlockError):
            _log.error("%s failed by a bug", self.describe(), exc_info=error)

    def _why_cancelled(self) -> str:
        if self._culprit is not None:
            return f"job {self.id!r} was cancelled because job {self._culprit!r} of its group did not succeed"
        return f"job {self.id!r} was cancelled"

    def _announce(self, *, success: bool) -> None:
        numbers = (self.id, self.kind, self.meter.total, self.meter.current, self.limit.speed)
        cancelled = not success and (self.error is None or isinstance(self.error, JobCancelledError))
        if cancelled:
            self.emit(BlockJobCancelled(*numbers))
        else:
            self.emit(BlockJobCompleted(*numbers, error=None if self.error is None else str(self.error)))

    def _dismiss(self) -> None:
        self._set_status(JobStatus.NULL)
        self._forget(self)

    def _set_status(self, status: JobStatus) -> None:
        self.status = transition(self.status, status)
        self.emit(JobStatusChanged(self.id, status.value))
        self.changed.notify()


def _now() -> float:
    return asyncio.get_running_loop().time()
