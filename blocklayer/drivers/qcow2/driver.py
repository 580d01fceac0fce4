"""qcow2: the mapping side of the driver. Reading and writing by mappings is ``FormatDriver``'s.

    try_map, load_map   L1 and L2 entries -> Mapping
    allocate            host clusters for a write, published by ``ClusterAllocation``
    zero_range, discard_range, write_compressed, truncate
    flush, close        ordered write-back (``image_file``), then what was freed comes back (``allocator``)

Specification: docs/interop/qcow2 of QEMU. Sections are named where bits are touched.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from blocklayer.base.errors import CorruptImageError, OptionError, ReadOnlyError, StateError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.ranges import align_down
from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    Run,
    mapping_run,
)
from blocklayer.codec.qcow2.entries import Mapping as Kind
from blocklayer.codec.qcow2.features import Incompatible
from blocklayer.codec.qcow2.header import is_qcow2
from blocklayer.drivers.qcow2 import changes, resize
from blocklayer.drivers.qcow2.allocator import Allocator
from blocklayer.drivers.qcow2.compressed import CompressedClusters
from blocklayer.drivers.qcow2.create import create_image
from blocklayer.drivers.qcow2.facts import facts, read_snapshots
from blocklayer.drivers.qcow2.holes import has_unwritten_clusters
from blocklayer.drivers.qcow2.image_file import Judged
from blocklayer.drivers.qcow2.l2_tables import L2Tables
from blocklayer.drivers.qcow2.opening import OpenedImage, open_image
from blocklayer.drivers.qcow2.repair import check_image, repair_image
from blocklayer.graph.format_driver import FormatDriver, MapKind, Mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Mapping as MappingType
    from typing import Self

    from blocklayer.base.options import Options
    from blocklayer.codec.qcow2.check_result import CheckResult
    from blocklayer.codec.qcow2.snapshots import Snapshot
    from blocklayer.drivers.qcow2.changes import ClusterAllocation
    from blocklayer.drivers.qcow2.dirty import WordTable
    from blocklayer.graph.opener import CreateContext, Opener

_NOT_PLAIN: Final = COMPRESSED | ZERO | L2_RESERVED

_KINDS: Final = {
    Kind.UNALLOCATED: MapKind.BACKING,
    Kind.UNALLOCATED_HOST: MapKind.BACKING,
    Kind.DATA: MapKind.DATA,
    Kind.ZERO: MapKind.ZERO,
    Kind.ZERO_HOST: MapKind.ZERO,
    Kind.COMPRESSED: MapKind.SPECIAL,
}


class Qcow2Driver(FormatDriver):
    """One open qcow2 image."""

    name: ClassVar[str] = "qcow2"
    suffixes: ClassVar[tuple[str, ...]] = (".qcow2",)
    zero_init = True

    def __init__(self, opened: OpenedImage) -> None:
        """Made by ``open``."""
        self.image = opened.image
        self.geometry = geometry = opened.image.geometry
        super().__init__(backing=opened.backing, unit=geometry.cluster_size, zero_unit=geometry.subcluster_size)
        self.l2 = L2Tables(self.image, cache_bytes=opened.options.l2_cache_size)
        self.compressed = CompressedClusters(self.image, opened.engine)
        self.allocator = Allocator(self.image, self.grace, cache_bytes=opened.options.refcount_cache_size)
        self.lazy = opened.lazy
        self.pass_discard = opened.options.pass_discard_request
        self._size = self.image.header.size
        self._writable = opened.writable
        self._marked_dirty = self.image.header.is_dirty
        self._marking = asyncio.Lock()
        """Held while the dirty bit is set: no write may go on before it is durable."""
        self.image.sources = self._tables
        self.judged = Judged(self.image)
        # What try_map needs, without a detour over other objects
        self._data = self.image.data
        self._cached = self.l2.cached
        self._l1_shift = geometry.l1_shift
        self._cluster_bits = geometry.cluster_bits
        self._l2_mask = geometry.l2_mask
        self._cluster_mask = geometry.cluster_mask
        self._extended = geometry.extended_l2
        self._sparse: bool | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """Open header, children and tables. Raises ``FormatError`` kinds, ``CorruptImageError`` and what the gate raises."""
        driver = cls(await open_image(options, opener))
        await driver.l2.load()
        if driver._writable:
            await driver.allocator.load()
            driver.l2.allocator = driver.allocator
            driver.image.watch_metadata(driver.l2.l1.words, driver.allocator.table.words)
        return driver

    @classmethod
    async def create(cls, options: Options, context: CreateContext) -> None:
        """Make a new image; see ``codec.qcow2.create.CreateOptions``."""
        await create_image(options, context)

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """The magic and a version from 2 on."""
        return is_qcow2(head)

    @property
    def size(self) -> int:
        """Bytes of the guest's disk."""
        return self._size

    @property
    def backing_reference(self) -> str | None:
        """The backing file's name in the header."""
        return self.image.header.backing_file

    @property
    def backing_format(self) -> str | None:
        """The format that the header records for it."""
        return self.image.header.backing_format

    @property
    def can_compress(self) -> bool:
        """Not into an external data file."""
        return not self.geometry.data_file

    async def info(self) -> MappingType[str, object]:
        """The format-specific part of ``qemu-img info --output=json``."""
        return await facts(self.image)

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, oldest first. Raises ``FormatError`` and ``LimitError``."""
        return await read_snapshots(self.image)

    async def prepare_write(self) -> None:
        """Refuse on a corrupt image; with lazy refcounts set the dirty bit before the first change."""
        self.image.check_usable()
        if not self._writable:
            raise ReadOnlyError("the image was opened read-only, or for repairing")
        if self.lazy and not self._marked_dirty:
            async with self._marking:
                if not self._marked_dirty:
                    await self.image.write_header_now(incompatible=self.image.header.incompatible | Incompatible.DIRTY)
                    self._marked_dirty = True

    def is_prepared(self) -> bool:
        """See ``FormatDriver.is_prepared``."""
        return self._writable and self.image.failed_mapping is None and (self._marked_dirty or not self.lazy)

    async def flush(self) -> None:
        """Ordered write-back; with lazy refcounts these stay in memory."""
        await self._flush(with_refcounts=not self.lazy)

    async def _flush(self, *, with_refcounts: bool) -> None:
        if not self._writable:
            return
        await self._settle()
        freed = self.allocator.take_freed()
        try:
            await self.image.flush(with_refcounts=with_refcounts)
        except BaseException:
            self.allocator.return_freed(freed, durable=False)
            raise
        self.allocator.return_freed(freed, durable=True)

    async def _settle(self) -> None:
        """Free what was dropped durably; give its space back to the file."""
        async with self.judged:
            await self.allocator.settle(partial(changes.punch, self.image.file) if self.pass_discard else None)

    async def close(self) -> None:
        """Write everything back, and clear the dirty bit."""
        if not self._writable or self.image.failed_mapping is not None:
            return
        await self._flush(with_refcounts=True)
        if self.allocator.has_dropped:
            await self._flush(with_refcounts=True)
        if self.image.header.is_dirty:
            await self.image.write_header_now(incompatible=self.image.header.incompatible & ~Incompatible.DIRTY)

    def _tables(self) -> Iterator[WordTable]:
        yield from self.l2.tables()
        yield from self.allocator.tables()

    # -- mapping -------------------------------------------------------------------------------------------------

    def try_map(self, offset: int, length: int) -> Mapping | None:
        """See ``FormatDriver.try_map``. The case of one plain cluster comes first: it is nearly every request's."""
        table = self._cached.get(offset >> self._l1_shift)
        if table is None:
            return self._map_without_table(offset, length)
        inside = offset & self._cluster_mask
        if not self._extended and inside + length <= self._cluster_mask + 1:
            entry = table.words[offset >> self._cluster_bits & self._l2_mask]
            if not entry:
                return Mapping(MapKind.BACKING, length)
            host = entry & OFFSET_MASK
            if not entry & _NOT_PLAIN and host and not host & self._cluster_mask:
                return Mapping(MapKind.DATA, length, self._data, host + inside, entry >= COPIED)
        try:
            return self._mapping(self.run(table, offset, length), offset)
        except CorruptImageError:
            return None  # load_map meets it again, and reports it

    def run(self, table: WordTable, offset: int, length: int) -> Run:
        """The run of L2 entries at guest ``offset``, ending with the table."""
        inside = offset & (self.geometry.l2_coverage - 1)
        return mapping_run(self.geometry, table.words, inside, min(length, self.geometry.l2_coverage - inside))

    def _mapping(self, run: Run, offset: int) -> Mapping:
        kind = _KINDS[run.mapping]
        if kind is MapKind.DATA:
            return Mapping(kind, run.length, self._data, run.host_offset, run.copied)
        if kind is MapKind.SPECIAL:
            return Mapping(kind, run.length, detail=(run.host_offset, run.compressed_length, offset))
        if run.mapping is Kind.ZERO_HOST:
            return Mapping(kind, run.length, self._data, run.host_offset)
        return Mapping(kind, run.length)

    def _map_without_table(self, offset: int, length: int) -> Mapping | None:
        """Unallocated as far as L1 has no tables; None if it has one here."""
        index, words = offset >> self._l1_shift, self.l2.l1.words
        if index >= len(words):
            return Mapping(MapKind.BACKING, length)
        if words[index]:
            return None
        end = offset + length
        while index < len(words) and not words[index] and index << self._l1_shift < end:
            index += 1
        return Mapping(MapKind.BACKING, min(end, index << self._l1_shift if index < len(words) else end) - offset)

    async def load_map(self, offset: int, length: int) -> Mapping:
        """See ``FormatDriver.load_map``. What cannot be true marks the image corrupt."""
        async with self.judged:
            table = await self.l2.table(offset >> self._l1_shift)
            if table is not None:
                return self._mapping(self.run(table, offset, length), offset)
        coverage = self.geometry.l2_coverage
        return Mapping(MapKind.BACKING, min(length, coverage - offset % coverage))

    async def read_special(self, mapping: Mapping, offset: int, buffer: memoryview) -> None:
        """Copy out of a decompressed cluster."""
        if not isinstance(mapping.detail, tuple):
            raise CorruptImageError("a compressed mapping has no place", offset=offset)
        host_offset, length, _ = mapping.detail
        cluster = await self.compressed.read(host_offset, length)
        inside = offset & self._cluster_mask
        buffer[:] = cluster[inside : inside + len(buffer)]

    # -- status --------------------------------------------------------------------------------------------------

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """See ``FormatDriver``; what may lie in a hole of the file takes a look there."""
        extent = super().try_block_status(offset, length)
        if extent is not None and self._sparse is not False and extent.kind is ExtentKind.DATA:
            return None
        return extent

    async def block_status(self, offset: int, length: int) -> Extent:
        """See ``FormatDriver``. In a sparse file data that were never written are known to be zeroes."""
        extent = await super().block_status(offset, length)
        if extent.host_offset is None or extent.kind is not ExtentKind.DATA or not await self._is_sparse():
            return extent
        inside = self._data.size - extent.host_offset
        if inside <= 0:
            return replace(extent, kind=ExtentKind.ZERO, unwritten=True)
        stored = await self._data.block_status(extent.host_offset, min(inside, extent.length))
        extent = extent.clipped(offset, stored.length)
        return replace(extent, kind=ExtentKind.ZERO, unwritten=True) if stored.is_zero else extent

    async def _is_sparse(self) -> bool:
        """Whether the file has many holes, as with preallocation=metadata. Found out once: asking for each run costs."""
        if self._sparse is None:
            self._sparse = await has_unwritten_clusters(self.image)
        return self._sparse

    # -- changes -------------------------------------------------------------------------------------------------

    async def allocate(self, offset: int, length: int) -> ClusterAllocation:
        """See ``FormatDriver.allocate``."""
        async with self.judged:
            one = changes.try_allocate_one(self, offset, length)
            return one if one is not None else await changes.allocate(self, offset, length)

    async def zero_range(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """See ``FormatDriver.zero_range``."""
        async with self.judged:
            return await changes.zero_range(self, offset, length, may_unmap=may_unmap)

    async def discard_range(self, offset: int, length: int) -> None:
        """See ``FormatDriver.discard_range``."""
        async with self.judged:
            await changes.discard_range(self, offset, length)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Store one cluster compressed, or plain if that is not smaller."""
        at_end = offset + len(data) == self._size
        if offset & self._cluster_mask or not (len(data) == self.unit or (at_end and len(data) < self.unit)):
            raise OptionError(
                f"compressed writes take one cluster of {self.unit} bytes", offset=offset, length=len(data)
            )
        await self.prepare_write()
        packed = None if self.geometry.data_file else await self.compressed.compress(data)
        if packed is None:
            await self.write(offset, data, WriteFlags.NONE)
            return
        async with self._locks.hold(align_down(offset, self.unit), self.unit), self.judged:
            await changes.store_compressed(self, offset, packed)

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Grow or shrink the guest's disk; what is new reads as zeroes."""
        await self.prepare_write()
        await resize.resize(self, size, preallocation)

    def set_size(self, size: int) -> None:
        """The header has the new size."""
        self._size = size

    async def check(self) -> CheckResult:
        """Count references and compare with the refcounts; flushes first. See ``codec.qcow2.check``."""
        await self._flush(with_refcounts=True)
        return await check_image(self.image)

    async def repair(self, result: CheckResult, *, leaks_only: bool = False) -> tuple[int, int]:
        """Repair what ``check`` has just found, on a node opened with ``repairing=True``; see ``repair_image``.

        Cancelled, it may be repeated. Raises ``StateError`` on other nodes, whose cached tables would be outdated.
        """
        if self._writable or not self.image.writable:
            raise StateError("only a node that was opened with repairing=True and not read-only can be repaired")
        return await repair_image(self.image, result, leaks_only=leaks_only)
