"""What ``info`` tells of an image beyond size and names; keys and order as in QEMU's ImageInfoSpecificQCow2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import FormatError
from blocklayer.base.units import KIB
from blocklayer.codec.qcow2.features import Autoclear, Compatible, Incompatible
from blocklayer.codec.qcow2.geometry import SNAPSHOT_TABLE_BYTES_MAX
from blocklayer.codec.qcow2.snapshots import BITMAP_AUTO, BITMAP_IN_USE, parse_bitmap_directory, parse_snapshots

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.snapshots import Snapshot
    from blocklayer.drivers.qcow2.image_file import ImageFile

SNAPSHOT_READ: Final = 64 * KIB
"""First read of the snapshot table, whose length is not recorded; doubled until the table fits."""

_BITMAP_FLAGS: Final = {BITMAP_IN_USE: "in-use", BITMAP_AUTO: "auto"}


async def facts(image: ImageFile) -> dict[str, object]:
    """JSON-able facts. Raises ``FormatError`` and ``LimitError`` for a bitmap directory that breaks the format."""
    header = image.header
    kind = "zstd" if header.compression_type else "zlib"
    found: dict[str, object] = {"compat": "0.10" if header.version == 2 else "1.1", "compression-type": kind}
    if header.version > 2:
        found["lazy-refcounts"] = Compatible.LAZY_REFCOUNTS in header.compatible
    if header.bitmaps is not None:
        found["bitmaps"] = await _bitmaps(image)
    found["refcount-bits"] = 1 << header.refcount_order
    if header.has_data_file:
        found["data-file"] = header.data_file
        found["data-file-raw"] = Autoclear.DATA_FILE_RAW in header.autoclear
    if header.version > 2:
        found["corrupt"] = Incompatible.CORRUPT in header.incompatible
        found["extended-l2"] = Incompatible.EXTENDED_L2 in header.incompatible
    return found


async def _bitmaps(image: ImageFile) -> list[dict[str, object]]:
    extension = image.header.bitmaps
    if extension is None:
        return []
    data = await _read(image, extension.directory_offset, extension.directory_size)
    return [
        {
            "flags": [word for bit, word in _BITMAP_FLAGS.items() if bitmap.flags & bit],
            "name": bitmap.name.decode(errors="surrogateescape"),
            "granularity": 1 << bitmap.granularity_bits,
        }
        for bitmap in parse_bitmap_directory(data, count=extension.nb_bitmaps)
    ]


async def read_snapshots(image: ImageFile) -> tuple[Snapshot, ...]:
    """The internal snapshots. Raises ``FormatError`` and ``LimitError``."""
    header, length = image.header, SNAPSHOT_READ
    if not header.nb_snapshots:
        return ()
    while True:
        data = await _read(image, header.snapshots_offset, length)
        parsed = parse_snapshots(data, count=header.nb_snapshots)
        if parsed is not None:
            return parsed[0]
        if len(data) < length or length > SNAPSHOT_TABLE_BYTES_MAX:
            raise FormatError("the snapshot table is cut short", offset=header.snapshots_offset)
        length *= 2


async def _read(image: ImageFile, offset: int, length: int) -> bytes:
    """Bytes of the file; fewer at its end."""
    return bytes(await image.file.read(offset, max(0, min(length, image.file.size - offset))))
