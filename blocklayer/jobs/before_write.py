"""Copies before guests' writes: what stands between a guest's write and the driver while a backup runs.

A guest's write waits here until no cluster that it touches is asked for or in flight. Usually its own task copies; with
a timeout a task of the graph does, because the copy has to go on when the guest has given up waiting.

Invariants
- ``save`` returns None only if the range is saved, or the point in time is ``over``: then everybody returns at once.
- After ``leave`` no copy of a guest is in flight; nobody waits for a storage that hangs, if ``abandon`` is said.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio

from blocklayer.aio.breath import Breather
from blocklayer.base.errors import BlockError, TimedOutError
from blocklayer.jobs.block_copy import BlockCopy, Failure
from blocklayer.jobs.give_up import GiveUp
from blocklayer.jobs.survey import Content

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklayer.jobs.claims import Claim, Claims


class BeforeWrite:
    """Saves clusters through ``copy``. ``surveyed``: ask for each cluster's content first (sync top)."""

    def __init__(
        self, copy: BlockCopy, claims: Claims, *, surveyed: bool, timeout_s: float, spawn: Callable[..., None]
    ) -> None:
        """``spawn(function, *args, name=...)`` starts tasks that outlive their caller."""
        self.over = False
        """The point in time is kept no more."""
        self.waits = 0
        """How many guests' writes had to wait."""
        self._copy = copy
        self._claims = claims
        self._surveyed = surveyed
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._copying: dict[GiveUp, None] = {}

    def is_saved(self, offset: int, length: int) -> bool:
        """Whether a write to the range has to wait for nothing."""
        return self.over or not self._copy.needs(*self._copy.clusters(offset, length))

    async def save(self, offset: int, length: int) -> Failure | None:
        """Save the range's old data, or answer why that was not possible."""
        if self.is_saved(offset, length):
            return None
        first, last = self._copy.clusters(offset, length)
        self.waits += 1
        if not self._timeout_s:
            return await self._save(first, last)
        with anyio.move_on_after(self._timeout_s) as limit:
            return await self._save(first, last)
        if not limit.cancelled_caught or self.over:
            return None
        message = f"saving old data took longer than {self._timeout_s:g} s"
        return Failure(TimedOutError(message, offset=offset, length=length), reading=False, offset=offset)

    async def leave(self, *, abandon: bool) -> None:
        """Let nobody in any more and wait for copies in flight; ``abandon`` gives these up."""
        self.over = True
        if abandon:
            for work in self._copying:
                work.now()
        await self._claims.wait_none()

    async def _save(self, first: int, last: int) -> Failure | None:
        if last - first == 1:  # nearly every write: nothing is left to look for
            claim = self._copy.claim(first, last, background=False)
            if claim is not None:
                return await self._perform(claim)
        breather = Breather()
        failure = await self._skim(first, last, breather) if self._copy.is_large(first, last) else None
        while failure is None and not self.over:
            await breather.breathe()
            claim = self._copy.claim(first, last, background=False)
            if claim is not None:
                failure = await self._perform(claim)
                continue
            other = self._claims.overlapping(first, last)
            if other is None:
                return None
            await other.wait()
        return failure

    async def _skim(self, first: int, last: int, breather: Breather) -> Failure | None:
        """Settle the zeroes and holes of a large range, so that discarding a whole disk does not read all of it.

        What the survey says of a cluster is true as long as its bit is set, so it need not be claimed before.
        """
        at = first
        while at < last and not self.over:
            await breather.breathe()
            offset, length = self._copy.span(at, last)
            try:
                run = await self._copy.survey.run_at(offset, offset + length)
            except BlockError as error:
                return Failure(error, reading=True, offset=offset)
            end = min(last, self._copy.clusters(run.offset, run.end - run.offset)[1])
            if run.content is not Content.DATA and not self._copy.settle_without_copy(at, end, run.content):
                failure = await self._write_zeroes(at, end)
                if failure is not None:
                    return failure
            at = end
        return None

    async def _write_zeroes(self, first: int, last: int) -> Failure | None:
        while (claim := self._copy.claim(first, last, background=False, content=Content.ZERO)) is not None:
            failure = await self._perform(claim, Content.ZERO)
            if failure is not None:
                return failure
        return None

    async def _perform(self, claim: Claim, content: Content | None = None) -> Failure | None:
        """Copy a claim (None: ask for its content); answers None also if that was given up, which ``over`` tells."""
        if self._timeout_s:
            return await self._detach(claim, content)
        return await self._perform_here(claim, content)

    async def _perform_here(self, claim: Claim, content: Content | None) -> Failure | None:
        with GiveUp() as work:
            self._copying[work] = None
            try:
                if content is None and (self._surveyed or claim.last - claim.first > 1):
                    return await self._copy.perform_surveyed(claim)
                return await self._copy.perform(claim, content or Content.DATA)
            finally:
                del self._copying[work]
        return None

    async def _detach(self, claim: Claim, content: Content | None) -> Failure | None:
        """Copy in a task of the graph: it goes on when the guest stops waiting."""
        outcome: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()
        try:
            self._spawn(self._run_detached, claim, content, outcome, name="copy before write")
        except BaseException:
            self._claims.settle(claim, copied=False)
            raise
        return await asyncio.shield(outcome)

    async def _run_detached(
        self, claim: Claim, content: Content | None, outcome: asyncio.Future[Failure | None]
    ) -> None:
        try:
            outcome.set_result(await self._perform_here(claim, content))
        except Exception as error:  # noqa: BLE001 - a bug in a driver is the guest's to see, not the graph's to die of
            outcome.set_exception(error)
            outcome.exception()  # seen, even if the guest has stopped waiting
        finally:
            self._claims.settle(claim, copied=False)
            outcome.cancel()
