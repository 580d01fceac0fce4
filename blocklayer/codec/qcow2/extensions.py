"""Header extensions of a qcow2 image: the list behind the fixed part of the header.

Layer ``codec``: pure. Each is a type, a length, the data, and padding to a multiple of 8 bytes; type 0 ends the list,
and so does the end of the area. Types that are not known are kept byte for byte. Source: qcow2, "Header extensions".
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import FormatError, LimitError
from blocklayer.base.ranges import align_up
from blocklayer.codec.qcow2.geometry import BITMAP_DIRECTORY_BYTES_MAX, BITMAPS_MAX, HOST_OFFSET_END

if TYPE_CHECKING:
    from collections.abc import Iterable


class ExtensionType(enum.IntEnum):
    """The types that the specification names."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


class Extension(NamedTuple):
    """One extension: its type and its data without padding."""

    type: int
    data: bytes


class BitmapsExtension(NamedTuple):
    """Where the stored dirty bitmaps are listed. Offset and size in bytes."""

    nb_bitmaps: int
    directory_offset: int
    directory_size: int


_HEAD = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
_ONCE: Final = frozenset(ExtensionType)


def split_extensions(area: bytes) -> tuple[Extension, ...]:
    """The extensions in ``area``, up to the end mark or to the area's end.

    Raises ``FormatError`` for one that does not fit, and for a known type that comes twice.
    """
    found: list[Extension] = []
    at = 0
    while at + _HEAD.size <= len(area):
        kind, length = _HEAD.unpack_from(area, at)
        at += _HEAD.size
        if kind == ExtensionType.END:
            break
        if length > len(area) - at:
            raise FormatError(f"header extension {kind:#010x} of {length} bytes does not fit into the header")
        if kind in _ONCE and any(kind == part.type for part in found):
            raise FormatError(f"header extension {ExtensionType(kind).name} comes twice")
        found.append(Extension(kind, area[at : at + length]))
        at += align_up(length, 8)
    return tuple(found)


def join_extensions(parts: Iterable[Extension]) -> bytes:
    """The bytes of ``parts`` and of the end mark; the length is a multiple of 8."""
    pieces = [_HEAD.pack(kind, len(data)) + data.ljust(align_up(len(data), 8), b"\0") for kind, data in parts]
    return b"".join(pieces) + bytes(_HEAD.size)


def parse_bitmaps(data: bytes, *, cluster_size: int) -> BitmapsExtension:
    """The bitmaps extension, checked. Raises ``FormatError`` or ``LimitError``."""
    if len(data) != _BITMAPS.size:
        raise FormatError(f"the bitmaps extension has {len(data)} bytes instead of {_BITMAPS.size}")
    count, reserved, size, offset = _BITMAPS.unpack(data)
    if reserved or not count:
        raise FormatError("the bitmaps extension lists no bitmaps or uses its reserved field")
    if count > BITMAPS_MAX or size > BITMAP_DIRECTORY_BYTES_MAX:
        raise LimitError(f"the bitmap directory lists {count} bitmaps in {size} bytes, more than is allowed")
    if offset % cluster_size or not 0 < offset < HOST_OFFSET_END:
        raise FormatError("the bitmap directory does not start on a cluster boundary", offset=offset)
    return BitmapsExtension(count, offset, size)


def serialize_bitmaps(bitmaps: BitmapsExtension) -> Extension:
    """The extension that ``parse_bitmaps`` reads."""
    data = _BITMAPS.pack(bitmaps.nb_bitmaps, 0, bitmaps.directory_size, bitmaps.directory_offset)
    return Extension(ExtensionType.BITMAPS, data)
