"""Entries of L1 and L2 tables: single ones, and runs of them.

Layer ``codec``: pure. Tables are ``array("Q")`` (or any buffer of 8-byte words) in NATIVE byte order; ``load_table``
and ``dump_table`` swap whole tables at once. With extended L2 entries a table alternates descriptor and bitmap.

``mapping_run`` is what request paths, map and check stand on: the longest stretch from one guest offset that has one
answer. Most stretches are either one word repeated or words that grow by one cluster each, so beyond a few entries
they are compared in bulk with an expected table: 5 ns an entry where a loop takes 50.

Reserved bits that are set, offsets off a cluster boundary, a subcluster both allocated and zero: ``CorruptImageError``.

    L1 entry             bits 0-8 reserved, 9-55 offset of the L2 table, 56-62 reserved, 63 COPIED    ("L1 table entry")
    L2 entry             bits 0-61 descriptor, 62 compressed, 63 COPIED                               ("L2 table entry")
    standard descriptor  bit 0 reads as zeroes (not in version 2, not extended), 1-8 reserved,
                         9-55 host offset, 56-61 reserved                             ("Standard Cluster Descriptor")
    compressed           bits 0 to x-1 host offset, x to 61 additional sectors     ("Compressed Clusters Descriptor")
    extended bitmap      bits 0-31 subcluster allocated, 32-63 reads as zeroes      ("Subcluster Allocation Bitmap")
"""

from __future__ import annotations

import enum
import sys
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import CorruptImageError
from blocklayer.base.units import SECTOR
from blocklayer.codec.qcow2.geometry import HOST_OFFSET_END, WORD, Geometry

if TYPE_CHECKING:
    from collections.abc import Sequence

COPIED: Final = 1 << 63
"""The refcount is exactly one: the cluster may be overwritten in place."""

COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55: the host offset of L1 entries and standard L2 entries."""

L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE

ALL_ALLOCATED: Final = 0x0000_0000_FFFF_FFFF
ALL_ZERO: Final = 0xFFFF_FFFF_0000_0000
"""Bitmap words of a whole cluster that is data, or zero."""

_LOOP_MAX: Final = 16
"""Entries compared one by one before a bulk comparison pays off."""


class Mapping(enum.IntEnum):
    """What a guest cluster, or subcluster, is.

    ================ ===================== ========================================
    mapping          host space            reads as
    ================ ===================== ========================================
    UNALLOCATED      none                  the backing file
    UNALLOCATED_HOST reserved (extended)   the backing file
    DATA             yes                   the data there
    ZERO             none                  zeroes
    ZERO_HOST        reserved              zeroes
    COMPRESSED       sectors, packed       what decompression gives
    ================ ===================== ========================================
    """

    UNALLOCATED = 0
    UNALLOCATED_HOST = 1
    DATA = 2
    ZERO = 3
    ZERO_HOST = 4
    COMPRESSED = 5


class Run(NamedTuple):
    """A stretch of guest bytes with one answer.

    ``host_offset`` is that of the stretch's first byte, 0 without host space; for COMPRESSED it is where the
    compressed bytes start, and ``compressed_length`` is how many there are at the most (padding included).
    ``copied`` is the COPIED flag, the same in the whole run.
    """

    mapping: Mapping
    length: int
    host_offset: int = 0
    copied: bool = False
    compressed_length: int = 0


class Descriptor(NamedTuple):
    """The first word of an L2 entry, decoded. Only for DATA, ZERO and so on of the whole cluster."""

    mapping: Mapping
    host_offset: int = 0
    copied: bool = False
    compressed_length: int = 0


# -- whole tables ----------------------------------------------------------------------------------------------


def load_table(data: bytes | bytearray | memoryview) -> array[int]:
    """A big-endian table as native words. ``data`` is a multiple of 8 bytes."""
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def dump_table(table: Sequence[int]) -> bytes:
    """Native words, or a slice of them, as they stand in the file."""
    words = array("Q", table)
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


# -- single entries --------------------------------------------------------------------------------------------


def decode_l1(geometry: Geometry, entry: int) -> int:
    """Host offset of the L2 table, or 0 if there is none. Raises ``CorruptImageError``."""
    offset = entry & OFFSET_MASK
    if entry & L1_RESERVED or offset & geometry.cluster_mask:
        raise CorruptImageError(f"L1 entry {entry:#018x} is not valid")
    return offset


def encode_l1(offset: int, *, copied: bool = True) -> int:
    """The L1 entry for an L2 table at ``offset``."""
    return offset | COPIED if copied else offset


def decode_l2(geometry: Geometry, entry: int) -> Descriptor:
    """The meaning of an L2 entry's first word; with extended entries DATA means "see the bitmap"."""
    if entry == 0:
        return _UNALLOCATED
    if entry & COMPRESSED:
        return _decode_compressed(geometry, entry)
    offset = entry & OFFSET_MASK
    zero = entry & ZERO
    misplaced = entry & L2_RESERVED or offset & geometry.cluster_mask
    if misplaced or (zero and (geometry.version < 3 or geometry.extended_l2)):
        raise CorruptImageError(f"L2 entry {entry:#018x} is not valid")
    copied = entry >= COPIED
    mapped = offset != 0 or (geometry.data_file and copied)
    if zero:
        return Descriptor(Mapping.ZERO_HOST if mapped else Mapping.ZERO, offset, copied)
    if mapped:
        return Descriptor(Mapping.DATA, offset, copied)
    raise CorruptImageError(f"L2 entry {entry:#018x} maps host offset 0, where the header is")


_UNALLOCATED: Final = Descriptor(Mapping.UNALLOCATED)


def _decode_compressed(geometry: Geometry, entry: int) -> Descriptor:
    shift = geometry.compressed_offset_bits
    offset = entry & ((1 << shift) - 1)
    if entry & COPIED or geometry.data_file or offset >= HOST_OFFSET_END:
        raise CorruptImageError(f"L2 entry {entry:#018x} of a compressed cluster is not valid")
    sectors = (entry & (COMPRESSED - 1)) >> shift
    length = (sectors + 1) * SECTOR - offset % SECTOR
    return Descriptor(Mapping.COMPRESSED, offset, copied=False, compressed_length=length)


def encode_data(offset: int, *, copied: bool = True) -> int:
    """The L2 entry of a cluster whose data lie at host ``offset``; also the first word of an extended entry."""
    return offset | COPIED if copied else offset


def encode_zero(offset: int | None = None, *, copied: bool = True) -> int:
    """The standard L2 entry of a cluster that reads as zeroes; ``offset`` is its reserved host space, if any."""
    return ZERO if offset is None else encode_data(offset, copied=copied) | ZERO


def encode_compressed(geometry: Geometry, offset: int, length: int) -> int:
    """The L2 entry of ``length`` compressed bytes at host ``offset``.

    Raises ``CorruptImageError`` if the descriptor has no room for them: host offsets of compressed clusters have
    ``compressed_offset_bits`` bits, and the length is at most about one cluster.
    """
    shift = geometry.compressed_offset_bits
    sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    if offset >= min(1 << shift, HOST_OFFSET_END) or sectors >= 1 << 62 - shift or length <= 0:
        raise CorruptImageError("a compressed cluster does not fit its descriptor", offset=offset, length=length)
    return COMPRESSED | sectors << shift | offset


def check_bitmap(entry: int, bitmap: int) -> None:
    """Raise ``CorruptImageError`` if an extended entry's two words contradict each other."""
    allocated = bitmap & ALL_ALLOCATED
    if entry & COMPRESSED:
        if bitmap:
            raise CorruptImageError(f"a compressed cluster has subclusters {bitmap:#018x}")
    elif allocated & bitmap >> 32:
        raise CorruptImageError(f"subclusters are both allocated and zero: {bitmap:#018x}")


def subcluster_mapping(geometry: Geometry, entry: int, bitmap: int, index: int) -> Mapping:
    """What subcluster ``index`` (0 to 31) of an extended L2 entry is."""
    check_bitmap(entry, bitmap)
    whole = decode_l2(geometry, entry).mapping
    if whole is Mapping.COMPRESSED:
        return whole
    if bitmap >> 32 + index & 1:
        return Mapping.ZERO_HOST if whole is Mapping.DATA else Mapping.ZERO
    if not bitmap >> index & 1:
        return Mapping.UNALLOCATED_HOST if whole is Mapping.DATA else Mapping.UNALLOCATED
    if whole is not Mapping.DATA:
        raise CorruptImageError(f"subclusters {bitmap:#018x} are allocated but have no host cluster")
    return whole


def subcluster_bits(first: int, count: int) -> int:
    """The ``count`` bits from ``first`` of one half of a bitmap word."""
    return ((1 << count) - 1) << first


# -- runs ------------------------------------------------------------------------------------------------------


def mapping_run(geometry: Geometry, table: Sequence[int], offset: int, length: int) -> Run:
    """The longest run from ``offset``, at most ``length`` bytes (> 0).

    ``offset`` counts from the first byte that ``table`` maps; the run ends at the table's end at the latest, and a
    compressed one with its cluster. Only the entries of the run are checked: ``CorruptImageError`` if one is not valid.
    """
    if geometry.extended_l2:
        return _extended_run(geometry, table, offset, length)
    index, inside = offset >> geometry.cluster_bits, offset & geometry.cluster_mask
    entry = table[index]
    found = decode_l2(geometry, entry)
    if found.mapping is Mapping.COMPRESSED:
        return Run(found.mapping, min(length, geometry.cluster_size - inside), *found[1:])
    wanted = min(geometry.clusters_for(inside + length), geometry.l2_entries - index)
    step = 0
    if found.mapping in _WITH_HOST:
        step = geometry.cluster_size
        wanted = min(wanted, (HOST_OFFSET_END - found.host_offset) >> geometry.cluster_bits)
    count = count_progression(table, index, wanted, step=step)
    host = found.host_offset + inside if step else 0
    return Run(found.mapping, min(length, (count << geometry.cluster_bits) - inside), host, found.copied)


_WITH_HOST: Final = frozenset({Mapping.DATA, Mapping.ZERO_HOST, Mapping.UNALLOCATED_HOST})


def _extended_run(geometry: Geometry, table: Sequence[int], offset: int, length: int) -> Run:
    index, inside = offset >> geometry.cluster_bits, offset & geometry.cluster_mask
    entry, bitmap = table[2 * index], table[2 * index + 1]
    first = inside >> geometry.subcluster_bits
    mapping = subcluster_mapping(geometry, entry, bitmap, first)
    found = decode_l2(geometry, entry)
    if mapping is Mapping.COMPRESSED:
        return Run(mapping, min(length, geometry.cluster_size - inside), *found[1:])
    last = first + _same_subclusters(bitmap, first)
    covered = (last << geometry.subcluster_bits) - inside
    if last == geometry.subclusters and covered < length:
        covered += _following_clusters(geometry, table, index, mapping, length - covered)
    host = found.host_offset + inside if mapping in _WITH_HOST else 0
    return Run(mapping, min(length, covered), host, found.copied)


def _same_subclusters(bitmap: int, first: int) -> int:
    """How many subclusters from ``first`` have the same two bits."""
    allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> 32
    differs = (allocated ^ -(allocated >> first & 1)) | (zero ^ -(zero >> first & 1))
    beyond = (differs & ALL_ALLOCATED) >> first
    return (beyond & -beyond).bit_length() - 1 if beyond else 32 - first


def _following_clusters(geometry: Geometry, table: Sequence[int], index: int, mapping: Mapping, length: int) -> int:
    """Bytes behind cluster ``index`` that continue its last subcluster's mapping, at least up to ``length``."""
    cluster = geometry.cluster_size
    step = cluster if mapping in _WITH_HOST else 0
    entry = table[2 * index]
    room = (HOST_OFFSET_END - (entry & OFFSET_MASK)) >> geometry.cluster_bits
    wanted = min(geometry.clusters_for(length), geometry.l2_entries - index - 1, room - 1)
    words = table[2 * index + 2 : 2 * (index + 1 + wanted)]
    bitmap = {Mapping.DATA: ALL_ALLOCATED, Mapping.ZERO: ALL_ZERO, Mapping.ZERO_HOST: ALL_ZERO}.get(mapping, 0)
    whole = min(
        count_progression([entry, *words[: 2 * _LOOP_MAX : 2]], 0, min(wanted, _LOOP_MAX) + 1, step=step) - 1,
        count_progression([bitmap, *words[1 : 2 * _LOOP_MAX : 2]], 0, min(wanted, _LOOP_MAX) + 1, step=0) - 1,
    )
    if whole == _LOOP_MAX < wanted:
        entries, bitmaps = array("Q", [entry]), array("Q", [bitmap])
        entries.extend(words[0::2])
        bitmaps.extend(words[1::2])
        whole = count_progression(entries, 0, wanted + 1, step=step) - 1
        whole = min(whole, count_progression(bitmaps, 0, wanted + 1, step=0) - 1)
    covered = whole * cluster
    if whole >= wanted:
        return covered
    return covered + _leading_part(geometry, words[2 * whole : 2 * whole + 2], entry + (whole + 1) * step, mapping)


def _leading_part(geometry: Geometry, words: Sequence[int], entry: int, mapping: Mapping) -> int:
    """Bytes at the start of the cluster of ``words`` that continue a run whose next entry would be ``entry``."""
    contradictory = words[1] & ALL_ALLOCATED & words[1] >> 32
    if words[0] != entry or contradictory or subcluster_mapping(geometry, entry, words[1], 0) is not mapping:
        return 0
    return _same_subclusters(words[1], 0) << geometry.subcluster_bits


def count_progression(table: Sequence[int], index: int, limit: int, *, step: int) -> int:
    """How many of the ``limit`` words from ``index`` grow by ``step`` each, the first one included (limit > 0).

    ``step`` is 0 or a power of two of at least 512. Words from ``index`` to ``index + limit`` must exist.
    """
    expected = table[index]
    for count in range(1, min(limit, _LOOP_MAX)):
        expected += step
        if table[index + count] != expected:
            return count
    if limit <= _LOOP_MAX:
        return limit
    return _search(table, index, limit, step)


def _search(table: Sequence[int], index: int, limit: int, step: int) -> int:
    """``count_progression`` for long stretches: bisect on single words, compare what is between in bulk."""
    first = table[index]
    good, bad, probe = 1, limit + 1, limit
    while bad - good > 1:
        if table[index + probe - 1] != first + (probe - 1) * step:
            bad = probe
        else:
            words = table[index + good : index + probe]
            actual = memoryview(words if isinstance(words, (array, memoryview)) else array("Q", words)).cast("B")
            common = _common_words(progression(first + good * step, probe - good, step=step), actual)
            if common < probe - good:
                return good + common
            good = probe
        probe = (good + bad) // 2
    return good


def _common_words(expected: bytearray, actual: memoryview) -> int:
    """Words before the first difference; both have the same length. Only a bytearray compares by memcmp."""
    if expected == actual:
        return len(actual) // WORD
    good, bad = 0, len(actual) // WORD
    while bad - good > 1:
        middle = (good + bad) // 2
        if expected[good * WORD : middle * WORD] == actual[good * WORD : middle * WORD]:
            good = middle
        else:
            bad = middle
    return good


# -- expected tables -------------------------------------------------------------------------------------------


def progression(first: int, count: int, *, step: int) -> bytearray:
    """``count`` native words from ``first``, each larger by ``step`` (0 or a power of two), as bytes.

    Long ones are cut from a template of multiples of ``step``; what its bits do not reach is written byte by byte
    column, each column in one strided assignment.
    """
    if not step:
        return bytearray(array("Q", [first]).tobytes() * count)
    if count <= _TEMPLATE_FROM:
        return bytearray(array("Q", range(first, first + count * step, step)).tobytes())
    template, span = _template(step), _TEMPLATE_WORDS * step
    words = bytearray()
    while len(words) < count * WORD:
        skipped = first % span // step
        piece = min(_TEMPLATE_WORDS - skipped, count - len(words) // WORD)
        part = bytearray(memoryview(template)[skipped * WORD : (skipped + piece) * WORD])
        _or_into(part, first - skipped * step)
        words += part
        first += piece * step
    return words


_TEMPLATE_WORDS: Final = 4096
_TEMPLATE_FROM: Final = 256


@lru_cache(maxsize=4)
def _template(step: int) -> bytes:
    """Multiples of ``step``, from 0; a pure function's result, kept because each image asks for one ``step`` only."""
    return array("Q", range(0, _TEMPLATE_WORDS * step, step)).tobytes()


@lru_cache(maxsize=256)
def _or_byte(byte: int) -> bytes:
    """The translation that sets the bits of ``byte``."""
    return bytes(value | byte for value in range(256))


def _or_into(words: bytearray, constant: int) -> None:
    """Set the bits of ``constant`` in every word."""
    for column, byte in enumerate(constant.to_bytes(WORD, sys.byteorder)):
        if byte:
            words[column::WORD] = words[column::WORD].translate(_or_byte(byte))
