"""The header of a qcow2 image: bytes to a checked value, and back.

Layer ``codec``: pure. ``parse`` believes nothing: whatever the bytes are it returns a ``Header`` that keeps every rule
below, or raises ``FormatError``, ``LimitError`` or ``UnsupportedFeatureError``. No memory is taken on the header's
word: the caller sizes its tables from a checked header only.

- Tables start on cluster boundaries below 2^56 and inside the file, and neither overlap each other nor the header.
- The L1 table is at most 32 MiB and covers the disk; the refcount table is 1 cluster to 8 MiB.
- Names and extensions lie inside the first cluster.
- Encryption and unknown incompatible features are refused by name. The dirty and corrupt bits are left to the driver.

What is not understood survives: unknown extensions, unknown compatible bits, unknown header fields and foreign feature
names are kept and written back. Where the header's strings lie is chosen anew when it is written.
Source: qcow2, "Header".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, NamedTuple

from blocklayer.base.errors import FormatError, LimitError, UnsupportedFeatureError
from blocklayer.base.ranges import Range, align_up
from blocklayer.base.units import SIZE_MAX
from blocklayer.codec.qcow2.extensions import (
    BitmapsExtension,
    Extension,
    ExtensionType,
    join_extensions,
    parse_bitmaps,
    split_extensions,
)
from blocklayer.codec.qcow2.features import (
    AUTOCLEAR_KNOWN,
    Autoclear,
    Compatible,
    FeatureName,
    Incompatible,
    parse_names,
    refuse_unknown,
    serialize_names,
)
from blocklayer.codec.qcow2.geometry import (
    BACKING_FORMAT_BYTES_MAX,
    BACKING_NAME_BYTES_MAX,
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    HOST_OFFSET_END,
    L1_BYTES_MAX,
    REFCOUNT_ORDER_DEFAULT,
    REFCOUNT_TABLE_BYTES_MAX,
    SNAPSHOTS_MAX,
    WORD,
    Geometry,
)

MAGIC: Final = b"QFI\xfb"

# qcow2, "Header": byte 0 magic, 4 version, 8 backing_file_offset, 16 backing_file_size, 20 cluster_bits, 24 size,
# 32 crypt_method, 36 l1_size, 40 l1_table_offset, 48 refcount_table_offset, 56 refcount_table_clusters,
# 60 nb_snapshots, 64 snapshots_offset
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
# 72 incompatible, 80 compatible, 88 autoclear, 96 refcount_order, 100 header_length
_V3 = struct.Struct(">QQQII")

LENGTH_V2: Final = 72
LENGTH_V3_MIN: Final = 104
COMPRESSION_OFFSET: Final = 104

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1

SNAPSHOT_ENTRY_MIN: Final = 40
"""Bytes of the shortest snapshot table entry."""

NAMES_CLUSTER_MIN: Final = 4096
"""Smaller clusters keep their room for the backing file's name, as with QEMU."""

_CRYPT_METHODS: Final = {1: "AES encryption", 2: "LUKS encryption"}


@dataclass(frozen=True, slots=True)
class Header:
    """A header that keeps the specification's rules. Offsets and sizes in bytes.

    ``extensions``    extensions without a field here, in file order, bitmaps included, byte for byte
    ``feature_names`` names for bits that the specification does not name
    ``further``       header fields behind byte 104 that are not known, without zero bytes at their end
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = Incompatible.NONE
    compatible: Compatible = Compatible.NONE
    autoclear: Autoclear = Autoclear.NONE
    refcount_order: int = REFCOUNT_ORDER_DEFAULT
    compression_type: int = COMPRESSION_ZLIB
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    extensions: tuple[Extension, ...] = ()
    feature_names: tuple[FeatureName, ...] = ()
    further: bytes = b""

    @property
    def geometry(self) -> Geometry:
        """How the image's tables are read."""
        return Geometry(
            cluster_bits=self.cluster_bits,
            refcount_order=self.refcount_order,
            extended_l2=Incompatible.EXTENDED_L2 in self.incompatible,
            version=self.version,
            data_file=Incompatible.DATA_FILE in self.incompatible,
        )

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def header_length(self) -> int:
        """Bytes of the fixed part as it is written."""
        if self.version == 2:
            return LENGTH_V2
        return align_up(COMPRESSION_OFFSET + 1 + len(self.further), 8)

    @property
    def is_dirty(self) -> bool:
        """Refcounts may be wrong: they must be repaired before the first write."""
        return Incompatible.DIRTY in self.incompatible

    @property
    def is_corrupt(self) -> bool:
        """The image must not be written to."""
        return Incompatible.CORRUPT in self.incompatible

    @property
    def has_data_file(self) -> bool:
        """Guest clusters live in another file."""
        return Incompatible.DATA_FILE in self.incompatible

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """Where the stored bitmaps are; None if there are none or they are stale. Raises like ``parse``."""
        if Autoclear.BITMAPS not in self.autoclear:
            return None
        data = next((part.data for part in self.extensions if part.type == ExtensionType.BITMAPS), None)
        return None if data is None else parse_bitmaps(data, cluster_size=self.cluster_size)


class _Fields(NamedTuple):
    """The numbers of the fixed part, as they stand in the file."""

    magic: bytes
    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = REFCOUNT_ORDER_DEFAULT
    header_length: int = LENGTH_V2


def is_qcow2(data: bytes) -> bool:
    """Whether the first bytes of a file are those of a qcow2 image, of any version but the unrelated first one."""
    return len(data) >= 8 and data[:4] == MAGIC and int.from_bytes(data[4:8], "big") >= 2


def bytes_needed(data: bytes) -> int:
    """How many bytes ``parse`` wants to see (one cluster), told from the first 512. Raises like ``parse``."""
    cluster_bits = _fixed_part(data).cluster_bits
    return 1 << cluster_bits


def parse(data: bytes, *, file_size: int) -> Header:
    """Check the first cluster of an image file of ``file_size`` bytes.

    ``data`` holds the first ``bytes_needed`` bytes, or the whole file if that is shorter.
    """
    fields = _fixed_part(data)
    _check_numbers(fields)
    end = _strings_end(fields, len(data))
    extensions = split_extensions(data[fields.header_length : end])
    named = {part.type: part.data for part in extensions}
    names = parse_names(named.get(ExtensionType.FEATURE_NAMES, b""))
    refuse_unknown(fields.incompatible, names)
    header = Header(
        **{name: getattr(fields, name) for name in _SHARED},
        incompatible=Incompatible(fields.incompatible),
        compatible=Compatible(fields.compatible),
        autoclear=Autoclear(fields.autoclear),
        compression_type=_compression_type(data, fields),
        backing_file=_backing_name(data, fields),
        backing_format=_text(named, ExtensionType.BACKING_FORMAT, length_max=BACKING_FORMAT_BYTES_MAX),
        data_file=_text(named, ExtensionType.DATA_FILE, length_max=1 << CLUSTER_BITS_MAX),
        extensions=tuple(part for part in extensions if part.type not in _WITH_FIELD),
        feature_names=names,
        further=data[COMPRESSION_OFFSET + 1 : fields.header_length].rstrip(b"\0"),
    )
    check(header, file_size=file_size)
    return header


_SHARED: Final = (
    "version", "cluster_bits", "size", "l1_size", "l1_table_offset", "refcount_table_offset",
    "refcount_table_clusters", "nb_snapshots", "snapshots_offset", "refcount_order",
)  # fmt: skip
"""Fields that pass from the file into ``Header`` as they are."""

_WITH_FIELD: Final = (ExtensionType.BACKING_FORMAT, ExtensionType.DATA_FILE, ExtensionType.FEATURE_NAMES)
"""Extensions that are fields of ``Header``."""


def _fixed_part(data: bytes) -> _Fields:
    if data[:4] != MAGIC[: len(data)] or len(data) < LENGTH_V2:
        raise FormatError("not a qcow2 image: the magic bytes are missing or the file is too short")
    fields = _Fields(*_V2.unpack_from(data))
    if fields.version not in (2, 3):
        name = f"qcow2 version {fields.version}"
        raise UnsupportedFeatureError(f"{name} is not supported, only versions 2 and 3", features=(name,))
    if fields.cluster_bits < CLUSTER_BITS_MIN:
        raise FormatError(f"cluster_bits {fields.cluster_bits} is less than {CLUSTER_BITS_MIN} (512 bytes)")
    if fields.cluster_bits > CLUSTER_BITS_MAX:
        raise LimitError(f"cluster_bits {fields.cluster_bits} is more than {CLUSTER_BITS_MAX} (2 MiB)")
    if fields.version == 2:
        return fields
    if len(data) < LENGTH_V3_MIN:
        raise FormatError(f"the header ends after {len(data)} bytes; version 3 needs {LENGTH_V3_MIN}")
    fields = _Fields(*fields[:13], *_V3.unpack_from(data, LENGTH_V2))
    if fields.header_length < LENGTH_V3_MIN or fields.header_length % 8:
        raise FormatError(f"header length {fields.header_length} is not a multiple of 8 from {LENGTH_V3_MIN}")
    if fields.header_length > 1 << fields.cluster_bits:
        raise FormatError(f"header length {fields.header_length} exceeds the cluster size {1 << fields.cluster_bits}")
    return fields


def _check_numbers(fields: _Fields) -> None:
    if fields.crypt_method:
        name = _CRYPT_METHODS.get(fields.crypt_method)
        if name is None:
            raise FormatError(f"encryption method {fields.crypt_method} does not exist")
        raise UnsupportedFeatureError(f"the image uses {name}, which is not supported", features=(name,))
    if fields.size > SIZE_MAX:
        raise LimitError(f"the disk's size {fields.size} is more than {SIZE_MAX} bytes")


def _strings_end(fields: _Fields, available: int) -> int:
    """Where the extensions end at the latest; checks where the backing file's name lies."""
    if fields.header_length > available:
        raise FormatError(f"the header ends after {available} of its {fields.header_length} bytes")
    end = min(available, 1 << fields.cluster_bits)
    if not fields.backing_offset:
        return end
    if fields.backing_length > BACKING_NAME_BYTES_MAX:
        raise LimitError(f"the backing file's name is longer than {BACKING_NAME_BYTES_MAX} bytes")
    if not fields.header_length <= fields.backing_offset <= end - fields.backing_length:
        raise FormatError(f"the backing file's name at {fields.backing_offset:#x} lies outside the header's cluster")
    return fields.backing_offset


def _backing_name(data: bytes, fields: _Fields) -> str | None:
    if not fields.backing_offset or not fields.backing_length:
        return None
    return _decode(data[fields.backing_offset :][: fields.backing_length], "the backing file's name")


def _text(named: dict[int, bytes], kind: ExtensionType, *, length_max: int) -> str | None:
    data = named.get(kind)
    if data is None:
        return None
    if len(data) > length_max:
        raise FormatError(f"header extension {kind.name} has {len(data)} bytes, more than {length_max}")
    return _decode(data, f"header extension {kind.name}")


def _decode(data: bytes, what: str) -> str:
    """File names are bytes: undecodable ones survive as surrogates, as in ``os.fsdecode``. NUL would cut them short."""
    if b"\0" in data:
        raise FormatError(f"{what} contains a zero byte")
    return data.decode("utf-8", "surrogateescape")


def _compression_type(data: bytes, fields: _Fields) -> int:
    kind = data[COMPRESSION_OFFSET] if fields.header_length > COMPRESSION_OFFSET else COMPRESSION_ZLIB
    flagged = bool(fields.incompatible & Incompatible.COMPRESSION_TYPE)
    if flagged != bool(kind):
        raise FormatError(f"compression type {kind} does not fit its feature bit, which is {int(flagged)}")
    if kind > COMPRESSION_ZSTD:
        name = f"compression type {kind}"
        raise UnsupportedFeatureError(f"{name} is not known here", features=(name,))
    return kind


# -- rules between fields --------------------------------------------------------------------------------------


def check(header: Header, *, file_size: int) -> None:
    """Raise ``FormatError`` or ``LimitError`` if the fields break a rule of the specification or a limit of ours."""
    _check_tables(header, header.geometry, file_size)
    _check_features(header)


def _check_tables(header: Header, geometry: Geometry, file_size: int) -> None:
    if header.l1_size * WORD > L1_BYTES_MAX:
        raise LimitError(f"the L1 table has {header.l1_size} entries, more than {L1_BYTES_MAX} bytes")
    needed = geometry.l1_entries_for(header.size)
    if needed * WORD > L1_BYTES_MAX:
        raise LimitError(f"a disk of {header.size} bytes needs an L1 table of more than {L1_BYTES_MAX} bytes")
    if header.l1_size < needed:
        raise FormatError(f"the L1 table has {header.l1_size} entries; the disk's size needs {needed}")
    if not header.refcount_table_clusters:
        raise FormatError("the image has no refcount table")
    if header.refcount_table_clusters > geometry.refcount_table_clusters_max:
        raise LimitError(f"the refcount table is larger than {REFCOUNT_TABLE_BYTES_MAX} bytes")
    if header.nb_snapshots > SNAPSHOTS_MAX:
        raise LimitError(f"the image has {header.nb_snapshots} snapshots, more than {SNAPSHOTS_MAX}")
    regions = tables(header)
    for name, region in regions.items():
        _check_region(name, region, header.cluster_size, file_size)
    occupied = {name: region.aligned_out(header.cluster_size) for name, region in regions.items() if region.length}
    for (name, region), (other_name, other) in combinations(occupied.items(), 2):
        if region.overlaps(other):
            raise FormatError(f"the {name} and the {other_name} overlap", offset=max(region.offset, other.offset))


def tables(header: Header) -> dict[str, Range]:
    """Where the header's own structures lie; of the snapshot table the shortest that it can be."""
    return {
        "header": Range(0, header.cluster_size),
        "L1 table": Range(header.l1_table_offset, header.l1_size * WORD),
        "refcount table": Range(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits),
        "snapshot table": Range(header.snapshots_offset, header.nb_snapshots * SNAPSHOT_ENTRY_MIN),
    }


def _check_region(name: str, region: Range, cluster_size: int, file_size: int) -> None:
    if region.offset % cluster_size:
        raise FormatError(f"the {name} does not start on a cluster boundary", offset=region.offset)
    if region.end > HOST_OFFSET_END:
        raise FormatError(f"the {name} lies beyond 2^56 bytes", offset=region.offset)
    if region.length and region.offset >= file_size:
        raise FormatError(f"the {name} lies beyond the file's end", offset=region.offset)


def _check_features(header: Header) -> None:
    kinds = [part.type for part in header.extensions]
    if ExtensionType.ENCRYPTION in kinds:
        raise FormatError("the image has an encryption header but is not encrypted")
    if Autoclear.BITMAPS in header.autoclear and ExtensionType.BITMAPS not in kinds:
        raise FormatError("the bitmaps bit is set but there is no bitmaps extension")
    _ = header.bitmaps
    raw = Autoclear.DATA_FILE_RAW in header.autoclear
    if raw and not header.has_data_file:
        raise FormatError("the raw external data bit is set but there is no external data file")
    if raw and header.backing_file is not None:
        raise FormatError("a raw external data file excludes a backing file")
    if header.has_data_file and header.nb_snapshots:
        raise FormatError("an external data file excludes internal snapshots")


# -- writing ---------------------------------------------------------------------------------------------------


def for_writing(header: Header) -> Header:
    """The header as it must be on disk before the first write: unknown autoclear bits are cleared."""
    return replace(header, autoclear=Autoclear(header.autoclear & AUTOCLEAR_KNOWN))


def serialize(header: Header) -> bytes:
    """The header, its extensions and the backing file's name. Raises ``FormatError`` if they exceed one cluster.

    Version 3 gets a feature name table if the cluster is large enough and has room for it.
    """
    backing = _encode(header.backing_file)
    if len(backing) > BACKING_NAME_BYTES_MAX:
        raise FormatError(f"the backing file's name is longer than {BACKING_NAME_BYTES_MAX} bytes")
    for with_names in (header.version > 2 and header.cluster_size >= NAMES_CLUSTER_MIN, False):
        extensions = join_extensions(_extensions(header, with_names=with_names))
        end = header.header_length + len(extensions) + len(backing)
        if end <= header.cluster_size:
            return _fixed_bytes(header, end - len(backing), len(backing)) + extensions + backing
    raise FormatError(f"the header needs {end} bytes but the cluster has {header.cluster_size}; shorten its strings")


def _extensions(header: Header, *, with_names: bool) -> list[Extension]:
    parts = []
    if header.backing_format is not None:
        parts.append(Extension(ExtensionType.BACKING_FORMAT, _encode(header.backing_format)))
    if header.data_file is not None:
        parts.append(Extension(ExtensionType.DATA_FILE, _encode(header.data_file)))
    if with_names:
        parts.append(Extension(ExtensionType.FEATURE_NAMES, serialize_names(header.feature_names)))
    return [*parts, *header.extensions]


def _fixed_bytes(header: Header, backing_offset: int, backing_length: int) -> bytes:
    fixed = _V2.pack(
        MAGIC,
        header.version,
        backing_offset if backing_length else 0,
        backing_length,
        header.cluster_bits,
        header.size,
        0,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    )
    if header.version == 2:
        return fixed
    fixed += _V3.pack(
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length
    )
    return (fixed + bytes([header.compression_type]) + header.further).ljust(header.header_length, b"\0")


def _encode(text: str | None) -> bytes:
    return b"" if text is None else text.encode("utf-8", "surrogateescape")
