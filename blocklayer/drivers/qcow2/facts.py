"""What ``info`` tells of an image beyond size and names; keys as in QEMU's ImageInfoSpecificQCow2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.features import Autoclear, Compatible, Incompatible

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.header import Header


def facts(header: Header) -> dict[str, object]:
    """JSON-able facts."""
    if header.version == 2:
        return {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
    found: dict[str, object] = {
        "compat": "1.1",
        "compression-type": "zstd" if header.compression_type else "zlib",
        "lazy-refcounts": Compatible.LAZY_REFCOUNTS in header.compatible,
        "refcount-bits": 1 << header.refcount_order,
        "corrupt": Incompatible.CORRUPT in header.incompatible,
        "extended-l2": Incompatible.EXTENDED_L2 in header.incompatible,
    }
    if header.has_data_file:
        found["data-file"] = header.data_file
        found["data-file-raw"] = Autoclear.DATA_FILE_RAW in header.autoclear
    return found
