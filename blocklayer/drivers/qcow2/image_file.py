"""The image file as the other parts of the driver see it: header, file child, L1, and the way of dirty tables to disk.

``flush`` takes all changes at one moment, lets the pure planner order them into epochs, and writes these with a flush of
the file between them. Because the moment is one step of the event loop, what it takes is consistent: a mapping that was
published before it brings its refcount along. Changes made while it writes wait for the next flush.

    _header_dirty, l1, refcount_table, refcount blocks, l2 tables --take--> Step... --plan_flush--> epochs --> file

After an error the epochs that were not completed are marked dirty again; completed ones stay done.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from blocklayer.base.errors import CorruptImageError, IOFailedError
from blocklayer.base.modes import Permission
from blocklayer.codec.qcow2.features import Incompatible
from blocklayer.codec.qcow2.header import Header, serialize
from blocklayer.codec.qcow2.plan import Epoch, Role, Step, plan_flush
from blocklayer.drivers.qcow2.places import MetadataPlaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from blocklayer.drivers.qcow2.dirty import WordTable
    from blocklayer.graph.child import Child


class ImageFile:
    """Owns ``header`` and the order of writes. ``sources`` yields every table that may be dirty."""

    def __init__(self, file: Child, data: Child, header: Header) -> None:
        """``data`` is the child that guest clusters lie in: ``file``, or the external data file."""
        self.file = file
        self.data = data
        self.header = header
        self.geometry = header.geometry
        self.sources: Callable[[], Iterator[WordTable]] = lambda: iter(())
        self.failed_mapping: CorruptImageError | None = None
        self.places: MetadataPlaces | None = None
        """Where metadata lie; None if no mapping can do harm (read-only, or data in a file of their own)."""
        self.claimed: frozenset[int] = frozenset()
        """Offsets that L1 gives for its tables, although something else is there."""
        self._header_dirty = False
        self._header_on_disk = header
        self._lock = asyncio.Lock()
        """Held by whoever writes the header: a flush, or ``write_header_now``."""

    @property
    def writable(self) -> bool:
        """Whether the file may be written to."""
        return Permission.WRITE in self.file.needs

    def change_header(self, **fields: object) -> None:
        """Change header fields; written by the next flush."""
        self.header = replace(self.header, **fields)  # type: ignore[arg-type]  # names are checked by replace
        self._header_dirty = True

    async def write_header_now(self, **fields: object) -> None:
        """Change header fields that nothing else depends on (feature bits), durably.

        Other changes go on waiting for their flush: what they point to may not be written yet.
        """
        async with self._lock:
            self.header = replace(self.header, **fields)  # type: ignore[arg-type]  # names are checked by replace
            on_disk = replace(self._header_on_disk, **fields)  # type: ignore[arg-type]  # as above
            await self.file.write(0, memoryview(serialize(on_disk)))
            self._header_on_disk = on_disk
            await self.file.flush()

    def watch_metadata(self, l1: Iterable[int], refcount_table: Iterable[int]) -> None:
        """Know from now on where metadata lie; the tables are those of the header."""
        if self.header.has_data_file:
            return
        header, size = self.header, self.geometry.cluster_size
        self.places = places = MetadataPlaces(size)
        places.add(header.l1_table_offset, self.geometry.clusters_for(header.l1_size * 8))
        places.add(header.refcount_table_offset, header.refcount_table_clusters)
        places.add_tables(refcount_table)
        self.claimed = places.claimed(l1)
        places.add_tables(l1)

    def note_metadata(self, offset: int, count: int = 1) -> None:
        """``count`` clusters from ``offset`` hold tables from now on."""
        if self.places is not None:
            self.places.add(offset, count)

    def forget_metadata(self, offset: int, count: int = 1) -> None:
        """They do not any more."""
        if self.places is not None:
            self.places.remove(offset, count)

    def holds_metadata(self, offset: int, count: int) -> bool:
        """Whether one of ``count`` clusters from ``offset`` is known to hold tables."""
        return self.places is not None and self.places.overlap(offset, count)

    async def mark_corrupt(self, error: CorruptImageError) -> None:
        """Metadata contradict each other: refuse writes from now on, and tell whoever opens the image next."""
        if self.failed_mapping is None:
            self.failed_mapping = error
            if self.writable and self.header.version > 2:
                with suppress(IOFailedError):  # the error that is reported is the corruption
                    await self.write_header_now(incompatible=self.header.incompatible | Incompatible.CORRUPT)

    def check_usable(self) -> None:
        """Raise ``CorruptImageError`` if writing could make things worse."""
        if self.failed_mapping is not None:
            message = f"it is marked corrupt and refuses writes ({self.failed_mapping.message}); check and repair it"
            raise CorruptImageError(message)

    # -- flush ---------------------------------------------------------------------------------------------------

    async def flush(self, *, with_refcounts: bool = True) -> None:
        """Make everything that has happened so far durable; refcounts may wait, unless the header moves to new tables."""
        async with self._lock:
            header = self.header
            taken = self._take(with_refcounts=with_refcounts or self._header_dirty)
            plan = plan_flush(step for step, _ in taken)
            owners = {owner for _, owner in taken if owner is not None}
            for owner in owners:
                owner.pins += 1
            reached = -1
            try:
                await self._flush_data(needed=bool(plan.epochs))
                for epoch in plan.epochs:
                    await self._write_epoch(epoch)
                    reached = max(step.role.epoch for step in epoch.steps)
                    if any(step.role is Role.HEADER for step in epoch.steps):
                        self._header_on_disk = header
            except BaseException:
                self._restore([(step, owner) for step, owner in taken if step.role.epoch > reached])
                raise
            finally:
                for owner in owners:
                    owner.pins -= 1

    def _take(self, *, with_refcounts: bool) -> list[tuple[Step, WordTable | None]]:
        taken: list[tuple[Step, WordTable | None]] = []
        for source in self.sources():
            if source.is_dirty and (with_refcounts or source.role is Role.MAPPING):
                taken.extend((step, source) for step in source.take())
        if self._header_dirty:
            self._header_dirty = False
            taken.append((Step(Role.HEADER, 0, serialize(self.header)), None))
        return taken

    def _restore(self, lost: list[tuple[Step, WordTable | None]]) -> None:
        for step, owner in lost:
            if owner is None:
                self._header_dirty = True
            else:
                owner.restore(step)

    async def _flush_data(self, *, needed: bool) -> None:
        """Guest data first: what a mapping will point to must be durable before it."""
        if self.data is not self.file:
            await self.data.flush()
        if needed or self.data is self.file:
            await self.file.flush()

    async def _write_epoch(self, epoch: Epoch) -> None:
        """All steps at once, then a flush; the first error is raised when none is under way any more."""
        writes = (self.file.write(step.offset, memoryview(step.data)) for step in epoch.steps)
        for outcome in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        await self.file.flush()


class Judged:
    """``async with``: metadata that turn out to contradict each other inside mark the image corrupt."""

    __slots__ = ("_image",)

    def __init__(self, image: ImageFile) -> None:
        """Holds nothing, so one serves all blocks, also at once."""
        self._image = image

    async def __aenter__(self) -> None:
        """Nothing to do."""

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Write the corrupt bit, and let the error go on."""
        if isinstance(error, CorruptImageError):
            await self._image.mark_corrupt(error)
