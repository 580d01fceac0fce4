"""Geometry of a qcow2 image: the few numbers that say how every table of it is read.

Layer ``codec``: pure. A ``Geometry`` follows from the header alone and never changes while an image is open; the
derived numbers are computed once, because the request path reads them on every call.

    guest offset = | l1_index | l2_index | offset in the cluster |
                              l2_bits     cluster_bits

An L2 table is one cluster of entries of 8 bytes, or of 16 with extended L2 entries, where 32 subclusters share an
entry. A refcount block is one cluster of counters of ``1 << refcount_order`` bits. Source: qcow2, "Cluster mapping",
"Extended L2 Entries" and "Host cluster management".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from blocklayer.base.errors import FormatError, LimitError
from blocklayer.base.ranges import div_round_up
from blocklayer.base.units import KIB, MIB, SIZE_MAX

CLUSTER_BITS_MIN: Final = 9
"""512 bytes, the sector: the specification's minimum."""

CLUSTER_BITS_MAX: Final = 21
"""2 MiB: QEMU's maximum, and what one cached table may cost."""

CLUSTER_BITS_DEFAULT: Final = 16

CLUSTER_BITS_MIN_EXTENDED: Final = 14
"""16 KiB: a subcluster, a 32nd of the cluster, must not be smaller than a sector."""

SUBCLUSTERS: Final = 32
"""Subclusters in a cluster with extended L2 entries: one bit of each half of the bitmap word."""

REFCOUNT_ORDER_DEFAULT: Final = 4
"""16-bit refcounts; the only width of version 2."""

REFCOUNT_ORDER_MAX: Final = 6

HOST_OFFSET_END: Final = 1 << 56
"""Table entries have 56 bits for a host offset."""

L1_BYTES_MAX: Final = 32 * MIB
"""QEMU's limit: the L1 table is kept in memory whole, so an image must not choose its size."""

REFCOUNT_TABLE_BYTES_MAX: Final = 8 * MIB
"""QEMU's limit, for the same reason."""

SNAPSHOTS_MAX: Final = 65536
"""QEMU's limit on internal snapshots."""

SNAPSHOT_TABLE_BYTES_MAX: Final = 64 * MIB
"""QEMU's limit: 1 KiB an entry."""

SNAPSHOT_EXTRA_BYTES_MAX: Final = KIB
"""QEMU's limit on one snapshot's extra data."""

BITMAPS_MAX: Final = 65535
"""QEMU's limit on stored bitmaps."""

BITMAP_DIRECTORY_BYTES_MAX: Final = BITMAPS_MAX * (24 + 1023 + 1)
"""As many entries as allowed, each with the longest name (1023 bytes) and no extra data."""

BACKING_NAME_BYTES_MAX: Final = 1023
"""The specification's limit."""

BACKING_FORMAT_BYTES_MAX: Final = 15
"""QEMU's limit on the name of a format."""

WORD: Final = 8
"""Bytes of an entry in an L1 table, a refcount table and a standard L2 table."""


class Split(NamedTuple):
    """A guest offset as table indices and the bytes behind the start of its cluster."""

    l1_index: int
    l2_index: int
    in_cluster: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the tables of one image are read. Sizes in bytes.

    ``version`` 2 has no zero clusters; ``data_file`` says that guest clusters live in another file, at their own
    offset. Raises ``FormatError`` for combinations that the specification forbids.
    """

    cluster_bits: int = CLUSTER_BITS_DEFAULT
    refcount_order: int = REFCOUNT_ORDER_DEFAULT
    extended_l2: bool = False
    version: int = 3
    data_file: bool = False

    cluster_size: int = field(init=False, repr=False)
    cluster_mask: int = field(init=False, repr=False)
    l2_entry_size: int = field(init=False, repr=False)
    l2_entry_words: int = field(init=False, repr=False)
    l2_entries: int = field(init=False, repr=False)
    l2_bits: int = field(init=False, repr=False)
    l2_mask: int = field(init=False, repr=False)
    l1_shift: int = field(init=False, repr=False)
    l2_coverage: int = field(init=False, repr=False)
    subclusters: int = field(init=False, repr=False)
    subcluster_size: int = field(init=False, repr=False)
    subcluster_bits: int = field(init=False, repr=False)
    refcount_bits: int = field(init=False, repr=False)
    refcount_max: int = field(init=False, repr=False)
    refcount_block_entries: int = field(init=False, repr=False)
    refcount_block_coverage: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check, then derive."""
        self._check()
        entry_words = 2 if self.extended_l2 else 1
        subclusters = SUBCLUSTERS if self.extended_l2 else 1
        cluster_size = 1 << self.cluster_bits
        l2_entries = cluster_size // (WORD * entry_words)
        refcount_bits = 1 << self.refcount_order
        derived = {
            "cluster_size": cluster_size,
            "cluster_mask": cluster_size - 1,
            "l2_entry_size": WORD * entry_words,
            "l2_entry_words": entry_words,
            "l2_entries": l2_entries,
            "l2_bits": l2_entries.bit_length() - 1,
            "l2_mask": l2_entries - 1,
            "l1_shift": self.cluster_bits + l2_entries.bit_length() - 1,
            "l2_coverage": cluster_size * l2_entries,
            "subclusters": subclusters,
            "subcluster_size": cluster_size // subclusters,
            "subcluster_bits": self.cluster_bits - (subclusters.bit_length() - 1),
            "refcount_bits": refcount_bits,
            "refcount_max": (1 << refcount_bits) - 1,
            "refcount_block_entries": cluster_size * 8 // refcount_bits,
            "refcount_block_coverage": cluster_size * (cluster_size * 8 // refcount_bits),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        if self.version not in (2, 3):
            raise FormatError(f"qcow2 version {self.version} does not exist; versions are 2 and 3")
        if self.cluster_bits < CLUSTER_BITS_MIN:
            raise FormatError(f"cluster_bits {self.cluster_bits} is less than {CLUSTER_BITS_MIN} (512 bytes)")
        if self.cluster_bits > CLUSTER_BITS_MAX:
            raise LimitError(f"cluster_bits {self.cluster_bits} is more than {CLUSTER_BITS_MAX} (2 MiB)")
        if not 0 <= self.refcount_order <= REFCOUNT_ORDER_MAX:
            raise FormatError(f"refcount_order {self.refcount_order} is outside 0 to {REFCOUNT_ORDER_MAX} (64 bits)")
        if self.extended_l2 and self.cluster_bits < CLUSTER_BITS_MIN_EXTENDED:
            raise FormatError(f"extended L2 entries need clusters of at least 16 KiB, not {1 << self.cluster_bits}")
        if self.version == 2 and (self.extended_l2 or self.data_file or self.refcount_order != REFCOUNT_ORDER_DEFAULT):
            raise FormatError("version 2 has no extended L2 entries, no data file and only 16-bit refcounts")

    def split(self, offset: int) -> Split:
        """Indices of the guest ``offset``."""
        return Split(
            offset >> self.l1_shift,
            offset >> self.cluster_bits & self.l2_mask,
            offset & self.cluster_mask,
        )

    def guest_offset(self, l1_index: int, l2_index: int) -> int:
        """Guest offset of a cluster, the inverse of ``split``."""
        return l1_index << self.l1_shift | l2_index << self.cluster_bits

    def l1_entries_for(self, size: int) -> int:
        """L1 entries that a disk of ``size`` bytes needs."""
        return div_round_up(size, self.l2_coverage)

    def clusters_for(self, length: int) -> int:
        """Clusters that ``length`` bytes occupy."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def refcount_position(self, host_offset: int) -> tuple[int, int]:
        """``(index in the refcount table, index in the refcount block)`` of the cluster at ``host_offset``."""
        return divmod(host_offset >> self.cluster_bits, self.refcount_block_entries)

    @property
    def l1_entries_max(self) -> int:
        """Entries of the largest L1 table."""
        return L1_BYTES_MAX // WORD

    @property
    def refcount_table_clusters_max(self) -> int:
        """Clusters of the largest refcount table."""
        return REFCOUNT_TABLE_BYTES_MAX >> self.cluster_bits

    @property
    def size_max(self) -> int:
        """Largest disk that the L1 limit lets us map, in bytes."""
        return min(self.l1_entries_max * self.l2_coverage, SIZE_MAX)

    @property
    def host_size_max(self) -> int:
        """Largest image file that the refcount table limit and the 56-bit offsets let us count, in bytes."""
        return min(REFCOUNT_TABLE_BYTES_MAX // WORD * self.refcount_block_coverage, HOST_OFFSET_END)

    @property
    def compressed_offset_bits(self) -> int:
        """Bits of a compressed descriptor that hold the host offset (the specification's x)."""
        return 62 - (self.cluster_bits - 8)
