"""Feature bits of a qcow2 header, and the names that a header gives them.

Layer ``codec``: pure. Three bit fields of 64 bits say how a program that does not know a feature must behave:

    incompatible  refuse the image               compatible  ignore the bit
    autoclear     clear the bit before the first write; what it described is then known to be stale

Source: qcow2, "Header" (bytes 72 to 95) and "Feature name table".
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from blocklayer.base.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Incompatible(enum.IntFlag, boundary=enum.KEEP):
    """Bytes 72 to 79. Unknown bits are kept in the value so that they can be named."""

    NONE = 0
    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(enum.IntFlag, boundary=enum.KEEP):
    """Bytes 80 to 87. Unknown bits are harmless and written back."""

    NONE = 0
    LAZY_REFCOUNTS = 1 << 0


class Autoclear(enum.IntFlag, boundary=enum.KEEP):
    """Bytes 88 to 95. Unknown bits are cleared by ``for_writing``."""

    NONE = 0
    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


INCOMPATIBLE_KNOWN: Final = 0b11111
AUTOCLEAR_KNOWN: Final = 0b11


class FeatureName(NamedTuple):
    """One entry of the feature name table: ``field`` 0 incompatible, 1 compatible, 2 autoclear; ``bit`` 0 to 63."""

    field: int
    bit: int
    name: bytes


STANDARD_NAMES: Final = (
    FeatureName(0, 0, b"dirty bit"),
    FeatureName(0, 1, b"corrupt bit"),
    FeatureName(0, 2, b"external data file"),
    FeatureName(0, 3, b"compression type"),
    FeatureName(0, 4, b"extended L2 entries"),
    FeatureName(1, 0, b"lazy refcounts"),
    FeatureName(2, 0, b"bitmaps"),
    FeatureName(2, 1, b"raw external data"),
)
"""The names that QEMU writes, in its order."""

# Feature name table entry (qcow2, "Feature name table"): byte 0 field, byte 1 bit, bytes 2 to 47 name, zero padded.
_ENTRY = struct.Struct(">BB46s")
_STANDARD_BITS: Final = frozenset(name[:2] for name in STANDARD_NAMES)


def parse_names(data: bytes) -> tuple[FeatureName, ...]:
    """Entries for bits that the specification does not name; a piece of an entry at the end is ignored."""
    whole = len(data) - len(data) % _ENTRY.size
    entries = (FeatureName(*fields) for fields in _ENTRY.iter_unpack(data[:whole]))
    foreign = [entry for entry in entries if entry[:2] not in _STANDARD_BITS]
    return tuple(entry._replace(name=entry.name.split(b"\0")[0]) for entry in foreign)


def serialize_names(foreign: Iterable[FeatureName]) -> bytes:
    """The table with the standard names and ``foreign`` ones."""
    return b"".join(_ENTRY.pack(*name) for name in (*STANDARD_NAMES, *foreign))


def refuse_unknown(incompatible: int, names: Iterable[FeatureName]) -> None:
    """Raise ``UnsupportedFeatureError`` naming each unknown incompatible bit; the image's own names come first."""
    unknown = incompatible & ~INCOMPATIBLE_KNOWN
    if not unknown:
        return
    given = {name.bit: name.name.decode(errors="backslashreplace") for name in names if name.field == 0}
    bits = [bit for bit in range(64) if unknown >> bit & 1]
    features = tuple(given.get(bit) or f"incompatible feature bit {bit}" for bit in bits)
    raise UnsupportedFeatureError(
        f"the image uses features that are not known here: {', '.join(features)}", features=features
    )
