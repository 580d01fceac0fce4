"""Directories of snapshots and stored bitmaps: golden entries, truncation, hostile lengths."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import FormatError, LimitError
from blocklayer.codec.qcow2.snapshots import (
    Snapshot,
    StoredBitmap,
    parse_bitmap_directory,
    parse_snapshots,
)

SNAPSHOT = bytes.fromhex(
    "0000000000050000 00000002 0001 0003 00000064 00000005 0000000000000009 00000007 00000010"
    "0000000000000008 0000000000100000"  # 64-bit VM state size, disk size
    "31 6f6e65"  # id "1", name "one"
    "00000000"
)
PARSED = Snapshot(
    l1_offset=0x50000,
    l1_size=2,
    identifier=b"1",
    name=b"one",
    date_s=100,
    date_ns=5,
    guest_clock_ns=9,
    vm_state_size=8,
    disk_size=1 << 20,
)
BITMAP = bytes.fromhex("0000000000060000 00000001 00000002 01 10 0003 00000000 616263 0000000000")
PARSED_BITMAP = StoredBitmap(0x60000, 1, 2, 1, 16, b"abc")


def test_a_snapshot_entry_is_read_like_this() -> None:
    """Golden bytes beside the object; padding counts."""
    assert parse_snapshots(SNAPSHOT * 2, count=2) == ((PARSED, PARSED), 2 * len(SNAPSHOT))
    assert parse_snapshots(b"", count=0) == ((), 0)


def test_a_snapshot_without_extra_data_has_the_small_vm_state_size() -> None:
    """Version 2 has none; the disk's size is then that of the image."""
    entry = struct.pack(">QIHHIIQII", 0x50000, 2, 1, 0, 0, 0, 0, 7, 0) + b"x"
    parsed = parse_snapshots(entry, count=1)
    assert parsed is not None
    assert (parsed[0][0].vm_state_size, parsed[0][0].disk_size) == (7, None)


def test_a_table_that_ends_early_asks_for_more() -> None:
    """Cut at every byte before the padding of the last entry."""
    for length in range(len(SNAPSHOT) - 4):
        assert parse_snapshots(SNAPSHOT[:length], count=1) is None
    assert parse_snapshots(SNAPSHOT[:-4], count=1) is not None


@pytest.mark.parametrize(
    "fields", [(0, 1, 0, 0, 0, 0, 0, 0, 1025), (0, 2**32 - 1, 0, 0, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0, 0, 0, 2**32 - 1)]
)
def test_a_hostile_snapshot_is_a_limit_error(fields: tuple[int, ...]) -> None:
    """Extra data beyond 1 KiB, an L1 table beyond 32 MiB."""
    with pytest.raises(LimitError):
        parse_snapshots(struct.pack(">QIHHIIQII", *fields) + bytes(2000), count=1)


def test_a_bitmap_directory_is_read_like_this() -> None:
    """Golden bytes beside the objects."""
    assert parse_bitmap_directory(BITMAP * 2, count=2) == (PARSED_BITMAP, PARSED_BITMAP)


def test_a_bitmap_directory_of_another_length_is_refused() -> None:
    """Cut anywhere, or longer than its entries."""
    for length in range(len(BITMAP) - 5):
        with pytest.raises(FormatError):
            parse_bitmap_directory(BITMAP[:length], count=1)
    with pytest.raises(FormatError):
        parse_bitmap_directory(BITMAP * 2, count=1)


def test_a_hostile_bitmap_is_refused() -> None:
    """No name, a name that is too long, a table of 32 GiB."""
    for size, name_length, error in ((1, 0, FormatError), (1, 1024, FormatError), (2**32 - 1, 8, LimitError)):
        entry = struct.pack(">QIIBBHI", 0x60000, size, 0, 1, 16, name_length, 0) + bytes(1024)
        with pytest.raises(error):
            parse_bitmap_directory(entry[: 24 + name_length], count=1)


@given(st.binary(max_size=400), st.integers(0, 5))
def test_any_bytes_are_entries_or_a_typed_error(data: bytes, count: int) -> None:
    """Fuzz both parsers."""
    for parser in (parse_snapshots, parse_bitmap_directory):
        with suppress(FormatError):
            parser(data, count=count)


@pytest.mark.parametrize(("stored", "instructions"), [(0, 0), (12345, 12345), (2**64 - 1, None)])
def test_counted_instructions_stand_behind_the_disk_s_size(stored: int, instructions: int | None) -> None:
    """All ones: nobody counted."""
    extra = bytes(16) + stored.to_bytes(8, "big")
    entry = struct.pack(">QIHHIIQII", 0, 0, 1, 1, 0, 0, 0, 0, len(extra)) + extra + b"1a"
    parsed = parse_snapshots(entry, count=1)
    assert parsed is not None
    assert parsed[0][0].instructions == instructions
