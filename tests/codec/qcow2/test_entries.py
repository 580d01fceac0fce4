"""Table entries and runs: every bit has its meaning, and runs equal those of a loop over single subclusters."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import CorruptImageError
from blocklayer.codec.qcow2 import entries
from blocklayer.codec.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    Descriptor,
    Mapping,
    Run,
)
from blocklayer.codec.qcow2.geometry import Geometry

STANDARD = Geometry(cluster_bits=9)
EXTENDED = Geometry(cluster_bits=14, extended_l2=True)


def test_tables_are_big_endian_in_the_file() -> None:
    """Golden bytes beside the words."""
    data = bytes.fromhex("8000000000050000 0000000000000001")
    assert list(entries.load_table(data)) == [COPIED | 0x50000, 1]
    assert entries.dump_table([COPIED | 0x50000, 1]) == data


CLUSTERS_64K = Geometry()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (0, Descriptor(Mapping.UNALLOCATED)),
        (0x50000, Descriptor(Mapping.DATA, 0x50000, copied=False)),
        (COPIED | 0x50000, Descriptor(Mapping.DATA, 0x50000, copied=True)),
        (1, Descriptor(Mapping.ZERO)),
        (COPIED | 0x50001, Descriptor(Mapping.ZERO_HOST, 0x50000, copied=True)),
        (COMPRESSED | 0x51234, Descriptor(Mapping.COMPRESSED, 0x51234, compressed_length=512 - 0x34)),
        (COMPRESSED | 3 << 54 | 0x51200, Descriptor(Mapping.COMPRESSED, 0x51200, compressed_length=4 * 512)),
    ],
)
def test_an_l2_entry_means(entry: int, expected: Descriptor) -> None:
    """Golden words beside their meaning, with 64 KiB clusters (x = 54)."""
    assert entries.decode_l2(CLUSTERS_64K, entry) == expected


@pytest.mark.parametrize("bit", [*range(1, 16), *range(56, 62)])
def test_a_reserved_or_misaligned_bit_of_an_l2_entry_is_corruption(bit: int) -> None:
    """Bits 1 to 8, those below the cluster size, and 56 to 61."""
    with pytest.raises(CorruptImageError):
        entries.decode_l2(CLUSTERS_64K, COPIED | 0x50000 | 1 << bit)


@pytest.mark.parametrize("bit", [*range(16), *range(56, 63)])
def test_a_reserved_or_misaligned_bit_of_an_l1_entry_is_corruption(bit: int) -> None:
    """Bits 0 to 8, those below the cluster size, and 56 to 62."""
    assert entries.decode_l1(CLUSTERS_64K, COPIED | 0x50000) == 0x50000
    with pytest.raises(CorruptImageError):
        entries.decode_l1(CLUSTERS_64K, COPIED | 0x50000 | 1 << bit)


@pytest.mark.parametrize(
    ("geometry", "entry"),
    [
        (Geometry(version=2), 0x50001),
        (EXTENDED, 0x50000 | 1),
        (CLUSTERS_64K, COPIED),
        (CLUSTERS_64K, COPIED | COMPRESSED | 0x50000),
        (Geometry(data_file=True), COMPRESSED | 0x50000),
        (Geometry(cluster_bits=9), COMPRESSED | 1 << 57),
    ],
)
def test_a_contradiction_in_an_entry_is_corruption(geometry: Geometry, entry: int) -> None:
    """Zero bit where it has no meaning, offset 0, a copied or out-of-place compressed cluster."""
    with pytest.raises(CorruptImageError):
        entries.decode_l2(geometry, entry)


def test_offset_zero_of_a_data_file_is_data() -> None:
    """The COPIED flag tells it from an unallocated cluster."""
    geometry = Geometry(data_file=True)
    assert entries.decode_l2(geometry, COPIED) == Descriptor(Mapping.DATA, 0, copied=True)
    assert entries.decode_l2(geometry, COPIED | 1) == Descriptor(Mapping.ZERO_HOST, 0, copied=True)
    assert entries.mapping_run(geometry, [COPIED, COPIED | 65536, *[0] * 8190], 100, 1 << 30) == Run(
        Mapping.DATA, 131072 - 100, 100, copied=True
    )


@given(st.integers(9, 21), st.data())
def test_compressed_descriptors_come_back(cluster_bits: int, data: st.DataObject) -> None:
    """The length grows to the end of its last sector."""
    geometry = Geometry(cluster_bits=cluster_bits)
    offset = data.draw(st.integers(0, min(1 << geometry.compressed_offset_bits, 1 << 56) - 1))
    length = data.draw(st.integers(1, geometry.cluster_size - 512 if cluster_bits > 9 else 1))
    found = entries.decode_l2(geometry, entries.encode_compressed(geometry, offset, length))
    assert (found.mapping, found.host_offset, found.copied) == (Mapping.COMPRESSED, offset, False)
    assert length <= found.compressed_length < length + 512
    assert (offset + found.compressed_length) % 512 == 0


def test_a_compressed_cluster_beyond_its_descriptor_is_refused() -> None:
    """With 2 MiB clusters host offsets have 49 bits."""
    geometry = Geometry(cluster_bits=21)
    for offset, length in ((1 << 49, 10), (0, 5 << 20), (0, 0)):
        with pytest.raises(CorruptImageError):
            entries.encode_compressed(geometry, offset, length)


def test_encoded_entries_decode_to_what_they_were() -> None:
    """Data, zero with and without host space, L1."""
    for copied in (True, False):
        assert entries.decode_l2(STANDARD, entries.encode_data(1024, copied=copied)) == (Mapping.DATA, 1024, copied, 0)
        zero = entries.encode_zero(1024, copied=copied)
        assert entries.decode_l2(STANDARD, zero) == (Mapping.ZERO_HOST, 1024, copied, 0)
        assert entries.decode_l1(STANDARD, entries.encode_l1(1024, copied=copied)) == 1024
    assert entries.encode_zero() == 1


# -- runs against a slow oracle --------------------------------------------------------------------------------


def slow_run(geometry: Geometry, table: list[int], offset: int, length: int) -> Run:
    """One subcluster at a time, as the specification reads."""
    unit = geometry.subcluster_size

    def answer(position: int) -> tuple[Mapping, int, bool, int]:
        cluster, inside = divmod(position, geometry.cluster_size)
        if geometry.extended_l2:
            entry, bitmap = table[2 * cluster : 2 * cluster + 2]
            mapping = entries.subcluster_mapping(geometry, entry, bitmap, inside // unit)
        else:
            entry = table[cluster]
            mapping = entries.decode_l2(geometry, entry).mapping
        found = entries.decode_l2(geometry, entry)
        if mapping is Mapping.COMPRESSED:
            return mapping, found.host_offset, False, found.compressed_length
        has_host = mapping in (Mapping.DATA, Mapping.ZERO_HOST, Mapping.UNALLOCATED_HOST)
        return mapping, found.host_offset + inside if has_host else 0, found.copied, 0

    mapping, host, copied, packed = first = answer(offset)
    end = min(offset + length, geometry.l2_coverage)
    position = (offset // unit + 1) * unit
    while position < end:
        if mapping is Mapping.COMPRESSED and position % geometry.cluster_size == 0:
            break
        try:
            later = answer(position)
        except CorruptImageError:
            break
        step = position - offset if host or mapping in (Mapping.DATA, Mapping.ZERO_HOST) else 0
        expected = first if mapping is Mapping.COMPRESSED else (mapping, host + step, copied, packed)
        if later != expected:
            break
        position += unit
    return Run(mapping, min(position, end) - offset, host, copied, packed)


@st.composite
def standard_tables(draw: st.DrawFn) -> list[int]:
    """Stretches of zeroes, of repeated and of contiguous entries, single odd ones in between."""
    table: list[int] = []
    while len(table) < STANDARD.l2_entries:
        kind = draw(st.sampled_from(["none", "data", "copied", "zero", "zero host", "compressed"]))
        count = draw(st.integers(1, 40))
        start = draw(st.integers(1, 60)) * 512
        for number in range(count):
            host = start + number * 512
            table.append(
                {
                    "none": 0,
                    "data": host,
                    "copied": host | COPIED,
                    "zero": 1,
                    "zero host": host | COPIED | 1,
                    "compressed": COMPRESSED | start,
                }[kind]
            )
    return table[: STANDARD.l2_entries]


@given(standard_tables(), st.data())
@settings(max_examples=200, deadline=None)
def test_runs_of_standard_tables_equal_those_of_a_loop(table: list[int], data: st.DataObject) -> None:
    """From any offset, for any length."""
    offset = data.draw(st.integers(0, STANDARD.l2_coverage - 1))
    length = data.draw(st.integers(1, STANDARD.l2_coverage))
    expected = slow_run(STANDARD, table, offset, length)
    assert entries.mapping_run(STANDARD, array("Q", table), offset, length) == expected


bitmaps = st.sampled_from([0, ALL_ALLOCATED, ALL_ZERO, 1, 0xFFFF, 0xFFFF0000, 1 << 63, 0xFFFF_0000_0000_FFFF, 0x5555])


@st.composite
def extended_tables(draw: st.DrawFn) -> list[int]:
    """Stretches of one bitmap over contiguous, missing or compressed clusters; the rest is unallocated."""
    words: list[int] = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["none", "data", "compressed"]))
        bitmap = draw(bitmaps)
        start = draw(st.integers(1, 60)) << 14
        for number in range(draw(st.integers(1, 40))):
            host = start + (number << 14)
            if kind == "none":
                words += [0, bitmap & ALL_ZERO]
            else:
                words += [host | COPIED, bitmap] if kind == "data" else [COMPRESSED | start, 0]
    words = words[: 2 * EXTENDED.l2_entries]
    return words + [0] * (2 * EXTENDED.l2_entries - len(words))


@given(extended_tables(), st.data())
@settings(max_examples=200, deadline=None)
def test_runs_of_extended_tables_equal_those_of_a_loop(table: list[int], data: st.DataObject) -> None:
    """Across subclusters and clusters."""
    offset = data.draw(st.integers(0, EXTENDED.cluster_size * 100))
    length = data.draw(st.integers(1, EXTENDED.l2_coverage))
    expected = slow_run(EXTENDED, table, offset, length)
    assert entries.mapping_run(EXTENDED, array("Q", table), offset, length) == expected


def test_a_subcluster_both_allocated_and_zero_is_corruption() -> None:
    """Also a bitmap at a compressed cluster, and allocated subclusters without a host cluster."""
    for entry, bitmap in ((1 << 14, 1 << 32 | 1), (COMPRESSED | 512, 2), (0, 1)):
        table = array("Q", [entry, bitmap, *[0] * (2 * EXTENDED.l2_entries - 2)])
        with pytest.raises(CorruptImageError):
            entries.mapping_run(EXTENDED, table, 0, 10)


def test_a_run_stops_where_offsets_would_leave_56_bits() -> None:
    """The next entry of the progression has a reserved bit set: it is not part of the run."""
    last = (1 << 56) - 512
    table = array("Q", [last | COPIED, (1 << 56) | COPIED, *[0] * 62])
    assert entries.mapping_run(STANDARD, table, 0, 9999) == Run(Mapping.DATA, 512, last, copied=True)
    with pytest.raises(CorruptImageError):
        entries.mapping_run(STANDARD, table, 512, 512)


@given(
    st.integers(0, 2**34),
    st.integers(1, 9000),
    st.sampled_from([9, 16, 21]),
    st.sampled_from([0, 1, COPIED, COPIED | 1]),
)
@settings(max_examples=60, deadline=None)
def test_an_expected_table_equals_its_definition(first: int, count: int, bits: int, flags: int) -> None:
    """Templates and strided columns against plain counting."""
    words = array("Q", ((first + number) << bits | flags for number in range(count)))
    assert entries.progression(first << bits | flags, count, step=1 << bits) == words.tobytes()


@given(st.integers(20, 9000), st.data())
@settings(max_examples=60, deadline=None)
def test_one_odd_word_ends_a_progression_there(count: int, data: st.DataObject) -> None:
    """Wherever it is; also when the words behind it continue as if nothing had been."""
    table = array("Q", (COPIED | number << 16 for number in range(5, 5 + count)))
    assert entries.count_progression(table, 0, count, step=65536) == count
    odd = data.draw(st.integers(1, count - 1))
    table[odd] ^= 1
    assert entries.count_progression(table, 0, count, step=65536) == odd


def test_subcluster_bits_select_a_stretch() -> None:
    """Both ends included in the specification's numbering from the least significant bit."""
    assert entries.subcluster_bits(0, 32) == ALL_ALLOCATED
    assert entries.subcluster_bits(4, 2) == 0b110000
