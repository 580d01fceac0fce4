"""The one copy engine: moves clusters from a source edge to a target edge, each of them once.

The job's loop and the before-write notifier use the same engine; they differ only in who waits. Data pass through
pooled 1 MiB buffers; clusters of zeroes become write_zeroes, or nothing where the target is known to read as zeroes;
with ``compress`` each cluster of the target is written compressed. Between two files the storage itself may copy
(``copy_range``), until it fails for the first time.

Invariants
- A claim is settled exactly once, however its copy ends; it counts as copied only if all of it is on the target.
- Failures are values (``Failure``), because they are decisions to take; exceptions are cancellations and bugs.
- If the source lies in the target's backing chain, copies are SERIALISING: a reader of the target never sees new data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocklayer.base.buffers import is_zero
from blocklayer.base.errors import BlockError
from blocklayer.base.modes import WriteFlags
from blocklayer.base.ranges import split
from blocklayer.jobs.buffers import BUFFER_LENGTH, BufferPool
from blocklayer.jobs.survey import Content

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklayer.bitmap.copy_bitmap import CopyBitmap
    from blocklayer.graph.child import Child
    from blocklayer.jobs.claims import Claim, Claims
    from blocklayer.jobs.survey import Survey


@dataclass(frozen=True, slots=True)
class Failure:
    """A copy did not work: reading from the source or writing to the target."""

    error: BlockError
    reading: bool
    offset: int

    @property
    def operation(self) -> str:
        """The word for it in events."""
        return "read" if self.reading else "write"


@dataclass(frozen=True, slots=True)
class CopyMode:
    """How to copy. In bytes: the job's ``cluster``, the target's ``target_cluster``, the longest copy ``chunk``."""

    cluster: int
    target_cluster: int
    chunk: int
    compress: bool = False
    target_is_zero: bool = False
    serialising: bool = False
    copy_range_chunk: int = 0
    """Longest request to the storage's own copying; 0: do not use it."""


@dataclass(slots=True)
class CopyCounters:
    """Bytes: copied in background, copied before guests' writes, found to be zeroes, skipped."""

    background: int = 0
    before_write: int = 0
    zero: int = 0
    skipped: int = 0


class BlockCopy:
    """Copies clusters of ``source`` that ``bitmap`` asks for; ``done`` and ``dropped`` are told the bytes."""

    def __init__(
        self,
        source: Child,
        target: Child,
        mode: CopyMode,
        *,
        bitmap: CopyBitmap,
        claims: Claims,
        survey: Survey,
        done: Callable[[int], None],
        dropped: Callable[[int], None],
    ) -> None:
        """Wire the parts; nothing is copied yet."""
        self.source = source
        self.target = target
        self.bitmap = bitmap
        self.claims = claims
        self.survey = survey
        self.mode = mode
        self.counters = CopyCounters()
        self.size = source.size
        self._done = done
        self._dropped = dropped
        self._pool = BufferPool()
        self._copy_range = mode.copy_range_chunk > 0 and not (mode.serialising or mode.compress)
        self._used_copy_range = False
        self._flags = WriteFlags.SERIALISING if mode.serialising else WriteFlags.NONE
        self._zero_flags = self._flags | WriteFlags.MAY_UNMAP
        self._chunk_clusters = max(1, mode.chunk // mode.cluster)

    # -- units -------------------------------------------------------------------------------------------------

    def clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters that ``[offset, offset + length)`` touches, half-open."""
        cluster = self.mode.cluster
        return offset // cluster, -(-(offset + length) // cluster)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Offset and length in bytes of clusters ``[first, last)``; the disk's last one may be short."""
        offset = first * self.mode.cluster
        return offset, min(last * self.mode.cluster, self.size) - offset

    # -- claiming ----------------------------------------------------------------------------------------------

    def needs(self, first: int, last: int) -> bool:
        """Whether a write to ``[first, last)`` has to wait for anything."""
        return self.bitmap.first_set(first, last) >= 0 or self.claims.overlapping(first, last) is not None

    def is_large(self, first: int, last: int) -> bool:
        """Whether ``[first, last)`` is more than one copy."""
        return last - first > self._chunk_clusters

    def claim(self, first: int, last: int, *, background: bool, content: Content = Content.DATA) -> Claim | None:
        """Claim the next run of at most a chunk; zeroes need no buffers, so their chunks are longer."""
        length_max = self._chunk_clusters
        if content is Content.ZERO:
            length_max = max(length_max, self.target.node.driver.limits.zeroes_max // self.mode.cluster)
        elif self._copy_range and background:
            length_max = max(length_max, self.mode.copy_range_chunk // self.mode.cluster)
        return self.claims.take(first, last, length_max=length_max, background=background)

    def settle_without_copy(self, first: int, last: int, content: Content) -> bool:
        """Settle ``[first, last)`` if nothing has to be written for it; answers whether that was so."""
        if content is Content.SKIP:
            length = self._clear(first, last)
            self.counters.skipped += length
            self._dropped(length)
            return True
        if content is Content.ZERO and self.mode.target_is_zero:
            length = self._clear(first, last)
            self.counters.zero += length
            self._done(length)
            return True
        return False

    def _clear(self, first: int, last: int) -> int:
        """Clear the bits of ``[first, last)``; answers the bytes that they stood for."""
        tail = 0
        if last == self.bitmap.clusters and last > first and self.bitmap[last - 1]:
            tail = self.bitmap.clusters * self.mode.cluster - self.size
        return self.bitmap.clear(first, last) * self.mode.cluster - tail

    # -- copying -----------------------------------------------------------------------------------------------

    async def perform(self, claim: Claim, content: Content) -> Failure | None:
        """Copy a claim whose content is known, and settle it. If cancelled, its clusters are asked for again."""
        copied = False
        try:
            offset, length = self.span(claim.first, claim.last)
            failure = await self._move(offset, length, content, background=claim.background)
            copied = failure is None
        finally:
            self.claims.settle(claim, copied=copied)
        if copied:
            self._done(length)
        return failure

    async def perform_surveyed(self, claim: Claim) -> Failure | None:
        """Copy a claim after asking for its content, run by run, and settle it."""
        copied, failure = False, None
        skipped = 0
        try:
            offset, length = self.span(claim.first, claim.last)
            at, end = offset, offset + length
            while at < end and failure is None:
                run = await self.survey.run_at(at, end)
                if run.content is Content.SKIP:
                    skipped += run.end - at
                else:
                    failure = await self._move(at, run.end - at, run.content, background=claim.background)
                at = run.end
            copied = failure is None
        except BlockError as error:
            failure = Failure(error, reading=True, offset=claim.first * self.mode.cluster)
        finally:
            self.claims.settle(claim, copied=copied)
        if copied:
            self.counters.skipped += skipped
            self._dropped(skipped)
            self._done(length - skipped)
        return failure

    async def _move(self, offset: int, length: int, content: Content, *, background: bool) -> Failure | None:
        if content is Content.ZERO:
            return await self._write_zeroes(offset, length)
        if self._copy_range and background and await self._offload(offset, length):
            self.counters.background += length
            return None
        if length <= BUFFER_LENGTH:
            return await self._move_piece(offset, length, background=background)
        for piece in split(offset, length, length_max=BUFFER_LENGTH):
            failure = await self._move_piece(piece.offset, piece.length, background=background)
            if failure is not None:
                return failure
        return None

    async def _move_piece(self, offset: int, length: int, *, background: bool) -> Failure | None:
        buffer = await self._pool.take()
        reading = True
        try:
            data = buffer[:length]
            await self.source.read_into(offset, data)
            reading = False
            zeroes = await self._store(offset, data)
        except BlockError as error:
            return Failure(error, reading=reading, offset=offset)
        finally:
            self._pool.give(buffer)
        self.counters.zero += zeroes
        if background:
            self.counters.background += length - zeroes
        else:
            self.counters.before_write += length - zeroes
        return None

    async def _store(self, offset: int, data: memoryview) -> int:
        """Write clusters that hold something as data and the others as zeroes; answers how many bytes these are."""
        cluster, length = self.mode.cluster, len(data)
        if length <= cluster and not self.mode.compress and not is_zero(data):
            await self.target.write(offset, data, self._flags)
            return 0
        start = zeroes = 0
        while start < length:
            zero = is_zero(data[start : start + cluster])
            end = min(start + cluster, length)
            while end < length and is_zero(data[end : end + cluster]) == zero:
                end = min(end + cluster, length)
            if not zero:
                await self._store_data(offset + start, data[start:end])
            else:
                zeroes += end - start
                if not self.mode.target_is_zero:
                    await self.target.write_zeroes(offset + start, end - start, self._zero_flags)
            start = end
        return zeroes

    async def _store_data(self, offset: int, data: memoryview) -> None:
        if not self.mode.compress:
            await self.target.write(offset, data, self._flags)
            return
        for piece in split(offset, len(data), length_max=self.mode.target_cluster):
            start = piece.offset - offset
            await self.target.write_compressed(piece.offset, data[start : start + piece.length], self._flags)

    async def _write_zeroes(self, offset: int, length: int) -> Failure | None:
        try:
            if not self.mode.target_is_zero:
                await self.target.write_zeroes(offset, length, self._zero_flags)
        except BlockError as error:
            return Failure(error, reading=False, offset=offset)
        self.counters.zero += length
        return None

    # -- copying inside the storage ----------------------------------------------------------------------------

    async def _offload(self, offset: int, length: int) -> bool:
        """Let the storage copy; False, for this and all later chunks, at the first sign that it cannot."""
        source, target = self.source.node, self.target.node
        if target.path.hooks or not self._copy_range:
            return False
        self._used_copy_range = True
        try:
            for piece in split(offset, length, length_max=self.mode.copy_range_chunk):
                if not await source.driver.copy_range_to(target.driver, piece.offset, piece.offset, piece.length):
                    self._copy_range = False
                    return False
        except BlockError:
            self._copy_range = False
            return False
        return True

    async def flush(self) -> None:
        """Make everything that was copied durable."""
        await self.target.flush()
        if self._used_copy_range:
            await self.target.node.driver.flush()
