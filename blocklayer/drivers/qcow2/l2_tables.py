"""L1 and L2: which guest cluster is where. L1 is in memory (at most 32 MiB), L2 tables are cached whole.

The cache is bounded in bytes. Only tables that the file holds completely are dropped; if there are none, an ordered
flush makes some. A table that an allocation will publish into is pinned until it has.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import CorruptImageError
from blocklayer.codec.qcow2.entries import COPIED, decode_l1, encode_l1, load_table
from blocklayer.codec.qcow2.geometry import HOST_OFFSET_END
from blocklayer.codec.qcow2.plan import Role
from blocklayer.drivers.qcow2.dirty import WordTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklayer.drivers.qcow2.allocator import Allocator
    from blocklayer.drivers.qcow2.image_file import ImageFile

TABLES_MIN: Final = 4
"""Fewest tables to keep, however small the cache: a request may need several at once."""


class L2Tables:
    """The mapping tables of one image; ``allocator`` is None while it is read-only."""

    def __init__(self, image: ImageFile, *, cache_bytes: int) -> None:
        """``load`` must be awaited before anything else."""
        self._image = image
        self._geometry = image.geometry
        self.allocator: Allocator | None = None
        self.l1 = WordTable(Role.MAPPING, 0, array("Q"))
        self.cached: dict[int, WordTable] = {}
        self._count_max = max(TABLES_MIN, cache_bytes // self._geometry.cluster_size)
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Read L1."""
        header = self._image.header
        data = await self._image.file.read(header.l1_table_offset, header.l1_size * 8)
        self.l1 = WordTable(Role.MAPPING, header.l1_table_offset, load_table(data))

    def tables(self) -> Iterator[WordTable]:
        """Everything that may be dirty here."""
        yield self.l1
        yield from self.cached.values()

    async def table(self, l1_index: int) -> WordTable | None:
        """The L2 table, loaded if need be; None if there is none. Raises ``CorruptImageError``."""
        known = self.cached.get(l1_index)
        if known is not None:
            return known
        async with self._lock:
            return self.cached.get(l1_index) or await self._read(l1_index)

    async def _read(self, l1_index: int) -> WordTable | None:
        if l1_index >= len(self.l1.words) or not self.l1.words[l1_index]:
            return None
        offset = decode_l1(self._geometry, self.l1.words[l1_index])
        if not offset or offset >= HOST_OFFSET_END:
            raise CorruptImageError(f"L1 entry {l1_index} points to {offset:#x}")
        if offset in self._image.claimed:
            raise CorruptImageError(f"L1 entry {l1_index} points to {offset:#x}, where something else is")
        await self._make_room()
        words = load_table(await self._image.file.read(offset, self._geometry.cluster_size))
        self._check_overlap(words, l1_index)
        table = self.cached[l1_index] = WordTable(Role.MAPPING, offset, words)
        return table

    def _check_overlap(self, words: array[int], l1_index: int) -> None:
        """Data clusters must not lie where metadata are, or a guest's write would change them."""
        if self._image.places is not None:
            step = self._geometry.l2_entry_words
            if self._image.places.meet(words if step == 1 else words[::step]):
                raise CorruptImageError(f"L2 table {l1_index} maps guest data onto metadata of the image")

    def try_writable_table(self, l1_index: int) -> WordTable | None:
        """As ``writable_table``, at once: the table is cached, and the image's own."""
        table = self.cached.get(l1_index)
        if table is None or not self.l1.words[l1_index] & COPIED:
            return None
        table.pins += 1
        return table

    async def writable_table(self, l1_index: int) -> WordTable:
        """The L2 table, pinned, made or copied if need be. Give it to ``unpin`` afterwards."""
        async with self._lock:
            table = self.cached.get(l1_index) or await self._read(l1_index)
            if table is None:
                table = await self._place(l1_index, array("Q", bytes(self._geometry.cluster_size)))
            elif not self.l1.words[l1_index] & COPIED:
                old = table.offset
                del self.cached[l1_index]
                table = await self._place(l1_index, table.words)
                self._image.forget_metadata(old)
                if self.allocator is not None:
                    self.allocator.free(old, 1)
            table.pins += 1
            return table

    async def _place(self, l1_index: int, words: array[int]) -> WordTable:
        """A new table with ``words``, in a new cluster, known to L1."""
        if self.allocator is None:
            raise CorruptImageError("a read-only image was asked for a new L2 table")
        await self._make_room()
        clusters = await self.allocator.take(1)
        table = self.cached[l1_index] = WordTable(Role.MAPPING, clusters.offset, words, fresh=True)
        self._image.note_metadata(clusters.offset)
        self.l1.words[l1_index] = encode_l1(clusters.offset)
        self.l1.touch(l1_index)
        return table

    def unpin(self, table: WordTable) -> None:
        """The table may be dropped again."""
        table.pins -= 1

    async def _make_room(self) -> None:
        if len(self.cached) < self._count_max:
            return
        if not self._drop_one():
            await self._image.flush()
            self._drop_one()

    def _drop_one(self) -> bool:
        for key, table in self.cached.items():
            if table.can_be_dropped:
                del self.cached[key]
                return True
        return False
