"""The loop of a job that copies a whole disk: it walks the copy bitmap and keeps several copies in flight.

    pause point -> failures -> workers, speed, back-off -> next run of set bits -> nothing to write? next
                -> held up meanwhile? again -> claim, one task per claim

One loop decides, tasks only copy: so pauses, speed, drained sections and errors take effect in one place. The loop goes
round until no bit is set and nothing is in flight; a copy that failed has set its bits again, and is found again.

Invariants
- Between ``held_up`` and the claim there is no await.
- The event loop gets a turn at least every millisecond, also when there is nothing but holes.
- Tasks record failures and never raise: the loop decides what they mean.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import anyio

from blocklayer.aio.breath import Breather
from blocklayer.base.errors import BlockError
from blocklayer.jobs.block_copy import BlockCopy, Failure
from blocklayer.jobs.events import BlockJobFailing
from blocklayer.jobs.policy import ErrorAction, OnError, backoff_s, decide, io_status

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from blocklayer.bitmap.copy_bitmap import CopyBitmap
    from blocklayer.jobs.claims import Claim, Claims
    from blocklayer.jobs.job import Job
    from blocklayer.jobs.survey import Content, Run, Survey

WORKERS_MAX = 16
"""Background copies in flight: 16 MiB keep two cores and any storage busy; more only delay guests' requests."""


class ErrorPolicy(NamedTuple):
    """What to do about failed reads and writes, after ``retry`` more attempts."""

    on_source: OnError
    on_target: OnError
    retry: int


class _Step(NamedTuple):
    """Clusters ``[first, last)`` of one content, not settled yet."""

    first: int
    last: int
    content: Content


class Background:
    """One job's loop. ``job`` gives pause points, speed and events."""

    def __init__(
        self,
        job: Job,
        copy: BlockCopy,
        *,
        bitmap: CopyBitmap,
        claims: Claims,
        survey: Survey,
        policy: ErrorPolicy,
        workers: int,
    ) -> None:
        """At most ``workers`` copies are in flight, and never more than ``WORKERS_MAX``."""
        self.fatal: Exception | None = None
        """Set by whoever finds that the job cannot succeed; the loop then ends."""
        self._job = job
        self._copy = copy
        self._bitmap = bitmap
        self._claims = claims
        self._survey = survey
        self._policy = policy
        self._workers = min(workers, WORKERS_MAX)
        self._failures: list[Failure] = []
        self._attempts: dict[int, int] = {}
        self._not_before = 0.0
        self._cursor = 0
        self._run: Run | None = None
        self._surveying = False
        self._breather = Breather()

    @property
    def busy(self) -> bool:
        """Whether requests of the loop are in flight."""
        return self._surveying or self._claims.background > 0

    async def run(self) -> None:
        """Copy everything; raises what a policy reports. When this ends, no task of the loop is left."""
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                failure = await self._dispatch(tasks)
                if failure is not None:
                    tasks.cancel_scope.cancel()
        finally:
            self._claims.give_up_background()
        if failure is not None:
            raise failure

    async def _dispatch(self, tasks: TaskGroup) -> Exception | None:
        while True:
            await self._breather.breathe()
            await self._job.pause_point()
            if self._failures and (error := self._judge()) is not None:
                return error
            if self.fatal is not None:
                return self.fatal
            if await self._wait_for_room():
                continue
            step = await self._next_step()
            if step is None:
                if self._finished():
                    return None
                if self._claims and not self._failures:
                    await self._job.changed.wait()
            elif not self._job.held_up:
                self._launch(tasks, step)

    def _finished(self) -> bool:
        """Whether all is copied; if bits are set (again) behind the cursor, go back to them."""
        self._cursor = 0
        return not (self._bitmap.remaining or self._claims or self._failures)

    async def _wait_for_room(self) -> bool:
        """Wait if no copy may start now; answers whether it waited, because then all has to be looked at again."""
        if self._claims.background >= self._workers:
            await self._job.changed.wait()
            return True
        if not self._bitmap.remaining:
            return False
        now = asyncio.get_running_loop().time()
        delay = max(self._job.limit.delay(now), self._not_before - now)
        if delay <= 0:
            return False
        await self._job.changed.wait_at_most(delay)
        return True

    async def _next_step(self) -> _Step | None:
        """The next clusters that something has to be written for; settles on the way what needs nothing."""
        clusters, unit = self._bitmap.clusters, self._copy.mode.cluster
        while (first := self._bitmap.first_set(self._cursor, clusters)) >= 0:
            run = self._run
            if run is None or not run.offset <= first * unit < run.end:
                run = await self._ask(first * unit)
                if run is None:
                    return None
            last = -(-run.end // unit)
            if not self._copy.settle_without_copy(first, last, run.content):
                return _Step(first, last, run.content)
            self._cursor = last
            if self._job.held_up:
                return None
            await self._breather.breathe()
        return None

    async def _ask(self, offset: int) -> Run | None:
        """The run at ``offset``; None if the source could not tell, which counts as a failed read."""
        self._surveying = True
        try:
            self._run = await self._survey.run_at(offset, self._copy.size)
        except BlockError as error:
            self._failures.append(Failure(error, reading=True, offset=offset))
            return None
        finally:
            self._surveying = False
            self._job.changed.notify()
        return self._run

    def _launch(self, tasks: TaskGroup, step: _Step) -> None:
        claim = self._copy.claim(step.first, step.last, background=True, content=step.content)
        if claim is None:
            return
        self._cursor = claim.last
        self._job.limit.charge(self._copy.span(claim.first, claim.last)[1], asyncio.get_running_loop().time())
        tasks.start_soon(self._work, claim, step.content)

    async def _work(self, claim: Claim, content: Content) -> None:
        try:
            failure = await self._copy.perform(claim, content)
        except Exception as error:  # noqa: BLE001 - a bug in a driver: the job fails with it, the loop decides
            self.fatal = error
            return
        if failure is not None:
            self._failures.append(failure)
            self._job.changed.notify()
        elif self._attempts:
            self._forget_attempts(claim)

    def _forget_attempts(self, claim: Claim) -> None:
        offset, length = self._copy.span(claim.first, claim.last)
        for failed in [failed for failed in self._attempts if offset <= failed < offset + length]:
            del self._attempts[failed]

    # -- errors ------------------------------------------------------------------------------------------------

    def _judge(self) -> Exception | None:
        """Apply retries and policies to all failures; answers the error that ends the job, if one does."""
        failures, self._failures = self._failures, []
        for failure in failures:
            self._cursor = min(self._cursor, failure.offset // self._copy.mode.cluster)
            attempt = self._attempts[failure.offset] = self._attempts.get(failure.offset, 0) + 1
            if attempt <= self._policy.retry:
                self._back_off(attempt)
                continue
            action = decide(self._policy.on_source if failure.reading else self._policy.on_target, failure.error)
            self._job.emit(BlockJobFailing(self._job.id, failure.operation, action.value))
            if action is ErrorAction.REPORT:
                return failure.error
            if action is ErrorAction.IGNORE:
                self._back_off(attempt - self._policy.retry)
            else:
                del self._attempts[failure.offset]
                self._job.stop_for(io_status(failure.error))
        return None

    def _back_off(self, attempt: int) -> None:
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + backoff_s(attempt))
