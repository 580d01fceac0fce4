"""How often each host cluster is referred to, and by what: the recomputed refcounts of a check.

Layer ``codec``: pure. One byte of count and one of marks for a cluster, in pages that exist only where something is
referred to, so a sparse file costs what it holds. Whole ranges are counted by translating their bytes. Counts of 255
and more live in a dict beside the pages. The memory is bounded: ``LimitError`` beyond ``PAGES_MAX`` pages.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import LimitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE: Final = 16384
"""Clusters in a page."""

_PAGE_BITS: Final = PAGE.bit_length() - 1
_PAGE_MASK: Final = PAGE - 1

PAGES_MAX: Final = 65536
"""1 Gi clusters, 64 TiB of used 64 KiB clusters: two GiB of memory at the most, far from what a real image needs."""

MANY: Final = 255
"""A byte of this value stands for a count in the dict."""


_LAST_SMALL: Final = MANY - 1


class Mark(enum.IntFlag):
    """What refers to a cluster.

    COPIED and UNCOPIED: an active table's entry, with and without the COPIED flag. TABLE: an L2 table. DATA: data.
    OWN: the header, the refcount blocks and whatever else must not be shared.
    """

    NONE = 0
    COPIED = 1
    UNCOPIED = 2
    TABLE = 4
    DATA = 8
    OWN = 16


@dataclass(slots=True)
class ReferenceMap:
    """Counts and marks by cluster number."""

    counts: dict[int, bytearray] = field(default_factory=dict)
    marks: dict[int, bytearray] = field(default_factory=dict)
    large: dict[int, int] = field(default_factory=dict)

    def add(self, first: int, count: int, *, times: int = 1, mark: Mark = Mark.NONE) -> None:
        """Count ``times`` references to each of ``count`` clusters from ``first``."""
        while count > 0:
            number, start = divmod(first, PAGE)
            piece = min(count, PAGE - start)
            self._add_to_page(number, start, start + piece, times)
            if mark:
                page = self._page(self.marks, number)
                page[start : start + piece] = page[start : start + piece].translate(_or(int(mark)))
            first += piece
            count -= piece

    def add_scattered(self, clusters: Iterable[int], *, mark: Mark) -> None:
        """Count one reference to each of ``clusters``, in any order: less work than ``add`` for single ones."""
        last, bits = -1, int(mark)
        page = marks = bytearray()
        for cluster in clusters:
            number, position = cluster >> _PAGE_BITS, cluster & _PAGE_MASK
            if number != last:
                page, marks, last = self._page(self.counts, number), self._page(self.marks, number), number
            if page[position] < _LAST_SMALL:
                page[position] += 1
            else:
                self._add_to_page(number, position, position + 1, 1)
            marks[position] |= bits

    def _page(self, pages: dict[int, bytearray], number: int) -> bytearray:
        page = pages.get(number)
        if page is None:
            if len(pages) >= PAGES_MAX:
                raise LimitError(f"the image refers to more than {PAGES_MAX * PAGE} clusters' worth of host space")
            page = pages[number] = bytearray(PAGE)
        return page

    def _add_to_page(self, number: int, start: int, end: int, times: int) -> None:
        page = self._page(self.counts, number)
        old = page[start:end]
        single = times == 1 and _LAST_SMALL not in old and MANY not in old
        if single or (times < MANY and max(old) + times < MANY):
            page[start:end] = old.translate(_plus(times))
            return
        for position in range(start, end):
            value = self.get(number * PAGE + position) + times
            page[position] = min(value, MANY)
            if value >= MANY:
                self.large[number * PAGE + position] = value

    def get(self, cluster: int) -> int:
        """References to one cluster."""
        page = self.counts.get(cluster // PAGE)
        value = page[cluster % PAGE] if page else 0
        return self.large[cluster] if value == MANY else value

    def marks_of(self, cluster: int) -> Mark:
        """Marks of one cluster."""
        page = self.marks.get(cluster // PAGE)
        return Mark(page[cluster % PAGE]) if page else Mark.NONE

    def count_bytes(self, first: int, count: int) -> bytes:
        """Counts of a range, ``MANY`` for large ones."""
        return _range(self.counts, first, count)

    def mark_bytes(self, first: int, count: int) -> bytes:
        """Marks of a range."""
        return _range(self.marks, first, count)

    @property
    def end(self) -> int:
        """One more than the last cluster that is referred to."""
        for number in sorted(self.counts, reverse=True):
            used = len(self.counts[number].rstrip(b"\0"))
            if used:
                return number * PAGE + used
        return 0

    def used_ranges(self, unit: int) -> set[int]:
        """Numbers of the ranges of ``unit`` clusters in which something is referred to."""
        found: set[int] = set()
        for number, page in self.counts.items():
            start = number * PAGE
            for piece in range(start // unit, (start + PAGE - 1) // unit + 1):
                low, high = max(piece * unit, start) - start, min((piece + 1) * unit, start + PAGE) - start
                if page[low:high].strip(b"\0"):
                    found.add(piece)
        return found

    def subtract(self, first: int, count: int) -> None:
        """Take back one reference to each cluster of a range that has some; marks stay."""
        for cluster in range(first, first + count):
            value = self.get(cluster)
            if value:
                self.large.pop(cluster, None)
                self.counts[cluster // PAGE][cluster % PAGE] = min(value - 1, MANY)
                if value > MANY:
                    self.large[cluster] = value - 1


def _range(pages: dict[int, bytearray], first: int, count: int) -> bytes:
    return b"".join(_pieces(pages, first, count))


def _pieces(pages: dict[int, bytearray], first: int, count: int) -> Iterator[bytes]:
    while count > 0:
        number, start = divmod(first, PAGE)
        piece = min(count, PAGE - start)
        page = pages.get(number)
        yield bytes(piece) if page is None else bytes(page[start : start + piece])
        first += piece
        count -= piece


@lru_cache(maxsize=64)
def _plus(times: int) -> bytes:
    """Translation that adds ``times``; the caller makes sure that no sum reaches ``MANY``."""
    return bytes(min(value + times, MANY) for value in range(256))


@lru_cache(maxsize=16)
def _or(bits: int) -> bytes:
    return bytes(value | bits for value in range(256))
