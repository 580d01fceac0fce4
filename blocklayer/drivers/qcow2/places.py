"""Where the active metadata of a writable image lie, so that a mapping which points there is found when it is loaded.

A guest's write through such a mapping would change the image's own tables (SEMANTICS of QEMU: the overlap checks
"main-header", "active-l1", "active-l2", "refcount-table", "refcount-block"). Looking at each table once, when it comes in,
costs nothing per write. Whoever places or frees metadata says so here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import COPIED

if TYPE_CHECKING:
    from collections.abc import Iterable

TABLES_MAX: Final = 65536
"""Above this many L2 tables (32 TiB with 64 KiB clusters) their places are not kept any more: it would take 10 MiB."""


class MetadataPlaces:
    """A set of host clusters, kept as the L2 entries that would mean them: with and without the COPIED flag."""

    __slots__ = ("_cluster_size", "_words")

    def __init__(self, cluster_size: int) -> None:
        """Only the header's cluster; an entry without a flag would mean "unallocated" there."""
        self._cluster_size = cluster_size
        self._words: set[int] = {COPIED}

    def add_tables(self, entries: Iterable[int]) -> None:
        """What L1 or refcount table entries point to, if there are not too many."""
        offsets = [entry & ~COPIED for entry in entries if entry]
        if len(offsets) <= TABLES_MAX:
            self._words.update(offsets)
            self._words.update([offset | COPIED for offset in offsets])

    def add(self, offset: int, count: int = 1) -> None:
        """``count`` clusters from ``offset`` hold metadata now."""
        for place in range(offset, offset + count * self._cluster_size, self._cluster_size):
            self._words.add(place)
            self._words.add(place | COPIED)

    def remove(self, offset: int, count: int = 1) -> None:
        """They do not any more."""
        for place in range(offset, offset + count * self._cluster_size, self._cluster_size):
            self._words.discard(place)
            self._words.discard(place | COPIED)

    def meet(self, entries: Iterable[int]) -> bool:
        """Whether one of the L2 ``entries`` points to metadata."""
        return not self._words.isdisjoint(entries)

    def overlap(self, offset: int, count: int) -> bool:
        """Whether one of ``count`` clusters from ``offset`` holds metadata."""
        end = offset + count * self._cluster_size
        return not self._words.isdisjoint(range(offset | COPIED, end | COPIED, self._cluster_size))

    def claimed(self, entries: Iterable[int]) -> frozenset[int]:
        """Offsets among L1 ``entries`` where other metadata lie, or that come twice: no table is there that is L1's alone."""
        offsets = [entry & ~COPIED for entry in entries if entry]
        if len(offsets) > TABLES_MAX:
            return frozenset()
        twice = {first for first, second in pairwise(sorted(offsets)) if first == second}
        return frozenset(twice | self._words.intersection(offsets) | ({0} & set(offsets)))
