"""Host clusters: who counts them, where free ones are, and when freed ones come back.

The refcount table (all in memory, at most 8 MiB) names refcount blocks, which are cached. A cluster is taken by raising
its count in memory. One that is freed keeps its count until the mapping that dropped it is durable and its grace period
is over (``settle``); only then may it be taken again.

New blocks describe themselves: block ``n`` is the first cluster of the region that it counts. A table that is too short
moves behind everything, together with the blocks that count its new place.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import CorruptImageError, LimitError, NoSpaceError
from blocklayer.base.ranges import align_up, div_round_up
from blocklayer.codec.qcow2.entries import load_table
from blocklayer.codec.qcow2.plan import Role, Step
from blocklayer.codec.qcow2.refcounts import RefcountBlock
from blocklayer.drivers.qcow2.dirty import WordTable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from blocklayer.drivers.qcow2.image_file import ImageFile
    from blocklayer.graph.grace import GracePeriods

_SECTOR = 512

RESERVE: Final = 16
"""Clusters that are taken together for requests of one cluster each; what is left of them goes back at each flush."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """``count`` clusters from host ``offset``; ``virgin``: never used, beyond the old end of the file."""

    offset: int
    count: int
    virgin: bool


class BlockTable(WordTable):
    """A refcount block as something to flush: bytes instead of words."""

    __slots__ = ("block",)

    def __init__(self, offset: int, block: RefcountBlock, *, fresh: bool = False) -> None:
        """``block`` holds the counters."""
        super().__init__(Role.REFCOUNT_RAISE, offset, array("Q"), fresh=fresh)
        self.block = block

    def touch_counters(self, index: int, count: int) -> None:
        """Counters ``[index, index + count)`` changed."""
        first = (index << self.block.order) >> 3
        last = ((index + count << self.block.order) - 1) >> 3
        self.dirty.update(range(first // _SECTOR, last // _SECTOR + 1))

    def take(self) -> Iterator[Step]:
        """See ``WordTable.take``."""
        data = self.block.data
        if self.fresh:
            yield Step(Role.NEW, self.offset, bytes(data))
        else:
            for sector in sorted(self.dirty):
                start = sector * _SECTOR
                yield Step(self.role, self.offset + start, bytes(data[start : start + _SECTOR]))
        self.fresh = False
        self.dirty.clear()

    def restore(self, step: Step) -> None:
        """See ``WordTable.restore``."""
        if step.role is Role.NEW:
            self.fresh = True
        else:
            first = (step.offset - self.offset) // _SECTOR
            self.dirty.update(range(first, first + div_round_up(len(step.data), _SECTOR)))


class Allocator:
    """Takes and gives back host clusters of one writable image."""

    def __init__(self, image: ImageFile, grace: GracePeriods, *, cache_bytes: int) -> None:
        """``load`` must be awaited before anything else."""
        self._image = image
        self._grace = grace
        self._geometry = image.geometry
        self._blocks: dict[int, BlockTable] = {}
        self._blocks_max = max(4, cache_bytes // self._geometry.cluster_size)
        self._lock = asyncio.Lock()
        self._next = 0
        self._reserve: list[Clusters] = []  # counted already, last first; nothing points to them
        self._used_end = 0
        self._freed: list[tuple[int, int, int]] = []  # (offset, clusters, generation) since the last flush took them
        self._dropped: list[tuple[int, int, int]] = []  # the same, whose mapping is durably gone
        self.table = WordTable(Role.REFCOUNT_TABLE, 0, array("Q"))

    async def load(self) -> None:
        """Read the refcount table."""
        header = self._image.header
        length = header.refcount_table_clusters * self._geometry.cluster_size
        words = load_table(await self._image.file.read(header.refcount_table_offset, length))
        self.table = WordTable(Role.REFCOUNT_TABLE, header.refcount_table_offset, words)
        driver = self._image.file.node.driver
        self._used_end = align_up(self._image.file.size, self._geometry.cluster_size)
        self._zeroes_behind = driver.zero_init and driver.growable

    def tables(self) -> Iterator[WordTable]:
        """Everything that may be dirty here, for a flush that begins now."""
        self.return_reserve()
        yield self.table
        yield from self._blocks.values()

    # -- taking --------------------------------------------------------------------------------------------------

    def try_take(self, count: int) -> Clusters | None:
        """As ``take``, at once; None if that takes a block from the file, or a new one."""
        if count == 1 and self._reserve:
            return self._reserve.pop()
        region, index = divmod(self._next, self._geometry.refcount_block_entries)
        table = self._blocks.get(region)
        if table is None or self._lock.locked():
            return None
        found = table.block.find_free(index, 1)
        if found is None:
            return None
        if count > 1:
            return self._take(region, table, found, table.block.free_run(found, count))
        run = self._take(region, table, found, table.block.free_run(found, RESERVE))
        size = self._geometry.cluster_size
        places = range(run.offset + run.count * size - size, run.offset - size, -size)
        self._reserve = [Clusters(place, 1, run.virgin) for place in places]
        return self._reserve.pop()

    def return_reserve(self) -> None:
        """Before tables are written: what is counted but not in use is free again."""
        if not self._reserve:
            return
        last, first = self._reserve[0], self._reserve[-1]
        region, index = self._geometry.refcount_position(first.offset)
        table, count = self._blocks[region], len(self._reserve)
        self._reserve = []
        table.block.add(index, count, -1)
        table.touch_counters(index, count)
        self._next = min(self._next, first.offset >> self._geometry.cluster_bits)
        if self._used_end == last.offset + self._geometry.cluster_size:
            self._used_end = first.offset

    async def take(self, count: int) -> Clusters:
        """Up to ``count`` clusters in a row, at least one: the first ones that are free."""
        async with self._lock:
            while True:
                region, index = divmod(self._next, self._geometry.refcount_block_entries)
                table = await self._region(region)
                found = table.block.find_free(index, 1)
                if found is not None:
                    return self._take(region, table, found, table.block.free_run(found, count))
                self._next = (region + 1) * self._geometry.refcount_block_entries

    async def take_exactly(self, count: int) -> Clusters:
        """``count`` clusters in a row (for tables)."""
        async with self._lock:
            position = self._next
            entries = self._geometry.refcount_block_entries
            while True:
                region, index = divmod(position, entries)
                table = await self._region(region)
                found = table.block.find_free(index, min(count, entries))
                if found is not None and count <= entries:
                    return self._take(region, table, found, count, skipped_free=True)
                if count >= entries:  # a fresh region has its own block in front
                    return await self._take_behind(count)
                position = (region + 1) * entries

    def _take(self, region: int, table: BlockTable, index: int, count: int, *, skipped_free: bool = False) -> Clusters:
        first = region * self._geometry.refcount_block_entries + index
        self._check_place(first, count)
        table.block.add(index, count, 1)
        table.touch_counters(index, count)
        if first <= self._next or not skipped_free:
            self._next = first + count
        return self._clusters(first, count)

    def _check_place(self, first: int, count: int) -> None:
        """A cluster that counts as free must not hold metadata; then refcounts cannot be trusted."""
        if not first or self._image.holds_metadata(first << self._geometry.cluster_bits, count):
            offset = first << self._geometry.cluster_bits
            raise CorruptImageError("the refcounts say that clusters with metadata are free", offset=offset)

    def _clusters(self, first: int, count: int) -> Clusters:
        offset = first << self._geometry.cluster_bits
        virgin = self._zeroes_behind and offset >= self._used_end
        self._used_end = max(self._used_end, offset + (count << self._geometry.cluster_bits))
        return Clusters(offset, count, virgin)

    async def _take_behind(self, count: int) -> Clusters:
        """A long run behind everything else, with the blocks that count it in front of it."""
        geometry = self._geometry
        entries = geometry.refcount_block_entries
        region = len(self.table.words)
        while region and not self.table.words[region - 1]:
            region -= 1
        blocks = 1
        while blocks * entries < blocks + count:
            blocks += 1
        if region + blocks > len(self.table.words):
            await self._grow_table(region + blocks)
            return await self._take_behind(count)
        self._lay_out(region, blocks, blocks + count)
        return self._clusters(region * entries + blocks, count)

    def _lay_out(self, region: int, blocks: int, used: int) -> None:
        """Make ``blocks`` new blocks from ``region`` on, standing at its start, with ``used`` clusters counted."""
        geometry = self._geometry
        entries = geometry.refcount_block_entries
        first = region * entries
        for number in range(blocks):
            block = RefcountBlock(geometry.refcount_order, bytearray(geometry.cluster_size))
            block.add(0, max(0, min(entries, used - number * entries)), 1)
            offset = first + number << geometry.cluster_bits
            self._blocks[region + number] = BlockTable(offset, block, fresh=True)
            self.table.words[region + number] = offset
            self.table.touch(region + number)
            self._image.note_metadata(offset)
        self._clusters(first, used)

    async def _region(self, region: int) -> BlockTable:
        """The block that counts ``region``, made if there is none. Under the lock."""
        if region >= len(self.table.words):
            await self._grow_table(region + 1)
        if not self.table.words[region]:
            if (region + 1) * self._geometry.refcount_block_coverage > self._geometry.host_size_max:
                raise NoSpaceError("the image has reached its largest size", errno=27)
            self._lay_out(region, 1, 1)
            await self._make_room(region)
        return await self._block(region)

    async def _block(self, region: int) -> BlockTable:
        """A block that exists. Under the lock: two loads of one block at once would be two truths."""
        cached = self._blocks.get(region)
        if cached is not None:
            return cached
        offset = self.table.words[region]
        if offset & self._geometry.cluster_mask or not offset:
            raise CorruptImageError(f"refcount table entry {region} is {offset:#x}, which is no cluster")
        data = await self._image.file.read(offset, self._geometry.cluster_size)
        table = self._blocks[region] = BlockTable(offset, RefcountBlock(self._geometry.refcount_order, data))
        await self._make_room(region)
        return table

    async def _make_room(self, needed: int) -> None:
        """Keep to the cache's size: forget blocks that the file holds; if too many are dirty, let a flush write them."""
        self._forget_clean(needed)
        if len(self._blocks) > 2 * self._blocks_max:
            await self._image.flush()
            self._forget_clean(needed)

    def _forget_clean(self, needed: int) -> None:
        surplus = len(self._blocks) - self._blocks_max
        if surplus > 0:
            clean = [key for key, table in self._blocks.items() if table.can_be_dropped and key != needed]
            for key in clean[:surplus]:
                del self._blocks[key]

    async def _grow_table(self, regions: int) -> None:
        """Move the refcount table to a larger place behind everything else."""
        geometry = self._geometry
        entries = geometry.refcount_block_entries
        old_offset, old_clusters = self.table.offset, self._image.header.refcount_table_clusters
        first = len(self.table.words)
        while first and not self.table.words[first - 1]:
            first -= 1
        clusters = div_round_up(max(regions, len(self.table.words) * 3 // 2) * 8, geometry.cluster_size)
        while True:
            blocks = 1
            while blocks * entries < blocks + clusters:
                blocks += 1
            fits = first + blocks <= clusters * geometry.cluster_size // 8
            if fits:
                break
            clusters += 1
        if clusters > geometry.refcount_table_clusters_max:
            raise LimitError("the refcount table would exceed 8 MiB: the image has reached its largest size")
        words = array("Q", self.table.words)
        words.extend(array("Q", bytes(clusters * geometry.cluster_size - 8 * len(words))))
        self.table = WordTable(Role.REFCOUNT_TABLE, 0, words, fresh=True)
        self._lay_out(first, blocks, blocks + clusters)
        self.table.offset = (first * entries + blocks) << geometry.cluster_bits
        self.table.dirty.clear()
        self._image.change_header(refcount_table_offset=self.table.offset, refcount_table_clusters=clusters)
        self._image.note_metadata(self.table.offset, clusters)
        self._image.forget_metadata(old_offset, old_clusters)
        self.free(old_offset, old_clusters)

    # -- giving back ---------------------------------------------------------------------------------------------

    def untake(self, offset: int, count: int) -> None:
        """Give back clusters that no mapping ever pointed to; they are free after the next ``settle``."""
        self._dropped.append((offset, count, self._grace.close()))

    def free(self, offset: int, count: int) -> None:
        """``count`` clusters from ``offset`` lose one reference each: the mapping changed in memory just now."""
        self._freed.append((offset, count, self._grace.close()))

    async def share(self, offset: int) -> None:
        """One more reference to the cluster at ``offset``. Raises ``LimitError`` if the count is full."""
        async with self._lock:
            region, index = self._geometry.refcount_position(offset)
            table = await self._block_of(region)
            table.block.add(index, 1, 1)
            table.touch_counters(index, 1)

    def take_freed(self) -> list[tuple[int, int, int]]:
        """A flush begins: what was freed before it."""
        freed, self._freed = self._freed, []
        return freed

    def return_freed(self, freed: list[tuple[int, int, int]], *, durable: bool) -> None:
        """The flush has ended; ``durable`` if the mappings that dropped them are."""
        if durable:
            self._dropped.extend(freed)
        else:
            self._freed[:0] = freed

    @property
    def has_dropped(self) -> bool:
        """Whether ``settle`` may find something to do."""
        return bool(self._dropped)

    async def settle(self, punch: Callable[[int, int], Awaitable[None]] | None) -> None:
        """Lower the counts of dropped clusters whose grace period is over.

        ``punch(offset, length)`` gives the space of those that nobody else uses back to the file. It must come first:
        a cluster whose count is zero may be taken, and written, at any time.
        """
        dropped, self._dropped = self._dropped, []
        try:
            while dropped:
                offset, count, generation = dropped.pop()
                if not self._grace.has_ended(generation):
                    self._dropped.append((offset, count, generation))
                    continue
                _, index = self._geometry.refcount_position(offset)
                piece = min(count, self._geometry.refcount_block_entries - index)
                if piece < count:
                    rest = offset + (piece << self._geometry.cluster_bits)
                    dropped.append((rest, count - piece, generation))
                await self._settle_piece(offset, piece, generation, punch)
        finally:
            self._dropped.extend(dropped)

    async def _settle_piece(
        self, offset: int, count: int, generation: int, punch: Callable[[int, int], Awaitable[None]] | None
    ) -> None:
        """Lower the counts of clusters that one block counts. Counts that contradict stay: that is reported once."""
        try:
            if self._image.holds_metadata(offset, count):
                raise CorruptImageError("a mapping of guest data let go of clusters with metadata", offset=offset)
            if punch is not None:
                for start, length in await self._last_references(offset, count):
                    await punch(start, length)
            await self._lower(offset, count)
        except CorruptImageError:
            raise
        except BaseException:
            self._dropped.append((offset, count, generation))
            raise

    async def _last_references(self, offset: int, count: int) -> list[tuple[int, int]]:
        """Runs (offset, length) of the clusters that have one reference left; ``count`` of them in one block."""
        runs: list[tuple[int, int]] = []
        size = self._geometry.cluster_size
        region, index = self._geometry.refcount_position(offset)
        async with self._lock:
            counts = (await self._block_of(region)).block.load(index, count)
        for number, references in enumerate(counts):
            place = offset + number * size
            if references != 1:
                continue
            if runs and runs[-1][0] + runs[-1][1] == place:
                runs[-1] = (runs[-1][0], runs[-1][1] + size)
            else:
                runs.append((place, size))
        return runs

    async def _lower(self, offset: int, count: int) -> None:
        """Take one reference from each of ``count`` clusters in one block."""
        region, index = self._geometry.refcount_position(offset)
        async with self._lock:
            table = await self._block_of(region)
            table.block.add(index, count, -1)
            table.touch_counters(index, count)
            self._next = min(self._next, region * self._geometry.refcount_block_entries + index)

    async def _block_of(self, region: int) -> BlockTable:
        """The block of clusters that are in use. Raises ``CorruptImageError`` if nothing counts them."""
        if region >= len(self.table.words) or not self.table.words[region]:
            raise CorruptImageError(f"clusters are in use that no refcount block counts (table entry {region})")
        return await self._block(region)
