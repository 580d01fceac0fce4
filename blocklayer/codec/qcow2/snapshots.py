"""The directories of internal snapshots and of stored bitmaps: lists of entries of different lengths.

Layer ``codec``: pure. Both parsers take the bytes from a table's start; they answer None while they need more, so that
the reader fetches as little as the table has. Sources: qcow2, "Snapshots" and "Bitmap directory".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from blocklayer.base.errors import FormatError, LimitError
from blocklayer.base.ranges import align_up
from blocklayer.codec.qcow2.geometry import L1_BYTES_MAX, SNAPSHOT_EXTRA_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX, WORD

# "Snapshot table entry": 0 l1_offset, 8 l1_size, 12 id length, 14 name length, 16 date, 20 nanoseconds,
# 24 guest clock, 32 vm state size, 36 extra data size; extra: 40 vm state size (64 bit), 48 disk size, 56 instructions
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA = struct.Struct(">QQ")

# "Structure of a bitmap directory entry": 0 table offset, 8 table size, 12 flags, 16 type, 17 granularity bits,
# 18 name size, 20 extra data size
_BITMAP = struct.Struct(">QIIBBHI")

BITMAP_NAME_BYTES_MAX: Final = 1023
BITMAP_IN_USE: Final = 1
BITMAP_AUTO: Final = 2
"""Flags of a bitmap directory entry."""

_NOT_COUNTED: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot. ``disk_size`` None: that of the image. Sizes in bytes.

    ``instructions``: how many the guest had executed, None if nobody counted.
    """

    l1_offset: int
    l1_size: int
    identifier: bytes
    name: bytes
    date_s: int
    date_ns: int
    guest_clock_ns: int
    vm_state_size: int
    disk_size: int | None
    instructions: int | None = None


@dataclass(frozen=True, slots=True)
class StoredBitmap:
    """One entry of the bitmap directory. ``table_size`` counts entries."""

    table_offset: int
    table_size: int
    flags: int
    type: int
    granularity_bits: int
    name: bytes


def parse_snapshots(data: bytes, *, count: int) -> tuple[tuple[Snapshot, ...], int] | None:
    """``count`` snapshots and the bytes they take, or None if ``data`` ends before. Raises ``LimitError``."""
    found: list[Snapshot] = []
    at = 0
    for _ in range(count):
        if at + _SNAPSHOT.size > len(data):
            return None
        fields = _SNAPSHOT.unpack_from(data, at)
        extra_length = fields[8]
        if extra_length > SNAPSHOT_EXTRA_BYTES_MAX:
            raise LimitError(f"a snapshot has {extra_length} bytes of extra data", offset=at)
        end = at + _SNAPSHOT.size + extra_length + fields[2] + fields[3]
        if end > SNAPSHOT_TABLE_BYTES_MAX:
            raise LimitError(f"the snapshot table is larger than {SNAPSHOT_TABLE_BYTES_MAX} bytes")
        if end > len(data):
            return None
        found.append(_snapshot(data[at:end], fields))
        at = align_up(end, 8)
    return tuple(found), at


def _snapshot(entry: bytes, fields: tuple[int, ...]) -> Snapshot:
    l1_offset, l1_size, id_length, name_length, date_s, date_ns, clock, vm_state, extra_length = fields
    if l1_size * WORD > L1_BYTES_MAX:
        raise LimitError(f"a snapshot's L1 table has {l1_size} entries, more than {L1_BYTES_MAX} bytes")
    extra = entry[_SNAPSHOT.size : _SNAPSHOT.size + extra_length]
    disk_size = None
    if len(extra) >= 8:
        vm_state = int.from_bytes(extra[:8], "big")
    if len(extra) >= _SNAPSHOT_EXTRA.size:
        disk_size = _SNAPSHOT_EXTRA.unpack_from(extra)[1]
    instructions = None
    if len(extra) >= _SNAPSHOT_EXTRA.size + 8:
        counted = int.from_bytes(extra[_SNAPSHOT_EXTRA.size :][:8], "big")
        instructions = None if counted == _NOT_COUNTED else counted
    strings = entry[_SNAPSHOT.size + extra_length :]
    return Snapshot(
        l1_offset,
        l1_size,
        strings[:id_length],
        strings[id_length : id_length + name_length],
        date_s,
        date_ns,
        clock,
        vm_state,
        disk_size,
        instructions,
    )


def parse_bitmap_directory(data: bytes, *, count: int) -> tuple[StoredBitmap, ...]:
    """The ``count`` entries that fill ``data``. Raises ``FormatError`` or ``LimitError``."""
    found: list[StoredBitmap] = []
    at = 0
    for _ in range(count):
        if at + _BITMAP.size > len(data):
            raise FormatError("the bitmap directory ends within an entry", offset=at)
        offset, size, flags, kind, granularity_bits, name_length, extra_length = _BITMAP.unpack_from(data, at)
        end = at + _BITMAP.size + extra_length + name_length
        if end > len(data) or not 0 < name_length <= BITMAP_NAME_BYTES_MAX:
            raise FormatError("a bitmap's name or extra data do not fit into the directory", offset=at)
        if size * WORD > L1_BYTES_MAX:
            raise LimitError(f"a bitmap's table has {size} entries, more than {L1_BYTES_MAX} bytes", offset=at)
        name = data[end - name_length : end]
        found.append(StoredBitmap(offset, size, flags, kind, granularity_bits, name))
        at = align_up(end, 8)
    if at != align_up(len(data), 8):
        raise FormatError("the bitmap directory is longer than its entries", offset=at)
    return tuple(found)
