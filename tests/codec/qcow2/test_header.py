"""Headers: what is written is read, hostile ones are refused by type, and truncation anywhere never surprises."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import FormatError, LimitError, UnsupportedFeatureError
from blocklayer.codec.qcow2.extensions import (
    BitmapsExtension,
    Extension,
    ExtensionType,
    serialize_bitmaps,
)
from blocklayer.codec.qcow2.features import (
    Autoclear,
    Compatible,
    FeatureName,
    Incompatible,
)
from blocklayer.codec.qcow2.header import (
    Header,
    bytes_needed,
    for_writing,
    is_qcow2,
    parse,
    serialize,
)

KIB = 1024
MIB = 1024 * KIB
FILE_SIZE = 10 * MIB

PLAIN = Header(
    version=3,
    cluster_bits=16,
    size=10 * MIB,
    l1_size=1,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
)
PLAIN_V2 = replace(PLAIN, version=2)

PLAIN_V2_BYTES = bytes.fromhex(
    "514649fb 00000002 0000000000000000 00000000 00000010 0000000000a00000 00000000 00000001"
    "0000000000030000 0000000000010000 00000001 00000000 0000000000000000"
    "0000000000000000"
)

OFFSETS = {
    "version": (4, ">I"),
    "backing_offset": (8, ">Q"),
    "backing_length": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}


def read(data: bytes, file_size: int = FILE_SIZE) -> Header:
    """Parse ``data`` as the start of a larger file."""
    return parse(data.ljust(65536, b"\0"), file_size=file_size)


def altered(header: Header = PLAIN, **values: int) -> bytes:
    """The header's bytes with raw values put into some of its fields."""
    data = bytearray(serialize(header))
    for name, value in values.items():
        offset, layout = OFFSETS[name]
        struct.pack_into(layout, data, offset, value)
    return bytes(data)


def test_a_version_2_header_has_these_bytes() -> None:
    """Golden bytes beside the object: 72 bytes of fields and the end of the extensions."""
    assert serialize(PLAIN_V2) == PLAIN_V2_BYTES
    assert read(PLAIN_V2_BYTES) == PLAIN_V2


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=100)
unknown_extensions = st.lists(st.builds(Extension, st.integers(1, 0xFFFF), st.binary(max_size=40)), max_size=3).map(
    tuple
)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Headers that keep the rules."""
    cluster_bits = draw(st.integers(12, 21))
    cluster = 1 << cluster_bits
    base = Header(
        version=draw(st.sampled_from([2, 3])),
        cluster_bits=cluster_bits,
        size=draw(st.integers(0, cluster * cluster // 16)),
        l1_size=draw(st.integers(1, cluster // 8)),
        l1_table_offset=3 * cluster,
        refcount_table_offset=cluster,
        refcount_table_clusters=draw(st.integers(1, 2)),
        nb_snapshots=draw(st.integers(0, cluster // 40)),
        snapshots_offset=4 * cluster,
        backing_file=draw(st.none() | names),
        backing_format=draw(st.none() | st.sampled_from(["raw", "qcow2"])),
        extensions=draw(unknown_extensions),
    )
    return base if base.version == 2 else draw(version_3(base))


@st.composite
def version_3(draw: st.DrawFn, base: Header) -> Header:
    """``base`` with fields of version 3."""
    incompatible = Incompatible(draw(st.integers(0, 3)))
    if base.cluster_bits >= 14 and draw(st.booleans()):
        incompatible |= Incompatible.EXTENDED_L2
    data_file = draw(st.none() | names)
    if data_file is not None:
        incompatible |= Incompatible.DATA_FILE
    kind = draw(st.integers(0, 1))
    return replace(
        base,
        incompatible=incompatible | (Incompatible.COMPRESSION_TYPE if kind else 0),
        compatible=Compatible(draw(st.integers(0, 2**64 - 1))),
        autoclear=Autoclear(draw(st.integers(0, 2**64 - 1)) & ~3),
        refcount_order=draw(st.integers(0, 6)),
        compression_type=kind,
        data_file=data_file,
        nb_snapshots=0 if data_file is not None else base.nb_snapshots,
        feature_names=draw(st.sampled_from([(), (FeatureName(1, 9, b"nine"),)])),
        further=draw(st.sampled_from([b"", b"\x01", b"\0\0\0\0\0\0\0\0\x05"])),
    )


@given(headers())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(header: Header) -> None:
    """Round trip, unknown extensions, bits, fields and names included."""
    data = serialize(header)
    file_size = 8 << header.cluster_bits
    assert header == parse(data.ljust(header.cluster_size, b"\0"), file_size=file_size)
    assert data == serialize(parse(data, file_size=file_size))


def test_truncation_at_every_byte_is_a_format_error_or_the_same_header() -> None:
    """Cut anywhere, the header is refused, or only the end mark of the extensions is lost."""
    header = replace(PLAIN, backing_file="base.img", backing_format="raw", extensions=(Extension(77, b"seven"),))
    data = serialize(header)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            parse(data[:length], file_size=FILE_SIZE)
    for length in range(len(serialize(PLAIN_V2))):
        try:
            found = parse(PLAIN_V2_BYTES[:length], file_size=FILE_SIZE)
        except FormatError:
            assert length < 72
        else:
            assert found == PLAIN_V2


@given(st.binary(max_size=300), st.integers(0, 1 << 64))
@settings(max_examples=300, deadline=None)
def test_any_bytes_behind_the_magic_are_a_header_or_a_typed_error(tail: bytes, file_size: int) -> None:
    """Fuzz: no other exception than those of the tree."""
    with suppress(FormatError):
        parse(b"QFI\xfb\0\0\0\3" + tail, file_size=file_size)


@given(st.lists(st.tuples(st.sampled_from(sorted(OFFSETS)), st.integers(0, 2**64 - 1), st.integers(0, 63)), max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_field_may_hold_anything(changes: list[tuple[str, int, int]]) -> None:
    """Fuzz by field: what is accepted keeps the limits and can be written again."""
    data = bytearray(serialize(replace(PLAIN, backing_file="base.img")).ljust(65536, b"\0"))
    for name, value, shift in changes:
        offset, layout = OFFSETS[name]
        struct.pack_into(layout, data, offset, (value >> shift) % (1 << 8 * struct.calcsize(layout)))
    try:
        header = parse(bytes(data), file_size=FILE_SIZE)
    except FormatError:
        return
    assert header.l1_size * 8 <= 32 * MIB
    assert header.refcount_table_clusters << header.cluster_bits <= 8 * MIB
    assert header.geometry.l1_entries_for(header.size) <= header.l1_size
    assert parse(serialize(header).ljust(65536, b"\0"), file_size=FILE_SIZE) == header


HOSTILE: list[tuple[str, bytes, type[FormatError]]] = [
    ("other magic", b"QFI\xfa" + bytes(500), FormatError),
    ("empty", b"", FormatError),
    ("version 1", altered(version=1), UnsupportedFeatureError),
    ("version 4", altered(version=4), UnsupportedFeatureError),
    ("cluster of 256 bytes", altered(cluster_bits=8), FormatError),
    ("cluster of 4 MiB", altered(cluster_bits=22), LimitError),
    ("cluster of 2^4294967295", altered(cluster_bits=2**32 - 1), LimitError),
    ("negative size", altered(size=2**64 - 1), LimitError),
    ("size beyond the L1 limit", altered(size=2**62), LimitError),
    ("L1 too small for the size", altered(size=2**40), FormatError),
    ("L1 empty", altered(l1_size=0), FormatError),
    ("L1 of 16 GiB", altered(l1_size=2**31), LimitError),
    ("L1 one entry too large", altered(l1_size=4 * MIB + 1), LimitError),
    ("L1 not aligned", altered(l1_table_offset=0x30001), FormatError),
    ("L1 beyond 2^56", altered(l1_table_offset=2**56), FormatError),
    ("L1 wraps around", altered(l1_table_offset=2**64 - 65536), FormatError),
    ("L1 behind the file", altered(l1_table_offset=2**40), FormatError),
    ("L1 in the header", altered(l1_table_offset=0), FormatError),
    ("L1 on the refcount table", altered(l1_table_offset=0x10000), FormatError),
    ("no refcount table", altered(refcount_table_clusters=0), FormatError),
    ("refcount table of 8 MiB + 1 cluster", altered(refcount_table_clusters=129), LimitError),
    ("refcount table of 2^48", altered(refcount_table_clusters=2**32 - 1), LimitError),
    ("refcount table not aligned", altered(refcount_table_offset=0x10200), FormatError),
    ("refcount table in the header", altered(refcount_table_offset=0), FormatError),
    ("refcount table over L1", altered(refcount_table_clusters=3), FormatError),
    ("refcount width 128", altered(refcount_order=7), FormatError),
    ("snapshots 65537", altered(nb_snapshots=65537, snapshots_offset=0x50000), LimitError),
    ("snapshot table not aligned", altered(nb_snapshots=1, snapshots_offset=0x50001), FormatError),
    ("snapshot table in L1", altered(nb_snapshots=1, snapshots_offset=0x30000), FormatError),
    ("snapshot table behind the file", altered(nb_snapshots=1, snapshots_offset=2**50), FormatError),
    ("AES", altered(crypt_method=1), UnsupportedFeatureError),
    ("LUKS", altered(crypt_method=2), UnsupportedFeatureError),
    ("encryption 3", altered(crypt_method=3), FormatError),
    ("header shorter than version 3", altered(header_length=72), FormatError),
    ("header length not a multiple of 8", altered(header_length=107), FormatError),
    ("header longer than the cluster", altered(header_length=65544), FormatError),
    ("backing name 1024 bytes", altered(backing_offset=1024, backing_length=1024), LimitError),
    ("backing name of 4 GiB", altered(backing_offset=1024, backing_length=2**32 - 1), LimitError),
    ("backing name across the cluster", altered(backing_offset=65530, backing_length=10), FormatError),
    ("backing name in the header", altered(backing_offset=16, backing_length=10), FormatError),
    ("backing name beyond everything", altered(backing_offset=2**64 - 1, backing_length=10), FormatError),
    ("backing name with a zero byte", altered(backing_offset=4096, backing_length=10), FormatError),
    ("unknown incompatible bit", altered(incompatible=1 << 5), UnsupportedFeatureError),
    ("all incompatible bits", altered(incompatible=2**64 - 1), UnsupportedFeatureError),
    ("extended L2, 8 KiB clusters", altered(incompatible=16, cluster_bits=13), FormatError),
    ("compression bit without type", altered(incompatible=8), FormatError),
    ("compression type without bit", altered(compression_type=1), FormatError),
    ("compression type 2", altered(incompatible=8, compression_type=2), UnsupportedFeatureError),
    ("raw data file without data file", altered(autoclear=2), FormatError),
    ("bitmaps bit without extension", altered(autoclear=1), FormatError),
    ("data file and snapshots", altered(incompatible=4, nb_snapshots=1, snapshots_offset=0x50000), FormatError),
    (
        "raw data file and backing file",
        altered(replace(PLAIN, backing_file="b"), incompatible=4, autoclear=2),
        FormatError,
    ),
    ("extension beyond the header", altered(PLAIN_V2)[:72] + struct.pack(">II", 7, 2**32 - 1), FormatError),
    ("encryption extension", serialize(replace(PLAIN, extensions=(Extension(0x0537BE77, bytes(16)),))), FormatError),
    (
        "two bitmaps extensions",
        serialize(replace(PLAIN, extensions=(Extension(0x23852875, b""),) * 2)),
        FormatError,
    ),
    ("format name of 16 bytes", serialize(replace(PLAIN, backing_format="x" * 16)), FormatError),
    ("format name with a zero byte", serialize(replace(PLAIN, backing_format="ra\0w")), FormatError),
]


@pytest.mark.parametrize(("data", "error"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_hostile_header_is_refused_with_its_type(data: bytes, error: type[FormatError]) -> None:
    """Exactly this class: a limit is no format error, an unknown feature is named."""
    with pytest.raises(FormatError) as caught:
        read(data)
    assert type(caught.value) is error


def test_unknown_features_are_named_as_the_image_names_them() -> None:
    """The feature name table comes first; a bit without a name is given by its number."""
    header = replace(PLAIN, feature_names=(FeatureName(0, 7, b"time travel"), FeatureName(1, 8, b"not this one")))
    with pytest.raises(UnsupportedFeatureError, match="time travel") as caught:
        read(altered(header, incompatible=1 << 7 | 1 << 8))
    assert caught.value.features == ("time travel", "incompatible feature bit 8")


def test_the_dirty_and_corrupt_bits_are_for_the_driver_to_judge() -> None:
    """They parse, and can be asked for."""
    header = read(altered(incompatible=3))
    assert header.is_dirty
    assert header.is_corrupt
    assert not PLAIN.is_dirty


def test_unknown_autoclear_bits_are_cleared_before_writing() -> None:
    """Known ones stay."""
    header = replace(PLAIN, autoclear=Autoclear(0xF0 | Autoclear.BITMAPS))
    assert for_writing(header).autoclear == Autoclear.BITMAPS


def test_bitmaps_are_believed_only_while_their_bit_is_set() -> None:
    """Without the autoclear bit the extension is kept but stale."""
    bitmaps = BitmapsExtension(2, 0x70000, 64)
    stale = replace(PLAIN, extensions=(serialize_bitmaps(bitmaps),))
    assert read(serialize(stale)).bitmaps is None
    valid = replace(stale, autoclear=Autoclear.BITMAPS)
    assert bitmaps == read(serialize(valid)).bitmaps
    assert stale.extensions == read(serialize(stale)).extensions


@pytest.mark.parametrize(
    "bitmaps", [BitmapsExtension(0, 65536, 1), BitmapsExtension(65536, 65536, 1), BitmapsExtension(1, 1, 1)]
)
def test_a_hostile_bitmaps_extension_is_refused(bitmaps: BitmapsExtension) -> None:
    """None, too many, or a directory off its cluster boundary."""
    header = replace(PLAIN, autoclear=Autoclear.BITMAPS, extensions=(serialize_bitmaps(bitmaps),))
    with pytest.raises(FormatError):
        read(serialize(header))


def test_a_file_name_that_is_not_utf8_survives() -> None:
    """Names are bytes of the operating system."""
    data = altered(replace(PLAIN, backing_file="base"))
    name = data.rindex(b"base")
    header = read(data[:name] + b"\xff\xfe\x80e")
    assert header.backing_file == "\udcff\udcfe\udc80e"
    assert serialize(header)[name:] == b"\xff\xfe\x80e"


def test_strings_that_do_not_fit_into_the_cluster_are_refused_when_writing() -> None:
    """A 512-byte cluster has no room for a long name; 1024 bytes are too many for any."""
    small = replace(PLAIN, cluster_bits=9)
    assert len(serialize(replace(small, backing_file="x" * 350))) <= 512
    for header in (replace(small, backing_file="x" * 400), replace(PLAIN, backing_file="x" * 1024)):
        with pytest.raises(FormatError):
            serialize(header)


def test_the_feature_name_table_is_written_for_version_3_only() -> None:
    """And only into clusters of 4 KiB and more."""
    mark = ExtensionType.FEATURE_NAMES.to_bytes(4, "big")
    assert mark in serialize(PLAIN)
    assert mark not in serialize(PLAIN_V2)
    assert mark not in serialize(replace(PLAIN, cluster_bits=11))


def test_the_probe_knows_versions_2_and_up() -> None:
    """Version 1 is another format; short input is none."""
    assert is_qcow2(serialize(PLAIN))
    assert is_qcow2(serialize(PLAIN_V2)[:8])
    assert not is_qcow2(b"QFI\xfb\0\0\0\1")
    assert not is_qcow2(b"QFI\xfb")
    assert bytes_needed(serialize(PLAIN)[:512]) == 65536
