"""Opening: header, children, and what has to happen before the first write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocklayer.base.errors import CorruptImageError, FormatError
from blocklayer.base.options import Options, build
from blocklayer.base.units import SECTOR
from blocklayer.codec.qcow2.features import Autoclear, Compatible
from blocklayer.codec.qcow2.header import Header, bytes_needed, for_writing, parse
from blocklayer.drivers.qcow2.image_file import ImageFile
from blocklayer.drivers.qcow2.options import Qcow2Options
from blocklayer.drivers.qcow2.repair import repair_refcounts

if TYPE_CHECKING:
    from blocklayer.aio.engine import Engine
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import Opener


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """What the driver is made of."""

    image: ImageFile
    backing: Child | None
    engine: Engine
    options: Qcow2Options
    writable: bool
    lazy: bool


async def open_image(options: Options, opener: Opener) -> OpenedImage:
    """Open everything but the tables. Raises ``FormatError`` kinds and what opening children raises."""
    wanted = build(Qcow2Options, options)
    file = await opener.child("file")
    opener.filename = opener.filename or file.node.filename
    writable = not (opener.read_only or wanted.repairing)
    try:
        header = await read_header(file)
    except FormatError as error:
        error.filename = error.filename or opener.filename
        raise
    data = await _data_file(opener, header) if header.has_data_file else file
    image = ImageFile(file, data, header)
    if writable:
        await _make_writable(image)
    backing = await _backing(opener, header)
    lazy = wanted.lazy_refcounts
    if lazy is None:
        lazy = Compatible.LAZY_REFCOUNTS in header.compatible
    return OpenedImage(image, backing, opener.engine, wanted, writable, lazy and header.version > 2)


async def read_header(file: Child) -> Header:
    """Read and check the header."""
    head = bytes(await file.read(0, min(SECTOR, file.size)))
    data = bytes(await file.read(0, min(bytes_needed(head), file.size)))
    return parse(data, file_size=file.size)


async def _make_writable(image: ImageFile) -> None:
    """Refuse a corrupt image, repair a dirty one, clear autoclear bits that we cannot keep true."""
    header = image.header
    if header.is_corrupt:
        raise CorruptImageError("it is marked corrupt; check and repair it, or open it read-only")
    if header.is_dirty:
        await repair_refcounts(image)
    keeps = for_writing(image.header).autoclear & ~Autoclear.BITMAPS
    if keeps != image.header.autoclear:
        await image.write_header_now(autoclear=keeps)


async def _data_file(opener: Opener, header: Header) -> Child:
    if opener.has("data-file"):
        return await opener.child("data-file")
    if header.data_file is None:
        raise FormatError(
            "its data lie in another file, but it does not name it; pass data_file", filename=opener.filename
        )
    return await opener.reference("data-file", header.data_file, format="file", writable=not opener.read_only)


async def _backing(opener: Opener, header: Header) -> Child | None:
    if opener.has("backing"):
        return await opener.optional_child("backing")
    if header.backing_file is None:
        return None
    return await opener.reference("backing", header.backing_file, format=header.backing_format)
