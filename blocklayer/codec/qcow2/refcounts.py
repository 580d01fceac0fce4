"""Refcount blocks: counters of 1, 2, 4, 8, 16, 32 or 64 bits, as they stand in the file.

Layer ``codec``: pure. A ``RefcountBlock`` wraps the bytes of one block; nothing is decoded that is not asked for.
Counters of a byte or more are big endian; smaller ones fill a byte from its least significant bit. Ranges are worked
on whole: a translation of bytes for the small widths, an array for the others, and uniform ranges as one repeated
value. Source: qcow2, "Host cluster management".
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import CorruptImageError, LimitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_BYTE_ORDER: Final = 3
"""``refcount_order`` of counters of one byte."""

_CODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}
"""Array type codes by ``refcount_order``; their sizes are checked in the tests."""

_WINDOW: Final = 8192
"""Counters of less than a byte that are unpacked at a time while searching."""


@dataclass(slots=True)
class RefcountBlock:
    """The counters of one block (or of any whole number of bytes). ``order``: a counter has ``1 << order`` bits."""

    order: int
    data: bytearray

    def __len__(self) -> int:
        """How many counters there are."""
        return len(self.data) * 8 >> self.order

    @property
    def value_max(self) -> int:
        """Largest count that fits."""
        return (1 << (1 << self.order)) - 1

    def get(self, index: int) -> int:
        """One counter."""
        if self.order < _BYTE_ORDER:
            bit = index << self.order
            return self.data[bit >> 3] >> (bit & 7) & self.value_max
        width = 1 << self.order - _BYTE_ORDER
        return int.from_bytes(self.data[index * width : (index + 1) * width], "big")

    def set(self, index: int, value: int) -> None:
        """Overwrite one counter. Raises ``LimitError`` if ``value`` does not fit."""
        self._check(value, value, index, 1)
        if self.order < _BYTE_ORDER:
            bit = index << self.order
            kept = self.data[bit >> 3] & ~(self.value_max << (bit & 7))
            self.data[bit >> 3] = kept | value << (bit & 7)
        else:
            width = 1 << self.order - _BYTE_ORDER
            self.data[index * width : (index + 1) * width] = value.to_bytes(width, "big")

    def load(self, index: int, count: int) -> array[int]:
        """``count`` counters from ``index``."""
        if self.order < _BYTE_ORDER:
            first, skipped = divmod(index, 8 >> self.order)
            last = -(-(index + count) // (8 >> self.order))
            return array("B", _unpack(self.order, self.data[first:last])[skipped : skipped + count])
        width = 1 << self.order - _BYTE_ORDER
        values = array(_CODES[self.order])
        values.frombytes(memoryview(self.data)[index * width : (index + count) * width])
        if sys.byteorder == "little":
            values.byteswap()
        return values

    def store(self, index: int, values: Sequence[int]) -> None:
        """Overwrite the counters from ``index``. Raises ``LimitError``, and changes nothing, if one does not fit."""
        if not values:
            return
        self._check(min(values), max(values), index, len(values))
        if self.order < _BYTE_ORDER:
            self._store_small(index, values)
            return
        width = 1 << self.order - _BYTE_ORDER
        words = array(_CODES[self.order])
        words.extend(values)  # the constructor would take bytes for machine words
        if sys.byteorder == "little":
            words.byteswap()
        self.data[index * width : (index + len(values)) * width] = words.tobytes()

    def _store_small(self, index: int, values: Sequence[int]) -> None:
        per_byte = 8 >> self.order
        first, skipped = divmod(index, per_byte)
        last = -(-(index + len(values)) // per_byte)
        unpacked = _unpack(self.order, self.data[first:last])
        unpacked[skipped : skipped + len(values)] = bytes(values)
        self.data[first:last] = _pack(self.order, unpacked)

    def add(self, index: int, count: int, delta: int) -> None:
        """Add ``delta`` to each counter of a range.

        Raises ``LimitError`` if one would overflow and ``CorruptImageError`` if one would fall below zero; then none
        has changed.
        """
        if count <= 0:
            return
        value = self.get(index)
        if count == 1:
            self._check(value + delta, value + delta, index, 1)
            self.set(index, value + delta)
        elif self.is_uniform(index, count):
            self._check(value + delta, value + delta, index, count)
            self.fill(index, count, value + delta)
        else:
            values = self.load(index, count)
            self._check(min(values) + delta, max(values) + delta, index, count)
            self.store(index, [each + delta for each in values])

    def is_uniform(self, index: int, count: int) -> bool:
        """Whether all counters of a range are equal."""
        if self.order < _BYTE_ORDER:
            values = self.load(index, count)
            return values.count(values[0]) == count
        width = 1 << self.order - _BYTE_ORDER
        start = index * width
        return self.data.startswith(bytes(self.data[start : start + width]) * count, start)

    def fill(self, index: int, count: int, value: int) -> None:
        """Set each counter of a range to ``value``. Raises ``LimitError`` if it does not fit."""
        self._check(value, value, index, count)
        if self.order < _BYTE_ORDER:
            self._store_small(index, bytes([value]) * count)
        else:
            width = 1 << self.order - _BYTE_ORDER
            self.data[index * width : (index + count) * width] = value.to_bytes(width, "big") * count

    def _check(self, lowest: int, highest: int, index: int, count: int) -> None:
        if not 0 <= index <= len(self) - count:
            raise IndexError(f"counters {index}+{count} lie outside a block of {len(self)}")
        if lowest < 0:
            raise CorruptImageError(f"a refcount of the {count} clusters from {index} would fall below zero")
        if highest > self.value_max:
            raise LimitError(f"refcount {highest} does not fit into {1 << self.order} bits")

    # -- free clusters ---------------------------------------------------------------------------------------------

    def find_free(self, start: int, count: int) -> int | None:
        """Index of the first ``count`` (> 0) successive zero counters at or behind ``start``, or None."""
        if self.order < _BYTE_ORDER:
            return self._find_free_small(start, count)
        width = 1 << self.order - _BYTE_ORDER
        wanted, at = bytes(count * width), start * width
        while (found := self.data.find(wanted, at)) >= 0:
            if not found % width:
                return found // width
            at = found + width - found % width
            if self.data.startswith(wanted, at):
                return at // width
        return None

    def _find_free_small(self, start: int, count: int) -> int | None:
        wanted = bytes(count)
        for at in range(start, len(self) - count + 1, _WINDOW):
            window = self.load(at, min(_WINDOW + count - 1, len(self) - at)).tobytes()
            found = window.find(wanted)
            if found >= 0:
                return at + found
        return None

    def free_run(self, index: int, limit: int) -> int:
        """How many counters from ``index`` are zero, at most ``limit``."""
        limit = min(limit, len(self) - index)
        if self.order < _BYTE_ORDER:
            values = self.load(index, limit).tobytes()
            return limit - len(values.lstrip(b"\0"))
        width = 1 << self.order - _BYTE_ORDER
        data = bytes(memoryview(self.data)[index * width : (index + limit) * width])
        return limit - -(-len(data.lstrip(b"\0")) // width)

    def used(self, count: int) -> int:
        """How many of the first ``count`` counters are not zero."""
        if self.is_uniform(0, count):
            return count if self.get(0) else 0
        return count - self.load(0, count).count(0)

    def last_used(self) -> int | None:
        """Index of the last counter that is not zero, or None."""
        used = len(self.data.rstrip(b"\0"))
        if not used:
            return None
        if self.order < _BYTE_ORDER:
            top = self.data[used - 1].bit_length() - 1
            return (used - 1) * (8 >> self.order) + (top >> self.order)
        return (used - 1) >> self.order - _BYTE_ORDER


def raised(order: int, old: bytes, new: bytes) -> bytes:
    """Each counter's larger value of two versions of a block.

    This is what may be written before the mappings change: clusters that become used are counted, and those that
    become free are still protected. ``new`` follows when no mapping on disk refers to the freed ones any more.
    """
    before, after = RefcountBlock(order, bytearray(old)), RefcountBlock(order, bytearray(new))
    differing = _differing_bytes(old, new)
    if differing is None:
        return new
    first, last = (position * 8 >> order for position in differing)
    count = min(last + 1, len(after)) - first
    if order < _BYTE_ORDER:
        count = min((differing[1] + 1) * 8 >> order, len(after)) - first
    values = [max(pair) for pair in zip(before.load(first, count), after.load(first, count), strict=True)]
    after.store(first, values)
    return bytes(after.data)


def _differing_bytes(old: bytes, new: bytes) -> tuple[int, int] | None:
    """First and last byte in which two buffers of one length differ."""
    changed = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
    if not changed:
        return None
    return ((changed & -changed).bit_length() - 1) // 8, (changed.bit_length() - 1) // 8


@lru_cache(maxsize=16)
def _extract_table(order: int, slot: int) -> bytes:
    """Translation of a packed byte to its counter number ``slot``."""
    width = 1 << order
    return bytes(byte >> slot * width & (1 << width) - 1 for byte in range(256))


def _unpack(order: int, packed: bytes | bytearray) -> bytearray:
    """Counters of less than a byte, one byte each."""
    per_byte = 8 >> order
    values = bytearray(len(packed) * per_byte)
    for slot in range(per_byte):
        values[slot::per_byte] = packed.translate(_extract_table(order, slot))
    return values


def _pack(order: int, values: bytearray) -> bytes:
    """The inverse of ``_unpack``."""
    per_byte, width = 8 >> order, 1 << order
    columns: Iterable[int] = (
        int.from_bytes(values[slot::per_byte], "little") << slot * width for slot in range(per_byte)
    )
    return sum(columns).to_bytes(len(values) // per_byte, "little")
