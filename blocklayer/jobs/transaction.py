"""How jobs end together: a transaction of one job, or of a group whose members all succeed or all fail.

    a member's work is done       -> it is WAITING
    all members are WAITING       -> all are PENDING; those that want it wait for one ``finalize``, which counts for all
    all members have prepared     -> all commit
    one member fails or is cancelled before that -> the others are cancelled

Every job has a transaction, so that there is one way to end; most have it for themselves. No I/O happens here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Sequence


class Member(Protocol):
    """What a transaction needs of a job."""

    @property
    def id(self) -> str:
        """For messages."""

    @property
    def auto_finalize(self) -> bool:
        """Whether it goes on without ``finalize``."""

    def become_pending(self) -> None:
        """All members are waiting."""

    def cancel_for(self, culprit: str) -> None:
        """Another member failed: end without success. Does nothing if the job has ended."""


class Transaction:
    """Ties ``members`` together; each calls ``arrive``, ``await_finalize``, ``prepared``, or else ``fail``."""

    def __init__(self, members: Sequence[Member]) -> None:
        """All members are still at work."""
        self._members = tuple(members)
        self._arrived: set[str] = set()
        self._prepared: set[str] = set()
        self._failed = False
        self._go = anyio.Event()
        self._all_prepared = anyio.Event()

    @property
    def needs_finalize(self) -> bool:
        """Whether somebody has to say ``finalize``."""
        return not all(member.auto_finalize for member in self._members)

    async def arrive(self, member: Member) -> None:
        """Say that the work of ``member`` is done; returns when all may prepare."""
        self._arrived.add(member.id)
        if len(self._arrived) == len(self._members) and not self._failed:
            for other in self._members:
                other.become_pending()
            if not self.needs_finalize:
                self._go.set()
        await self._go.wait()

    def finalize(self) -> None:
        """Let all members, which are pending, prepare and commit."""
        self._go.set()

    async def prepared(self, member: Member) -> None:
        """Say that ``member`` can commit; returns when all can."""
        self._prepared.add(member.id)
        if len(self._prepared) == len(self._members) and not self._failed:
            self._all_prepared.set()
        await self._all_prepared.wait()

    def fail(self, member: Member) -> None:
        """``member`` has failed or was cancelled: nobody else succeeds."""
        if not self._failed:
            self._failed = True
            for other in self._members:
                if other is not member:
                    other.cancel_for(member.id)
