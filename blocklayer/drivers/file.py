"""A file or block device of the host: the bottom of most chains.

Options: ``filename``; ``locking`` ("auto", "on", "off"): image locks that QEMU honours; ``share_rw``: let other processes
write too; ``create``: make the file if it is not there (whoever creates an image empties it once its lock is held).

Cache mode, read-only and force-share are node options. Locks follow what the users of the node need and share
(``permissions_changed``); a writable file is never shared with other writing processes unless ``share_rw`` says so.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blocklayer.aio.file import File
from blocklayer.base.errors import AccessDeniedError, UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import TRANSFER_MAX, BlockLimits
from blocklayer.base.modes import Permission, Preallocation, WriteFlags
from blocklayer.base.options import Options, build
from blocklayer.graph.driver import Driver

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from blocklayer.base.errors import BlockError
    from blocklayer.graph.opener import Opener

_NO_FLAGS = WriteFlags.NONE
_WRITERS = Permission.WRITE | Permission.RESIZE


class Locking(enum.Enum):
    """``auto`` locks where the file system can, ``on`` insists, ``off`` does not."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class FileOptions:
    """See the module's text."""

    filename: str
    locking: Locking = Locking.AUTO
    share_rw: bool = False
    create: bool = False


class FileDriver(Driver):
    """Passes requests to an ``aio.File``."""

    name = "file"
    handles_fua = True

    def __init__(self, file: File, node_name: str, options: FileOptions, *, force_share: bool) -> None:
        """Made by ``open``."""
        self._file = file
        self._node_name = node_name
        self._options = options
        self._locks = options.locking is not Locking.OFF and not force_share
        self.growable = not file.is_device
        self.try_read_into = file.try_read_into  # type: ignore[method-assign]  # one call less on the hottest path
        alignment = file.request_alignment
        self.limits = BlockLimits(alignment, file.memory_alignment, TRANSFER_MAX)

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """Open the file; falls back to read-only if the node may (``auto-read-only``)."""
        wanted = build(FileOptions, options)
        node = opener.options
        try:
            file = await File.open(
                opener.engine, wanted.filename, read_only=node.read_only, cache=node.cache, create=wanted.create
            )
        except AccessDeniedError:
            if node.read_only or not node.auto_read_only:
                raise
            file = await File.open(opener.engine, wanted.filename, read_only=True, cache=node.cache)
            opener.options = replace(node, read_only=True)
        if wanted.locking is Locking.ON and file.lock is None:
            await file.close()
            raise UnsupportedError("its file system has no locks; use locking=auto or off", filename=wanted.filename)
        return cls(file, opener.node_name, wanted, force_share=node.force_share)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    def permissions_changed(self, needed: Permission, shared: Permission) -> None:
        """Adapt the image locks, or raise ``LockedError``."""
        if not self._locks:
            return
        if self._options.share_rw:
            shared |= _WRITERS
        elif not self._file.read_only:
            shared &= ~_WRITERS
        self._file.change_lock(needed, shared)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read."""
        await self._file.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Write, extending the file if need be."""
        await self._file.write(offset, data, durable=flags is not _NO_FLAGS and WriteFlags.FUA in flags)

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a write in the page cache's file."""
        return self._file.start_write(offset, data, done)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero by hole, by reserved zeroes, or by writing."""
        await self._file.write_zeroes(
            offset,
            length,
            may_unmap=WriteFlags.MAY_UNMAP in flags,
            fallback=WriteFlags.NO_FALLBACK not in flags,
            durable=WriteFlags.FUA in flags,
        )

    async def discard(self, offset: int, length: int) -> None:
        """Punch a hole, where the file system can."""
        await self._file.discard(offset, length)

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """The run that was found last."""
        run = self._file.try_block_status(offset, length)
        return None if run is None else self._extent(offset, *run)

    async def block_status(self, offset: int, length: int) -> Extent:
        """Data and holes as SEEK_DATA and SEEK_HOLE tell them."""
        return self._extent(offset, *await self._file.block_status(offset, length))

    def _extent(self, offset: int, is_data: bool, length: int) -> Extent:  # noqa: FBT001 - unpacked from a pair
        kind = ExtentKind.DATA if is_data else ExtentKind.ZERO
        return Extent(offset, length, kind, host_offset=offset, host_node=self._node_name)

    async def allocated_size(self) -> int | None:
        """Blocks of the file that are not holes; of a device nobody can tell."""
        return await self._file.allocated_size()

    async def flush(self) -> None:
        """``fdatasync``."""
        await self._file.flush()

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Change the size of the file."""
        await self._file.truncate(size, preallocation)

    async def copy_range_to(self, target: Driver, source_offset: int, target_offset: int, length: int) -> bool:
        """Let the kernel copy, if the target is a file too."""
        if not isinstance(target, FileDriver):
            return False
        return await self._file.copy_range_to(target._file, source_offset, target_offset, length)  # noqa: SLF001 - of the same class

    async def close(self) -> None:
        """Close the file; its locks go with it."""
        await self._file.close()

    @property
    def zero_init(self) -> bool:
        """A new file reads as zeroes; a device holds what it held."""
        return not self._file.is_device
