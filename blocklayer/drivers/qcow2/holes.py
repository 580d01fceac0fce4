"""Whether clusters that are in use may lie in holes of the image file, because nothing was ever written to them.

preallocation=metadata maps every cluster of the disk and leaves it to the file system that they read as zeroes. Who
knows that need not read them; but to ask the file about every run of data costs more than it saves on other images.
So it is asked only if noticeably more clusters count as used than the file system stores (the measure is QEMU's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.base.errors import BlockError
from blocklayer.base.ranges import div_round_up
from blocklayer.codec.qcow2.entries import load_table
from blocklayer.codec.qcow2.refcounts import RefcountBlock

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image_file import ImageFile


async def has_unwritten_clusters(image: ImageFile) -> bool:
    """Judged by what the file says of itself; False also if it cannot be told."""
    size = image.geometry.cluster_size
    occupied = await image.file.node.driver.allocated_size()
    if occupied is None or image.geometry.data_file:
        return False
    stored, clusters = occupied // size, image.file.size // size
    enough = max(stored * 10 // 9, stored + 2)
    try:
        return clusters >= enough and await _count_used(image, clusters, enough) >= enough
    except BlockError:
        return False  # whoever needs the counts will report what is wrong with them


async def _count_used(image: ImageFile, clusters: int, enough: int) -> int:
    """How many of the first ``clusters`` have a count; stops at ``enough``."""
    header, geometry = image.header, image.geometry
    entries = geometry.refcount_block_entries
    length = min(header.refcount_table_clusters * geometry.cluster_size, div_round_up(clusters, entries) * 8)
    used = 0
    for number, offset in enumerate(load_table(await image.file.read(header.refcount_table_offset, length))):
        if offset and used < enough:
            block = RefcountBlock(header.refcount_order, await image.file.read(offset, geometry.cluster_size))
            used += block.used(min(entries, clusters - number * entries))
    return used
