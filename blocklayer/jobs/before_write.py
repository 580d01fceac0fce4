"""Copies before guests' writes: what stands between a guest's write and the driver while a backup runs.

A guest's write waits here until no cluster that it touches is asked for or in flight. Usually its own task copies; with a
timeout a task of the graph does, because the copy has to go on when the guest has given up waiting.

Invariants
- ``save`` returns None only if the range is saved, or the point in time is ``over``: then everybody returns at once.
- After ``leave`` no copy of a guest is in flight; nobody waits for a storage that hangs, if ``abandon`` is said.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio

from blocklayer.base.errors import TimedOutError
from blocklayer.jobs.block_copy import BlockCopy, Failure
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
        self._scopes: set[anyio.CancelScope] = set()

    async def save(self, offset: int, length: int) -> Failure | None:
        """Save the range's old data, or answer why that was not possible."""
        if self.over:
            return None
        first, last = self._copy.clusters(offset, length)
        if not self._copy.needs(first, last):
            return None
        self.waits += 1
        if not self._timeout_s:
            return await self._save(first, last)
        with anyio.move_on_after(self._timeout_s):
            return await self._save(first, last)
        if self.over:
            return None
        message = f"saving old data took longer than {self._timeout_s:g} s"
        return Failure(TimedOutError(message, offset=offset, length=length), reading=False, offset=offset)

    async def leave(self, *, abandon: bool) -> None:
        """Let nobody in any more and wait for copies in flight; ``abandon`` gives these up."""
        self.over = True
        if abandon:
            for scope in self._scopes:
                scope.cancel()
        await self._claims.wait_none()

    async def _save(self, first: int, last: int) -> Failure | None:
        perform = self._perform_detached if self._timeout_s else self._perform
        while not self.over:
            claim = self._copy.claim(first, last, background=False)
            if claim is not None:
                failure = await perform(claim)
                if failure is not None:
                    return failure
                continue
            other = self._claims.overlapping(first, last)
            if other is None:
                return None
            await other.wait()
        return None

    async def _perform(self, claim: Claim) -> Failure | None:
        """Copy in the guest's own task; answers None also if the copy was abandoned, which ``over`` tells."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if self._surveyed or claim.last - claim.first > 1:
                    return await self._copy.perform_surveyed(claim)
                return await self._copy.perform(claim, Content.DATA)
            finally:
                self._scopes.discard(scope)
        return None

    async def _perform_detached(self, claim: Claim) -> Failure | None:
        """Copy in a task of the graph: it goes on when the guest stops waiting."""
        outcome: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()
        try:
            self._spawn(self._run_detached, claim, outcome, name="copy before write")
        except BaseException:
            self._claims.settle(claim, copied=False)
            raise
        return await asyncio.shield(outcome)

    async def _run_detached(self, claim: Claim, outcome: asyncio.Future[Failure | None]) -> None:
        try:
            outcome.set_result(await self._perform(claim))
        except Exception as error:  # noqa: BLE001 - a bug in a driver is the guest's to see, not the graph's to die of
            outcome.set_exception(error)
            outcome.exception()  # seen, even if the guest has stopped waiting
        finally:
            self._claims.settle(claim, copied=False)
            outcome.cancel()
