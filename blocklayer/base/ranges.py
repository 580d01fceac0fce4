"""Interval arithmetic on ``(offset, length)`` pairs. Pure functions; all numbers are bytes unless named otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Range(NamedTuple):
    """A half-open interval ``[offset, offset + length)``."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.offset + self.length

    def overlaps(self, other: Range) -> bool:
        """Whether the two share a byte; an empty range shares none."""
        return max(self.offset, other.offset) < min(self.end, other.end)

    def intersect(self, other: Range) -> Range:
        """The shared part; its length is 0 where there is none."""
        start = max(self.offset, other.offset)
        return Range(start, max(0, min(self.end, other.end) - start))

    def aligned_out(self, alignment: int) -> Range:
        """The smallest range of whole ``alignment`` units that holds this one."""
        start = align_down(self.offset, alignment)
        return Range(start, align_up(self.end, alignment) - start)

    def aligned_in(self, alignment: int) -> Range:
        """The largest range of whole ``alignment`` units inside this one; length 0 if none fits."""
        start = align_up(self.offset, alignment)
        return Range(start, max(0, align_down(self.end, alignment) - start))


def align_down(value: int, alignment: int) -> int:
    """Largest multiple of ``alignment`` that is at most ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """Smallest multiple of ``alignment`` that is at least ``value``."""
    return value + -value % alignment


def is_power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def div_round_up(value: int, unit: int) -> int:
    """How many units of size ``unit`` are needed for ``value``."""
    return -(-value // unit)


def split(offset: int, length: int, *, length_max: int) -> Iterator[Range]:
    """Cut a range into pieces of at most ``length_max``, in order."""
    end = offset + length
    while offset < end:
        piece = min(length_max, end - offset)
        yield Range(offset, piece)
        offset += piece


def split_aligned(offset: int, length: int, *, unit: int) -> Iterator[Range]:
    """Cut a range at the multiples of ``unit``, in order."""
    end = offset + length
    while offset < end:
        piece = min(unit - offset % unit, end - offset)
        yield Range(offset, piece)
        offset += piece
