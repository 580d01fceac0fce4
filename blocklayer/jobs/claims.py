"""Claims: which clusters are being copied right now, by whom, and who waits for them.

A claim takes a run of set bits out of the copy bitmap, synchronously; so two claims never overlap, and a cluster is
either asked for (bit set), in flight (in a claim) or settled. ``settle`` ends a claim: a copy that failed gives its
bits back, and whoever waits looks again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocklayer.bitmap.copy_bitmap import CopyBitmap
    from blocklayer.jobs.signal import Signal


class Claim:
    """Clusters ``[first, last)`` in flight; ``background``: by the job's own loop, else before a guest's write."""

    __slots__ = ("_done", "background", "first", "last")

    def __init__(self, first: int, last: int, *, background: bool) -> None:
        """Made by ``Claims``."""
        self.first = first
        self.last = last
        self.background = background
        self._done: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        """``<claim 3..7 background>``."""
        return f"<claim {self.first}..{self.last} {'background' if self.background else 'before write'}>"

    async def wait(self) -> None:
        """Wait until the claim is settled."""
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._done)

    def wake(self) -> None:
        """Wake whoever waits."""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Claims:
    """All claims of one job."""

    __slots__ = ("_bitmap", "_claims", "background", "changed")

    def __init__(self, bitmap: CopyBitmap, changed: Signal) -> None:
        """Take clusters from ``bitmap``; ``changed`` is notified when a claim is settled."""
        self._bitmap = bitmap
        self._claims: dict[Claim, None] = {}
        self.changed = changed
        self.background = 0
        """How many claims are the background's."""

    def __len__(self) -> int:
        """How many there are."""
        return len(self._claims)

    def take(self, first: int, last: int, *, length_max: int, background: bool) -> Claim | None:
        """Claim the first run of clusters in ``[first, last)`` that are asked for; None if none is."""
        run = self._bitmap.next_run(first, last, length_max=length_max)
        if run is None:
            return None
        self._bitmap.clear(*run)
        claim = Claim(*run, background=background)
        self._claims[claim] = None
        self.background += background
        return claim

    def overlapping(self, first: int, last: int) -> Claim | None:
        """A claim that shares a cluster with ``[first, last)``."""
        for claim in self._claims:
            if claim.first < last and first < claim.last:
                return claim
        return None

    def settle(self, claim: Claim, *, copied: bool) -> None:
        """End ``claim``; if it was not ``copied`` its clusters are asked for again. Settling twice is fine."""
        if claim not in self._claims:
            return
        del self._claims[claim]
        self.background -= claim.background
        if not copied:
            self._bitmap.restore(claim.first, claim.last)
        claim.wake()
        self.changed.notify()

    def give_up_background(self) -> None:
        """Settle what background tasks left that were cancelled before they began."""
        for claim in [claim for claim in self._claims if claim.background]:
            self.settle(claim, copied=False)

    async def wait_none(self) -> None:
        """Wait until nothing is in flight."""
        while self._claims:
            await self.changed.wait()
