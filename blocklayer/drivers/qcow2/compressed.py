"""Compressed clusters: reading them through a small cache, and packing new ones behind each other.

Compressed data are byte runs in host clusters that several of them share, each with one reference. A new run continues
where the last one ended if its cluster has room (or the next cluster taken happens to follow), else it starts a cluster.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import LimitError
from blocklayer.base.ranges import div_round_up
from blocklayer.base.units import MIB
from blocklayer.codec.qcow2.compress import Compressor

if TYPE_CHECKING:
    from blocklayer.aio.engine import Engine
    from blocklayer.drivers.qcow2.allocator import Allocator
    from blocklayer.drivers.qcow2.image_file import ImageFile

CACHE_BYTES: Final = 4 * MIB
"""Decompressed clusters to keep: reads smaller than a cluster come in sequence."""


class CompressedClusters:
    """Compresses and decompresses in the engine's threads."""

    def __init__(self, image: ImageFile, engine: Engine) -> None:
        """Nothing is cached."""
        self._image = image
        self._engine = engine
        self._compressor = Compressor(image.header.compression_type, image.geometry.cluster_size)
        self._cached: dict[int, bytes] = {}
        self._count_max = max(2, CACHE_BYTES // image.geometry.cluster_size)
        self._forgotten = 0
        """How often ``forget`` was called: what was read before it must not be cached after it."""
        self._tail = 0
        self._lock = asyncio.Lock()

    async def read(self, host_offset: int, length: int) -> bytes:
        """The whole guest cluster stored in ``length`` bytes at ``host_offset``."""
        known = self._cached.get(host_offset)
        if known is not None:
            return known
        forgotten = self._forgotten
        packed = await self._image.file.read(host_offset, length)
        cluster = await self._engine.call(self._compressor.decompress, packed, weight=self._image.geometry.cluster_size)
        if forgotten == self._forgotten:
            if len(self._cached) >= self._count_max:
                del self._cached[next(iter(self._cached))]
            self._cached[host_offset] = cluster
        return cluster

    def forget(self) -> None:
        """Host space of compressed clusters was freed: what is cached by host offset is not to be trusted."""
        self._cached.clear()
        self._forgotten += 1
        self._tail = 0

    async def compress(self, data: memoryview) -> bytes | None:
        """The packed cluster, or None if it does not get smaller."""
        cluster = bytearray(self._image.geometry.cluster_size)
        cluster[: len(data)] = data
        return await self._engine.call(self._compressor.compress, cluster, weight=len(cluster))

    async def place(self, allocator: Allocator, length: int) -> int:
        """Room for ``length`` bytes: answers its host offset; every cluster it touches has one reference more."""
        size = self._image.geometry.cluster_size
        async with self._lock:
            start = self._tail
            room = -start % size
            if not await self._share_tail(allocator, room):
                room = 0
            missing = div_round_up(length - room, size) if length > room else 0
            if missing:
                try:
                    clusters = await allocator.take_exactly(missing)
                except BaseException:
                    if room:
                        allocator.untake(start - start % size, 1)
                    raise
                if room and clusters.offset != start + room:
                    allocator.untake(start - start % size, 1)
                    room = 0
                    if missing < div_round_up(length, size):
                        allocator.untake(clusters.offset, clusters.count)
                        clusters = await allocator.take_exactly(div_round_up(length, size))
                if not room:
                    start = clusters.offset
            self._tail = start + length
            return start

    async def _share_tail(self, allocator: Allocator, room: int) -> bool:
        if not room:
            return False
        try:
            await allocator.share(self._tail - self._tail % self._image.geometry.cluster_size)
        except LimitError:
            return False
        return True

    def references(self, host_offset: int, length: int) -> tuple[int, int]:
        """``(first cluster's offset, number of clusters)`` that a packed run touches."""
        size = self._image.geometry.cluster_size
        start = host_offset - host_offset % size
        return start, div_round_up(host_offset + length - start, size)
