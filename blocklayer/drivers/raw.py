"""The raw format: the bytes of its child "file" as they are, or a slice of them.

Options: ``offset`` and ``size`` cut out a slice; without both the node grows with its file. ``probed`` says that the
format was guessed from content: then writes that would make the head look like another format are refused, because
whoever guesses next would believe them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blocklayer.base.errors import OptionError, ReadOnlyError, UnsupportedError
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.options import Options, build
from blocklayer.base.units import SECTOR
from blocklayer.graph.driver import Driver

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from blocklayer.base.errors import BlockError
    from blocklayer.base.extents import Extent
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import CreateContext, Opener


@dataclass(frozen=True, slots=True)
class RawOptions:
    """Bytes; ``size`` None reaches to the end of the file."""

    offset: int = 0
    size: int | None = None
    probed: bool = False


@dataclass(frozen=True, slots=True)
class RawCreateOptions:
    """Options of a new image."""

    size: int
    preallocation: Preallocation = Preallocation.OFF


class RawDriver(Driver):
    """Adds ``offset`` to every request."""

    name = "raw"
    is_format = True
    suffixes = (".raw",)
    handles_fua = True

    def __init__(self, file: Child, options: RawOptions, probe: Callable[[bytes], str] | None) -> None:
        """Made by ``open``; ``probe`` names the format that some bytes look like."""
        self._file = file
        self._offset = options.offset
        self._size = options.size
        self._probe = probe
        self._head = asyncio.Lock()
        """Held from looking at the first sector until it is written: two writes may each be harmless alone."""
        self._whole = options.offset == 0 and options.size is None
        self.growable = self._whole and file.node.driver.growable
        self.limits = file.node.driver.limits
        if self._whole:
            self.try_read_into = file.node.path.try_read_into  # type: ignore[method-assign]  # one call less

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """See ``RawOptions``; raises ``OptionError`` if the slice sticks out of the file."""
        wanted = build(RawOptions, options)
        file = await opener.child("file")
        alignment = file.node.driver.limits.request_alignment
        if wanted.offset > file.size or (wanted.size or 0) > file.size - wanted.offset:
            raise OptionError(f"offset {wanted.offset} and size {wanted.size} stick out of {file.size} bytes")
        if wanted.offset % alignment or (wanted.size or 0) % alignment:
            raise OptionError(f"offset and size must be multiples of {alignment} here")
        return cls(file, wanted, opener.graph.probe_head if wanted.probed else None)

    @property
    def size(self) -> int:
        """Bytes of the slice."""
        return self._file.node.driver.size - self._offset if self._size is None else self._size

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Read at once from the file, if it can."""
        return self._file.try_read_into(self._offset + offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read from the file."""
        await self._file.read_into(self._offset + offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Write to the file."""
        if self._probe is None or offset >= SECTOR:
            await self._file.write(self._offset + offset, data, flags)
            return
        async with self._head:
            await self._check_head(offset, data)
            await self._file.write(self._offset + offset, data, flags)

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a write to the file."""
        if self._probe is not None and offset < SECTOR:
            return False
        return self._file.start_write(self._offset + offset, data, done)

    async def _check_head(self, offset: int, data: memoryview) -> None:
        """Refuse to make the first sector look like another format."""
        head = bytearray(SECTOR)
        await self._file.read_into(self._offset, memoryview(head))
        head[offset : offset + len(data)] = data[: SECTOR - offset]
        if self._probe is not None and (seems := self._probe(bytes(head))) != self.name:
            message = f"the format was guessed to be raw, and this write would make it look like {seems}"
            raise ReadOnlyError(message + "; open it with format='raw'", offset=offset, length=len(data))

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero in the file."""
        await self._file.write_zeroes(self._offset + offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """Discard in the file."""
        await self._file.discard(self._offset + offset, length)

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """The file's, moved by ``offset``."""
        status = self._file.node.driver.try_block_status(self._offset + offset, length)
        return None if status is None else replace(status, offset=offset)

    async def block_status(self, offset: int, length: int) -> Extent:
        """The file's, moved by ``offset``."""
        return replace(await self._file.block_status(self._offset + offset, length), offset=offset)

    async def allocated_size(self) -> int | None:
        """The file's, if this is all of it."""
        whole = self._offset == 0 and self._size is None
        return await self._file.node.driver.allocated_size() if whole else None

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Resize the file; a slice of fixed size cannot be resized."""
        if self._size is not None:
            raise UnsupportedError("a raw node with a fixed size cannot be resized")
        await self._file.truncate(self._offset + size, preallocation)

    async def copy_range_to(self, target: Driver, source_offset: int, target_offset: int, length: int) -> bool:
        """Let the storage copy, if both lie on such."""
        if isinstance(target, RawDriver):
            if target._probe is not None and target_offset < SECTOR:  # noqa: SLF001 - same class
                return False  # what is written there has to be looked at
            target_offset += target._offset  # noqa: SLF001 - same class
            target = target._file.node.driver  # noqa: SLF001 - as above
        return await self._file.node.driver.copy_range_to(target, self._offset + source_offset, target_offset, length)

    @property
    def zero_init(self) -> bool:
        """As the file."""
        return self._file.node.driver.zero_init

    @classmethod
    async def create(cls, options: Options, context: CreateContext) -> None:
        """Options: ``size``; ``preallocation`` off, falloc or full."""
        wanted = build(RawCreateOptions, options)
        if wanted.preallocation is Preallocation.METADATA:
            raise OptionError("raw has no metadata: preallocation can be off, falloc or full")
        file = await context.create_file(context.filename)
        await file.truncate(wanted.size, wanted.preallocation)
