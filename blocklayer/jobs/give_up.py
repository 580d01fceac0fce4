"""Work that somebody else may end early: what ``anyio.CancelScope`` does, for a path where its 5 us would show.

    with GiveUp() as work:       somebody else: work.now()
        await ...                raises CancelledError inside the block, which ends there
    # work.given_up tells

The technique is ``asyncio.timeout``'s: the block swallows exactly the cancellation that ``now`` asked for, so one that
comes from elsewhere at the same moment goes on (``Task.uncancel``).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class GiveUp:
    """One block in one task."""

    __slots__ = ("_cancelling", "_task", "given_up")

    def __init__(self) -> None:
        """Not entered yet."""
        self.given_up = False
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    def now(self) -> None:
        """End the block; nothing happens if it has ended."""
        if self._task is not None and not self.given_up:
            self.given_up = True
            self._task.cancel()

    def __enter__(self) -> Self:
        """Belongs to the running task from now on."""
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Swallow the cancellation that ``now`` asked for, and no other."""
        task, self._task = self._task, None
        if not self.given_up or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError
