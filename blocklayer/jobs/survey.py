"""Which clusters have to be copied, which read as zeroes, and which do not matter: block status in the job's own unit.

Extents of the source end anywhere; the answers here are runs of whole clusters. A cluster that is not all one thing is
copied as data. A cluster whose copy bit is still set has not changed since the point in time (every write clears the
bit first), so an answer stays true for it however late it is used; for other clusters nobody asks.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from blocklayer.base.extents import ExtentKind
from blocklayer.base.ranges import align_down, align_up
from blocklayer.graph.block_status import chain_status, layer_status

if TYPE_CHECKING:
    from blocklayer.base.extents import Extent
    from blocklayer.graph.node import Node


class Content(enum.Enum):
    """What to do with a run: copy ``DATA``, write ``ZERO``, or ``SKIP`` what the target has from its backing file."""

    DATA = "data"
    ZERO = "zero"
    SKIP = "skip"


class Run(NamedTuple):
    """Bytes ``[offset, end)``, whole clusters (the last one of the disk may be short)."""

    offset: int
    end: int
    content: Content


class Survey:
    """Asks ``source``: its topmost layer alone (``top_only``), or the whole chain. ``cluster`` in bytes."""

    def __init__(self, source: Node, cluster: int, *, top_only: bool) -> None:
        """Nothing is asked yet."""
        self._source = source
        self._size = source.size
        self._cluster = cluster
        self._top_only = top_only

    async def run_at(self, offset: int, end: int) -> Run:
        """The run that starts at ``offset`` (aligned), as far as it is known to be alike, at most up to ``end``."""
        first_end = min(offset + self._cluster, self._size)
        end = max(end, first_end)
        status = await self._status(offset, end - offset)
        content, reached = self._content(status), status.end
        while reached < first_end and content is not Content.DATA:  # the first cluster may be made of several extents
            status = await self._status(reached, end - reached)
            if self._content(status) is not content:
                return Run(offset, first_end, Content.DATA)
            reached = status.end
        if content is Content.DATA:
            return Run(offset, min(align_up(max(reached, first_end), self._cluster), end), content)
        return Run(offset, reached if reached == self._size else align_down(reached, self._cluster), content)

    async def _status(self, offset: int, length: int) -> Extent:
        ask = layer_status if self._top_only else chain_status
        return await ask(self._source, offset, length)

    def _content(self, status: Extent) -> Content:
        if status.kind is ExtentKind.DATA:
            return Content.DATA
        if status.kind is ExtentKind.UNALLOCATED and self._top_only:
            return Content.SKIP
        return Content.ZERO
