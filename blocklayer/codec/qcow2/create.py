"""A new image, laid out in full before a byte is written.

Layer ``codec``: pure. ``CreateOptions`` takes qemu-img's words and refuses what qemu-img refuses; ``plan_create``
decides where everything lies; the plan's ``writes`` are made one at a time, so that the memory is that of one table
however large the image. The header comes last, behind a flush: what a crash leaves behind is no image.

    | header | refcount table | refcount blocks | L1 table | L2 tables | guest clusters |
                                                            only when preallocated

Every cluster up to the end of the file has refcount 1. With a data file there are no guest clusters in this one.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import FormatError, OptionError
from blocklayer.base.modes import Preallocation
from blocklayer.base.ranges import Range, align_up, div_round_up, is_power_of_two
from blocklayer.base.units import KIB, MIB, SECTOR
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.entries import COPIED, dump_table, progression
from blocklayer.codec.qcow2.features import Autoclear, Compatible, Incompatible
from blocklayer.codec.qcow2.geometry import (
    BACKING_FORMAT_BYTES_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    CLUSTER_BITS_MIN_EXTENDED,
    REFCOUNT_TABLE_BYTES_MAX,
    WORD,
    Geometry,
)
from blocklayer.codec.qcow2.header import COMPRESSION_ZLIB, COMPRESSION_ZSTD, Header
from blocklayer.codec.qcow2.refcounts import RefcountBlock

if TYPE_CHECKING:
    from collections.abc import Iterator

_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_COMPRESSION: Final = {"zlib": COMPRESSION_ZLIB, "zstd": COMPRESSION_ZSTD}

L1_PIECE: Final = MIB
"""Bytes of the L1 table that are made at a time."""


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What ``qemu-img create -f qcow2 -o`` takes. Sizes in bytes; ``size`` is rounded up to a sector.

    ``compat`` "0.10" or "1.1" (also "v2", "v3"); ``compression_type`` "zlib" or "zstd". Raises ``OptionError``.
    """

    size: int
    cluster_size: int = 64 * KIB
    compat: str = "1.1"
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    compression_type: str = "zlib"
    preallocation: Preallocation = Preallocation.OFF

    def __post_init__(self) -> None:
        """Check each option, then their combinations."""
        self._check_values()
        self._check_version()
        self._check_combinations()

    @property
    def version(self) -> int:
        """2 or 3."""
        return _VERSIONS[self.compat]

    @property
    def cluster_bits(self) -> int:
        """Binary logarithm of the cluster size."""
        return self.cluster_size.bit_length() - 1

    @property
    def lays_out_tables(self) -> bool:
        """Whether L2 tables are written; a raw data file needs them, or its reader would see backing or zeroes."""
        return self.preallocation is not Preallocation.OFF or self.data_file_raw

    def _check_values(self) -> None:
        if self.compat not in _VERSIONS:
            raise OptionError(f"compat is {self.compat!r}, but must be 0.10 or 1.1")
        if self.compression_type not in _COMPRESSION:
            raise OptionError(f"compression_type is {self.compression_type!r}, but must be zlib or zstd")
        if not is_power_of_two(self.cluster_size) or not CLUSTER_BITS_MIN <= self.cluster_bits <= CLUSTER_BITS_MAX:
            raise OptionError(f"cluster_size {self.cluster_size} is not a power of two from 512 to 2M")
        if not is_power_of_two(self.refcount_bits) or self.refcount_bits > 64:
            raise OptionError(f"refcount_bits {self.refcount_bits} is not a power of two from 1 to 64")
        if self.size < 0:
            raise OptionError(f"size {self.size} is negative")

    def _check_version(self) -> None:
        needs_v3 = {
            "refcount_bits other than 16": self.refcount_bits != 16,
            "lazy_refcounts": self.lazy_refcounts,
            "extended_l2": self.extended_l2,
            "data_file": self.data_file is not None,
            "compression_type other than zlib": self.compression_type != "zlib",
        }
        for name, used in needs_v3.items():
            if used and self.version < 3:
                raise OptionError(f"{name} needs compat 1.1 or above")

    def _check_combinations(self) -> None:
        if self.extended_l2 and self.cluster_bits < CLUSTER_BITS_MIN_EXTENDED:
            raise OptionError(f"extended_l2 needs a cluster_size of at least 16k, not {self.cluster_size}")
        if self.data_file_raw and self.data_file is None:
            raise OptionError("data_file_raw needs data_file")
        if self.backing_file is None and self.backing_fmt is not None:
            raise OptionError("backing_fmt needs backing_file")
        if self.backing_file is not None:
            self._check_backing(self.backing_fmt)

    def _check_backing(self, backing_fmt: str | None) -> None:
        if not self.backing_file or "\0" in self.backing_file:
            raise OptionError("backing_file is not a file name")
        if not backing_fmt:
            raise OptionError("backing_file needs backing_fmt: without it readers would guess the format")
        if len(backing_fmt.encode()) > BACKING_FORMAT_BYTES_MAX:
            raise OptionError(f"backing_fmt is longer than {BACKING_FORMAT_BYTES_MAX} bytes")
        if self.data_file_raw:
            raise OptionError("backing_file and data_file_raw exclude each other")
        if self.preallocation is not Preallocation.OFF and not self.extended_l2:
            raise OptionError("backing_file and preallocation exclude each other unless extended_l2 is on")


class Write(NamedTuple):
    """Bytes at a file offset."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CreatePlan:
    """Where everything in a new image lies. Offsets and sizes in bytes.

    The writer makes an empty file, extends it to ``file_size``, and performs ``writes()``. ``guest`` is the range of
    this file (or, with a data file, of that one) that ``preallocation`` falloc reserves and full fills with zeroes;
    an external data file is made ``header.size`` long.
    """

    header: Header
    file_size: int
    guest: Range
    preallocation: Preallocation
    refcount_blocks: Range
    l2_tables: Range

    def writes(self) -> Iterator[Write]:
        """Everything that is not zero, the header last."""
        yield from self._refcounts()
        if self.l2_tables.length:
            yield from self._l1_table()
            yield from self._l2_tables()
        yield Write(0, qcow2_header.serialize(self.header))

    def _refcounts(self) -> Iterator[Write]:
        geometry = self.header.geometry
        cluster = geometry.cluster_size
        blocks = range(self.refcount_blocks.offset, self.refcount_blocks.end, cluster)
        yield Write(self.header.refcount_table_offset, dump_table(array("Q", blocks)))
        left = self.file_size // cluster
        for offset in blocks:
            block = RefcountBlock(geometry.refcount_order, bytearray(cluster))
            block.fill(0, min(left, len(block)), 1)
            left -= min(left, len(block))
            yield Write(offset, bytes(block.data))

    def _l1_table(self) -> Iterator[Write]:
        cluster = self.header.cluster_size
        for at in range(0, self.header.l1_size * WORD, L1_PIECE):
            count = min(L1_PIECE, self.header.l1_size * WORD - at) // WORD
            first = (self.l2_tables.offset + at // WORD * cluster) | COPIED
            yield Write(self.header.l1_table_offset + at, _big_endian(progression(first, count, step=cluster)))

    def _l2_tables(self) -> Iterator[Write]:
        geometry = self.header.geometry
        clusters = geometry.clusters_for(self.header.size)
        for index in range(self.header.l1_size):
            first = index * geometry.l2_entries
            count = min(geometry.l2_entries, clusters - first)
            host = self.guest.offset + first * geometry.cluster_size
            entries = progression(host | COPIED, count, step=geometry.cluster_size)
            if geometry.extended_l2:
                entries = _with_empty_bitmaps(entries)
            yield Write(self.l2_tables.offset + index * geometry.cluster_size, _big_endian(entries))


def _big_endian(words: bytearray) -> bytes:
    table = array("Q")
    table.frombytes(words)
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()


def _with_empty_bitmaps(descriptors: bytearray) -> bytearray:
    """Extended entries of reserved clusters with no subcluster allocated: they read as the backing file."""
    table = array("Q", bytes(2 * len(descriptors)))
    words = array("Q")
    words.frombytes(descriptors)
    table[0::2] = words
    return bytearray(table.tobytes())


def plan_create(options: CreateOptions) -> CreatePlan:
    """Lay out the image. Raises ``OptionError`` if it exceeds a limit of the format or of the header's cluster."""
    geometry = _geometry(options)
    size = align_up(options.size, SECTOR)
    if size > geometry.size_max:
        raise OptionError(f"size {size} is more than {geometry.size_max}, the most for this cluster_size")
    l1_size = geometry.l1_entries_for(size)
    l2_clusters = l1_size if options.lays_out_tables else 0
    guest_clusters = geometry.clusters_for(size) if l2_clusters and options.data_file is None else 0
    fixed = 1 + geometry.clusters_for(l1_size * WORD) + l2_clusters + guest_clusters
    table_clusters, blocks = _refcount_clusters(geometry, fixed)
    cluster = geometry.cluster_size
    refcount_blocks = Range((1 + table_clusters) * cluster, blocks * cluster)
    l2_tables = Range(refcount_blocks.end + align_up(l1_size * WORD, cluster), l2_clusters * cluster)
    guest = Range(l2_tables.end, guest_clusters * cluster)
    file_size = guest.end
    if options.data_file is not None:
        guest = Range(0, size)
    header = Header(
        version=options.version,
        cluster_bits=options.cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_table_offset=refcount_blocks.end,
        refcount_table_offset=cluster,
        refcount_table_clusters=table_clusters,
        incompatible=_incompatible(options),
        compatible=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else Compatible.NONE,
        autoclear=Autoclear.DATA_FILE_RAW if options.data_file_raw else Autoclear.NONE,
        refcount_order=geometry.refcount_order,
        compression_type=_COMPRESSION[options.compression_type],
        backing_file=options.backing_file,
        backing_format=options.backing_fmt,
        data_file=options.data_file,
    )
    _check_header(header, file_size)
    return CreatePlan(header, file_size, guest, options.preallocation, refcount_blocks, l2_tables)


def _geometry(options: CreateOptions) -> Geometry:
    return Geometry(
        cluster_bits=options.cluster_bits,
        refcount_order=options.refcount_bits.bit_length() - 1,
        extended_l2=options.extended_l2,
        version=options.version,
        data_file=options.data_file is not None,
    )


def _refcount_clusters(geometry: Geometry, clusters: int) -> tuple[int, int]:
    """Clusters of refcount table and of blocks that count ``clusters`` others and themselves."""
    table = blocks = 1
    while True:
        needed_blocks = div_round_up(clusters + table + blocks, geometry.refcount_block_entries)
        needed_table = max(1, geometry.clusters_for(needed_blocks * WORD))
        if needed_table > geometry.refcount_table_clusters_max:
            raise OptionError(f"preallocation needs a refcount table of more than {REFCOUNT_TABLE_BYTES_MAX} bytes")
        if (needed_table, needed_blocks) == (table, blocks):
            return table, blocks
        table, blocks = max(table, needed_table), max(blocks, needed_blocks)


def _incompatible(options: CreateOptions) -> Incompatible:
    used = {
        Incompatible.DATA_FILE: options.data_file is not None,
        Incompatible.COMPRESSION_TYPE: options.compression_type != "zlib",
        Incompatible.EXTENDED_L2: options.extended_l2,
    }
    return Incompatible(sum(bit for bit, is_used in used.items() if is_used))


def _check_header(header: Header, file_size: int) -> None:
    """What we write, we can read: names that do not fit are found here."""
    try:
        qcow2_header.parse(qcow2_header.serialize(header), file_size=file_size)
    except FormatError as error:
        raise OptionError(error.message) from None
